"""How a number comes about: tasks, timers, interleaved rounds, 95 % intervals, peak memory.

A task has an untimed `prepare` and a timed `run`. Every call allocates its outputs afresh and drops them inside the
timed region, as a training step does. Timers know tasks and meters only, so that fakes can stand in for a GPU.
"""

import contextlib
import ctypes
import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

MODES = ("forward", "backward", "both", "loss_only")
FLUSH_BYTES = 512 << 20  # twice the largest L2/L3 that we know of
LEAST_SAMPLES = 6  # the whole range of five samples holds the median in 93.75 % of cases only
TAIL = 0.025  # outside a 95 % interval, at either end


@dataclass(frozen=True)
class Task:
    """One provider in one mode. `prepare()` is not timed, `run(state)` is."""

    provider: str
    run: Callable
    prepare: Callable = lambda: None


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call, `number` calls to a sample, in the order of the rounds."""

    samples: tuple[float, ...]
    number: int

    @property
    def median(self) -> float:
        return float(np.median(self.samples))

    def columns(self) -> dict:
        """Of a row of the CSV."""
        low, high = median_interval(self.samples)
        p20, p80 = np.quantile(self.samples, (0.2, 0.8)).tolist()
        return {
            "rounds": len(self.samples), "calls_per_sample": self.number, "median_ms": self.median,
            "minimum_ms": min(self.samples), "p20_ms": p20, "p80_ms": p80, "median_low_ms": low, "median_high_ms": high,
        }  # fmt: skip


def rank(count: int) -> int:
    """How many samples may be dropped at either end so that the rest still holds the median with 95 % confidence: the
    number below the median is binomial with probability 1/2."""
    outside = np.cumsum([math.comb(count, i) * 0.5**count for i in range(count)])
    return max(0, int((outside <= TAIL).sum()) - 1)


def median_interval(samples: Sequence[float]) -> tuple[float, float]:
    """Two order statistics; the whole range where the samples are too few for anything narrower."""
    ordered, dropped = sorted(samples), rank(len(samples))
    return ordered[dropped], ordered[-1 - dropped]


def ratio_interval(above: Sequence[float], below: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """Of the ratio of two medians whose samples came in pairs, one of each per round: whole rounds are drawn again
    (bootstrap, always the same draws), so that a slow moment of the machine, which hits both, cancels as it should."""
    rounds = np.random.default_rng(0).integers(len(above), size=(draws, len(above)))
    ratios = np.median(np.asarray(above)[rounds], -1) / np.median(np.asarray(below)[rounds], -1)  # [draws]
    low, high = np.quantile(ratios, (TAIL, 1 - TAIL)).tolist()
    return low, high


def make_task(provider: str, mode: str, call: Callable, leaves: Sequence[torch.Tensor]) -> Task:
    """Forward (graph kept, as in training), backward (its forward is not timed), both, or loss only (no graph)."""

    def loss_only(_):
        with torch.no_grad():
            call()

    def both(_):
        torch.autograd.grad(call(), leaves)

    if mode == "backward":
        return Task(provider, lambda loss: torch.autograd.grad(loss, leaves), prepare=call)
    return Task(provider, {"forward": lambda _: call(), "both": both, "loss_only": loss_only}[mode])


def gradient_in_forward(loss: torch.Tensor) -> bool:
    """Whether the gradient of this loss was made with it, so that a backward alone says nothing about its cost."""
    nodes = [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        kind = getattr(node, "_forward_cls", None)  # of a torch.autograd.Function in Python
        if getattr(node, "gradient_in_forward", getattr(kind, "gradient_in_forward", False)):
            return True
        nodes += [] if node is None else [following for following, _ in node.next_functions]
    return False


class Host:
    """Marks are seconds; memory is the kernel's high-water mark of this process (Linux), elsewhere not known."""

    memory_method = "VmHWM after clear_refs and malloc_trim"

    def mark(self):
        return time.perf_counter()

    def seconds(self, a, b) -> float:
        return b - a

    def wait(self) -> None:
        pass

    def clean(self) -> None:
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)

    def peak_and_reset(self) -> int | None:
        try:
            status = Path("/proc/self/status").read_text()
            Path("/proc/self/clear_refs").write_text("5")
            return int(status.split("VmHWM:")[1].split()[0]) * 1024
        except (OSError, IndexError):
            return None


