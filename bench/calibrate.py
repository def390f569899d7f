"""`fastkd bench --calibrate`: each size of fastkd.thresholds measured here, PyTorch and kernels in interleaved rounds."""

import json
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from fastkd.bench import machine, measure
from torch import Tensor

from fastkd import atomic_write, functional, thresholds
from fastkd.compat import soft_labels

ROUNDS, BUDGET = 15, 2.0  # seconds of one size


def unit(rows: int, width: int = 128, learns: bool = True) -> Tensor:
    return F.normalize(torch.randn(rows, width), dim=1).requires_grad_(learns)


def in_batch(size: int) -> tuple[Callable, list]:
    leaves = [unit(size, 384), unit(size, 384)]
    return lambda: functional.info_nce_loss(*leaves, None), leaves


def bank(size: int) -> tuple[Callable, list]:
    query, positive, rows = unit(32), unit(32, learns=False), unit(size // 32, learns=False)
    return lambda: functional.info_nce_loss(query, positive, rows), [query]


def linear_divergence(size: int) -> tuple[Callable, list]:
    rows = math.isqrt(size) // 4
    student, teacher = ([unit(count, 256) for count in (rows, size // rows)] for _ in range(2))
    return lambda: functional.linear_divergence(*student, *(x.detach() for x in teacher)), student


def unit_linear(size: int) -> tuple[Callable, list]:
    x, layer = torch.randn(size, 6 * 768).requires_grad_(), torch.nn.Linear(6 * 768, 128)
    return lambda: functional.unit_linear(x, layer.weight, layer.bias).sum(), [x, layer.weight, layer.bias]


def softened(size: int) -> tuple[Callable, list]:
    student, teacher = torch.randn(size // 256, 256).requires_grad_(), torch.randn(size // 256, 256)

    def loss():
        if soft_labels.takes(student, teacher):
            return soft_labels.kl_div(student, teacher, 2.0, "batchmean")
        return F.kl_div(F.log_softmax(student / 2, 1), F.softmax(teacher / 2, 1), reduction="batchmean")

    return loss, [student]


# name -> what makes a call of 2^n, and n
CASES = {
    "in_batch": (in_batch, range(4, 12)), "bank": (bank, range(9, 22, 2)),
    "linear_divergence": (linear_divergence, range(10, 23, 2)), "unit_linear": (unit_linear, range(3, 12)),
    "soft_labels": (softened, range(9, 20)),
}  # fmt: skip


def cut(sizes: Sequence[int], small: Sequence[float], large: Sequence[float]) -> int:
    """Up to which size `small` should serve: the sum of logarithms of the times is least."""
    gains = [math.log(b / a) for a, b in zip(small, large, strict=True)]
    best = max(range(len(sizes) + 1), key=lambda count: sum(gains[:count]))
    return thresholds.NEVER if best == 0 else thresholds.ALWAYS if best == len(sizes) else sizes[best - 1]


def times(name: str, timer: measure.Timer) -> tuple[list[int], dict[str, list[float]]]:
    """Milliseconds of loss and gradients at each size, by whoever computes them."""
    make, exponents = CASES[name]
    found: dict[str, list[float]] = {thresholds.KERNELS: [], thresholds.PYTORCH: []}
    for n in exponents:
        call, leaves = make(2**n)
        tasks = [measure.make_task(way, "both", _by(name, way, call), leaves) for way in found]
        for way, timing in measure.interleave(tasks, timer, ROUNDS, BUDGET).items():
            found[way].append(timing.median)
    return [2**n for n in exponents], found


def _by(name: str, way: str, call: Callable) -> Callable:
    up_to = thresholds.forced(way)[name]

    def run():
        thresholds.UP_TO[name] = up_to
        return call()

    return run


def calibrate(keep: bool, force: bool = False) -> int:
    """0: measured, and kept in the file if asked to; 2: the machine was busy."""
    cpu, path = torch.device("cpu"), thresholds.file()
    if keep:
        atomic_write.probe(path.parent, "FASTKD_THRESHOLDS")
    if machine.is_busy(cpu, force):
        return 2
    timer, measured = measure.make_timer(cpu, cold=False), {}
    for name, threshold in thresholds.TABLE.items():
        sizes, found = times(name, timer)
        thresholds.UP_TO[name] = measured[name] = cut(sizes, found[threshold.small], found[threshold.large])
        print(f"\n{threshold.what}\n{threshold.unit:>10}", *(f"{way:>12}" for way in found), "  ms")
        for row in zip(sizes, *found.values(), strict=True):
            print(f"{row[0]:10}", *(f"{value:12.4f}" for value in row[1:]))
    if keep:
        with atomic_write.replacing(path) as scratch:
            scratch.write_text(json.dumps(measured, indent=1) + "\n")
        print(f"\nwritten: {path}; delete it to return to the shipped table")
    print("", *thresholds.lines(), sep="\n")
    return 0
