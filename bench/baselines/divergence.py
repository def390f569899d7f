"""Row-wise divergences between two sets of logits: eager PyTorch, and GLMKD's way."""

import math

import torch
import torch.nn.functional as F
from fastkd.bench.cases.divergence import candidate_scores

from fastkd import reductions


def eager(student, teacher, kind="forward_kl", temperature=1.0, beta=0.5, alpha=0.1):
    """Logits [N, V] -> [N], times T² except for mse; in the logits' dtype, nothing computed twice."""
    if kind == "mse":
        return F.mse_loss(student, teacher, reduction="none").sum(-1)
    factor, s, t = temperature**2, student, teacher
    if temperature != 1:
        s, t = s / temperature, t / temperature
    if kind == "tvd":
        return (s.softmax(-1) - t.softmax(-1)).abs().sum(-1) * (0.5 * factor)
    if kind == "soft_ce":
        return F.cross_entropy(s, t.softmax(-1), reduction="none") * factor
    log_q, log_p = s.log_softmax(-1), t.log_softmax(-1)  # [N, V]
    if kind == "forward_kl":
        return kl(log_p, log_q) * factor
    if kind == "reverse_kl":
        return kl(log_q, log_p) * factor
    log_m = mixture(log_p, log_q, alpha if kind == "skew_kl" else beta)
    if kind == "skew_kl":
        return kl(log_p, log_m) * factor
    return beta * factor * kl(log_p, log_m) + (1 - beta) * factor * kl(log_q, log_m)


def kl(log_a, log_b):
    return F.kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1)


def mixture(log_p, log_q, weight: float):
    """log(weight p + (1 - weight) q)"""
    if weight == 0.5:
        return torch.logaddexp(log_p, log_q) - math.log(2.0)
    return torch.logaddexp(log_p + math.log(weight), log_q + math.log(1 - weight))


def eager_top_k(student, indices, log_probs, temperature=1.0, tail=None):
    """Forward KL against a teacher's k log-probabilities [N, k], and with `tail` the rest of both as one more token."""
    log_q = (student / temperature).log_softmax(-1).gather(-1, indices)  # [N, k]
    rows = (log_probs.exp() * (log_probs - log_q)).sum(-1)
    if tail:
        rest_p, rest_q = (torch.log1p(-log.exp().sum(-1)) for log in (log_probs, log_q))
        rows = rows + rest_p.exp() * (rest_p - rest_q)
    return rows * temperature**2


def authors(student, teacher, *, kind="forward_kl", temperature=1.0, t_squared=True, beta=0.5, alpha=0.1, mask=None,
            labels=None, ignore_index=-100, reduction="mean"):  # fmt: skip
    """GLMKD: logits to float32, both multiplied by the mask, probabilities as target, one loss per entry, summed last."""
    s, t = student.float(), teacher.float()
    valid = reductions.counted_rows(mask, labels, ignore_index, s.shape[:-1])
    if valid is not None:
        s, t = s * valid.unsqueeze(-1), t * valid.unsqueeze(-1)
    if kind == "mse":
        return reductions.reduce(F.mse_loss(s, t, reduction="none").sum(-1), valid, reduction)
    log_q, p = F.log_softmax(s / temperature, -1), F.softmax(t / temperature, -1)
    rows = _entries(kind, log_q, p, t / temperature, beta, alpha).sum(-1)
    return reductions.reduce(rows * (temperature**2 if t_squared else 1.0), valid, reduction)


def _entries(kind: str, log_q, p, t, beta: float, alpha: float):
    """One number per token [..., V]."""
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


def eager_case(x: dict, options: dict):
    if "candidates" in x:
        return eager(candidate_scores(x), x["teacher"], **options).mean()
    if "teacher" in x:
        return eager(x["student"], x["teacher"], **options).mean()
    return eager_top_k(x["student"], x["indices"], x["log_probs"], options["temperature"], options["tail"]).mean()


def authors_case(x: dict, options: dict):
    return authors(x["student"], x["teacher"], mask=x["student"].new_ones(len(x["student"])), **options)
