"""gram: the correlation of two self-similarity matrices (FCD), at token level, or at token and sequence level."""

import torch
from fastkd.bench.cases.case import AFTER, BF16, FP32, Case, Gemm, Inputs, Work, normal

from fastkd import functional

SIZES = {"B": "examples", "N": "tokens", "Ds": "student width", "Dt": "teacher width"}
GROUPINGS = {"fcd": "position", "fcd_official": "official", "token": None, "fcd_anisotropic": "position"}
AXES = dict.fromkeys(GROUPINGS, SIZES)
COMMON = 3.0  # of the direction that all states share: a mean cosine of 9 / (9 + 1)


def make(case: Case, generator) -> dict:
    """States; anisotropic ones point the same way, as a transformer's do."""
    batch, length = case.shape["B"], case.shape["N"]
    widths = {"student": case.shape["Ds"], "teacher": case.shape["Dt"]}
    made = {name: normal(batch, length, d, generator=generator) for name, d in widths.items()}
    if case.kind != "fcd_anisotropic":
        return made
    return {name: x + COMMON * normal(x.shape[-1], generator=generator) for name, x in made.items()}


def ours(inputs: Inputs, backend: str) -> torch.Tensor:
    grouping, sides = inputs.options["grouping"], (inputs["student"], inputs["teacher"])
    level = "token" if grouping is None else {"token": 1.0, "sequence": 1.0}
    return functional.gram_correlation_loss(*sides, level=level, grouping=grouping or "position", backend=backend)


def case(kind: str, batch: int, length: int, ds: int, dt: int, dtype=FP32, **more) -> Case:
    """Symmetric products of rows, and their mixture @ [rows, ds]; or of features, where that is less."""
    forward, pull, gemms = 0.0, 0.0, []
    for rows, groups in [(length, batch)] if kind == "token" else [(length, batch), (batch, length)]:
        fewest = groups * rows * min(rows, ds + dt)
        forward, pull = forward + fewest * (ds + dt), pull + 2.0 * fewest * ds
        gemms += [Gemm(rows, ds, rows, groups), Gemm(rows, dt, rows, groups), Gemm(rows, rows, ds, groups, AFTER)]
    read, written = batch * length * (ds + dt) * dtype.itemsize, batch * length * ds * dtype.itemsize
    return Case(
        "gram", kind, dict(zip(SIZES, (batch, length, ds, dt), strict=True)), dtype, make, ours, ("student",),
        flops=Work(forward, forward + pull, forward + pull), bytes=Work(read, read + written, read + written),
        gemms=tuple(gemms), options={"grouping": GROUPINGS[kind]}, **more,
    )  # fmt: skip


CASES = [
    case("fcd", 32, 128, 384, 768, quick=True, goals={"eager": 3.2, "compile": 2.2, "gemms": 1.0}),
    case("fcd_official", 32, 128, 384, 768),
    case("fcd", 16, 512, 768, 1024),
    case("fcd", 32, 128, 384, 768, BF16, goals={"eager": 7, "compile": 3.5}),
    case("fcd_official", 32, 128, 384, 768, BF16),
    case("fcd", 16, 512, 768, 1024, BF16),
    case("fcd", 4, 32, 384, 768),
    case("fcd", 31, 113, 383, 761, goals={"eager": 3, "compile": 2}),
    *(case("token", 2, n, 384, 768) for n in (128, 512, 2048, 4096)),
    case("fcd_anisotropic", 16, 128, 768, 768, BF16, goals={"error": 0.02}),
]
ON_GPU = [
    case("token", 64, 512, 1024, 1024, BF16, goals={"floor": 0.5, "eager": 2.5, "compile": 2}, target="G8"),
    case("fcd", 32, 128, 768, 768, BF16, goals={"launches": 4, "eager": 6}, target="G9"),
]
