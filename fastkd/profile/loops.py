"""Steps that others write, within the same training run: the loop of a careful engineer who has PyTorch and transformers, what
TRL's two trainers compute, and the same loop with torchdistill's or TextBrewer's loss.

They take the place of DistillTrainer.compute_loss. Data, backward, clipping and AdamW are Trainer's for every provider, and so
is the one student with the one optimizer: its state has the same size whoever steps. Losses and gradients are ours (a test
compares them); batches of the profile have no padding.
"""

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.bench.baselines import divergence, gram
from fastkd.train.methods.distilbert import DistilBERT
from fastkd.train.methods.fcd import FCD
from fastkd.train.methods.forward_kl import ForwardKL
from fastkd.train.methods.glmd import GLMD
from fastkd.train.methods.kd import KD
from fastkd.train.states import States

BETA = {"forward_kl": 0.0, "reverse_kl": 1.0}  # in TRL; of jsd the method says it


def refusal(provider: str, trainer) -> str | None:
    """Why a step cannot be computed by this provider; None where it can."""
    name, method = next(iter(trainer.method.methods.items()))
    one = len(trainer.method.methods) == 1
    if provider == "logits" and not trainer._finish["student"]:
        return "heads are not taken off here, so that fastkd makes the logits too"
    if provider in LOOPS and trainer.compiled:
        return "a compiled model cannot be given some of its rows for the head; leave --compile out"
    if provider == "loop":
        known = one and isinstance(method, (KD, ForwardKL, GLMD, DistilBERT, FCD))
        plain = not getattr(getattr(method, "loss", None), "top_n", None)
        if isinstance(method, FCD):
            last = {side: (getattr(method.setup, side).layers,) for side in method.read}
            plain = method.read == last and "random" not in method.weights
        return None if known and plain else f"there is no loop for {' + '.join(trainer.method.methods)}"
    package = {"gkd": "trl"}.get(provider, provider)
    if provider in LOOPS and importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    if provider in ("torchdistill", "textbrewer"):
        both = one and isinstance(method, KD) and method.loss.soft and method.loss.hard
        known = both and trainer.task == "classification"
        return None if known else f"{provider} is compared in kd for classification, with hard labels"
    if provider in LOOPS:
        if not one or getattr(method, "kind", "") not in ("forward_kl", "reverse_kl", "jsd") or method.loss.hard:
            return f"TRL has no {name} with these options; it has forward_kl, reverse_kl and jsd without hard labels"
        if provider == "gkd" and method.loss.divergence["temperature"] != 1:
            return "GKDTrainer passes its loss no temperature"
    return None


def targets(task: str, labels: Tensor, mask: Tensor) -> Tensor:
    """[B, S]: what each position is asked for, -100 where nothing."""
    if task != "causal_lm":
        return labels
    return F.pad(labels[:, 1:].masked_fill(mask[:, 1:] == 0, -100), (0, 1), value=-100)


class Models:
    """Student and teacher of a step, run as a loop runs them, each in its phase."""

    def __init__(self, trainer, student, inputs: dict):
        self.trainer, self.timeline, self.student, self.teacher = trainer, trainer.timeline, student, trainer.teacher
        self.labels, self.mask = inputs["labels"], inputs["attention_mask"]
        self.inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}

    def both(self, run: Callable) -> tuple:
        """run(model, inputs, phase) of either; the teacher's without a graph."""
        found = []
        for side, model in (("teacher", self.teacher), ("student", self.student)):
            inputs = {**self.inputs, "use_cache": False} if "use_cache" in self.trainer._accepts[side] else self.inputs
            phase = f"{side} forward"
            with self.timeline.phase(phase), torch.set_grad_enabled(side == "student"):
                found.append(run(model, inputs, phase))
        return found[1], found[0]

    def bodies(self) -> tuple[Tensor, Tensor]:
        """The last hidden states [B, S, D]; no head runs."""
        student, teacher = self.both(lambda model, inputs, _: model.base_model(**inputs).last_hidden_state)
        self.trainer._watch_backward(States(student))
        return student, teacher

    def heads(self, rows: Tensor | None = None):
        """((logits, last hidden states) of the student, of the teacher). Of the rows [B, S] alone the heads make logits [n, V];
        without them the logits are all that the task has."""

        def run(model, inputs, phase):
            hidden = []

            def select(module, args, outputs):
                hidden.append(outputs.last_hidden_state)
                if rows is not None:
                    outputs.last_hidden_state = hidden[0][rows][None]
                self.timeline.switch(phase, "loss: heads")
                return outputs

            hook = model.base_model.register_forward_hook(select)
            try:
                logits = model(**inputs).logits
            finally:
                hook.remove()
            return logits if rows is None else logits[0], hidden[0]

        student, teacher = self.both(run)
        self.trainer._watch_backward(States(student[1]))
        return student, teacher


