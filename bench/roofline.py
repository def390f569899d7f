"""The roofline of this machine, measured first and in the same process: copy bandwidth, GEMM rate, the exact GEMMs."""

import math
import statistics
from collections.abc import Callable

import torch
from fastkd.bench.cases.case import Case, Gemm
from fastkd.bench.measure import Task

BATCH_BYTES = 4 << 30  # of a batched product, factors and all, that are there at once


def copy_size(moved: float) -> int:
    """Bytes read plus written by the copy that stands for `moved` bytes: the next power of two, 1 MiB to 1 GiB."""
    return 1 << min(30, max(20, math.ceil(math.log2(moved))))


def floor(flops: float, moved: float, copy_rate: float, gemm_rate: float) -> tuple[float, str]:
    """The fewest seconds the work can take allow, and which of the two bounds it is."""
    by_copy, by_gemm = moved / copy_rate, flops / gemm_rate
    return (by_copy, "copy") if by_copy >= by_gemm else (by_gemm, "gemm")


def best(timer, run: Callable, samples: int = 7) -> float:
    """Seconds of the fastest of a few calls: a bound is what the machine can do, not what it does on average."""
    task = Task("roofline", lambda _: run())
    timer.sample(task, 1)
    return min(timer.sample(task, 1) for _ in range(samples))


class Roofline:
    """Remembers the best rate it has seen; always warm-cache numbers, the harder yardstick.

    A machine has slow minutes. `again` measures anew, so that a bound from one of them does not stand over a fast case.
    The random numbers are its own: the device's generator may be left unusable by a provider whose graph capture failed.
    """

    def __init__(self, device: torch.device, timer):
        self.device, self.timer = device, timer
        self.generator = torch.Generator(device)
        self.copies: dict[int, float] = {}
        self.gemm_rates: dict[torch.dtype, float] = {}

    def copy_rate(self, moved: float) -> float:
        """Bytes per second, read plus written, of a copy about as large as the case."""
        size = copy_size(moved)
        if size not in self.copies:
            self.measure_copy(size)
        return self.copies[size]

    def gemm_rate(self, dtype: torch.dtype) -> float:
        """FLOP per second of a large square product in this dtype, on random data."""
        if dtype not in self.gemm_rates:
            self.measure_gemm(dtype)
        return self.gemm_rates[dtype]

    def random(self, *size: int) -> torch.Tensor:
        return torch.randn(*size, device=self.device, generator=self.generator)

    def measure_copy(self, size: int) -> None:
        source = self.random(size // 8)
        target = torch.empty_like(source)
        rate = size / best(self.timer, lambda: target.copy_(source))
        self.copies[size] = max(rate, self.copies.get(size, 0.0))

    def measure_gemm(self, dtype: torch.dtype) -> None:
        side = 8192 if self.device.type == "cuda" else 2048
        a, b = (self.random(side, side).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        rate = 2.0 * side**3 / best(self.timer, lambda: torch.mm(a, b, out=out), 5)
        self.gemm_rates[dtype] = max(rate, self.gemm_rates.get(dtype, 0.0))

    def again(self, case: Case, mode: str) -> None:
        self.measure_copy(copy_size(case.bytes.of(mode)))
        self.measure_gemm(case.dtype)

    def floor_of(self, case: Case, mode: str) -> tuple[float, str]:
        moved, flops = case.bytes.of(mode), case.flops.of(mode)
        return floor(flops, moved, self.copy_rate(moved), self.gemm_rate(case.dtype))

    def gemm_seconds(self, gemm: Gemm, dtype: torch.dtype, samples: int = 7) -> float:
        """One bare product of the shape, into a preallocated output; the median, as for the providers. Of a batch that is
        larger than some gigabytes a part is measured, as many times as it takes."""
        numbers = gemm.rows * gemm.inner + gemm.inner * gemm.columns + gemm.rows * gemm.columns
        batch = max(1, min(gemm.batch, BATCH_BYTES // (numbers * dtype.itemsize)))
        lead = () if batch == 1 else (batch,)
        a = self.random(*lead, gemm.rows, gemm.inner).to(dtype)
        b = self.random(*lead, gemm.inner, gemm.columns).to(dtype)
        out = torch.empty(*lead, gemm.rows, gemm.columns, device=self.device, dtype=dtype)
        task = Task("gemm", lambda _: torch.matmul(a, b, out=out))
        self.timer.sample(task, 1)
        return statistics.median(self.timer.sample(task, 1) for _ in range(samples)) * gemm.batch / batch

    def gemms_of(self, case: Case) -> dict[str, float]:
        """mode -> seconds of all bare products that the mode needs; each measured once."""
        seconds = {gemm: self.gemm_seconds(gemm, case.dtype) for gemm in dict.fromkeys(case.gemms)}
        return {mode: sum(seconds[g] for g in case.gemms if mode in g.modes) for mode in case.modes} if seconds else {}
