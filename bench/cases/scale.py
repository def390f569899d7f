"""Cases beyond every day's: the shapes of the GPU targets, and the far ends of the curves (`fastkd bench --scale`).

The curves end at 16k tokens, 256k words, a million negatives, 48×48 layers. Where the float64 reference would hold a whole
score matrix, the oracle computes the same loss in pieces, each recomputed for its gradient.
"""

from collections.abc import Callable, Iterator

import torch
from fastkd.bench.cases import stems
from fastkd.bench.cases.case import ON_GPU, SCALE, Case, Inputs, functional, stem
from torch.utils.checkpoint import checkpoint

FP32, BF16 = torch.float32, torch.bfloat16
PIECE = 512  # rows of a score matrix that an oracle holds at once
EVERY_MODE = ("forward", "backward", "both", "loss_only")

# The GPU targets --------------------------------------------------------------------------------------------------


def by_rows(function: Callable, left: torch.Tensor, right: torch.Tensor, options: dict, piece: int) -> torch.Tensor:
    """The mean of `function` in the reference, pieces of rows at a time: whole, its float64 graph would take 17 times the
    logits, which is more than any card has."""
    options = {**options, "reduction": "sum", "backend": "reference"}
    pieces = [
        checkpoint(function, *sides, use_reentrant=False, preserve_rng_state=False, **options)
        for sides in zip(left.split(piece), right.split(piece), strict=True)
    ]
    return sum(pieces) / len(left)


def divergence_in_pieces(inputs: Inputs) -> torch.Tensor:
    return by_rows(functional().divergence, inputs["student"], inputs["teacher"], inputs.options, PIECE)


def linear_in_pieces(inputs: Inputs) -> torch.Tensor:
    def rows(student, teacher, **options):
        heads = inputs["student_head"], inputs["teacher_head"]
        return functional().linear_divergence(student, heads[0], teacher, heads[1], **options)

    return by_rows(rows, inputs["student_hidden"], inputs["teacher_hidden"], inputs.options, PIECE)


@stem("linear_divergence", ON_GPU)
def linear_on_gpu() -> Iterator[Case]:
    more = {"oracle": linear_in_pieces}
    yield stems.linear_case(
        "forward_kl", 8192, 128256, 4096, 4096, BF16, goal="1.25x of the GEMMs", modes=EVERY_MODE, **more
    )
    yield stems.linear_case("forward_kl", 8192, 128256, 2048, 4096, BF16, goal="1.35x of the GEMMs", **more)


@stem("divergence", ON_GPU)
def divergence_on_gpu() -> Iterator[Case]:
    more = {"goal": "70 % / 50 % of copy, 2x compile", "oracle": divergence_in_pieces}
    for vocabulary in (32000, 128256):
        yield stems.divergence_case("forward_kl", 8192, vocabulary, BF16, **more)


@stem("gram", ON_GPU)
def gram_on_gpu() -> Iterator[Case]:
    yield stems.gram_case("token", 64, 512, 1024, 1024, BF16, goal="half of the tensor floor, 4x eager")
    yield stems.gram_case("fcd", 32, 128, 768, 768, BF16, goal="4 launches, 6x eager")


@stem("relation", ON_GPU)
def relation_on_gpu() -> Iterator[Case]:
    goal = "8x eager at a twentieth of its memory"
    yield stems.relation_case(64, 16, 512, 64, 3, BF16, goal=goal, oracle=relation_in_pieces)


@stem("transport", ON_GPU)
def transport_on_gpu() -> Iterator[Case]:
    yield stems.transport_case(1024, 12, 24, goal="3x a loop of ot.emd")


@stem("contrast", ON_GPU)
def contrast_on_gpu() -> Iterator[Case]:
    for batch in (32, 256):
        yield stems.queue_case(batch, 65536, 768, BF16, goal="65 % of copy, 2.5x eager")
    yield stems.batch_case(32768, 768, BF16, goal="3x Inf-CL's way, cut-cross-entropy's speed")


# The far ends of the curves ---------------------------------------------------------------------------------------


