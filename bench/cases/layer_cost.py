"""layer_cost: student layers × teacher layers (BERT-EMD, TinyBERT, PKD), of hidden states or of attention."""

import torch
from fastkd.bench.cases.case import AFTER, BF16, FP32, Case, Gemm, Inputs, Work, normal

from fastkd import functional

LAYERS = {"N": "student layers", "M": "teacher layers", "B": "examples"}
HIDDEN = {**LAYERS, "S": "tokens", "D": "width"}
AXES = {"hidden": HIDDEN, "attention": {**LAYERS, "H": "heads", "S": "tokens", "d": "head width"}, "emd_step": HIDDEN}


def sparse_flow(rows: int, columns: int) -> torch.Tensor:
    """A vertex of the uniform transport problem (north-west corner): at most N + M - 1 entries are not zero."""
    flow, supply, demand = torch.zeros(rows, columns), [1.0 / rows] * rows, [1.0 / columns] * columns
    i = j = 0
    while i < rows and j < columns:
        amount = min(supply[i], demand[j])
        flow[i, j] = amount
        supply[i] -= amount
        demand[j] -= amount
        i, j = (i + 1, j) if supply[i] <= demand[j] else (i, j + 1)
    return flow  # [N, M]


def make(case: Case, generator) -> dict:
    """Layers [B, S, D], or queries and keys [B, H, S, d]; the flow that weighs the costs, unless it is part of the case."""
    shape = case.shape
    size = [shape[axis] for axis in shape if axis not in "NM"]
    names = {f"{side}{part}": shape[axis] for side, axis in (("student", "N"), ("teacher", "M"))
             for part in (("_q", "_k") if case.kind == "attention" else ("s",))}  # fmt: skip
    made = {name: [normal(*size, generator=generator) for _ in range(count)] for name, count in names.items()}
    return made if case.kind == "emd_step" else {**made, "flow": sparse_flow(shape["N"], shape["M"])}


def ours_hidden(inputs: Inputs, backend: str) -> torch.Tensor:
    return (functional.layer_costs(inputs["students"], inputs["teachers"], backend=backend) * inputs["flow"]).sum()


def ours_attention(inputs: Inputs, backend: str) -> torch.Tensor:
    sides = [list(zip(inputs[f"{s}_q"], inputs[f"{s}_k"], strict=True)) for s in ("student", "teacher")]
    return (functional.attention_costs(*sides, backend=backend) * inputs["flow"]).sum()


def ours_step(inputs: Inputs, backend: str) -> torch.Tensor:
    """BERT-EMD's step: costs and their transport."""
    costs = functional.layer_costs(inputs["students"], inputs["teachers"], backend=backend)
    return functional.transport(costs, backend="auto" if backend == "triton" else backend).value


def attention_work(n: int, m: int, length: int, d: int) -> Work:
    """FLOPs of one head, the cheaper way: every layer's scores [S, S]; or, as <Q K^T, R L^T> = <Q^T R, K^T L>, products
    [d, d] of queries and of keys, half of one with itself. At most N + M - 1 flows pull at a student."""
    scores, features, flows = 2.0 * length * length * d, 2.0 * length * d * d, n + m - 1
    of_scores, pulls_of_scores = (n + m) * scores, 2 * n * scores
    of_features, pulls = (n + m + 2 * n * m) * features, 2 * (n + flows) * features
    pulls_alone = (n + 2 * flows) * features + pulls
    return Work(
        min(of_scores, of_features),
        min(of_scores + pulls_of_scores, pulls_alone),
        min(of_scores + min(pulls_of_scores, pulls_alone), of_features + pulls),
    )


def case(kind: str, *sizes: int, dtype=FP32, **more) -> Case:
    """Forward reads every layer once; backward reads them again (at most N + M - 1 flows) and writes N gradients."""
    shape = dict(zip(AXES[kind], sizes, strict=True))
    n, m, batch, length = (shape[axis] for axis in "NMBS")
    if kind == "attention":
        heads, d = batch * shape["H"], shape["d"]
        work, states = attention_work(n, m, length, d), 2.0 * heads * length * d
        flops = Work(*(heads * x for x in (work.forward, work.backward, work.both)))
        more["gemms"] = Gemm(length, d, length, (n + m) * heads), Gemm(length, length, d, 2 * n * heads, AFTER)
        leaves, ours = ("student_q", "student_k"), ours_attention
    else:
        states = float(batch * length * shape["D"])
        pairs, pulls = 3.0 * n * m * states, 2.0 * (n + m) * states
        flops, leaves = Work(pairs, pulls, pairs + pulls), ("students",)
        ours = ours_step if kind == "emd_step" else ours_hidden
    moved = states * dtype.itemsize
    return Case(
        "layer_cost", kind, shape, dtype, make, ours, leaves, flops=flops,
        bytes=Work((n + m) * moved, (2 * n + m) * moved, (2 * n + m) * moved),
        keep=() if kind == "emd_step" else ("flow",), **more,
    )  # fmt: skip


CASES = [
    case("hidden", 6, 12, 32, 128, 768, goals={"authors": 10, "compile": 2.2, "floor": 0.48}),
    case("hidden", 6, 12, 32, 128, 768, dtype=BF16, target="G10"),
    case("hidden", 4, 12, 8, 64, 312, quick=True),
    case("hidden", 1, 1, 32, 128, 768),
    case("attention", 6, 12, 8, 12, 128, 64),
    *(case("hidden", n, n, 8, 128, 256) for n in (6, 12, 24, 48)),
    case("emd_step", 6, 12, 32, 128, 768, goals={"authors": 15}, target="G10 step"),
]
ON_GPU: list[Case] = []
