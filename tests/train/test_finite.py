"""A loss or gradient that is not finite: the step is skipped, the term is named, and what is saved stays finite."""

import json
import math

import pytest
import torch

import tiny

pytest.importorskip("transformers")
from test_methods import METHODS, pair, spelled, task_of
from transformers import TrainerCallback, logging

from fastkd import checks
from fastkd.train import checkpoints
from fastkd.train.trainer import DistillTrainer

logging.set_verbosity_warning()


def trained(
    folder, method="kd", task=None, *, bad=(), data=None, family=None, limit=10, kind=DistillTrainer, **options
):
    """One row per micro-batch, in order; the teacher says NaN of the examples `bad`."""
    name = method.partition(":")[0]
    family = family or ("gpt2" if METHODS[name].causal else "bert")
    task = task or task_of(name, family)
    teacher, student = pair(family, task)
    data = numbered(data or tiny.dataset(task, even=True))
    settings = {
        "max_steps": 8, "per_device_train_batch_size": 1, "train_sampling_strategy": "sequential", "save_strategy": "steps",
        "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-2,
    }  # fmt: skip
    torch.manual_seed(3)
    trainer = kind(
        student, teacher, method, task=task, args=tiny.arguments(folder, **settings | options), train_dataset=data,
        max_skipped_steps=limit,
    )  # fmt: skip

    def spoil(module, args, output):  # [B, S, D]
        hit = torch.isin(args[0][:, 1] - 5, torch.tensor(list(bad)))
        return output.masked_fill(hit[:, None, None], torch.nan)

    if bad:
        teacher.get_input_embeddings().register_forward_hook(spoil)
    trainer.train()
    return trainer


def numbered(data):
    """The second token of row i is 5 + i."""
    columns = data.to_dict()
    for i, row in enumerate(columns["input_ids"]):
        row[1] = 5 + i
    return tiny.Dataset.from_dict(columns)


@pytest.fixture
def said(caplog):
    """What was logged of it."""
    caplog.set_level("WARNING")
    return lambda: [r.getMessage() for r in caplog.records if "not finite" in r.getMessage()]


QUICK = ("bert_emd", "codir")
EVERY = [pytest.param(spelled(x), marks=() if x in QUICK else pytest.mark.long) for x in METHODS]


@pytest.mark.parametrize("method", EVERY)
def test_a_bad_example_is_named_and_the_others_train(method, tmp_path, said):
    name = method.partition(":")[0]
    trainer = trained(tmp_path, method, bad=[3])
    sentences = said()
    assert len(sentences) == 1, sentences
    assert sentences[0].startswith(f"step 4: the term {name}/")
    assert sentences[0].endswith("is not finite in micro-batch 1 (examples 3); the step was skipped")
    logs = [entry for entry in trainer.state.log_history if "learning_rate" in entry]
    assert [entry["step"] for entry in logs if "loss" not in entry] == [4] and logs[3]["skipped_steps"] == 1
    assert all(math.isfinite(value) for entry in logs for value in entry.values())
    for part in (trainer.model, trainer.method):
        assert all(x.isfinite().all() for x in part.state_dict().values() if x.is_floating_point())
    assert checkpoints.newest(tmp_path) == (str(tmp_path / "checkpoint-8"), [])


