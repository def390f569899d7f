"""A short training run under the timeline: DistillTrainer as it is, with a phase around each of its parts."""

import functools
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
from torch.autograd.grad_mode import set_multithreading_enabled
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from fastkd import atomic_write
from fastkd.bench import machine
from fastkd.train.trainer import DistillTrainer

from . import loops
from .implementations import DEFAULT, Switchboard
from .timeline import LOSS_BACKWARD, STUDENT_BACKWARD, Step, Timeline


@dataclass(frozen=True)
class Plan:
    """How many steps of each kind, for every provider in turn."""

    providers: tuple[str, ...] = DEFAULT
    warm: int = 2
    timed: int = 10
    memory: int = 1
    trace: int = 1

    def steps(self) -> list[tuple[str, str]]:
        """(provider, mode) of each step; the providers take turns."""
        rounds = ["warm"] * self.warm + ["time"] * self.timed + ["memory"] * self.memory + ["trace"] * self.trace
        return [(provider, mode) for mode in rounds for provider in self.providers]


class ProfiledTrainer(DistillTrainer):
    """DistillTrainer whose data, forwards, losses, backward and optimizer are phases."""

    timeline: Timeline
    board: Switchboard
    compiled = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.board.provider in loops.LOOPS:
            return loops.step(self.board.provider, self, model, inputs)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def get_batch_samples(self, *args, **kwargs):
        with self.timeline.phase("data"):
            return super().get_batch_samples(*args, **kwargs)

    def _prepare_inputs(self, inputs):
        with self.timeline.phase("data"):
            return super()._prepare_inputs(inputs)

    def _states(self, model, inputs, side, progress, reads):
        kept = dict.fromkeys(self._finish) if self.board.provider == "logits" else {}
        with self.timeline.phase(f"{side} forward"), mock.patch.dict(self._finish, kept):
            states = super()._states(model, inputs, side, progress, reads)
        if side == "student":
            self._watch_backward(states)
        return states

    def _watch_backward(self, states) -> None:
        """Autograd works through what came last first: all of the loss, then the student, which begins when the first of
        its outputs is asked for its gradient."""
        for x in states.tensors():
            if x.grad_fn is not None:
                x.grad_fn.register_prehook(lambda grads: self.timeline.switch(LOSS_BACKWARD, STUDENT_BACKWARD))

    def _terms(self, batch):
        with self.timeline.phase("loss: other"):
            return super()._terms(batch)

    def _clip_grad_norm(self, model):
        with self.timeline.phase("optimizer"):
            return super()._clip_grad_norm(model)


class Turns(TrainerCallback):
    """Begins and ends the steps, and times what Trainer gives no method to override for. `profiler` records the traced
    ones, which come last."""

    def __init__(self, trainer: ProfiledTrainer, plan: Plan, board: Switchboard, profiler):
        self.trainer, self.board, self.profiler = trainer, board, profiler
        self.left = plan.steps()
        self.meter, self.foreign, self.mode = None, None, ""

    def on_train_begin(self, args, state, control, **kwargs):
        timeline, trainer = self.trainer.timeline, self.trainer
        for owner, name, phase in (
            (trainer.optimizer, "step", "optimizer"), (trainer.model_wrapped, "zero_grad", "optimizer"),
            (trainer.accelerator, "backward", LOSS_BACKWARD),
        ):  # fmt: skip
            setattr(owner, name, timed(timeline, getattr(owner, name), phase))
        self._next()

    def on_step_end(self, args, state, control, **kwargs):
        self._next()

    def _next(self) -> None:
        self.trainer.timeline.end()
        before = self.mode
        self.board.provider, self.mode = self.left.pop(0) if self.left else (self.board.provider, "")
        if before != self.mode:
            if before == "time":
                self.foreign = self.meter.stop()
            if (
                self.mode == "time"
            ):  # others' load is that of the timed steps: before them compilers run, and those are ours
                self.meter = machine.LoadMeter()
            if self.mode == "trace" and self.profiler is not None:
                self.profiler.start()
        if self.mode:
            self.trainer.timeline.begin_step(self.board.provider, self.mode)


def timed(timeline: Timeline, function, phase: str):
    """`function` as a phase; where autograd has threads of its own, a traced backward does without them."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        with timeline.phase(phase), set_multithreading_enabled(not timeline.tracing):
            return function(*args, **kwargs)

    return call


def run(teacher, student, method: str, task: str, data, plan: Plan, *, batch: int, device: torch.device,
        half: bool = False, compiled: bool = False, trace: Path | None = None
        ) -> tuple[list[Step], float | None, dict[str, str]]:  # fmt: skip
    """The steps of one method, all providers; others' load meanwhile; and why some providers have no steps. Random order, AdamW,
    clipping, as by default. `trace`: one Chrome trace (Perfetto reads it) for all providers."""
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=batch, save_strategy="no", report_to="none", disable_tqdm=True,
            logging_strategy="no", use_cpu=device.type == "cpu", bf16=half, dataloader_drop_last=True,
            dataloader_pin_memory=device.type == "cuda", seed=1,
        )  # fmt: skip
        options = {"args": args, "train_dataset": data, "compile_teacher": compiled}
        trainer = ProfiledTrainer(student, teacher, method, task=task, **options)
        if compiled:
            trainer.model_wrapped = trainer.model = torch.compile(trainer.model)
        trainer.compiled = compiled
        left_out = {provider: why for provider in plan.providers if (why := loops.refusal(provider, trainer))}
        plan = replace(plan, providers=tuple(provider for provider in plan.providers if provider not in left_out))
        if not plan.providers:
            raise ValueError("providers: " + "; ".join(f"{provider}: {why}" for provider, why in left_out.items()))
        trainer.args.max_steps = len(plan.steps())
        trainer.remove_callback(PrinterCallback)
        trainer.timeline = Timeline(args.device)
        profiler = torch.profiler.profile() if trace is not None and plan.trace else None
        with Switchboard(trainer.timeline).installed() as trainer.board:
            turns = Turns(trainer, plan, trainer.board, profiler)
            trainer.add_callback(turns)
            trainer.train()
    if profiler is not None:
        profiler.stop()
        trace.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write.replacing(trace) as scratch:
            profiler.export_chrome_trace(str(scratch))
    return trainer.timeline.steps, turns.foreign, left_out
