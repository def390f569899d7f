"""The three ways a step can compute its losses: ours, our reference (plain PyTorch), the authors'. They take turns, step by
step, in one training run: same model, same data, same moments of the machine."""

import contextlib
from collections.abc import Callable

from fastkd import functional
from fastkd.train.batch import Batch

from . import authors
from .timeline import Timeline

WAYS = ("fastkd", "reference", "authors")
HOT = (
    "attention_costs", "divergence", "gram_correlation_loss", "info_nce_loss", "layer_costs", "linear_divergence",
    "nce_loss", "nce_pair_loss", "nce_partition", "relation_kl_loss", "sample_negatives", "transport", "unit_linear",
    "update_bank",
)  # fmt: skip
HARD = "hard labels"


def name_of(function: str, options: dict) -> str:
    """What a call is called in the profile: with its kind or level, where it has one."""
    detail = options.get("kind") or options.get("level")
    if isinstance(detail, dict):  # several levels at once
        detail = " + ".join(detail)
    return f"{function} ({detail})" if detail else function


class Switchboard:
    """While installed, every hot path is a phase of the timeline, and is computed in the way `way` says."""

    def __init__(self, timeline: Timeline):
        self.timeline, self.way = timeline, WAYS[0]
        self.ours = {name: getattr(functional, name) for name in HOT}
        self.seen: set[str] = set()

    def _routed(self, name: str) -> Callable:
        ours, theirs = self.ours[name], getattr(authors, name, None) if name in authors.WRITTEN else None

        def call(*args, **options):
            if self.timeline.now.startswith("loss: ") and self.timeline.now[6:].split(" (")[0] in self.ours:
                return ours(*args, **options)  # a hot path within a hot path, or the authors' way falling back on ours
            with self.timeline.phase(f"loss: {name_of(name, options)}"):
                if self.way == "authors" and theirs is not None:
                    return theirs(*args, **options)
                if self.way != "fastkd":
                    options["backend"] = "reference"
                return ours(*args, **options)

        return call

    @contextlib.contextmanager
    def installed(self):
        hard = Batch.hard

        def timed_hard(batch):
            with self.timeline.phase(f"loss: {HARD}"):
                return hard(batch)

        for name in HOT:
            setattr(functional, name, self._routed(name))
        Batch.hard = timed_hard
        try:
            yield self
        finally:
            Batch.hard = hard
            for name, function in self.ours.items():
                setattr(functional, name, function)
