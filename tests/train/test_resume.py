"""Checkpoints: a resumed run is the undisturbed one bit for bit; a damaged checkpoint is named and never resumed from."""

import errno
import json
import os
import shutil

import pytest
import torch

import tiny

pytest.importorskip("transformers")
from test_methods import METHODS, pair, spelled, task_of
from transformers import EarlyStoppingCallback, TrainerCallback, logging

from fastkd import atomic_write
from fastkd.train import checkpoints
from fastkd.train.callbacks import Watch
from fastkd.train.trainer import DistillTrainer

logging.set_verbosity_error()


class Stop(Exception):
    """As sudden as kill −9, for whoever only looks at what is on the disk."""


class Killed(TrainerCallback):
    """Before step + 1, or (None) at the end of the first epoch."""

    def __init__(self, step: int | None):
        self.step = step

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.step is None:
            raise Stop

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Stop


def made(folder, method="kd", seed=11, task=None, data=None, callbacks=(), family=None, **options):
    """A trainer with dropout, accumulation and weight decay, whose epochs end within the run."""
    name = method.partition(":")[0].split(" ")[0]
    family = family or ("gpt2" if METHODS[name].causal else "bert")
    task = task or task_of(name, family)
    teacher, student = pair(family, task)
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    settings = {
        "max_steps": 7, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_strategy": "steps",
        "save_steps": 3, "learning_rate": 1e-2, "lr_scheduler_type": "linear", "weight_decay": 0.01,
        "per_device_eval_batch_size": 4,
    }  # fmt: skip
    torch.manual_seed(seed)
    data = data or tiny.dataset(task, rows=10)
    return DistillTrainer(
        student, teacher, method, task=task, args=tiny.arguments(folder, **settings | options), train_dataset=data,
        eval_dataset=data, callbacks=list(callbacks),
    )  # fmt: skip


def assert_same(first, second):
    for kind in ("model", "method"):
        ours, theirs = (getattr(trainer, kind).state_dict() for trainer in (first, second))
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), (kind, name)
    states = [t.optimizer.state_dict()["state"] for t in (first, second)]
    assert all(torch.equal(x, states[1][i][k]) for i, of in states[0].items() for k, x in of.items())


LONG = ["fcd:gamma=1,K=8 + kd", "tinybert:share=0.5", *map(spelled, METHODS)]
EVERY = [
    ("bert_emd:beta=1", (4, 6)),
    ("codir:nce_k=3,feat_dim=8", (4,)),
    *(pytest.param(method, (4,), marks=pytest.mark.long) for method in LONG),
]


@pytest.mark.parametrize(("method", "steps"), EVERY)
def test_a_run_goes_on_bit_for_bit_from_its_last_checkpoint(method, steps, tmp_path):
    """From the middle of an epoch (4), and from the end of one (6)."""
    straight = made(tmp_path / "straight", method, save_steps=2)
    straight.train()
    logged = {entry["step"]: entry["loss"] for entry in straight.state.log_history if "loss" in entry}
    assert len(logged) == 7
    for step in steps:
        shutil.copytree(tmp_path / "straight" / f"checkpoint-{step}", tmp_path / f"{step}" / f"checkpoint-{step}")
        resumed = made(tmp_path / f"{step}", method, seed=99, save_strategy="no")  # a fresh process starts elsewhere
        resumed.train(resume_from_checkpoint=True)
        assert_same(resumed, straight)
        assert {entry["step"]: entry["loss"] for entry in resumed.state.log_history if "loss" in entry} == logged


@pytest.mark.parametrize("strategy", ["epoch", pytest.param("steps", marks=pytest.mark.long)])
def test_an_evaluation_draws_no_random_numbers_and_is_made_up_for(strategy, tmp_path):
    """The checkpoint of step 3 is written before the epoch's evaluation, and the run is killed between them."""
    evaluates = {"eval_strategy": strategy, "eval_steps": 2, "max_steps": 8}
    plain = made(tmp_path / "plain", max_steps=8)
    plain.train()
    straight = made(tmp_path / "straight", **evaluates)
    straight.train()
    assert_same(plain, straight)
    with pytest.raises(Stop):
        made(tmp_path / "killed", callbacks=[Killed(None if strategy == "epoch" else 4)], **evaluates).train()
    resumed = made(tmp_path / "killed", seed=99, **evaluates)
    resumed.train(resume_from_checkpoint=True)
    assert_same(resumed, straight)
    evaluated = [
        {e["step"]: e["eval_loss"] for e in t.state.log_history if "eval_loss" in e} for t in (straight, resumed)
    ]
    assert evaluated[0] == evaluated[1] and list(evaluated[0]) == ([2, 4, 6, 8] if strategy == "steps" else [3, 6, 8])


