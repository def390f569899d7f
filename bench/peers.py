"""Peers, other people's packages or one more way of writing it: (name, package, needs a GPU, make) by stem.

`make(case)` gives a function of (tensors, options), or the sentence that says why it does not do the same job here.
"""

import torch
import torch.nn.functional as F
from fastkd.bench import baselines
from fastkd.bench.cases.case import Case
from fastkd.bench.cases.linear_divergence import full_logits
from fastkd.bench.drop_ins import DROP_INS
from torch.utils.checkpoint import checkpoint


def checkpointed_chunks(case: Case):
    """TRL's shape before 1.16: 256 tokens at a time in fp32, under activation checkpointing."""

    def chunk(student, head, teacher, teacher_head, kind, temperature):
        logits = F.linear(student.float(), head.float()), F.linear(teacher.float(), teacher_head.float())
        return baselines.divergence.eager(*logits, kind, temperature).sum()

    def run(x, options):
        total, rows = 0.0, x["student_hidden"].shape[0]
        for start in range(0, rows, 256):
            part = slice(start, start + 256)
            sides = x["student_hidden"][part], x["student_head"], x["teacher_hidden"][part], x["teacher_head"]
            total = total + checkpoint(
                chunk, *sides, options["kind"], options["temperature"], use_reentrant=False, preserve_rng_state=False
            )  # the state of random numbers cannot be read while a graph is captured
        return total / rows

    return run


def cdist(case: Case):
    if case.dtype != torch.float32:
        return f"torch.cdist has no {case.dtype_text}"

    def run(x, options):
        sides = [torch.stack([layer.flatten() for layer in side]) for side in baselines.layer_cost.layers_of(x)]
        return (torch.cdist(*sides).square() / sides[0].shape[1] * x["flow"]).sum()

    return run


class Tiled(torch.autograd.Function):
    """Inf-CL's shape: tiles of scores, of which the forward keeps a log-sum-exp per row; the backward makes them again."""

    TILE = 4096

    @staticmethod
    def tiles(query, positive, scale):
        for start in range(0, len(query), Tiled.TILE):
            rows = slice(start, start + Tiled.TILE)
            for begin in range(0, len(positive), Tiled.TILE):
                columns = slice(begin, begin + Tiled.TILE)
                yield rows, columns, (query[rows] @ positive[columns].mT).float() * scale

    @staticmethod
    def forward(ctx, query, positive, scale):
        sums = torch.full((len(query),), -torch.inf, device=query.device)  # [B]
        for rows, _, scores in Tiled.tiles(query, positive, scale):
            sums[rows] = torch.logaddexp(sums[rows], scores.logsumexp(-1))
        ctx.save_for_backward(query, positive, sums)
        ctx.scale = scale
        return (sums - (query.float() * positive.float()).sum(-1) * scale).mean()

    @staticmethod
    def backward(ctx, grad):
        query, positive, sums = ctx.saved_tensors
        sides = [torch.zeros(x.shape, device=x.device) for x in (query, positive)]
        for rows, columns, scores in Tiled.tiles(query, positive, ctx.scale):
            shares = (scores - sums[rows, None]).exp().to(query.dtype)
            sides[0][rows] += shares @ positive[columns]
            sides[1][columns] += shares.mT @ query[rows]
        factor = grad * ctx.scale / len(query)
        own = [(side - other) * factor for side, other in zip(sides, (positive, query), strict=True)]
        return own[0].to(query.dtype), own[1].to(positive.dtype), None


def tiled_contrast(case: Case):
    return lambda x, options: Tiled.apply(x["query"], x["positive"], 1 / options["temperature"])


def cut_cross_entropy(case: Case):
    """Apple's, where the other examples' positives are the vocabulary."""
    if case.dtype == torch.float32:
        return "cut-cross-entropy takes half precision only"
    from cut_cross_entropy import linear_cross_entropy

    def run(x, options):
        labels = torch.arange(len(x["query"]), device=x["query"].device)
        return linear_cross_entropy(x["query"] / options["temperature"], x["positive"], labels)

    return run


MORE = {
    "layer_cost": [
        ("eager stacked", "", False, lambda case: baselines.layer_cost.stacked_case),
        ("cdist", "", False, cdist),
    ],
    "linear_divergence": [("trl-style", "", False, checkpointed_chunks)],
    "transport": [("authors", "ot", False, lambda case: baselines.transport.authors_case)],
    ("layer_cost", "emd_step"): [("authors", "ot", False, lambda case: baselines.transport.authors_step_case)],
    ("linear_divergence", "subset"): [("full logits", "", False, full_logits)],
    ("contrast", "in_batch"): [
        ("inf-cl-style", "", False, tiled_contrast),
        ("cut-cross-entropy", "cut_cross_entropy", True, cut_cross_entropy),
    ],
}
MORE = {key: [*MORE.get(key, ()), *DROP_INS.get(key, ())] for key in (*MORE, *DROP_INS)}
