"""linear_divergence: the divergence from hidden states and heads (GLMD); logits of neither side are materialised."""

import torch
import torch.nn.functional as F
from fastkd.bench.cases.case import AFTER, BF16, FP32, Case, Gemm, Inputs, Work, by_rows, normal
from fastkd.bench.cases.divergence import KINDS

from fastkd import functional

SIZES = {"R": "tokens", "V": "vocabulary", "Ds": "student width", "Dt": "teacher width"}
AXES = dict.fromkeys((*KINDS, "near_convergence", "subset"), SIZES)
HIDDEN = ("student_hidden", "student_head", "teacher_hidden", "teacher_head")
NEAR = 0.1  # of a logit's spread: a KL of about 5e-3 at temperature 2


def make(case: Case, generator) -> dict:
    """near_convergence: a student that has nearly arrived. subset: the teacher's vocabulary is twice as large, and `kept` of
    it is the student's."""
    rows, vocabulary, ds, dt = (case.shape[axis] for axis in SIZES)

    def head(size: int, d: int, scale: float = 2.0):
        return normal(size, d, generator=generator, scale=scale * d**-0.5)

    sides = [(normal(rows, d, generator=generator), head(vocabulary, d)) for d in (ds, dt)]
    made = dict(zip(HIDDEN, (x for side in sides for x in side), strict=True))
    if case.kind == "near_convergence":
        made["student_hidden"] = made["teacher_hidden"].clone()
        made["student_head"] = made["teacher_head"] + head(vocabulary, dt, 2.0 * NEAR)
    elif case.kind == "subset":
        full = head(2 * vocabulary, dt)
        kept = torch.randperm(2 * vocabulary, generator=generator)[:vocabulary].sort().values
        made |= {"teacher_head": full[kept], "full_head": full, "kept": kept}
    return made


def ours(inputs: Inputs, backend: str) -> torch.Tensor:
    return functional.linear_divergence(*(inputs[name] for name in HIDDEN), backend=backend, **inputs.options)


def full_logits(case: Case):
    """A peer of `subset`: all of the teacher's logits, of which the kept ones are picked; then the same divergence."""

    def run(x, options):
        student, teacher = (
            F.linear(x["student_hidden"], x["student_head"]),
            F.linear(x["teacher_hidden"], x["full_head"]),
        )
        return functional.divergence(student, teacher[:, x["kept"]], **options)

    return run


def in_pieces(inputs: Inputs) -> torch.Tensor:
    def rows(student, teacher, **options):
        heads = inputs["student_head"], inputs["teacher_head"]
        return functional.linear_divergence(student, heads[0], teacher, heads[1], **options)

    return by_rows(rows, inputs["student_hidden"], inputs["teacher_hidden"], inputs.options)


def case(kind: str, rows: int, vocabulary: int, ds: int, dt: int, dtype=FP32, **more) -> Case:
    """Two products forward, two backward (gradient formed in the forward: no recompute); no logits in memory."""
    product = 2.0 * rows * vocabulary
    read, written = ((rows + vocabulary) * width * dtype.itemsize for width in (ds + dt, ds))
    gemms = (Gemm(rows, ds, vocabulary), Gemm(rows, dt, vocabulary),
             Gemm(rows, vocabulary, ds, 1, AFTER), Gemm(vocabulary, rows, ds, 1, AFTER))  # fmt: skip
    return Case(
        "linear_divergence", kind, dict(zip(SIZES, (rows, vocabulary, ds, dt), strict=True)), dtype, make, ours, HIDDEN[:2],
        flops=Work(product * (ds + dt), product * 2 * ds, product * (3 * ds + dt)),
        bytes=Work(read, read + written, read + written), gemms=gemms,
        options={"kind": kind if kind in KINDS else "forward_kl", "temperature": 2.0}, **more,
    )  # fmt: skip


CASES = [
    case("forward_kl", 1024, 32000, 768, 1024, BF16, goals={"eager": 3, "compile": 1.7, "gemms": 1.25, "memory": 0.2}),
    case("forward_kl", 1024, 32000, 768, 1024, goals={"eager": 1.8, "compile": 1.2, "gemms": 1.15}),
    case("jsd", 1024, 32000, 768, 1024, BF16),
    case("forward_kl", 509, 28996, 383, 761, goals={"eager": 1.7, "compile": 1.15}),
    case("forward_kl", 64, 4096, 256, 384, quick=True),
    *(case("forward_kl", n, 15360, 312, 768, BF16) for n in (128, 512, 2048)),
    case("near_convergence", 256, 8192, 256, 256, BF16, goals={"error": 0.1}),
    case("subset", 512, 16384, 512, 512, BF16, goals={"full logits": 1.22}),
]
ON_GPU = [
    case("forward_kl", 8192, 128256, 4096, 4096, BF16, oracle=in_pieces, modes=("forward", "backward", "both", "loss_only"),
         goals={"gemms": 1.15, "eager": 3, "compile": 2, "liger": 1.5, "trl": 1.4, "trl-style": 5}, target="G1"),
    case("jsd", 8192, 128256, 4096, 4096, BF16, oracle=in_pieces, goals={"trl": 1.8}, target="G1 jsd"),
    case("forward_kl", 8192, 128256, 2048, 4096, BF16, goals={"gemms": 1.35}, oracle=in_pieces),
]  # fmt: skip
