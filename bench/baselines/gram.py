"""Correlation of two Gram matrices: eager PyTorch, and FCD's way."""

import torch
import torch.nn.functional as F
from torch import Tensor


def pearson(a, b, eps=1e-6):
    """1 - the correlation of each row [G, m] -> [G]; eps is added to the product of the norms, as FCD does."""
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    return 1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1) + eps)


def correlation(student, teacher, level="token", grouping="position"):
    """States [B, N, D] of unit length -> [groups]."""
    batch, length = student.shape[:2]
    groups = length if level == "sequence" and grouping == "position" else batch
    sides = (x.transpose(0, 1) if level == "sequence" else x for x in (student, teacher))
    return pearson(*((x @ x.mT).reshape(groups, -1) for x in sides))


def eager(student, teacher, level="token", grouping="position"):
    """States [B, N, D] -> [groups], in their own dtype."""
    return correlation(F.normalize(student, dim=-1), F.normalize(teacher, dim=-1), level, grouping)


def eager_case(x: dict, options: dict):
    s, t = F.normalize(x["student"], dim=-1), F.normalize(x["teacher"], dim=-1)
    loss = correlation(s, t).mean()
    return loss if options["grouping"] is None else loss + correlation(s, t, "sequence", options["grouping"]).mean()


def authors(student, teacher, *, level="token", grouping="position", pearson="matrix", normalize=True, mask=None,
            eps=1e-6):  # fmt: skip
    """FCD: the batch axis moved by a copy, and with grouping "official" the [N, B, B] tensor viewed as B rows. The release
    knows no mask, and this ignores it."""
    sides = ([x] if isinstance(x, Tensor) else x for x in (student, teacher))
    levels, total, pairs = level if isinstance(level, dict) else {level: 1.0}, 0.0, list(zip(*sides, strict=True))
    for pair in pairs:
        s, t = (F.normalize(x, dim=-1) if normalize else x for x in pair)
        for name, weight in levels.items():
            total = total + weight * _authors_level(s, t, name, grouping, pearson == "row", eps)
    return total / len(pairs)


def _authors_level(s, t, level: str, grouping: str, by_row: bool, eps: float):
    groups = len(s)
    if level == "sequence":
        s, t = s.permute(1, 0, 2).contiguous(), t.permute(1, 0, 2).contiguous()
        groups = len(s) if grouping == "position" else groups
    grams = torch.bmm(s, s.mT), torch.bmm(t, t.mT)
    return pearson(*(x.flatten(0, 1) if by_row else x.view(groups, -1) for x in grams), eps).mean()


def authors_case(x: dict, options: dict):
    levels = {"token": 1.0} if options["grouping"] is None else {"token": 1.0, "sequence": 1.0}
    return authors(x["student"], x["teacher"], level=levels, grouping=options["grouping"])
