"""A step of any method looks at no value of a tensor: on a GPU each look would wait for everything before it."""

import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastkd
import tiny

pytest.importorskip("transformers")
from test_methods import METHODS, pair, task_of

from fastkd.train.trainer import DistillTrainer

LOOKS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::masked_select"}
# Checks of values that the user gave, which fastkd.checks.looks_are_free allows on the CPU only.
FREE = {("checks.py", "values"), ("checks.py", "solved")}
PACKAGE = Path(fastkd.__file__).parent  # not a part of a path: the checkout itself may be called fastkd
OPTIONS = {"codir": "codir:nce_k=3,feat_dim=8", "minilmv2": "minilmv2:relation_heads=4"}


class Looks(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().partition(".")[0] in LOOKS:
            ours = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(PACKAGE)]
            at = ours[-1] if ours else None
            if at is None or (Path(at.filename).name, at.name) not in FREE:
                self.seen[f"{func.name()} at {at and f'{at.filename}:{at.lineno}'}"] += 1
        return func(*args, **(kwargs or {}))


class Watched(DistillTrainer):
    looks = None

    def _terms(self, batch):
        with self.looks:
            return super()._terms(batch)


@pytest.mark.parametrize("name", METHODS)
def test_no_trainer_method_synchronises(name, tmp_path):
    family = "gpt2" if METHODS[name].causal else "bert"
    task = task_of(name, family)
    teacher, student = pair(family, task)
    args = tiny.arguments(tmp_path, per_device_train_batch_size=4)
    trainer = Watched(student, teacher, OPTIONS.get(name, name), task=task, args=args, train_dataset=tiny.dataset(task))
    trainer.looks = Looks()
    trainer.train()
    assert not trainer.looks.seen, dict(trainer.looks.seen)


def test_the_watch_notices_a_synchronisation():
    looks = Looks()
    with looks:
        torch.ones(()).item()
    assert looks.seen
