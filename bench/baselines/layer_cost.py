"""The costs of all pairs of layers: eager PyTorch, and BERT-EMD's way."""

import torch
import torch.nn.functional as F
from torch import Tensor

MASKED = -10000.0  # the additive mask of BERT's attention


def eager(students: list, teachers: list):
    return torch.stack([torch.stack([F.mse_loss(s, t) for t in teachers]) for s in students])  # [N, M]


def stacked(students: list, teachers: list):
    """Vectorised over the teachers: slower than pairs in eager on a CPU, what Inductor fuses best."""
    every = torch.stack(teachers).flatten(1)  # [M, numel]
    return torch.stack([(every - s.flatten()).square().mean(-1) for s in students])  # [N, M]


def authors(students: list, teachers: list, *, mask=None, clamp=None):
    """A masked copy of both and a mean per pair, each written into the matrix [N + M, N + M], twice."""
    n, m = len(students), len(teachers)
    matrix = torch.zeros(n + m, n + m, device=students[0].device)
    valid = None if mask is None else mask.float().view(*mask.shape, *[1] * (students[0].dim() - 2))
    for i, s in enumerate(students):
        for j, t in enumerate(teachers):
            if clamp is not None:
                s, t = (torch.where(x <= clamp, torch.zeros_like(x), x) for x in (s, t))
            if valid is None:
                cost = F.mse_loss(s, t)
            else:
                cost = F.mse_loss(s * valid, t * valid, reduction="sum") / (valid.sum() * s[0, 0].numel())
            matrix[i, n + j] = matrix[n + j, i] = cost
    return matrix[:n, n:]


def authors_attention(students: list, teachers: list, *, mask=None, causal=False, scale=None, heads=None):
    """The same of the scores that the model wrote down, whatever its mask hides counted as 0."""
    sides = ([_scores(x, mask, causal, scale, heads) for x in side] for side in (students, teachers))
    return authors(*sides, clamp=-100.0)


def _scores(layer, mask=None, causal=False, scale=None, heads=None):
    """Scores [B, H, S, S] as they are, or of (q, k) with the additive mask in them."""
    if isinstance(layer, Tensor):
        return layer
    query, key = layer
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1) if query.shape[1] != key.shape[1] else key
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.mean(1, keepdim=True) if heads == "mean" else scores
    if mask is not None:
        scores = scores + (1.0 - mask[:, None, None, :].float()) * MASKED
    return scores + torch.full_like(scores[0, 0], MASKED).triu(1) if causal else scores


def layers_of(x: dict) -> tuple[list, list]:
    """Of a case: the layers, or the scores that (q, k) give."""
    if "students" in x:
        return x["students"], x["teachers"]
    return tuple([_scores(pair) for pair in zip(x[f"{side}_q"], x[f"{side}_k"], strict=True)]
                 for side in ("student", "teacher"))  # fmt: skip


def eager_case(x: dict, options: dict):
    return (eager(*layers_of(x)) * x["flow"]).sum()


def stacked_case(x: dict, options: dict):
    return (stacked(*layers_of(x)) * x["flow"]).sum()


def authors_case(x: dict, options: dict):
    """The matrix goes to the host for the solver; the flow is given here."""
    matrix = authors(*layers_of(x), clamp=None if "students" in x else -100.0)
    matrix.detach().cpu().numpy().astype("float64")
    return (matrix * x["flow"]).sum()