@pytest.mark.parametrize(
    ("looks", "optim"),
    [(True, "adamw_torch"), (False, "adamw_torch_fused"), pytest.param(False, "sgd", marks=pytest.mark.long)],
    ids=lambda x: str(x),
)
@pytest.mark.parametrize("method", ["bert_emd", "codir:nce_k=3,feat_dim=8"])
def test_a_skipped_step_changes_nothing(method, looks, optim, tmp_path, monkeypatch):
    """Neither weights nor the optimizer's moments nor what the method learned; looks=False: as on a GPU, where the device
    decides and nothing waits for it."""
    before = {}

    class Compare(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            if state.global_step == 3:
                before.update(self.everything(optimizer))

        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            changed = {
                name for name, x in self.everything(optimizer).items() if not torch.equal(x, before.get(name, x))
            }
            if state.global_step == 4:
                assert before and not changed, changed
                before.clear()

        def everything(self, optimizer):
            parts = {"model": self.trainer.model.state_dict(), "method": self.trainer.method.state_dict()}
            parts |= {f"moments {i}": x for i, x in optimizer.state_dict()["state"].items()}
            return {(part, name): x.clone() for part, of in parts.items() for name, x in of.items()
                    if isinstance(x, torch.Tensor) and "bank" not in name}  # fmt: skip

    class Watched(DistillTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            compare = Compare()
            compare.trainer = self
            self.add_callback(compare)

    if not looks:
        monkeypatch.setattr(checks, "looks_are_free", lambda x: False)
    trainer = trained(tmp_path, method, bad=[3], kind=Watched, optim=optim)
    assert not before and trainer.finite.in_a_row == 0


def test_only_the_micro_batch_that_is_wrong_is_named(tmp_path, said):
    data = tiny.dataset("classification", rows=16, even=True)
    sizes = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2, "max_steps": 2}
    trained(tmp_path, "kd:alpha=1", bad=[3, 6], data=data, **sizes)
    where = "micro-batch 2 (examples 2, 3), 4 (examples 6, 7)"
    assert said() == [f"step 1: the term kd/soft is not finite in {where}; the step was skipped"]


def test_a_finite_loss_with_a_gradient_that_is_not(tmp_path, said):
    class Hooked(DistillTrainer):
        def __init__(self, student, *args, **kwargs):
            super().__init__(student, *args, **kwargs)
            count = iter(range(100))
            student.classifier.weight.register_hook(lambda g: g * (torch.inf if next(count) == 1 else 1))

    trainer = trained(tmp_path, kind=Hooked)
    assert said() == ["step 2: the gradient is not finite in micro-batch 1 (examples 1); the step was skipped"]
    assert all(x.isfinite().all() for x in trainer.model.parameters())


def test_fine_tuning_with_one_infinite_label(tmp_path, said):
    data = tiny.dataset("regression", even=True)
    labels = [float("inf") if i == 2 else x for i, x in enumerate(data["labels"])]
    data = data.remove_columns("labels").add_column("labels", labels)
    _, student = pair("bert", "regression")
    args = tiny.arguments(tmp_path, per_device_train_batch_size=2, train_sampling_strategy="sequential", max_steps=4)
    DistillTrainer(student, None, task="regression", args=args, train_dataset=data).train()
    assert said() == ["step 2: the term hard is not finite in micro-batch 1 (examples 2, 3); the step was skipped"]
    assert all(x.isfinite().all() for x in student.parameters())


@pytest.mark.parametrize("looks", [True, pytest.param(False, marks=pytest.mark.long)])
def test_the_limit_ends_the_run_with_the_last_good_checkpoint(looks, tmp_path, monkeypatch):
    if not looks:
        monkeypatch.setattr(checks, "looks_are_free", lambda x: False)
    message = (
        r"step 7: the term kd/soft is not finite in micro-batch 1 \(examples 6\); 3 steps in a row were skipped, and "
        rf"max_skipped_steps=3 ends the run. The last good checkpoint is {tmp_path / 'checkpoint-6'}; look at these"
    )
    with pytest.raises(RuntimeError, match=message):
        trained(tmp_path, "kd:alpha=1", bad=[1, 2, 4, 5, 6], limit=3)
    found, _ = checkpoints.newest(tmp_path)
    assert found == str(tmp_path / "checkpoint-6")
    history = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    assert sum(entry.get("skipped_steps", 0) for entry in history) == 4  # steps 2, 3, 5, 6


def test_a_teacher_that_is_broken_teaches_nothing(tmp_path):
    with pytest.raises(RuntimeError, match=r"all 8 steps were skipped, .* so the student has learned nothing"):
        trained(tmp_path, "bert_emd", bad=range(8))


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    class Overflow(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 4:
                with torch.no_grad():
                    model.classifier.weight[0, 0] = torch.inf

    class Trainer(DistillTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, callbacks=[Overflow()], **kwargs)

    with pytest.raises(RuntimeError, match=r"not finite after step 4 \(classifier.weight\), so they are not saved"):
        trained(tmp_path, kind=Trainer)
    assert checkpoints.newest(tmp_path) == (str(tmp_path / "checkpoint-2"), [])


@pytest.mark.parametrize("method", EVERY)
def test_padding_alone_and_a_spike_are_survived(method, tmp_path, said):
    """A batch without a real token or a label; and one with a loss that is 10^6 times the others'."""
    name = method.partition(":")[0]
    family = "gpt2" if METHODS[name].causal else "bert"
    task = task_of(name, family)
    data = tiny.dataset(task, even=True).to_dict()
    data["attention_mask"][2] = [0] * tiny.LENGTH
    if "labels" in data:
        data["labels"][2] = -100 if task == "classification" else [-100] * tiny.LENGTH

    class Spiky(DistillTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * 1e6 if self.state.global_step == 4 else loss

    trainer = trained(tmp_path, method, data=tiny.Dataset.from_dict(data), kind=Spiky, max_grad_norm=1.0)
    assert said() == []
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert torch.tensor(losses).isfinite().all() and len(losses) == 8


def test_an_ordinary_step_waits_for_nothing_more(tmp_path, monkeypatch):
    """As on a GPU: with a fused optimizer, nothing of the guard is read before Trainer logs."""
    monkeypatch.setattr(checks, "looks_are_free", lambda x: False)
    read, item, tolist = [], torch.Tensor.item, torch.Tensor.tolist
    steps = []

    class Step(TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            steps.append(len(read))

        def on_step_begin(self, *args, **kwargs):
            steps.append(len(read))

    class Trainer(DistillTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.callback_handler.callbacks.insert(0, first := Step())
            self.callback_handler.callbacks.append(first)

    monkeypatch.setattr(torch.Tensor, "item", lambda x: read.append(1) or item(x))
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: read.append(1) or tolist(x))
    trained(tmp_path, kind=Trainer, optim="adamw_torch_fused", logging_steps=100, save_strategy="no")
    before_and_after = list(zip(steps[::2], steps[1::2], strict=True))  # of the guard's two calls
    assert len(before_and_after) == 16 and all(a == b for a, b in before_and_after)
