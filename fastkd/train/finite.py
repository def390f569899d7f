"""A step whose loss or gradient is not finite changes nothing: it is skipped on all ranks, and what was wrong is named.

Each term of the loss leaves a flag on the device. Where the optimizer can read such a flag itself (fused ones), nothing waits
for the device: the flags are looked at when Trainer logs. Elsewhere they are looked at before each step of the optimizer.
"""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback
from transformers.utils import logging

from fastkd import checks

from . import checkpoints

# Learned state up to so many numbers is put back after a skipped step; banks take no row that is not finite.
SMALL = 1 << 16
logger = logging.get_logger(__name__)


class MicroBatch(NamedTuple):
    names: tuple[str, ...]
    wrong: Tensor  # [terms], where a term is not finite
    ids: Tensor | None  # [B], the examples' numbers


class Step(NamedTuple):
    number: int
    names: tuple[str, ...]
    wrong: Tensor  # [terms + 3]: each term, the gradient; any term on any rank, the gradient on any rank
    batches: list[MicroBatch]


@dataclass
class Tally:
    """Of the steps since a log: how many there were, how many were skipped, how many of these had a term that was not finite,
    and how often each term was part of such a step."""

    steps: int = 0
    skipped: int = 0
    lost: int = 0
    lost_of_term: Counter = field(default_factory=Counter)