class Device:
    """Of a GPU: marks are events in the stream, so that a piece is what the device spent; read after the step. Memory is
    what torch's allocator handed out."""

    memory_method = "torch.cuda.max_memory_allocated"

    def mark(self):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, a, b) -> float:
        return 1e-3 * a.elapsed_time(b)

    def wait(self) -> None:
        torch.cuda.synchronize()

    clean = wait

    def peak_and_reset(self) -> int:
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak


class Timer:
    """Seconds per call. The caches are evicted (`flush`) before every sample or, on a GPU, before every call: a long kernel,
    behind which the host runs ahead, so that the events time the device and not the launch."""

    def __init__(self, meter, flush: Callable = lambda: None, every_call: bool = False):
        self.meter, self.flush, self.every_call = meter, flush, every_call

    def sample(self, task: Task, number: int) -> float:
        marks = []
        for calls in [1] * number if self.every_call else [number]:
            states = [task.prepare() for _ in range(calls)]
            self.flush()
            begin = self.meter.mark()
            for i in range(calls):
                task.run(states[i])
            marks.append((begin, self.meter.mark()))
        self.meter.wait()
        return sum(self.meter.seconds(*ends) for ends in marks) / number


def capture_task(provider: str, mode: str, call: Callable, leaves: Sequence[torch.Tensor]) -> Task:
    """The task as CUDA-graph replays. Backward alone is a second graph in the memory pool of its forward.

    What waits for the device fails in the warm-up: a capture that it broke would leave its side stream current, and the
    default generator counting for a graph that never came to be.
    """
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(call(), leaves)
        torch.cuda.set_sync_debug_mode("error")
        try:
            torch.autograd.grad(call(), leaves)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    current.wait_stream(stream)
    plain = make_task(provider, mode, call, leaves)
    first, second, kept = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph(), []
    try:
        if mode == "backward":
            with torch.cuda.graph(first, stream=stream):
                kept.append(call())
            with torch.cuda.graph(second, pool=first.pool(), stream=stream):
                kept.append(torch.autograd.grad(kept[0], leaves))
            return Task(provider, lambda _, held=kept: second.replay(), prepare=first.replay)
        with torch.cuda.graph(first, stream=stream):
            plain.run(None)
        return Task(provider, lambda _, held=kept: first.replay())
    finally:
        torch.cuda.set_stream(current)


def make_timer(device: torch.device, cold: bool) -> Timer:
    """A GPU is always measured cold, its caches evicted by a write; a CPU as the previous provider left it, or cold."""
    on_gpu = device.type == "cuda"
    if not cold and not on_gpu:
        return Timer(Host())
    buffer = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device)
    return Timer(Device() if on_gpu else Host(), buffer.zero_, every_call=on_gpu)


def calls_per_sample(seconds: float, least: float = 1e-3, most: int = 64) -> int:
    """So many calls that a sample is not shorter than a millisecond."""
    return max(1, min(most, round(least / max(seconds, 1e-9))))


def interleave(tasks: Sequence[Task], timer, rounds: int, budget: float, clock: Callable = time.perf_counter) -> dict:
    """A B C A B C …: `rounds` rounds, fewer (never under six) once `budget` seconds are spent. name -> Timing."""
    numbers = {task.provider: calls_per_sample(timer.sample(task, 1)) for task in tasks}
    samples = {task.provider: [] for task in tasks}
    start, collecting = clock(), gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for done in range(rounds):
            if done >= LEAST_SAMPLES and clock() - start > budget:
                break
            for task in tasks:
                samples[task.provider].append(1e3 * timer.sample(task, numbers[task.provider]))
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(values), numbers[name]) for name, values in samples.items()}


def count_launches(task: Task, device: torch.device) -> int | None:
    """Kernels that one call starts, counted by the profiler; None on a CPU, where nothing is launched."""
    if device.type != "cuda":
        return None
    state = task.prepare()
    torch.cuda.synchronize()
    with torch.profiler.profile() as profiler:
        task.run(state)
        torch.cuda.synchronize()
    return sum(event.name.startswith(("cudaLaunchKernel", "cuLaunchKernel")) for event in profiler.events())


def peak_memory(task: Task, device: torch.device) -> tuple[int | None, str]:
    """Bytes of one call, results included and inputs excluded, and how they were measured; None where there is no way."""
    meter, state = Device() if device.type == "cuda" else Host(), task.prepare()
    meter.clean()
    meter.peak_and_reset()
    before = meter.peak_and_reset()
    task.run(state)
    peak = meter.peak_and_reset()
    if before is None or peak is None:
        return None, "not measured: this system keeps no high-water mark that can be reset"
    return max(0, peak - before), meter.memory_method
