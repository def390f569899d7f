"""Who computes a step. Providers take turns, step by step, in one training run: same model, same data, same moments of the
machine. Within DistillTrainer: ours, ours with the logits of all tokens, our reference (plain PyTorch), the authors' losses;
in its place: those of loops.py."""

import contextlib
import importlib.util
import inspect
from collections.abc import Callable
from unittest import mock

import torch
from torch.utils._pytree import tree_map_only

from fastkd import functional
from fastkd.bench.baselines import RELEASED
from fastkd.train.batch import Batch

from .timeline import Timeline

DEFAULT = ("fastkd", "logits", "loop", "authors")
PROVIDERS = (*DEFAULT, "reference", "trl", "gkd", "torchdistill", "textbrewer")
HOT = (*RELEASED, "nce_partition", "sample_negatives", "unit_linear", "update_bank")
POT = importlib.util.find_spec("ot") is not None


def name_of(function: str, options: dict) -> str:
    """What a call is called in the profile: with its kind or level, where it has one."""
    detail = options.get("kind") or options.get("level")
    if isinstance(detail, dict):  # several levels at once
        detail = " + ".join(detail)
    return f"{function} ({detail})" if detail else function


def authors(name: str, args: tuple, options: dict) -> Callable | None:
    """A call of what was released, in float32 at least; None where that does not know what is asked for."""
    if name not in RELEASED or (name.startswith("transport") and not POT):
        return None
    given = {key: value for key, value in options.items() if key != "backend" and value is not None}
    try:
        inspect.signature(RELEASED[name]).bind(*args, **given)
    except TypeError:
        return None
    half = (torch.float16, torch.bfloat16)
    args, given = tree_map_only(torch.Tensor, lambda x: x.float() if x.dtype in half else x, (args, given))
    return lambda: RELEASED[name](*args, **given)


class Switchboard:
    """While installed, every hot path is a phase of the timeline, and `provider` computes it."""

    def __init__(self, timeline: Timeline):
        self.timeline, self.provider = timeline, PROVIDERS[0]

    def _routed(self, name: str) -> Callable:
        ours = getattr(functional, name)

        def call(*args, **options):
            if self.timeline.stack[-1].removeprefix("loss: ").split(" (")[0] in HOT:
                return ours(*args, **options)  # a hot path within a hot path
            with self.timeline.phase(f"loss: {name_of(name, options)}"):
                theirs = authors(name, args, options) if self.provider == "authors" else None
                if theirs is not None:
                    return theirs()
                plain = self.provider in ("reference", "authors")
                return ours(*args, **{**options, "backend": "reference"} if plain else options)

        return call

    @contextlib.contextmanager
    def installed(self):
        hard = Batch.hard

        def timed_hard(batch):
            with self.timeline.phase("loss: hard labels"):
                return hard(batch)

        routes = {name: self._routed(name) for name in HOT}
        with mock.patch.multiple(functional, **routes), mock.patch.object(Batch, "hard", timed_hard):
            yield self