class Finite(TrainerCallback):
    """Skips the steps of `trainer` that are not finite. limit: so many of them in a row end the run."""

    def __init__(self, trainer, limit: int = 10):
        checks.count("max_skipped_steps", limit)
        self.trainer, self.limit = trainer, limit
        self.norm: Tensor | float | None = None  # of the gradient, set by the trainer
        self.in_a_row = 0
        self._tally = Tally()
        self._batches: list[MicroBatch] = []
        self._steps: list[Step] = []  # not looked at yet
        self._buffers: list[tuple[Tensor, Tensor]] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.in_a_row, self._batches, self._steps = 0, [], []

    def on_step_begin(self, args, state, control, **kwargs):
        method = self.trainer.method
        held = () if method is None else method.buffers()
        self._buffers = [(x, x.clone()) for x in held if x.numel() <= SMALL]

    def see(self, values: dict[str, Tensor], ids: Tensor | None) -> dict[str, Tensor]:
        """Note which terms of a micro-batch are finite; the values, or 0 where one of them is not."""
        found = torch.stack([value.detach().float() for value in values.values()])
        wrong = ~found.isfinite()
        self._batches.append(MicroBatch(tuple(values), wrong, ids))
        return dict(zip(values, found.masked_fill(wrong.any(), 0.0), strict=True))

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        batches, self._batches = self._batches, []
        if not batches:
            return
        scaled = getattr(self.trainer.accelerator, "scaler", None) is not None  # it looks at the gradient itself
        flags: dict[str, Tensor] = {}
        for batch in batches:
            for name, flag in zip(batch.names, batch.wrong, strict=True):
                flags[name] = flags[name] | flag if name in flags else flag
        gradient = torch.zeros_like(batches[0].wrong[0]) if scaled else self._gradient_is_wrong(batches[0].wrong)
        wrong = torch.stack([*flags.values(), gradient])
        anywhere = torch.stack([wrong[:-1].any(), gradient]).int()
        if args.world_size > 1:
            dist.all_reduce(anywhere, dist.ReduceOp.MAX)
        self._steps.append(Step(state.global_step + 1, tuple(flags), torch.cat([wrong.int(), anywhere]), batches))
        any_wrong, inner = anywhere.amax().float(), getattr(optimizer, "optimizer", optimizer)
        if getattr(inner, "_step_supports_amp_scaling", False) and not scaled and not checks.looks_are_free(wrong):
            inner.found_inf, inner.grad_scale = any_wrong, None
            for buffer, before in self._buffers:
                buffer.copy_(torch.where(any_wrong > 0, before, buffer))
        elif any_wrong.item():
            for parameter in self._parameters():
                parameter.grad = None  # which optimizers pass over
            for buffer, before in self._buffers:
                buffer.copy_(before)

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        inner = getattr(optimizer, "optimizer", optimizer)
        if getattr(inner, "found_inf", None) is not None:
            inner.found_inf = inner.grad_scale = None

    def on_step_end(self, args, state, control, **kwargs):
        if self._steps and checks.looks_are_free(self._steps[0].wrong):
            self._look()

    def on_train_end(self, args, state, control, **kwargs):
        self._look()
        if 0 < state.global_step <= self.in_a_row:
            raise RuntimeError(
                f"all {self.in_a_row} steps were skipped, since their loss or gradient was not finite, so the student has "
                "learned nothing; look at the warnings above"
            )

    def amend(self, logs: dict) -> Counter:
        """Take skipped steps out of what Trainer logs, and count them; how often each term was part of a step whose terms were
        not all finite."""
        self._look()
        tally, self._tally = self._tally, Tally()
        if tally.skipped:
            logs["skipped_steps"] = tally.skipped
            if tally.steps > tally.lost:
                logs["loss"] *= tally.steps / (tally.steps - tally.lost)
            else:
                del logs["loss"]
            if not math.isfinite(logs.get("grad_norm", 0.0)):
                del logs["grad_norm"]
        return tally.lost_of_term

    def _look(self) -> None:
        steps, self._steps = self._steps, []
        flags = torch.cat([step.wrong for step in steps]).tolist() if steps else []
        for step in steps:
            here, flags = flags[: len(step.wrong)], flags[len(step.wrong) :]
            term_anywhere, gradient_anywhere = here[-2:]
            self._tally.steps += 1
            self.in_a_row = self.in_a_row + 1 if term_anywhere or gradient_anywhere else 0
            if not self.in_a_row:
                continue
            self._tally.skipped += 1
            if term_anywhere:
                self._tally.lost += 1
                self._tally.lost_of_term.update(step.names)
            sentence = self._named(step, here)
            if self.in_a_row >= self.limit:
                kept = checkpoints.last(self.trainer.args.output_dir)
                raise RuntimeError(
                    f"{sentence}; {self.in_a_row} steps in a row were skipped, and max_skipped_steps={self.limit} ends the "
                    f"run. {f'The last good checkpoint is {kept}' if kept else 'There is no checkpoint yet'}; look at these "
                    "examples and at the teacher, or lower the learning rate"
                )
            logger.warning(f"{sentence}; the step was skipped")

    def _named(self, step: Step, flags: list[int]) -> str:
        terms = [name for name, flag in zip(step.names, flags, strict=False) if flag]
        term_anywhere = flags[-2]
        if not terms and (term_anywhere or not flags[len(step.names)]):
            return f"step {step.number}: a term or the gradient is not finite on another rank"
        what = f"the term {', '.join(terms)}" if terms else "the gradient"
        guilty = [(i, batch.ids) for i, batch in enumerate(step.batches, 1) if not terms or bool(batch.wrong.any())]
        where = [f"{i}" if ids is None else f"{i} (examples {_listed(ids.tolist())})" for i, ids in guilty]
        return f"step {step.number}: {what} is not finite in micro-batch {', '.join(where)}"

    def _parameters(self):
        method = self.trainer.method
        return [*self.trainer.model.parameters(), *([] if method is None else method.parameters())]

    def _gradient_is_wrong(self, like: Tensor) -> Tensor:
        norm = self.norm.full_tensor() if hasattr(self.norm, "full_tensor") else self.norm
        norms = [] if norm is None else [torch.as_tensor(norm, device=like.device, dtype=torch.float32)]
        method = self.trainer.method
        learned = [] if method is None else [p.grad for p in method.parameters() if p.grad is not None]
        if learned:
            norms.append(torch.nn.utils.get_total_norm(learned).float())
        return ~torch.stack(norms).isfinite().all() if norms else torch.zeros_like(like[0])


def _listed(numbers: list[int], shown: int = 16) -> str:
    more = f" and {len(numbers) - shown} more" if len(numbers) > shown else ""
    return ", ".join(map(str, numbers[:shown])) + more
