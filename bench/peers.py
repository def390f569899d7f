"""Peers, other people's packages or one more way of writing it: (name, package, needs a GPU, make) by stem.

`make(case)` gives a function of (tensors, options), or the sentence that says why it does not do the same job here.
"""

from functools import partial

import torch
import torch.nn.functional as F
from fastkd.bench import baselines
from fastkd.bench.cases.case import Case
from fastkd.bench.cases.linear_divergence import full_logits
from torch.utils.checkpoint import checkpoint


def liger_divergence(case: Case):
    """Liger-Kernel takes log-probabilities or probabilities: the softmaxes before it are ours to make."""
    from liger_kernel import transformers as liger

    before = torch.softmax if case.kind == "tvd" else torch.log_softmax
    if case.kind == "forward_kl":
        loss = liger.LigerKLDIVLoss(reduction="batchmean", log_target=True)
    elif case.kind == "jsd":
        loss = liger.LigerJSD(beta=0.5)
    elif case.kind == "tvd":
        loss = liger.LigerTVDLoss(reduction="batchmean")
    else:
        return f"Liger-Kernel has no {case.kind}"

    def run(x, options):
        temperature = options["temperature"]
        return loss(before(x["student"] / temperature, -1), before(x["teacher"] / temperature, -1)) * temperature**2

    return run


def liger_linear(case: Case):
    """Its chunked loss: beta 0 is forward KL there, no hard-label part."""
    beta = {"forward_kl": 0.0, "jsd": 0.5}.get(case.kind)
    if beta is None:
        return f"Liger-Kernel has no fused linear {case.kind}"
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    temperature = case.options["temperature"]
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, temperature=temperature)

    def run(x, options):
        labels = torch.zeros(x["student_hidden"].shape[0], dtype=torch.long, device=x["student_hidden"].device)
        sides = (x["student_hidden"], x["student_head"], x["teacher_hidden"], x["teacher_head"])
        value = loss(*sides, labels)
        return (value[0] if isinstance(value, tuple) else value) * temperature**2

    return run


TRL_BETAS = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}


def trl_logits(case: Case, ours: bool = False):
    """GKDTrainer's loss, or fastkd's in its place."""
    if case.kind not in TRL_BETAS:
        return f"TRL has no {case.kind}"
    if ours:
        from fastkd.compat.trl import generalized_jsd_loss as loss
    else:
        from trl.experimental.gkd.gkd_trainer import GKDTrainer

        loss = GKDTrainer.generalized_jsd_loss

    def run(x, options):
        temperature, labels = options["temperature"], torch.zeros(x["student"].shape[:-1], dtype=torch.long)
        sides = x["student"], x["teacher"], labels.to(x["student"].device)
        return loss(*sides, beta=TRL_BETAS[case.kind], temperature=temperature) * temperature**2

    return run


def trl_chunked(case: Case, ours: bool = False):
    """DistillationTrainer's loss, with the entropy that it logs; or fastkd's in its place, with the entropy too."""
    kind = case.options["kind"]
    if kind not in TRL_BETAS:
        return f"TRL has no chunked {kind}"
    if ours:
        from fastkd.compat.trl import chunked_divergence_loss as loss
    else:
        from trl.trainer.distillation_trainer import _chunked_divergence_loss as loss

    def run(x, options):
        hidden, heads = (x["student_hidden"], x["teacher_hidden"]), (x["student_head"], x["teacher_head"])
        mask = torch.ones(len(hidden[0]), dtype=torch.long, device=hidden[0].device)
        temperature = options["temperature"]
        return loss(*hidden, *heads, mask, TRL_BETAS[kind], temperature=temperature)[0] * temperature**2

    return run


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
    """Apple's, where the other examples' positives are the words."""
    if case.dtype == torch.float32:
        return "cut-cross-entropy takes half precision only"
    from cut_cross_entropy import linear_cross_entropy

    def run(x, options):
        labels = torch.arange(len(x["query"]), device=x["query"].device)
        return linear_cross_entropy(x["query"] / options["temperature"], x["positive"], labels)

    return run


MORE = {
    "divergence": [
        ("liger", "liger_kernel", True, liger_divergence),
        ("trl", "trl", False, trl_logits),
        ("compat trl", "", False, partial(trl_logits, ours=True)),
    ],
    "layer_cost": [
        ("eager stacked", "", False, lambda case: baselines.layer_cost.stacked_case),
        ("cdist", "", False, cdist),
    ],
    "linear_divergence": [
        ("trl-style", "", False, checkpointed_chunks),
        ("trl", "trl", False, trl_chunked),
        ("compat trl", "", False, partial(trl_chunked, ours=True)),
        ("liger", "liger_kernel", False, liger_linear),
    ],
    "transport": [("authors", "ot", False, lambda case: baselines.transport.authors_case)],
    ("layer_cost", "emd_step"): [("authors", "ot", False, lambda case: baselines.transport.authors_step_case)],
    ("linear_divergence", "subset"): [("full logits", "", False, full_logits)],
    ("contrast", "in_batch"): [
        ("inf-cl-style", "", False, tiled_contrast),
        ("cut-cross-entropy", "cut_cross_entropy", True, cut_cross_entropy),
    ],
}
