"""DistillTrainer: accumulation, learned state, checkpoints, the teacher's place, labels and vocabularies."""

import copy

import pytest
import torch

import tiny

pytest.importorskip("transformers")
from test_methods import METHODS, pair, task_of
from transformers import logging

from fastkd.train.batch import Batch
from fastkd.train.states import read
from fastkd.train.trainer import DistillTrainer

logging.set_verbosity_error()
SEPARABLE = [
    "kd", "bert_emd:theta=0", "codir:crd=0,nce_k=3,feat_dim=8", "fcd:beta=0,share=1", "fcd:alpha=0,beta=0,gamma=0.0001,share=0", "pkd", "tinybert:share=1", "tinybert:share=0",
    "minilm:share=1", "minilmv2:relation_heads=4,share=1", "distilbert", "glmd", "forward_kl", "reverse_kl", "jsd",
    "skew_kl", "embedding:mse=0.5",
]  # fmt: skip


def test_every_method_has_terms_that_accumulate():
    assert {method.partition(":")[0] for method in SEPARABLE} == set(METHODS)


def one_step(folder, method: str, accumulation: int, kind=DistillTrainer, even=True, **options):
    """The gradient of one optimizer step over 8 rows (plain SGD at rate 1), and the trainer."""
    name = method.partition(":")[0]
    family = "gpt2" if METHODS[name].causal else "bert"
    task = task_of(name, family)
    teacher, student = pair(family, task)
    before = [p.detach().clone() for p in student.parameters()]
    args = tiny.arguments(
        folder, optim="sgd", learning_rate=1.0, gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=8 // accumulation,
    )  # fmt: skip
    torch.manual_seed(0)
    data = tiny.dataset(task, even=even)
    trainer = kind(student, teacher, method, task=task, args=args, train_dataset=data, **options)
    trainer.start = copy.deepcopy(trainer.method), copy.deepcopy(student)
    trainer.train()
    return [a - b.detach() for a, b in zip(before, student.parameters(), strict=True)], trainer


def distance(first, second) -> float:
    first, second = (torch.cat([x.flatten() for x in xs]) for xs in (first, second))
    return float((first - second).norm() / second.norm())


@pytest.mark.parametrize("method", SEPARABLE)
def test_accumulation_changes_nothing_for_separable_terms(method, tmp_path):
    """The micro-batches hold unequal numbers of tokens and of labels: a mean of their means would be another. Of methods that
    have coupled terms too, these have the weight 0 here."""
    whole, first = one_step(tmp_path / "1", method, 1, even=False)
    parts, second = one_step(tmp_path / "4", method, 4, even=False)
    assert distance(parts, whole) < 1e-5
    logs = [next(e for e in trainer.state.log_history if "loss" in e) for trainer in (first, second)]
    for key in logs[0]:
        if key.startswith(("term/", "loss")) and logs[0].get(key.replace("term/", "weight/"), 1):
            assert logs[1][key] == pytest.approx(logs[0][key], rel=1e-4, abs=1e-7), key


class Recording(DistillTrainer):
    """Keeps the micro-batches in the order in which they came."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.__dict__.setdefault("seen", []).append({name: x.clone() for name, x in inputs.items()})
        return super().compute_loss(model, inputs, *args, **kwargs)


COUPLED = ["fcd:alpha=0,share=1", "bert_emd:beta=1", "codir:nce_k=3,feat_dim=8"]


@pytest.mark.parametrize("advance", ["step", "micro"])
@pytest.mark.parametrize("method", COUPLED)
def test_accumulation_is_the_mean_over_micro_batches_for_coupled_terms(method, advance, tmp_path):
    gradient, trainer = one_step(tmp_path, method, 2, Recording, advance=advance)
    term, student = trainer.start
    term.train()
    assert len(trainer.seen) == 2
    for place, inputs in enumerate(trainer.seen):
        model_inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        layers = {side: term.attention(side) for side in ("student", "teacher")}
        with torch.no_grad():
            teacher_states = read(trainer.teacher, model_inputs, hidden=True, layers=layers["teacher"])
        states = read(student, model_inputs, hidden=True, layers=layers["student"])
        batch = Batch(
            trainer.task, states, teacher_states, inputs["attention_mask"], inputs["labels"], inputs["example_id"],
            advance=advance == "micro" or place == 1,
        )  # fmt: skip
        (sum(part.value * part.weight for part in term(batch).values()) / 2).backward()
    by_hand = [torch.zeros_like(p) if p.grad is None else p.grad for p in student.parameters()]
    assert distance(gradient, by_hand) < 1e-5


def test_learned_pieces_take_the_gradient_of_their_own_step_only(tmp_path):
    """Trainer zeroes its model's gradients, not its optimizer's: a projection's would pile up from step to step."""
    teacher, student = pair("bert", "classification")
    student.bert.requires_grad_(False)  # only the projection moves
    args = tiny.arguments(tmp_path, max_steps=3, optim="sgd", learning_rate=0.01)
    trainer = DistillTrainer(
        student, teacher, "tinybert:share=1", args=args, train_dataset=tiny.dataset("classification")
    )
    trainer.train()
    weight, bias = trainer.method.parameters()
    last, last_of_bias = weight.grad.clone(), bias.grad.clone()
    trainer.method.zero_grad()
    inputs = {k: torch.tensor(tiny.dataset("classification")[k][:]) for k in ("input_ids", "attention_mask", "labels")}
    before = weight.detach() + 0.01 * last  # where the third step began
    with torch.no_grad():
        weight.copy_(before)
        bias += 0.01 * last_of_bias
    trainer.compute_loss(student.train(), inputs).backward()
    torch.testing.assert_close(weight.grad, last, rtol=1e-4, atol=1e-6)