def loop(models: Models, method, task: str) -> Tensor:
    """Logits of the rows that count only, and PyTorch's own functions."""
    if isinstance(method, FCD):
        sides = models.bodies()
        with models.timeline.phase("loss: loop"):
            sides = [F.normalize(x, dim=-1) for x in sides]
            return sum(weight * gram.correlation(*sides, level).mean() for level, weight in method.weights.items())
    if task == "classification":
        (s, _), (t, _) = models.heads()
        with models.timeline.phase("loss: loop"):
            return predicted(method.loss, s, t, models.labels)
    wanted, real = targets(task, models.labels, models.mask), models.mask.bool()
    rows = real if isinstance(method, (GLMD, DistilBERT)) else wanted != -100
    (s, s_hidden), (t, t_hidden) = models.heads(rows)
    wanted = wanted[rows]
    with models.timeline.phase("loss: loop"):
        if isinstance(method, GLMD):
            total = divergence.eager(s, t, temperature=method.loss.temperature).sum()
            return total / (rows.numel() if method.loss.normalize == "positions" else len(s))
        if not isinstance(method, DistilBERT):
            return predicted(method.loss, s, t, wanted)
        soft = divergence.eager(s, t, **method.loss.divergence).mean()
        cosine = (1 - F.cosine_similarity(s_hidden[real], t_hidden[real], dim=-1)).mean()
        if task == "masked_lm":  # few of the rows have a label
            s, wanted = s[wanted != -100], wanted[wanted != -100]
        hard = F.cross_entropy(s, wanted)
        return method.alpha_kl * soft + method.alpha_mlm * hard + method.alpha_cosine * cosine


def predicted(loss, s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """soft · divergence + hard · cross-entropy of logits [n, C], all of which count."""
    terms = []
    if loss.soft:
        terms.append(loss.soft * divergence.eager(s, t, **loss.divergence).mean())
    if loss.hard:
        terms.append(loss.hard * F.cross_entropy(s, labels))
    return sum(terms)


def beta_of(method) -> float:
    return BETA.get(method.kind, method.loss.divergence.get("beta"))


def trl(models: Models, method, task: str) -> Tensor:
    """DistillationTrainer's: hidden states, and heads on tiles of the vocabulary; with the entropy that it logs."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    sides, temperature = models.bodies(), method.loss.divergence["temperature"]
    heads = [model.get_output_embeddings() for model in (models.student, models.teacher)]
    with models.timeline.phase("loss: trl"):
        mask = targets(task, models.labels, models.mask)[:, :-1] != -100
        loss, entropy, count = _chunked_divergence_loss(
            *(x[:, :-1] for x in sides), *(head.weight for head in heads), mask, beta_of(method), mask.sum(),
            *(head.bias for head in heads), temperature=temperature,
        )  # fmt: skip
        (entropy.detach() / count).item()
        return loss * temperature**2


def gkd(models: Models, method, task: str) -> Tensor:
    """GKDTrainer's: all logits of both, and the loss of those that have a label."""
    from trl.experimental.gkd.gkd_trainer import GKDTrainer
    from trl.experimental.utils import empty_cache

    (s, _), (t, _) = models.heads()
    with models.timeline.phase("loss: gkd"):
        wanted = targets(task, models.labels, models.mask)[:, :-1]
        count = (wanted != -100).sum()
        loss = GKDTrainer.generalized_jsd_loss(s[:, :-1], t[:, :-1], wanted, beta_of(method), num_items_in_batch=count)
        empty_cache()
        return loss


def torchdistill(models: Models, method, task: str) -> Tensor:
    """The logits reach its loss as the outputs of a module."""
    from torchdistill.losses.mid_level import KDLoss

    where, loss = ("classifier", "output"), method.loss
    peer = KDLoss(*where, *where, loss.divergence["temperature"], alpha=loss.hard, beta=loss.soft)
    (s, _), (t, _) = models.heads()
    with models.timeline.phase("loss: torchdistill"):
        return peer({"classifier": {"output": s}}, {"classifier": {"output": t}}, models.labels)


def textbrewer(models: Models, method, task: str) -> Tensor:
    """Its soft loss is the cross-entropy with the teacher: the KL and the teacher's entropy, which has no gradient."""
    from textbrewer.losses import kd_ce_loss

    (s, _), (t, _) = models.heads()
    with models.timeline.phase("loss: textbrewer"):
        temperature = method.loss.divergence["temperature"]
        soft = method.loss.soft * temperature**2 * kd_ce_loss(s, t, temperature)
        return soft + method.loss.hard * F.cross_entropy(s, models.labels)


LOOPS = {"loop": loop, "trl": trl, "gkd": gkd, "torchdistill": torchdistill, "textbrewer": textbrewer}


def step(provider: str, trainer, model, inputs: dict) -> Tensor:
    """The loss of one batch."""
    (name, method), *_ = trainer.method.methods.items()
    return trainer.method.weights[name] * LOOPS[provider](Models(trainer, model, inputs), method, trainer.task)
