"""Rivals that are packages or one more way of writing it: (name, package, needs a GPU, make) by stem.

`make(case)` gives a function of (tensors, options), or the sentence that says why it does not do the same job here.
"""

import torch
import torch.nn.functional as F
from fastkd.bench import baselines
from fastkd.bench.cases.case import Case
from torch.utils.checkpoint import checkpoint


def liger_divergence(case: Case):
    """Liger-Kernel takes log-probabilities or probabilities: the softmaxes before it are ours to make."""
    if case.kind == "forward_kl":
        from liger_kernel.transformers import LigerKLDIVLoss

        loss, before = LigerKLDIVLoss(reduction="batchmean", log_target=True), torch.log_softmax
    elif case.kind == "jsd":
        from liger_kernel.transformers import LigerJSD

        loss, before = LigerJSD(beta=0.5), torch.log_softmax
    elif case.kind == "tvd":
        from liger_kernel.transformers import LigerTVDLoss

        loss, before = LigerTVDLoss(reduction="batchmean"), torch.softmax
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


def checkpointed_chunks(case: Case):
    """TRL's shape: 256 tokens at a time in fp32, under activation checkpointing."""

    def chunk(student, head, teacher, teacher_head, kind, temperature):
        logits = F.linear(student.float(), head.float()), F.linear(teacher.float(), teacher_head.float())
        return baselines.divergence.eager(*logits, kind, temperature).sum()

    def run(x, options):
        total, rows = 0.0, x["student_hidden"].shape[0]
        for start in range(0, rows, 256):
            part = slice(start, start + 256)
            total = total + checkpoint(
                chunk,
                x["student_hidden"][part],
                x["student_head"],
                x["teacher_hidden"][part],
                x["teacher_head"],
                options["kind"],
                options["temperature"],
                use_reentrant=False,
                preserve_rng_state=False,
            )  # fmt: skip (the state of random numbers cannot be read while a graph is captured)
        return total / rows

    return run


def auto_chunker(case: Case):
    """Inductor's AutoChunker, where this torch has it."""
    import torch._inductor.config as inductor

    if not hasattr(inductor, "auto_chunker"):
        return f"torch {torch.__version__} has no AutoChunker"
    function = torch.compile(
        baselines.linear_divergence.eager_case, dynamic=False, options={"auto_chunker.enable": True}
    )
    return lambda x, options: function(x, options)


def cdist(case: Case):
    def run(x, options):
        sides = [torch.stack([layer.flatten() for layer in side]) for side in baselines.layer_cost.layers_of(x)]
        return (torch.cdist(*sides).square() / sides[0].shape[1] * x["flow"]).sum()

    return run if case.dtype == torch.float32 else f"torch.cdist has no {case.dtype_text}"


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


def full_logits(case: Case):
    from fastkd.bench.cases import accuracy

    return accuracy.full_logits(case)


def linear_program(case: Case):
    """SciPy's HiGHS, problem by problem."""
    import numpy as np
    from scipy.optimize import linprog

    count, n, m = (case.shape[axis] for axis in "PNM")
    if count * n * m > 4096:
        return "problem after problem, so many would take minutes"
    constraints = np.concatenate((np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))))

    def run(x, options):
        total = 0.0
        for cost, a, b in zip(x["cost"], x["a"], x["b"], strict=True):
            masses = torch.cat((a, b)).cpu().numpy()
            flow = linprog(cost.detach().cpu().numpy().ravel(), A_eq=constraints, b_eq=masses, method="highs").x
            total = total + (torch.from_numpy(flow).to(cost).view(n, m) * cost).sum()
        return total

    return run


def refuse(reason: str):
    return lambda case: reason


NOT_EXACT = "Sinkhorn and proximal iterations: not the exact plan (errors from 1 % up)"
MORE = {
    "divergence": [("liger", "liger_kernel", True, liger_divergence)],
    "layer_cost": [
        ("eager stacked", "", False, lambda case: baselines.layer_cost.stacked_case),
        ("cdist", "", False, cdist),
    ],
    ("layer_cost", "emd_step"): [("authors", "ot", False, lambda case: baselines.transport.authors_step_case)],
    ("linear_divergence", "subset"): [("full logits", "", False, full_logits)],
    "transport": [
        ("authors", "ot", False, lambda case: baselines.transport.authors_case),
        ("scipy", "scipy", False, linear_program),
        ("pot batch", "ot", False, refuse(NOT_EXACT)),
        ("linear_sum_assignment", "scipy", False, refuse("assignments only: square, equal masses")),
    ],
    ("contrast", "in_batch"): [
        ("inf-cl-style", "", False, tiled_contrast),
        ("cut-cross-entropy", "cut_cross_entropy", True, cut_cross_entropy),
    ],
    "contrast": [
        ("cut-cross-entropy", "cut_cross_entropy", True, refuse("in-batch only: a positive is one of the words")),
        ("inf-cl", "inf_cl", True, refuse("in-batch only: no bank without a gradient")),
    ],
    "linear_divergence": [
        ("trl-style", "", False, checkpointed_chunks),
        ("liger", "liger_kernel", False, liger_linear),
        ("autochunker", "", False, auto_chunker),
        ("cut-cross-entropy", "cut_cross_entropy", False, refuse("hard labels only")),
        ("linear_cross_entropy", "", False, refuse("hard labels, or the teacher's probabilities as a full tensor")),
    ],
}
