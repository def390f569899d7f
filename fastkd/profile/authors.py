"""The authors' way behind our own functions' signatures, for whole training steps: materialised copies, one loss per entry,
host loops and host syncs, as the papers' releases go about it; written by us. What nobody released is plain PyTorch.

A mask counts as in ours, so that both compute the same number; FCD's release knows no mask and ignores it.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import functional, reductions


def _mean(rows: Tensor, counted: Tensor | None, reduction: str) -> Tensor:
    return reductions.reduce(rows, counted, reduction)


def _pearson(a: Tensor, b: Tensor, eps: float) -> Tensor:
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    return 1 - ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1) + eps)).mean()


def gram_correlation_loss(student, teacher, *, level="token", grouping="position", pearson="matrix", normalize=True,
                          mask=None, eps=1e-6, process_group=None, reduction="mean", backend=None):  # fmt: skip
    sides = ([x] if isinstance(x, Tensor) else x for x in (student, teacher))
    pairs, weights = list(zip(*sides, strict=True)), level if isinstance(level, dict) else {level: 1.0}
    losses = (weight * _correlation(*pair, name, grouping, pearson, normalize, eps)
              for pair in pairs for name, weight in weights.items())  # fmt: skip
    return sum(losses) / len(pairs)


def _correlation(student, teacher, level, grouping, pearson, normalize, eps):
    s, t = student.float(), teacher.float()
    if normalize:
        s, t = F.normalize(s, dim=-1), F.normalize(t, dim=-1)
    groups = s.shape[0]
    if level == "sequence":
        s, t = s.permute(1, 0, 2).contiguous(), t.permute(1, 0, 2).contiguous()
        groups = s.shape[0] if grouping == "position" else groups
    gram_s, gram_t = torch.bmm(s, s.mT), torch.bmm(t, t.mT)
    if pearson == "row":
        return _pearson(gram_s.flatten(0, 1), gram_t.flatten(0, 1), eps)
    return _pearson(gram_s.view(groups, -1), gram_t.view(groups, -1), eps)


def relation_kl_loss(student, teacher, *, heads=None, mask=None, causal=False, temperature=None, reduction="mean",
                     backend=None):  # fmt: skip
    total = []
    for pair in zip(student, teacher, strict=True):
        scores = []
        for x in pair:
            x, y = x if isinstance(x, (tuple, list)) else (x, x)
            x, y = (_resplit(z.float(), heads) for z in (x, y))
            score = torch.matmul(x, y.transpose(-1, -2)) / (
                math.sqrt(x.shape[-1]) if temperature is None else temperature
            )
            if mask is not None:
                score = score + (1.0 - mask[:, None, None, :].float()) * -1e9
            if causal:
                length = score.shape[-1]
                score = score + torch.full((length, length), -1e9, device=score.device).triu(1)
            scores.append(score)
        rows = F.kl_div(F.log_softmax(scores[0], -1), F.softmax(scores[1], -1), reduction="none").sum(-1)  # [B, H, L]
        counted = None if mask is None else mask.bool()[:, None, :].expand_as(rows)
        total.append(_mean(rows, counted, reduction))
    return torch.stack(total) if reduction == "none" else sum(total)


def _resplit(x: Tensor, heads: int | None) -> Tensor:
    if heads is None or heads == x.shape[1]:
        return x
    batch, _, length, _ = x.shape
    return x.transpose(1, 2).reshape(batch, length, heads, -1).transpose(1, 2)


def _matrix(students: list, teachers: list, counted) -> Tensor:
    """A masked copy and a mean per pair, each written into one matrix."""
    matrix = torch.zeros(len(students), len(teachers), device=students[0].device)
    for i, s in enumerate(students):
        for j, t in enumerate(teachers):
            if counted is None:
                matrix[i, j] = F.mse_loss(s, t)
            else:
                matrix[i, j] = F.mse_loss(s * counted, t * counted, reduction="sum") / (counted.sum() * s[0, 0].numel())
    return matrix


def layer_costs(students, teachers, *, mask=None, clamp=None, backend=None):
    sides = [[x.float() for x in side] for side in (students, teachers)]
    if clamp is not None:
        sides = [[torch.where(x <= clamp, torch.zeros_like(x), x) for x in side] for side in sides]
    counted = None if mask is None else mask.float().view(*mask.shape, *[1] * (students[0].dim() - 2))
    return _matrix(*sides, counted)


def attention_costs(students, teachers, *, mask=None, causal=False, scale=None, heads=None, backend=None):
    sides = [[_scores(x, mask, causal, scale, heads) for x in side] for side in (students, teachers)]
    matrix = torch.zeros(len(students), len(teachers), device=sides[0][0].device)
    for i, s in enumerate(sides[0]):
        for j, t in enumerate(sides[1]):
            s, t = (torch.where(x <= -100, torch.zeros_like(x), x) for x in (s, t))
            matrix[i, j] = F.mse_loss(s, t)
    return matrix


def _scores(layer, mask, causal: bool, scale: float | None, heads: str | None) -> Tensor:
    """What the authors read from the model, [B, H, S, S] with the additive mask in it."""
    if isinstance(layer, Tensor):
        return layer.float()
    query, key = (x.float() for x in layer)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    score = torch.matmul(query, key.transpose(-1, -2)) * (query.shape[-1] ** -0.5 if scale is None else scale)
    score = score.mean(1, keepdim=True) if heads == "mean" else score
    if mask is not None:
        score = score + (1.0 - mask[:, None, None, :].float()) * -10000.0
    if causal:
        length = score.shape[-1]
        score = score + torch.full((length, length), -10000.0, device=score.device).triu(1)
    return score


def transport(cost, a=None, b=None, *, warm_start=None, backend=None):
    """To the host, problem by problem, and back; where POT is not installed, our reference does the same job."""
    try:
        import ot
    except ImportError:
        return functional.transport(cost, a, b, backend="reference")
    lead, (n, m) = cost.shape[:-2], cost.shape[-2:]
    a = cost.new_full((*lead, n), 1.0 / n) if a is None else a
    b = cost.new_full((*lead, m), 1.0 / m) if b is None else b
    flows, us, vs = [], [], []
    problems = zip(cost.reshape(-1, n, m), a.reshape(-1, n), b.reshape(-1, m), strict=True)
    for one_cost, one_a, one_b in problems:
        args = (x.detach().cpu().numpy().astype("float64") for x in (one_a, one_b, one_cost))
        flow, log = ot.emd(*args, log=True)
        flows.append(torch.from_numpy(flow))
        us.append(torch.from_numpy(log["u"]))
        vs.append(torch.from_numpy(log["v"]))
    flow, u, v = (torch.stack(x).to(cost).view(*lead, *x[0].shape) for x in (flows, us, vs))
    status = torch.zeros(lead, dtype=torch.int32, device=cost.device)
    return functional.TransportPlan((flow * cost).sum((-2, -1)), flow, u, v, status)


def nce_loss(query, bank, index, *, n_data, temperature, z, reduction="mean", backend=None):
    (batch, columns), eps = index.shape, 1e-7
    noise = (columns - 1) / n_data
    rows = torch.index_select(bank, 0, index.reshape(-1)).view(batch, columns, -1)
    p = torch.exp(torch.bmm(rows, query.reshape(batch, -1, 1)) / temperature).squeeze(-1) / z
    first = torch.log(p[:, 0] / (p[:, 0] + noise + eps))
    second = torch.log(torch.full_like(p[:, 1:], noise) / (p[:, 1:] + noise + eps))
    return _mean(-first - second.sum(-1), None, reduction)


def nce_pair_loss(queries, banks, index, *, z, reduction="mean", backend=None, **options):
    sides = list(zip(queries, banks, z, strict=True))
    z = tuple(functional.nce_partition(q, bank, index, z=x, backend="reference", **options) for q, bank, x in sides)
    losses = [nce_loss(q, bank, index, z=x.item() or 1.0, **options) for (q, bank, _), x in zip(sides, z, strict=True)]
    return sum(losses) / 2, z


def info_nce_loss(query, positive, bank, index=None, *, temperature=0.07, exclude=None, scale=None, reduction="mean",
                  backend=None):  # fmt: skip
    if exclude is not None or scale is not None:
        more = {"exclude": exclude, "scale": scale, "temperature": temperature, "reduction": reduction}
        return functional.info_nce_loss(query, positive, bank, index, **more, backend="reference")
    first = (query * positive).sum(-1, keepdim=True)
    others = query @ bank.T if index is None else torch.bmm(bank[index], query.unsqueeze(-1)).squeeze(-1)
    logits = torch.cat((first, others), 1) / temperature
    return F.cross_entropy(
        logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device), reduction=reduction
    )


def divergence(student_logits, teacher, *, kind="forward_kl", temperature=1.0, t_squared=True, beta=0.5, alpha=0.1,
               mask=None, labels=None, ignore_index=-100, reduction="mean", backend=None):  # fmt: skip
    if not isinstance(teacher, Tensor):
        more = {"kind": kind, "temperature": temperature, "t_squared": t_squared, "beta": beta, "alpha": alpha}
        more |= {"mask": mask, "labels": labels, "ignore_index": ignore_index, "reduction": reduction}
        return functional.divergence(student_logits, teacher, **more, backend="reference")
    s, t = student_logits.float(), teacher.float()
    counted = reductions.counted_rows(mask, labels, ignore_index, s.shape[:-1])
    if counted is not None:
        s, t = s * counted.unsqueeze(-1), t * counted.unsqueeze(-1)
    if kind == "mse":
        return _mean(F.mse_loss(s, t, reduction="none").sum(-1), counted, reduction)
    log_q, p = F.log_softmax(s / temperature, -1), F.softmax(t / temperature, -1)
    rows = _entries(kind, log_q, p, t / temperature, beta, alpha).sum(-1)
    return _mean(rows * (temperature**2 if t_squared else 1.0), counted, reduction)


def _entries(kind: str, log_q: Tensor, p: Tensor, t: Tensor, beta: float, alpha: float) -> Tensor:
    """One number per class [..., V], as the releases write it down."""
    if kind == "forward_kl":
        return F.kl_div(log_q, p, reduction="none")
    if kind == "soft_ce":
        return -p * log_q
    q, log_p = log_q.exp(), F.log_softmax(t, -1)
    if kind == "tvd":
        return 0.5 * (p - q).abs()
    if kind == "reverse_kl":
        return q * (log_q - log_p)
    if kind == "skew_kl":
        return p * (log_p - torch.log(alpha * p + (1 - alpha) * q))
    log_m = torch.log(beta * p + (1 - beta) * q)  # jsd
    return beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)


def linear_divergence(student_hidden, student_head, teacher_hidden, teacher_head=None, *, student_bias=None,
                      teacher_bias=None, vocab=None, weights=None, memory="speed", **options):  # fmt: skip
    """GLMKD: both logits in full, the kept columns gathered."""
    if weights is not None or teacher_head is None or options.keys() & {"hard_weight", "logit_scale", "logit_softcap"}:
        more = {"student_bias": student_bias, "teacher_bias": teacher_bias, "vocab": vocab, "weights": weights}
        sides = (student_hidden, student_head, teacher_hidden, teacher_head)
        return functional.linear_divergence(*sides, **more, **{**options, "backend": "reference"})
    student = F.linear(student_hidden, student_head, student_bias)
    teacher = F.linear(teacher_hidden, teacher_head, teacher_bias)
    kept = None if vocab is None else getattr(vocab, "kept_ids", vocab)
    return divergence(student, teacher if kept is None else teacher[..., kept.to(teacher.device)], **options)


WRITTEN = (
    "attention_costs", "divergence", "gram_correlation_loss", "info_nce_loss", "layer_costs", "linear_divergence",
    "nce_loss", "nce_pair_loss", "relation_kl_loss", "transport",
)  # fmt: skip
