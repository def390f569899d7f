"""divergence: rows of the student's logits against the teacher's, or against its top k."""

import torch
from fastkd.bench.cases.case import BF16, FP32, Case, Inputs, Work, by_rows, normal

from fastkd import functional

KINDS = ("forward_kl", "reverse_kl", "skew_kl", "jsd", "tvd", "soft_ce", "mse")
SIZES = {"N": "tokens", "V": "vocabulary"}
TOP_K = {**SIZES, "K": "tokens kept"}
CANDIDATES = {"B": "examples", "n": "candidates", "D": "width"}
AXES = {"candidates": CANDIDATES, **dict.fromkeys(KINDS, SIZES), "top_k": TOP_K, "top_k_tail": TOP_K}


def make_logits(case: Case, generator) -> dict:
    rows, vocabulary = case.shape["N"], case.shape["V"]
    teacher = normal(rows, vocabulary, generator=generator, scale=2.0)
    return {"student": teacher + normal(rows, vocabulary, generator=generator), "teacher": teacher}


def make_top_k(case: Case, generator) -> dict:
    """A peaked teacher, as language models are: without a tail, a flat one's rows are a sum that cancels."""
    full = {name: 3.0 * logits for name, logits in make_logits(case, generator).items()}
    log_probs, indices = torch.log_softmax(full["teacher"] / case.options["temperature"], -1).topk(case.shape["K"])
    return {"student": full["student"], "indices": indices, "log_probs": log_probs}


def make_candidates(case: Case, generator) -> dict:
    """Embeddings whose dot products are the student's scores, and the teacher's scores."""
    batch, n, d = (case.shape[axis] for axis in "BnD")
    query, *candidates = (normal(batch, d, generator=generator, scale=d**-0.25) for _ in range(n + 1))
    return {"query": query, "candidates": candidates, "teacher": normal(batch, n, generator=generator)}


def ours(inputs: Inputs, backend: str) -> torch.Tensor:
    return functional.divergence(inputs["student"], inputs["teacher"], backend=backend, **inputs.options)


def ours_top_k(inputs: Inputs, backend: str) -> torch.Tensor:
    options = dict(inputs.options)
    teacher = functional.TopK(inputs["indices"], inputs["log_probs"], tail=options.pop("tail"))
    return functional.divergence(inputs["student"], teacher, backend=backend, **options)


def ours_candidates(inputs: Inputs, backend: str) -> torch.Tensor:
    return functional.divergence(candidate_scores(inputs), inputs["teacher"], backend=backend, **inputs.options)


def candidate_scores(x: dict) -> torch.Tensor:
    """[B, n], of each query and its candidates; eager's too."""
    return (x["query"][:, None] * torch.stack(x["candidates"], 1)).sum(-1)


def in_pieces(inputs: Inputs) -> torch.Tensor:
    return by_rows(functional.divergence, inputs["student"], inputs["teacher"], inputs.options)


def case(kind: str, *sizes: int, dtype=FP32, **more) -> Case:
    shape = dict(zip(AXES[kind], sizes, strict=True))
    if kind == "candidates":
        read = float(sizes[0] * (sizes[1] + 1) * sizes[2])
        return Case(
            "divergence", kind, shape, dtype, make_candidates, ours_candidates, ("query", "candidates"),
            flops=Work(2 * read, 4 * read, 6 * read), bytes=Work(*(dtype.itemsize * n * read for n in (1, 2, 2))),
            options={"kind": "forward_kl", "temperature": 2.0}, **more,
        )  # fmt: skip
    elements, moved = float(sizes[0] * sizes[1]), float(sizes[0] * sizes[1] * dtype.itemsize)
    if kind in KINDS:
        return Case(
            "divergence", kind, shape, dtype, make_logits, ours, ("student",),
            flops=Work(8 * elements, 6 * elements, 12 * elements), bytes=Work(2 * moved, 3 * moved, 3 * moved),
            options={"kind": kind, "temperature": 2.0}, **more,
        )  # fmt: skip
    options = {"kind": "forward_kl", "temperature": 2.0, "tail": True if kind == "top_k_tail" else None}
    return Case(
        "divergence", kind, shape, dtype, make_top_k, ours_top_k, ("student",),
        flops=Work(4 * elements, 3 * elements, 6 * elements),
        bytes=Work(moved + sizes[0] * sizes[2] * 12.0, 2 * moved, 2 * moved), options=options, keep=("log_probs",), **more,
    )  # fmt: skip


CASES = [
    *(case(kind, 512, 30522, quick=kind in ("forward_kl", "jsd"),
           goals={"eager": 7, "compile": 2.5} if kind == "forward_kl" else {"eager": 3}) for kind in KINDS),
    case("forward_kl", 512, 30522, dtype=BF16),
    *(case("forward_kl", *sizes, quick=sizes[0] == 64) for sizes in ((32, 3), (8, 1000), (64, 4096), (16, 30522))),
    case("forward_kl", 509, 28996, goals={"eager": 8, "compile": 2.5}),
    case("forward_kl", 4096, 9),  # token classification
    *(case("forward_kl", 256, v) for v in (1024, 4096, 16384, 65536, 262144)),
    *(case(kind, 512, 30522, 64) for kind in ("top_k", "top_k_tail")),
    case("candidates", 64, 8, 768),
]  # fmt: skip
ON_GPU = [
    case("forward_kl", 8192, 32000, dtype=BF16, goals={"floor": 0.75}, oracle=in_pieces, target="G6 32k"),
    case("forward_kl", 8192, 128256, dtype=BF16, goals={"floor": 0.55, "compile": 2, "liger": 2}, oracle=in_pieces,
         target="G6 128k"),
]  # fmt: skip
