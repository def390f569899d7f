"""How a number comes about: tasks, timers, interleaved rounds, order statistics, peak memory.

A task has an untimed `prepare` and a timed `run`. Every call allocates its outputs afresh and drops them inside the
timed region, as a training step does. Timers only know tasks, so that a fake one can stand in for a GPU.
"""

import ctypes
import gc
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from fastkd.bench.intervals import LEAST_SAMPLES, median_interval, quantile

MODES = ("forward", "backward", "both", "loss_only")
FLUSH_BYTES = 512 << 20  # twice the largest L2/L3 that we know of on a GPU; on a CPU the caches are asked


@dataclass(frozen=True)
class Task:
    """One provider in one mode. `prepare()` is not timed, `run(state)` is."""

    provider: str
    run: Callable
    prepare: Callable = lambda: None


@dataclass(frozen=True)
class Timing:
    """Order statistics of one task, in milliseconds per call."""

    rounds: int
    number: int
    median: float
    minimum: float
    p20: float
    p80: float
    low: float  # 95 % interval of the median
    high: float
    samples: tuple[float, ...] = ()


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


def summarise(seconds: Sequence[float], number: int) -> Timing:
    """Seconds per call to a Timing in milliseconds."""
    milliseconds = [1e3 * sample for sample in seconds]
    low, high = median_interval(milliseconds)
    return Timing(
        rounds=len(milliseconds),
        number=number,
        median=statistics.median(milliseconds),
        minimum=min(milliseconds),
        p20=quantile(milliseconds, 0.2),
        p80=quantile(milliseconds, 0.8),
        low=low,
        high=high,
        samples=tuple(milliseconds),
    )


def nothing() -> None:
    """The flush of a warm measurement."""


class WallTimer:
    """Wall clock for CPU tasks. `flush` runs before every sample, outside of it."""

    launch = "plain"

    def __init__(self, flush: Callable = nothing, clock: Callable = time.perf_counter):
        self.flush, self.clock = flush, clock

    def sample(self, task: Task, number: int) -> float:
        states = [task.prepare() for _ in range(number)]
        self.flush()
        start = self.clock()
        for i in range(number):
            task.run(states[i])
        elapsed = self.clock() - start
        return elapsed / number


class EventTimer:
    """CUDA events around every single call, the L2 flushed before each. `Event` and `synchronize` can be faked."""

    launch = "plain"

    def __init__(self, flush: Callable = nothing, event: Callable | None = None, synchronize: Callable | None = None):
        self.flush = flush
        self.event = event or (lambda: torch.cuda.Event(enable_timing=True))
        self.synchronize = synchronize or torch.cuda.synchronize

    def sample(self, task: Task, number: int) -> float:
        pairs = []
        for _ in range(number):
            state = task.prepare()
            self.flush()  # a long kernel: the host runs ahead, so that the events time the device, not the launch
            start, end = self.event(), self.event()
            start.record()
            task.run(state)
            end.record()
            pairs.append((start, end))
        self.synchronize()
        return 1e-3 * sum(start.elapsed_time(end) for start, end in pairs) / number


class GraphTimer(EventTimer):
    """The same events around the replay of captured graphs; `capture_task` makes such tasks."""

    launch = "graph"


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


def make_flush(device: torch.device, size: int) -> Callable:
    """A function that evicts the caches of the device by writing `size` bytes."""
    buffer = torch.empty(size // 4, dtype=torch.int32, device=device)
    return lambda: buffer.zero_()


def cache_bytes(path: str = "/sys/devices/system/cpu/cpu0/cache/index3/size") -> int:
    """The last-level cache of this CPU, 32 MiB where the system does not say."""
    try:
        with open(path) as handle:
            text = handle.read().strip()
    except OSError:
        return 32 << 20
    return int(text.rstrip("KMG")) * {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1], 1)


def make_timer(device: torch.device, cold: bool, launch: str = "plain"):
    """The timer of a device. A GPU is always measured cold; a CPU as the previous provider left it, or cold."""
    if device.type == "cuda":
        kind = GraphTimer if launch == "graph" else EventTimer
        return kind(make_flush(device, FLUSH_BYTES))
    return WallTimer(make_flush(device, 2 * cache_bytes()) if cold else nothing)


def cache_state(device: torch.device, cold: bool) -> str:
    """What the `cache` column says."""
    return "cold (flushed)" if cold or device.type == "cuda" else "as the previous provider left it"


def calls_per_sample(seconds: float, least: float = 1e-3, most: int = 64) -> int:
    """So many calls that a sample is not shorter than a millisecond."""
    return max(1, min(most, round(least / max(seconds, 1e-9))))


def interleave(tasks: Sequence[Task], timer, rounds: int, budget: float, clock: Callable = time.perf_counter) -> dict:
    """A B C A B C …: `rounds` rounds, fewer (never under six) once `budget` seconds are spent. name -> Timing."""
    numbers = {task.provider: calls_per_sample(timer.sample(task, 1)) for task in tasks}
    samples = {task.provider: [] for task in tasks}
    start = clock()
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for done in range(rounds):
            if done >= LEAST_SAMPLES and clock() - start > budget:
                break
            for task in tasks:
                samples[task.provider].append(timer.sample(task, numbers[task.provider]))
    finally:
        if collecting:
            gc.enable()
    return {name: summarise(values, numbers[name]) for name, values in samples.items()}


# Peak extra memory of one call, results included, inputs excluded -------------------------------------------------


def status_bytes(field: str) -> int:
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def reset_peak() -> None:
    """Hands the heap's free pages back, then restarts the kernel's high-water mark of this process (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as handle:
        handle.write("5")


def peak_by_kernel(task: Task) -> int:
    state = task.prepare()
    reset_peak()
    before = status_bytes("VmRSS")
    task.run(state)
    return max(0, status_bytes("VmHWM") - before)


def peak_by_sampling(task: Task, interval: float = 5e-4) -> int:
    """Where the kernel keeps no mark that one can reset: a thread that reads the resident size."""
    import psutil

    process, done, seen = psutil.Process(), threading.Event(), []

    def watch():
        while not done.is_set():
            seen.append(process.memory_info().rss)
            time.sleep(interval)

    state = task.prepare()
    gc.collect()
    before = process.memory_info().rss
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        task.run(state)
    finally:
        done.set()
        watcher.join()
    return max(0, max(seen, default=before) - before)


def peak_on_cuda(task: Task) -> int:
    state = task.prepare()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    task.run(state)
    torch.cuda.synchronize()
    return max(0, torch.cuda.max_memory_allocated() - before)


KERNEL_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")


def count_launches(task: Task, device: torch.device) -> int | None:
    """Kernels that one call starts, counted by the profiler; None on a CPU, where nothing is launched."""
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    state = task.prepare()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        task.run(state)
        torch.cuda.synchronize()
    return sum(event.name in KERNEL_LAUNCHES for event in profiler.events())


def peak_memory(task: Task, device: torch.device) -> tuple[int | None, str]:
    """Bytes and how they were measured; None with the reason where this machine offers no way."""
    if device.type == "cuda":
        return peak_on_cuda(task), "torch.cuda.max_memory_allocated"
    try:
        return peak_by_kernel(task), "VmHWM after clear_refs and malloc_trim"
    except (OSError, AttributeError):
        pass
    try:
        return peak_by_sampling(task), "resident size sampled every 0.5 ms"
    except ImportError:
        return None, "not measured: neither /proc nor psutil"