def gram_in_pieces(inputs: Inputs) -> torch.Tensor:
    """1 - Pearson of two Gram matrices from their moments, summed over pieces of rows; the mean over the batch."""
    student, teacher = (torch.nn.functional.normalize(inputs[name], dim=-1) for name in ("student", "teacher"))

    def moments(s, t, start):
        a, b = (x[start : start + PIECE] @ x.mT for x in (s, t))  # [PIECE, N]
        return torch.stack([a.sum(), b.sum(), (a * a).sum(), (b * b).sum(), (a * b).sum()])

    losses, length = [], student.shape[1]
    for s, t in zip(student, teacher, strict=True):
        pieces = [checkpoint(moments, s, t, i, use_reentrant=False) for i in range(0, length, PIECE)]
        a, b, aa, bb, ab = sum(pieces) / length**2
        covariance = ab - a * b
        spread = ((aa - a * a) * (bb - b * b)).sqrt()
        losses.append(1 - covariance / (spread + 1e-6 / length**2))
    return sum(losses) / len(losses)


def relation_in_pieces(inputs: Inputs) -> torch.Tensor:
    """KL between softmaxed self-relations, pieces of query rows at a time."""

    def rows(s, t, start):
        log_q, log_p = ((x[..., start : start + PIECE, :] @ x.mT * x.shape[-1] ** -0.5).log_softmax(-1) for x in (s, t))
        return (log_p.exp() * (log_p - log_q)).sum()

    total = 0.0
    for s, t in zip(inputs["student"], inputs["teacher"], strict=True):
        length = s.shape[-2]
        pieces = [checkpoint(rows, s, t, i, use_reentrant=False) for i in range(0, length, PIECE)]
        total = total + sum(pieces) / s[..., 0].numel()
    return total


BOTH = {"modes": ("both",)}


@stem("gram", SCALE)
def gram_scale() -> Iterator[Case]:
    for length in (8192, 16384):
        yield stems.gram_case("token", 2, length, 384, 768, FP32, sweep="N", oracle=gram_in_pieces, **BOTH)
    for batch in (8, 32, 128, 512):
        yield stems.gram_case("fcd", batch, 64, 384, 768, FP32, sweep="B", **BOTH)


@stem("relation", SCALE)
def relation_scale() -> Iterator[Case]:
    for length in (4096, 8192, 16384):
        yield stems.relation_case(1, 12, length, 64, 1, FP32, sweep="L", oracle=relation_in_pieces, **BOTH)
    for batch in (1, 4, 16, 64):
        yield stems.relation_case(batch, 12, 128, 64, 3, BF16, sweep="B", **BOTH)


@stem("layer_cost", SCALE)
def layer_scale() -> Iterator[Case]:
    for batch in (2, 8, 32, 128):
        yield stems.layer_case(4, 12, batch, 128, 312, BF16, sweep="B", **BOTH)
    for length in (128, 512, 2048):  # on a CPU the identity's side is the cheaper one from a few hundred tokens on
        yield stems.attention_case(3, 6, 1, 12, length, 64, FP32, sweep="S", **BOTH)


@stem("transport", SCALE)
def transport_scale() -> Iterator[Case]:
    for layers in (6, 12, 24, 48):
        yield stems.transport_case(64, layers, layers, sweep="N")
    for problems in (1, 16, 256, 4096):
        yield stems.transport_case(problems, 12, 24, sweep="P")


def nce_in_pieces(inputs: Inputs) -> torch.Tensor:
    """A few examples at a time: each gathers its negatives."""

    def side(anchor, bank):
        def rows(query, index, **options):
            return functional().nce_loss(query, inputs[bank], index, **options)

        return by_rows(rows, inputs[anchor], inputs["index"], inputs.options, 4)

    return side("query_t", "bank_s") + side("query_s", "bank_t")


@stem("contrast", SCALE)
def contrast_scale() -> Iterator[Case]:
    for batch in (8, 32, 128, 512):
        yield stems.queue_case(batch, 16384, 128, BF16, sweep="B", **BOTH)
    for k in (1024, 8192, 65536):
        yield stems.gather_case(32, k, 128, 262144, sweep="K", oracle=nce_in_pieces, **BOTH)


@stem("divergence", SCALE)
def divergence_scale() -> Iterator[Case]:
    for rows in (16, 64, 256, 1024):
        yield stems.divergence_case("forward_kl", rows, 30522, BF16, sweep="N", **BOTH)


@stem("linear_divergence", SCALE)
def linear_scale() -> Iterator[Case]:
    for vocabulary in (32768, 65536, 131072, 262144):
        yield stems.linear_case("forward_kl", 256, vocabulary, 256, 512, FP32, sweep="V", **BOTH)
    for rows in (512, 2048, 8192):
        more = {"sweep": "R", "oracle": linear_in_pieces, **BOTH}
        yield stems.linear_case("forward_kl", rows, 131072, 256, 512, FP32, **more)
