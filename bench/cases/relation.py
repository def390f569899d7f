"""relation: KL between softmaxed self-relations (MiniLM, MiniLMv2)."""

import torch
from fastkd.bench.cases import case as case_module
from fastkd.bench.cases.case import AFTER, BF16, FP32, Case, Gemm, Inputs, Work, normal
from torch.utils.checkpoint import checkpoint

from fastkd import functional

SIZES = {"B": "examples", "H": "heads", "L": "tokens", "d": "head width", "R": "relations"}
AXES = {"self": SIZES}


def make(case: Case, generator) -> dict:
    size = [case.shape[axis] for axis in "BHLd"]
    count = case.shape["R"]
    return {side: [normal(*size, generator=generator) for _ in range(count)] for side in ("student", "teacher")}


def ours(inputs: Inputs, backend: str) -> torch.Tensor:
    return functional.relation_kl_loss(inputs["student"], inputs["teacher"], backend=backend)


def in_pieces(inputs: Inputs) -> torch.Tensor:
    """Pieces of query rows at a time."""
    piece = case_module.PIECE

    def rows(s, t, start):
        log_q, log_p = ((x[..., start : start + piece, :] @ x.mT * x.shape[-1] ** -0.5).log_softmax(-1) for x in (s, t))
        return (log_p.exp() * (log_p - log_q)).sum()

    total = 0.0
    for s, t in zip(inputs["student"], inputs["teacher"], strict=True):
        pieces = [checkpoint(rows, s, t, i, use_reentrant=False) for i in range(0, s.shape[-2], piece)]
        total = total + sum(pieces) / s[..., 0].numel()
    return total


def case(kind: str, batch: int, heads: int, length: int, d: int, count: int, dtype=FP32, **more) -> Case:
    """Two score tiles forward (symmetric, so half of each), and dS @ X backward."""
    groups = count * batch * heads
    flops, moved = 2.0 * groups * length * length * d, 1.0 * groups * length * d * dtype.itemsize
    return Case(
        "relation", kind, dict(zip(SIZES, (batch, heads, length, d, count), strict=True)), dtype, make, ours, ("student",),
        flops=Work(flops, 2 * flops, 2 * flops), bytes=Work(2 * moved, 3 * moved, 3 * moved),
        gemms=(Gemm(length, d, length, 2 * groups), Gemm(length, length, d, groups, AFTER)), **more,
    )  # fmt: skip


CASES = [
    case("self", 8, 12, 256, 64, 3, goals={"eager": 4, "memory": 0.1}),
    case("self", 8, 12, 256, 64, 3, BF16),
    case("self", 2, 12, 64, 64, 3, quick=True),
    *(case("self", 1, 12, n, 64, 1) for n in (128, 512, 2048)),
]
ON_GPU = [case("self", 64, 16, 512, 64, 3, BF16, goals={"eager": 5, "compile": 4, "memory": 0.05}, oracle=in_pieces,
               target="G7")]  # fmt: skip
