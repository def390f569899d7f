"""KL between softmaxed self-relations: eager PyTorch, and GLMKD's way."""

import math

import torch
import torch.nn.functional as F
from fastkd.bench.baselines.divergence import kl

from fastkd import reductions

FAR_BELOW = -1e4  # of a score that must not count; float16 has it too


def eager(student, teacher, *, causal=False, temperature=None):
    """One relation, x [B, H, L, d] with itself or a pair (x, y) -> [B, H, L], in its own dtype."""
    logs = []
    for x in (student, teacher):
        x, y = x if isinstance(x, tuple) else (x, x)
        scores = x @ y.mT * (x.shape[-1] ** -0.5 if temperature is None else 1 / temperature)
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), FAR_BELOW)
        logs.append(scores.log_softmax(-1))
    return kl(logs[1], logs[0])


def eager_case(x: dict, options: dict):
    return sum(eager(s, t).mean() for s, t in zip(x["student"], x["teacher"], strict=True))


def authors(student, teacher, *, heads=None, mask=None, causal=False, temperature=None, reduction="mean"):
    """GLMKD: scores divided after the product, probabilities as target, one loss per entry."""
    total = []
    for pair in zip(student, teacher, strict=True):
        scores = [_scores(x, heads, mask, causal, temperature) for x in pair]
        rows = F.kl_div(F.log_softmax(scores[0], -1), F.softmax(scores[1], -1), reduction="none").sum(-1)  # [B, H, L]
        valid = None if mask is None else mask.bool()[:, None, :].expand_as(rows)
        total.append(reductions.reduce(rows, valid, reduction))
    return torch.stack(total) if reduction == "none" else sum(total)


def _scores(x, heads, mask, causal: bool, temperature):
    x, y = x if isinstance(x, (tuple, list)) else (x, x)
    if heads not in (None, x.shape[1]):
        x, y = (z.transpose(1, 2).flatten(2).unflatten(2, (heads, -1)).transpose(1, 2) for z in (x, y))
    scores = torch.matmul(x, y.transpose(-1, -2)) / (math.sqrt(x.shape[-1]) if temperature is None else temperature)
    if mask is not None:
        scores = scores + (1.0 - mask[:, None, None, :].float()) * -1e9
    return scores + torch.full_like(scores[0, 0], FAR_BELOW).triu(1) if causal else scores


def authors_case(x: dict, options: dict):
    return authors(x["student"], x["teacher"])