def test_a_run_that_had_ended_makes_no_further_step(tmp_path):
    straight = made(tmp_path, "bert_emd")
    watch = Watch(straight)
    straight.add_callback(watch)
    straight.train()
    again = made(tmp_path, "bert_emd", seed=99)
    other = Watch(again)
    again.add_callback(other)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 7 and other.maps == watch.maps and len(watch.maps) == 7
    for name, x in straight.model.state_dict().items():
        assert torch.equal(x, again.model.state_dict()[name])


def test_early_stopping_counts_on(tmp_path):
    settings = {
        "learning_rate": 0.0, "max_steps": 20, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1,
        "load_best_model_at_end": True, "metric_for_best_model": "loss",
    }  # fmt: skip
    with pytest.raises(Stop):
        made(tmp_path, callbacks=[EarlyStoppingCallback(3), Killed(2)], **settings).train()
    resumed = made(tmp_path, callbacks=[EarlyStoppingCallback(3)], **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4 and resumed.state.best_global_step == 1  # not 2 + 3
    assert resumed.state.best_model_checkpoint == str(tmp_path / "checkpoint-1") and checkpoints.is_finished(resumed)
    again = made(tmp_path, callbacks=[EarlyStoppingCallback(3)], **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4 and checkpoints.is_finished(again)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path):
    shutil.rmtree(path.parent)
    path.parent.mkdir()


DAMAGE = [
    ("missing", lambda path: path.unlink(), "has no {}"),
    ("truncated", truncate, "bytes of {} instead of"),
    ("flipped", flip, "has a {} that is not what was written: its checksum differs"),
]
FILES = [
    "model.safetensors", "config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
    "fastkd_method.safetensors", "fastkd_method.json",
]  # fmt: skip
TABLE = [
    *((f"{name} {kind}", name, damage, sentence.format(name)) for name in FILES for kind, damage, sentence in DAMAGE),
    ("empty folder", "model.safetensors", empty, "has no manifest.json, so it was not written completely"),
    (
        "no manifest",
        "manifest.json",
        lambda path: path.unlink(),
        "has no manifest.json, so it was not written completely",
    ),
    ("half a manifest", "manifest.json", truncate, "has a damaged manifest.json"),
    ("a manifest of another kind", "manifest.json", lambda path: path.write_text("[1]"), "has a damaged manifest.json"),
]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    trainer = made(folder, "bert_emd")
    trainer.train()
    return folder, trainer


@pytest.mark.parametrize(("case", "name", "damage", "sentence"), TABLE, ids=[row[0] for row in TABLE])
def test_a_damaged_checkpoint_is_named_and_stepped_over(case, name, damage, sentence, straight, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(straight[0], folder)
    damage(folder / "checkpoint-7" / name)
    found, skipped = checkpoints.newest(folder)
    assert found == str(folder / "checkpoint-6")
    assert len(skipped) == 1 and skipped[0].startswith(f"{folder / 'checkpoint-7'} ") and sentence in skipped[0]
    with pytest.raises(ValueError, match=r"resume_from_checkpoint: .*checkpoint-7 has"):
        made(folder, "bert_emd").train(resume_from_checkpoint=str(folder / "checkpoint-7"))


@pytest.mark.parametrize("damage", [flip, pytest.param(empty, marks=pytest.mark.long)])
def test_a_run_with_a_damaged_checkpoint_ends_as_the_undisturbed_one(damage, straight, tmp_path):
    shutil.copytree(straight[0], tmp_path / "run")
    damage(tmp_path / "run" / "checkpoint-7" / "optimizer.pt")
    resumed = made(tmp_path / "run", "bert_emd", seed=99)
    resumed.train(resume_from_checkpoint=True)
    assert_same(resumed, straight[1])
    assert checkpoints.newest(tmp_path / "run") == (str(tmp_path / "run" / "checkpoint-7"), [])


def test_a_run_never_starts_anew_without_a_word(straight, tmp_path):
    shutil.copytree(straight[0], tmp_path / "run")
    for step in (3, 6, 7):
        (tmp_path / "run" / f"checkpoint-{step}" / "optimizer.pt").unlink()
    with pytest.raises(
        ValueError, match=r"none of its checkpoints can be resumed from: .*checkpoint-7 has no optimizer.pt; "
    ):
        made(tmp_path / "run", "bert_emd").train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="has no checkpoint; leave it out"):
        made(tmp_path / "new", "bert_emd").train(resume_from_checkpoint=True)


def test_weights_alone_are_no_checkpoint_to_go_on_from(tmp_path):
    made(tmp_path, save_only_model=True).train()
    with pytest.raises(ValueError, match=r"has the weights alone \(save_only_model\)"):
        made(tmp_path).train(resume_from_checkpoint=True)


def test_what_we_write_ourselves_is_safetensors_and_json(straight):
    trainers = {"optimizer.pt", "scheduler.pt", "rng_state.pth"}  # Trainer's own, which it reads with weights_only=True
    for folder in checkpoints.found(straight[0]):
        assert {path.suffix for path in folder.iterdir() if path.name not in trainers} == {".safetensors", ".json"}
        manifest = json.loads((folder / "manifest.json").read_text())
        assert set(manifest["files"]) | {"manifest.json"} == {path.name for path in folder.iterdir()}


def test_old_checkpoints_go_when_the_new_one_is_complete(tmp_path, monkeypatch):
    present, renamed = [], atomic_write.rename

    def rename(scratch, folder):
        present.append(sorted(path.name for path in checkpoints.found(tmp_path)))
        renamed(scratch, folder)

    monkeypatch.setattr(atomic_write, "rename", rename)
    made(tmp_path, save_steps=2, save_total_limit=1).train()
    assert present == [[], ["checkpoint-2"], ["checkpoint-4"], ["checkpoint-6"]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-7"]


def test_rotation_keeps_the_new_and_the_best_and_deletes_incomplete_ones_first(tmp_path):
    for step in (2, 4, 6, 8, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step not in (6, 10):
            (tmp_path / f"checkpoint-{step}" / "manifest.json").touch()
    checkpoints.rotate(tmp_path, 3, {tmp_path / "checkpoint-8", tmp_path / "checkpoint-2"})
    assert [path.name for path in checkpoints.found(tmp_path)] == ["checkpoint-8", "checkpoint-4", "checkpoint-2"]
    checkpoints.rotate(tmp_path, None, set())
    assert len(checkpoints.found(tmp_path)) == 3


def refused(code):
    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code), "somewhere")

    return refuse


def torchs_own(*args, **kwargs):
    raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0\n frame #0")


FAULTS = [
    ("torch.save", torchs_own, "unexpected pos 64 vs 0", ()),
    ("fastkd.train.learned.save_file", refused(errno.EROFS), "Read-only file system", pytest.mark.long),
    ("torch.save", refused(errno.ENOSPC), "No space left on device", pytest.mark.long),
    ("fastkd.train.checkpoints.write_manifest", refused(errno.EIO), "Input/output error", pytest.mark.long),
    ("fastkd.atomic_write.rename", refused(errno.EACCES), "Permission denied", pytest.mark.long),
]


@pytest.mark.parametrize(("place", "fault", "reason"), [pytest.param(*row, marks=marks) for *row, marks in FAULTS])
def test_a_checkpoint_that_cannot_be_written_is_one_sentence(place, fault, reason, straight, tmp_path, monkeypatch):
    class Fault(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 5:
                monkeypatch.setattr(place, fault)

    with pytest.raises(RuntimeError, match="checkpoint-6 could not be written") as error:
        made(tmp_path, "bert_emd", callbacks=[Fault()]).train()
    sentence = str(error.value)
    assert reason in sentence and f"{tmp_path / 'checkpoint-3'} is intact" in sentence and "\n" not in sentence
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    monkeypatch.undo()
    resumed = made(tmp_path, "bert_emd", seed=99)
    resumed.train(resume_from_checkpoint=True)
    assert_same(resumed, straight[1])


def test_a_disk_that_is_full_within_a_file(tmp_path):
    resource = pytest.importorskip("resource")

    class Full(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 5:
                resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(RuntimeError, match=r"checkpoint-6 could not be written .*checkpoint-3 is intact"):
            made(tmp_path, callbacks=[Full()], logging_steps=100).train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoints.newest(tmp_path) == (str(tmp_path / "checkpoint-3"), [])


def test_a_folder_that_is_deleted_meanwhile_is_made_anew(tmp_path):
    class Delete(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4:
                shutil.rmtree(args.output_dir)

    made(tmp_path / "run", callbacks=[Delete()]).train()
    assert [path.name for path in checkpoints.found(tmp_path / "run")] == ["checkpoint-7", "checkpoint-6"]
    assert checkpoints.newest(tmp_path / "run")[0] == str(tmp_path / "run" / "checkpoint-7")
