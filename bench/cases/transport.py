"""transport: exact optimal transport, many small problems at once (BERT-EMD)."""

import importlib.util

import torch
from fastkd.bench.cases.case import Case, Inputs, Work

from fastkd import functional

SIZES = {"P": "problems", "N": "student layers", "M": "teacher layers"}
AXES = {"exact": SIZES}


def make(case: Case, generator) -> dict:
    count, n, m = (case.shape[axis] for axis in "PNM")
    marginals = [torch.rand(count, size, generator=generator) + 0.1 for size in (n, m)]
    a, b = (mass / mass.sum(-1, keepdim=True) for mass in (x.double() for x in marginals))
    return {"cost": torch.rand(count, n, m, generator=generator), "a": a, "b": b}


def ours(inputs: Inputs, backend: str) -> torch.Tensor:
    return functional.transport(inputs["cost"], inputs["a"], inputs["b"], backend=backend).value.sum()


def by_pot(inputs: Inputs) -> torch.Tensor:
    """Exact as the reference is, which is a page of Python, and too slow for problems of this size."""
    from ot import emd

    problems = zip(*(inputs[name].detach().cpu().unbind() for name in ("a", "b", "cost")), strict=True)
    flow = torch.stack([torch.from_numpy(emd(*(x.numpy() for x in each))) for each in problems])  # [P, N, M]
    return (flow.to(inputs["cost"]) * inputs["cost"]).sum()


def case(kind: str, count: int, n: int, m: int, dtype=None, **more) -> Case:
    """Every cost is priced at least once; the pivots on top depend on the numbers, so the floor is far away. Always float64."""
    entries, large = 1.0 * count * n * m, max(n, m) > 64
    return Case(
        "transport", kind, {"P": count, "N": n, "M": m}, torch.float64, make, ours, ("cost",),
        flops=Work(2 * entries, entries, 3 * entries), bytes=Work(16 * entries, 16 * entries, 24 * entries),
        modes=("forward",), oracle=by_pot if large and importlib.util.find_spec("ot") else None, **more,
    )  # fmt: skip


CASES = [
    case("exact", 384, 12, 24, goals={"authors": 10}),
    case("exact", 64, 4, 12, quick=True),
    case("exact", 1, 4, 12),
    case("exact", 32, 48, 48, goals={"authors": 8}),
    *(case("exact", 1, n, n) for n in (10, 50, 100, 200, 500)),
]
ON_GPU = [case("exact", 1024, 12, 24, goals={"authors": 3}, target="G11")]