def learned(trainer) -> dict:
    return {name: x.clone() for name, x in trainer.method.named_buffers()}


def test_layer_weights_move_once_per_step_or_per_micro_batch(tmp_path):
    _, once = one_step(tmp_path / "a", "bert_emd", 4, Recording)
    _, each = one_step(tmp_path / "b", "bert_emd", 4, Recording, advance="micro")
    method, student = once.start
    method.train()
    inputs = {key: once.seen[-1][key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():  # the last micro-batch alone moves the uniform weights
        teacher_states, states = (
            read(m, inputs, hidden=True, layers=range(n)) for m, n in ((once.teacher, 4), (student, 2))
        )
        method(Batch("classification", states, teacher_states, inputs["attention_mask"], once.seen[-1]["labels"]))
    by_hand = dict(method.named_buffers())
    for name, weight in learned(once).items():
        torch.testing.assert_close(weight, by_hand[name], rtol=1e-9, atol=0)
    assert any((learned(each)[name] - by_hand[name]).abs().max() > 1e-6 for name in by_hand)


def test_the_bank_moves_once_per_step_with_every_row_of_it(tmp_path):
    _, trainer = one_step(tmp_path, "codir:nce_k=3,feat_dim=8", 4)
    before, after = trainer.start[0].state_dict(), trainer.method.state_dict()
    key = "methods.codir.loss.bank_student"
    assert (before[key] != after[key]).any(1).all()
    assert after["methods.codir.loss.sampler"][1] == before["methods.codir.loss.sampler"][1] + 1
    assert not trainer.method.methods["codir"].seen


def test_a_checkpoint_holds_the_student_and_apart_from_it_what_the_method_learned(tmp_path):
    from safetensors.torch import load_file

    teacher, student = pair("bert", "classification")
    args = tiny.arguments(tmp_path, save_strategy="steps", save_steps=1)
    trainer = DistillTrainer(student, teacher, "bert_emd", args=args, train_dataset=tiny.dataset("classification"))
    trainer.train()
    folder = tmp_path / "checkpoint-1"
    assert set(load_file(folder / "model.safetensors")) == set(student.state_dict())
    learned_names = set(load_file(folder / "fastkd_method.safetensors"))
    assert "methods.bert_emd.projection.linear.0.weight" in learned_names
    assert "methods.bert_emd.loss.hidden_student_weight" in learned_names
    assert not (folder / "training_args.bin").exists()


def test_resuming_with_another_method_or_without_its_state_is_refused(tmp_path):
    def trainer(method):
        teacher, student = pair("bert", "classification")
        args = tiny.arguments(tmp_path, save_strategy="steps", save_steps=1)
        return DistillTrainer(student, teacher, method, args=args, train_dataset=tiny.dataset("classification"))

    trainer("bert_emd").train()
    checkpoint = str(tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match=r"written by method bert_emd, and this run is kd"):
        trainer("kd").train(resume_from_checkpoint=checkpoint)
    (tmp_path / "checkpoint-1" / "fastkd_method.json").unlink()
    with pytest.raises(ValueError, match=r"has no fastkd_method\.json"):
        trainer("bert_emd").train(resume_from_checkpoint=checkpoint)


def test_the_teacher_stays_as_it_is(tmp_path):
    teacher, student = pair("bert", "classification")
    teacher.train()
    for module in teacher.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    before = copy.deepcopy(teacher.state_dict())
    args = tiny.arguments(tmp_path, max_steps=3)
    trainer = DistillTrainer(student, teacher, "bert_emd", args=args, train_dataset=tiny.dataset("classification"))
    trainer.train()
    assert not teacher.training and not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert all(torch.equal(x, before[name]) for name, x in teacher.state_dict().items())
    optimised = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not optimised & {id(p) for p in teacher.parameters()}
    assert {id(p) for p in trainer.method.parameters()} <= optimised


def test_terms_are_logged_with_their_weights_and_add_up(tmp_path):
    teacher, student = pair("bert", "classification")
    args = tiny.arguments(tmp_path, max_steps=4, logging_steps=2, per_device_train_batch_size=2)
    trainer = DistillTrainer(student, teacher, "pkd", args=args, train_dataset=tiny.dataset("classification"))
    trainer.train()
    entries = [e for e in trainer.state.log_history if "loss" in e]
    assert len(entries) == 2
    for entry in entries:
        total = sum(entry[f"term/pkd/{x}"] * entry[f"weight/pkd/{x}"] for x in ("hard", "soft", "patient"))
        assert entry["loss"] == pytest.approx(total, rel=1e-4)


def named(model, names):
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: i for i, name in enumerate(names)}
    return model


def test_labels_in_another_order_are_mapped_by_name(tmp_path):
    losses = []
    for order in (("no", "yes"), ("Yes", "no")):
        teacher, student = pair("bert", "classification")
        named(student, ("no", "yes"))
        named(teacher, order)
        if order[0] == "Yes":  # the same teacher, its outputs the other way round
            teacher.classifier.weight.data = teacher.classifier.weight.data.flip(0)
            teacher.classifier.bias.data = teacher.classifier.bias.data.flip(0)
        args = tiny.arguments(tmp_path)
        data = tiny.dataset("classification")
        trainer = DistillTrainer(student, teacher, "kd:alpha=1", args=args, train_dataset=data, eval_dataset=data)
        trainer.train()
        losses.append((trainer.state.log_history[0]["loss"], trainer.evaluate_other(teacher)["eval_loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_labels_of_other_names_are_refused(tmp_path):
    teacher, student = pair("bert", "classification")
    named(student, ("no", "yes"))
    named(teacher, ("bad", "good"))
    with pytest.raises(ValueError, match="the student's are no, yes and the teacher's bad, good"):
        DistillTrainer(
            student, teacher, "kd", args=tiny.arguments(tmp_path), train_dataset=tiny.dataset("classification")
        )


def test_differing_vocabularies_are_refused_with_both_sizes(tmp_path):
    teacher = tiny.model("gpt2", "causal_lm")
    student = tiny.AUTO["causal_lm"].from_config(tiny.config("gpt2", vocab_size=64))
    with pytest.raises(ValueError, match="the student has 64 tokens and the teacher 60"):
        DistillTrainer(student, teacher, "kd", task="causal_lm", args=tiny.arguments(tmp_path))


def test_a_configuration_that_asks_for_attentions_is_refused(tmp_path):
    teacher, student = pair("bert", "classification")
    student.config.attn_implementation = "eager"
    teacher.config._output_attentions = True
    with pytest.raises(ValueError, match="teacher: its configuration asks for output_attentions"):
        DistillTrainer(
            student, teacher, "kd", args=tiny.arguments(tmp_path), train_dataset=tiny.dataset("classification")
        )


def test_the_trainer_also_trains_without_a_teacher(tmp_path):
    _, student = pair("bert", "classification")
    args = tiny.arguments(tmp_path, max_steps=8, learning_rate=5e-3)
    trainer = DistillTrainer(student, None, args=args, train_dataset=tiny.dataset("classification"))
    trainer.train()
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("task", ["regression", "cloze"])
def test_the_other_sentence_tasks_train(task, tmp_path):
    method = {"regression": "kd", "cloze": "glmd:temperature=2"}[task]
    teacher, student = pair("bert", task, noise=0.2)
    args = tiny.arguments(tmp_path, max_steps=10, learning_rate=5e-3)
    answers = torch.tensor([7, 9]) if task == "cloze" else None
    trainer = DistillTrainer(
        student, teacher, method, task=task, answers=answers, args=args, train_dataset=tiny.dataset(task)
    )
    trainer.train()
    entries = [e for e in trainer.state.log_history if "loss" in e]
    if task == "cloze":  # tokens, then the task's soft labels
        assert "term/glmd/tokens" in entries[0] and "term/glmd/soft" in entries[-1]
        assert entries[4]["loss"] < entries[0]["loss"] and entries[-1]["loss"] < entries[5]["loss"] + 1e-4
    else:
        assert entries[-1]["loss"] < entries[0]["loss"]
