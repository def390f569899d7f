"""DistillTrainer: transformers' Trainer, with a frozen teacher beside the student and a method between them."""

import copy
import inspect
from functools import cached_property, partial
from pathlib import Path

import torch
from accelerate.utils import is_compiled_module
from torch import Tensor
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from fastkd import checks, interruption
from fastkd.deprecation import renamed

from . import cache, embedding, heads, packing, ranks, states
from .agreement import check_model, check_pair, teacher_labels
from .batch import LABEL_FREE_TASKS, NAMED_TASKS, UNITS, VOCABULARY_TASKS, Batch, count_units
from .checkpoints import Checkpoints, Continuation, Interruptions, not_finite
from .finite import Finite
from .learned import Learned
from .methods import Combined, Setup, Side, build
from .student import origins

EXTRA = ("example_id", "blank")
COUNTS = "units"  # of a micro-batch, a rank's average


class DistillTrainer(Checkpoints, Learned, Trainer):
    """Trainer(model=student, …) with `teacher` and `method` ("bert_emd", "fcd + kd:weight=0.5"; see fastkd.train.methods).

    The teacher is frozen and in eval mode, never wrapped, never saved. The method's learned pieces (projections, layer
    weights, banks) train with the student, are saved in every checkpoint, and never become part of the student.
    The loss of a step is the mean over all that its micro-batches hold on all ranks, tokens or whatever a term is a mean
    over, not a mean of their means. Each term is logged as term/<method>/<name> with its weight, without a look at it before
    Trainer itself logs. advance="step" moves the method's learned state once per optimizer step, "micro" once per
    micro-batch, as most papers' releases do. answers: in cloze, the token of each class. pooling: in embedding, what of the
    token states is the embedding: "mean", "cls" (the first token) or "last".
    teacher_cache: a folder, or cache.Options, for what the teacher says of each example: computed once, or found there, and
    then teacher may be None. shard_teacher: each rank keeps a part of the teacher's layers (FSDP2).
    max_skipped_steps: a step whose loss or gradient is not finite is skipped; so many of them in a row end the run.
    teacher_tokens: the teacher's id of each of the student's tokens, where their vocabularies differ
    (agreement.teacher_tokens); the data bear the student's ids.
    """

    loss_is_scaled_for_ga = True  # by Batch.of_step

    @renamed(words="teacher_tokens")
    def __init__(
        self,
        model,
        teacher,
        method: str | None = None,
        *,
        task: str = "classification",
        answers: Tensor | None = None,
        pooling: str = "mean",
        advance: str = "step",
        teacher_dtype: str = "auto",
        compile_teacher: bool = False,
        shard_teacher: bool = False,
        teacher_cache: "str | Path | cache.Options | None" = None,
        teacher_tokens: Tensor | None = None,
        max_skipped_steps: int = 10,
        **kwargs,
    ):
        if advance not in ("step", "micro"):
            raise ValueError(f"advance: expected 'step' or 'micro', got {advance!r}")
        if kwargs.get("args") is None:
            raise ValueError("args: DistillTrainer needs TrainingArguments, with an output_dir")
        if teacher is None and method is not None and not teacher_cache:
            raise ValueError(f"teacher: method={method!r} needs one, got None; leave the method out to fine-tune alone")
        checks.one_of("pooling", pooling, tuple(embedding.POOLINGS))
        if teacher is None and task == "embedding":
            raise ValueError("teacher: the task embedding has no labels to fine-tune on, so it needs one, got None")
        kwargs["args"] = copy.copy(kwargs["args"])
        kwargs["args"].logging_nan_inf_filter = False  # it looks at every loss on the host, and hides NaN
        if method is not None:
            ranks.find_unused(kwargs["args"])
        super().__init__(model=model, **kwargs)
        self.finite, self.interruptions = Finite(self, max_skipped_steps), Interruptions(self)
        for callback in (self.interruptions, self.finite, Continuation(self)):
            self.add_callback(callback)
        self.model_accepts_loss_kwargs = False
        ranks.check_sharding(self)
        self.task, self.advance, self.pooling = task, advance, pooling
        if task == "embedding":
            self.label_names = ["labels"]  # the scores of pairs; the model's own forward takes none
        self.answers = None if answers is None else answers.to(self.args.device)
        self.teacher, self.method, self.relabel, self.cache = None, None, None, None
        self.teacher_tokens = None if teacher_tokens is None else teacher_tokens.to(self.args.device)
        self._finish: dict[str, heads.Finish | None] = {"student": None, "teacher": None}
        self._loss_only, self._stop_after, self._replicated = False, None, None
        self._accepts = {"student": arguments_of(model), "teacher": arguments_of(teacher)}
        check_model("student", model, task)
        asked = cache.Options.of(teacher_cache) if teacher_cache and (teacher is not None or method) else None
        known = cache.Absent.of(asked) if asked and teacher is None else teacher
        if known is not None:
            self.method = self._method(model, known, method)
        if teacher is not None:
            if shard_teacher:
                ranks.check_sharded_teacher(self.args.world_size, compile_teacher, bool(asked))
            self.teacher = self._prepared(teacher, teacher_dtype, compile_teacher, shard_teacher)
            if not compile_teacher:
                read = self.method.attention("teacher"), self.method.levels("teacher")
                self._stop_after = states.stop_after(self.teacher, *read)
        self._take_heads_off(compile_teacher)
        self.teacher_config = None if known is None else known.config
        if asked:
            self.cache = self._opened(asked, compile_teacher)
        self._step_begins = True
        self._sums: dict[str, Tensor] = {}
        self._steps: dict[str, int] = {}
        self._weights: dict[str, float] = {}

    def _method(self, model, teacher, method: str | None) -> Combined:
        loaded = not isinstance(teacher, cache.Absent)
        if loaded:
            check_model("teacher", teacher, self.task)
        networks = {"student": model, **({"teacher": teacher} if loaded else {})}
        check_pair(model, teacher, self.task, self.teacher_tokens)
        relabel = teacher_labels(model, teacher) if self.task in NAMED_TASKS else None
        self.relabel = None if relabel is None else relabel.to(self.args.device)
        of_teacher = Side.of(teacher) if loaded else teacher.side
        group = ranks.process_group(self.args)
        begins_as = origins(model, teacher) if loaded else None
        built = build(method, Setup(Side.of(model), of_teacher, self.task, self.train_dataset, group, begins_as))
        columns = getattr(self.train_dataset, "column_names", None) or ["labels"]
        if self.task not in LABEL_FREE_TASKS and not {"label", "labels"} & set(columns):
            built.check_unlabelled()
        if packing.is_packed(self.task, columns):
            built.check_packed()
            for side, network in networks.items():
                packing.check_model(network, self._accepts[side])
        ranks.check_replicas(self, built, model)
        for side, network in networks.items():
            if built.attention(side):
                states.record_attention(network)
        built = built.to(self.args.device)
        ranks.begin_alike(built, group)
        return built

    def _prepared(self, teacher, dtype: str, compiled: bool, sharded: bool):
        if dtype == "auto":
            on_gpu = self.args.device.type == "cuda" and torch.cuda.is_bf16_supported()
            dtype = "bfloat16" if on_gpu else "float32"
        teacher = teacher.eval().requires_grad_(False).to(getattr(torch, dtype))
        teacher = ranks.shard(teacher, self.args.device) if sharded else teacher.to(self.args.device)
        if not compiled:
            return teacher
        if self.method.attention("teacher"):
            raise ValueError(
                "compile_teacher: this method reads the teacher's attention while it runs; leave it uncompiled"
            )
        return torch.compile(teacher)

    def _take_heads_off(self, compiled: bool) -> None:
        """Of both models, or of neither: what is compared is of one kind. FSDP and DeepSpeed gather a weight only within its
        module's forward, and compiled code does not see that a module's forward is another now."""
        if self.task not in VOCABULARY_TASKS:
            return
        compiled = compiled or self.args.torch_compile or is_compiled_module(self.model)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or compiled:
            heads.logger.warning("all logits are made in each step, since FSDP, DeepSpeed or torch.compile is in use")
            return
        models = {"student": self.model, **({} if self.teacher is None else {"teacher": self.teacher})}
        found = {side: heads.find(model) for side, model in models.items()}
        if None not in found.values():
            self._finish |= found

    def _opened(self, asked: cache.Options, compiled: bool) -> cache.Reader:
        teacher, args = None, self.args
        if self.teacher is not None:
            if self._finish["teacher"] is None and self.task in VOCABULARY_TASKS and not compiled:
                self._finish["teacher"] = heads.find(self.teacher)
            collate = self._get_collator_with_removed_columns(self.data_collator)
            how = args.per_device_eval_batch_size, self._finish["teacher"], self.teacher_tokens
            teacher = cache.Teacher(self.teacher, self._ask_teacher, collate, *how)
        first = partial(args.main_process_first, local=False, desc="teacher_cache")
        processes = cache.Processes(args.process_index, args.world_size, self.accelerator.wait_for_everyone, first)
        with interruption.deferred():
            return cache.opened(
                asked, self.method, self.task, self.train_dataset, self.teacher_config, tokenizer=self.processing_class,
                teacher_tokens=self.teacher_tokens, teacher=teacher, processes=processes,
            )  # fmt: skip

    def get_train_dataloader(self):
        if self.cache is None:
            return super().get_train_dataloader()
        plain, self.data_collator = self.data_collator, cache.Collator(self.data_collator, self.cache)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = plain

    def _set_signature_columns_if_needed(self):
        """The columns that are kept of the data; Trainer drops those that its own model does not take."""
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns += ["labels", *EXTRA, *self._accepts["teacher"]]

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        return ByLength(sampler, self.args.seed) if isinstance(sampler, LengthGroupedSampler) else sampler

    # -- a batch, from the data to its loss ---------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of a step, and how many of each of UNITS they hold: a rank's average, since ranks are averaged."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not samples:
            return samples, None
        if self.method is not None and self.args.world_size > 1 and self.method.one_shape():
            tokenizer, text = self.processing_class, self.model.config.get_text_config()
            pad_id = next(
                (x for x in (text.pad_token_id, getattr(tokenizer, "pad_token_id", None)) if x is not None), 0
            )
            ranks.pad_alike(samples, pad_id, getattr(tokenizer, "padding_side", "right"), self._host_group)
        counts = [count_units(self.task, real_tokens(x), x.get("labels")) for x in samples]
        counts = self.accelerator.reduce(torch.stack(counts).to(device), "mean")  # [micro-batches, UNITS]
        for x, count in zip(samples, counts, strict=True):
            x[COUNTS] = count
        return samples, counts.sum(0)

    @cached_property
    def _host_group(self):
        return ranks.of_the_host(ranks.process_group(self.args))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        labels = inputs.pop("labels", None)
        extra = {name: inputs.pop(name, None) for name in (*EXTRA, COUNTS)}
        kept = inputs.pop(cache.BATCH_KEY, None)
        training = model.training
        distils = training and self.method is not None
        progress = self.state.global_step / max(self.state.max_steps, 1) if training else 0.0
        student = self._states(model, inputs, "student", progress, distils)
        if self.model is self.teacher:  # evaluate_other
            student = self._in_students_terms(student)
        elif (
            distils
            and self.teacher_tokens is not None
            and self.task in VOCABULARY_TASKS
            and student.predictions is not None
        ):
            student = student.over(slice(len(self.teacher_tokens)))
        teacher = None
        if distils and self.method.needs_teacher(progress):
            teacher = self._teacher_states(inputs, kept, progress)
        elif self.task == "embedding":  # what the evaluation compares with
            teacher = self._states(self.teacher, inputs, "teacher", progress, False)
        batch = Batch(
            self.task, student, teacher, real_tokens(inputs), labels, extra["example_id"], self.answers, extra["blank"],
            progress, self.advance == "micro" or self.accelerator.sync_gradients, pooling=self.pooling,
        )  # fmt: skip
        if num_items_in_batch is not None and training:
            whole, own = num_items_in_batch.clamp_min(1e-9), count_units(self.task, batch.mask, labels)
            of_all = own if extra[COUNTS] is None else extra[COUNTS]
            batch.shares, batch.shares_of_all_ranks = (dict(zip(UNITS, x / whole, strict=True)) for x in (own, of_all))
        loss = self._terms(batch) if distils else batch.of_step(batch.fine_tune()["hard"])
        if training and not distils:
            self.finite.see({"hard": loss}, batch.ids)
        if not return_outputs:
            return loss
        return loss, {"loss": loss} if self._loss_only else {"loss": loss, **batch.outputs()}

    def _states(self, model, inputs, side: str, progress: float | None, reads: bool) -> states.States:
        if self.teacher_tokens is not None and (side == "teacher" or model is self.teacher):
            inputs = {**inputs, "input_ids": self.teacher_tokens[inputs["input_ids"]]}
        if packing.is_packed(self.task, inputs):
            inputs = packing.model_inputs(inputs)
        inputs = {**inputs, "use_cache": False}  # a decoder's keys and values would be kept, and are not read
        inputs = {name: x for name, x in inputs.items() if name in self._accepts[side]}
        finish = self._finish[side] if reads or model.training or self._loss_only else None
        output = "last_hidden_state" if self.task == "embedding" else "logits"
        if not reads:
            return states.read(model, inputs, finish=finish, output=output)
        levels, layers = self.method.levels(side, progress), self.method.attention(side, progress)
        predictions = self.method.predicts(side, progress)
        return states.read(
            model, inputs, hidden=levels, layers=layers, finish=finish, predictions=predictions, output=output,
            stop=self._stop_after if side == "teacher" and not predictions else None,
        )  # fmt: skip

    @torch.no_grad()  # not inference_mode: methods compute with these tensors, and autograd saves no inference tensor
    def _teacher_states(self, inputs, kept: dict[str, Tensor] | None, progress: float) -> states.States:
        if self.cache is not None:
            return self._in_students_terms(self.cache.states(kept))
        return self._in_students_terms(self._states(self.teacher, inputs, "teacher", progress, True))

    def _in_students_terms(self, teacher: states.States) -> states.States:
        """Its labels, or tokens, in the student's order."""
        order = self.teacher_tokens if self.task in VOCABULARY_TASKS else self.relabel
        if order is None or teacher.predictions is None or isinstance(teacher.predictions, heads.Sparse):
            return teacher  # the few tokens of a Sparse are the student's already
        return teacher.over(order)

    def _terms(self, batch: Batch) -> Tensor:
        self.method.train()
        loss, terms = 0.0, self.method(batch)
        values = {name: batch.of_step(term) for name, term in terms.items()}
        shown = self.finite.see(values, batch.ids)
        for name, term in terms.items():
            loss = loss + term.weight * values[name]
            self._sums[name] = self._sums.get(name, 0.0) + shown[name]
            self._steps[name] = self._steps.get(name, 0) + self.accelerator.sync_gradients
            self._weights[name] = term.weight
        return loss

    @torch.no_grad()
    def _ask_teacher(self, batch) -> states.States:
        """What the method ever reads of it."""
        inputs = {
            name: x.to(self.args.device) for name, x in batch.items() if isinstance(x, Tensor) and name != "labels"
        }
        return self._states(self.teacher, inputs, "teacher", None, True)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        self._loss_only = prediction_loss_only  # where nobody asks for logits, none are made
        if inputs.get("labels") is None and self.task == "embedding":  # else Trainer computes no loss
            inputs = {**inputs, "labels": torch.full((len(inputs["input_ids"]),), torch.nan)}
        if inputs.get("labels") is None:  # then Trainer calls the model itself
            inputs = {name: x for name, x in inputs.items() if name in self._accepts["student"]}
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._loss_only = False

    def evaluate_other(self, model, data=None) -> dict[str, float]:
        """`evaluate` of another model, the teacher for example, on the same data and in the same way; not logged."""
        own, accepts, finish = self.model, self._accepts["student"], self._finish["student"]
        self.model = self.model_wrapped = model
        if finish is not None and model is not own:
            self._finish["student"] = self._finish["teacher"] if model is self.teacher else heads.find(model)
        self._accepts["student"] = arguments_of(model)
        self.log = lambda *_, **__: None
        try:
            return self.evaluate(data)
        finally:
            del self.log
            self.model = self.model_wrapped = own
            self._accepts["student"], self._finish["student"] = accepts, finish

    def log(self, logs, start_time=None):
        if "loss" in logs:
            lost = self.finite.amend(logs)
            steps = {name: count - lost[name] for name, count in self._steps.items()}
            names = sorted(name for name, count in steps.items() if count > 0)
            means = [self._sums[name] / steps[name] for name in names]
            means = self.accelerator.reduce(torch.stack(means), "mean").tolist() if means else []
            for name, value in zip(names, means, strict=True):  # the one look, where Trainer looks too
                logs |= {f"term/{name}": value, f"weight/{name}": self._weights[name]}
            self._sums, self._steps = {}, {}
        super().log(logs, start_time)

    def _get_grad_norm(self, model, grad_norm=None):
        self.finite.norm = super()._get_grad_norm(model, grad_norm)
        return self.finite.norm

    def _save(self, output_dir=None, state_dict=None):
        """The student alone, loadable with AutoModel….from_pretrained: nothing of the teacher or the method, no pickle."""
        if not self.args.should_save:
            return
        saved = dict(self.model.named_parameters()) if state_dict is None else state_dict
        wrong = not_finite(saved | ({} if self.method is None else dict(self.method.named_parameters())))
        if wrong:
            raise RuntimeError(
                f"the weights are not finite after step {self.state.global_step} ({', '.join(wrong[:3])}), so they are not "
                "saved, and the checkpoints before are intact; lower the learning rate"
            )
        student = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        output_dir = output_dir or self.args.output_dir
        student.save_pretrained(output_dir, state_dict=state_dict)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)


class ByLength(LengthGroupedSampler):
    """transformers' own, whose order depends on the seed and the epoch alone: a resumed run sees the rows in the same one."""

    def __init__(self, sampler: LengthGroupedSampler, seed: int):
        super().__init__(sampler.batch_size, lengths=sampler.lengths, generator=torch.Generator())
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self.seed + epoch)


def real_tokens(inputs) -> Tensor:
    """[B, S], 1 where a token is real: all of them where no mask is given."""
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"]) if mask is None else mask


def arguments_of(model) -> set[str]:
    """What a model's forward takes by name: DistilBERT and decoders, for example, know no token types."""
    return set() if model is None else set(inspect.signature(model.forward).parameters)
