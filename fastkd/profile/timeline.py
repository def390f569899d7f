"""One line of time, cut where a phase begins or ends; every piece belongs to the innermost phase, so nothing is counted
twice. The wall time of a step is measured beside it, on the host, and is not the sum of the pieces."""

import contextlib
import threading
import time
from dataclasses import dataclass, field

import torch

from fastkd.bench.measure import Device, Host

LOSS_BACKWARD, STUDENT_BACKWARD = "loss backward", "student backward"
OUTSIDE = "trainer"  # what Trainer does around the phases: callbacks, schedule, bookkeeping


@dataclass
class Step:
    """One training step: seconds and, in a memory step, the highest bytes by phase beyond what the models and the optimizer
    hold before it. mode: warm, time, memory or trace."""

    provider: str
    mode: str
    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    wall: float = 0.0
    cpu: float = 0.0  # of all threads


class Timeline:
    """`begin_step(provider, mode)`, then phases, then `begin_step` again or `end`. `steps` are the finished ones."""

    def __init__(self, device: torch.device):
        self.nvtx, self.thread = device.type == "cuda", threading.get_ident()
        self.meter = Device() if self.nvtx else Host()
        self.steps: list[Step] = []
        self.step: Step | None = None
        self.stack, self.marks, self.ranges = [OUTSIDE], [], []

    def begin_step(self, provider: str, mode: str) -> None:
        self.end()
        self.step = Step(provider, mode)
        if mode == "memory":
            self.meter.clean()
            self.meter.peak_and_reset()
            self.held = self.meter.peak_and_reset() or 0
        self.marks = [(OUTSIDE, self.meter.mark())]
        self.started = time.perf_counter(), time.process_time()

    def end(self) -> None:
        """Closes the step that is open, reading all marks at once."""
        if self.step is None:
            return
        self._cut(OUTSIDE)
        self.meter.wait()
        self.step.wall, self.step.cpu = time.perf_counter() - self.started[0], time.process_time() - self.started[1]
        for (name, a), (_, b) in zip(self.marks, self.marks[1:], strict=False):
            self.step.seconds[name] = self.step.seconds.get(name, 0.0) + self.meter.seconds(a, b)
        self.steps.append(self.step)
        self.step = None

    def _cut(self, name: str) -> None:
        """From here on time belongs to `name`."""
        if self.step is None:
            return
        if self.step.mode == "memory" and (peak := self.meter.peak_and_reset()) is not None:
            before = self.marks[-1][0]
            self.step.peaks[before] = max(peak - self.held, self.step.peaks.get(before, 0))
        self.marks.append((name, self.meter.mark()))

    @contextlib.contextmanager
    def phase(self, name: str):
        self.stack.append(name)
        self._cut(name)
        self.ranges.append(self._show(name))
        try:
            yield
        finally:
            self.ranges.pop().close()
            self.stack.pop()
            self._cut(self.stack[-1])

    def switch(self, before: str, after: str) -> None:
        """In the middle of phase `before` begins `after`, until that phase ends: the loss's backward becomes the model's.
        Called from autograd's thread on a GPU, unless the step is traced; a second call changes nothing."""
        if self.step is not None and self.stack[-1] == before:
            self.stack[-1] = after
            self._cut(after)
            self.ranges[-1].close()
            self.ranges[-1] = self._show(after)

    @property
    def tracing(self) -> bool:
        return self.step is not None and self.step.mode == "trace"

    def _show(self, name: str) -> contextlib.ExitStack:
        """Until it is closed: the phase as a range in torch.profiler's trace and in Nsight. Both count ranges by thread, so
        a traced backward stays in ours."""
        shown = contextlib.ExitStack()
        if self.tracing and threading.get_ident() == self.thread:
            if self.nvtx:
                shown.enter_context(torch.cuda.nvtx.range(name))
            shown.enter_context(torch.profiler.record_function(name))
        return shown
