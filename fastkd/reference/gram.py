"""gram: 1 - Pearson correlation of two self-similarity matrices, one number per group of their entries.

R = x xᵀ over the rows of a group: the tokens of a sequence ("token") or one position of every sequence ("sequence").
rho(a, b) = <a - mean a, b - mean b> / (|a - mean a| |b - mean b| + eps), both centred before anything is multiplied.
"""

import torch
import torch.nn.functional as F

ENOUGH_ROWS = {"token": 2, "sequence": 3}  # of 2 sequences every Gram is [[1, c], [c, 1]]: rho is 1 whatever c is


def gram(student, teacher, mask, level, grouping, pearson, normalize, eps):
    """[B,N,Ds], [B,N,Dt], [B,N] -> (1 - rho, valid): [G], or with pearson="row" one per row of each Gram, [G,R]."""
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    # A centred Gram may be small against its mean: float64 on the CPU, where it costs little.
    student, teacher = (x.to(torch.float64 if x.device.type == "cpu" else dtype) for x in (student, teacher))
    keep = torch.ones(student.shape[:2], dtype=torch.bool, device=student.device) if mask is None else mask
    if level == "sequence":
        student, teacher, keep = student.transpose(0, 1), teacher.transpose(0, 1), keep.transpose(0, 1)
    if mask is not None:
        keep = keep & (keep.sum(1, keepdim=True) >= ENOUGH_ROWS[level])  # a group with too few rows is not valid

    pairs = keep[:, :, None] & keep[:, None, :]  # [G, R, R]
    if pearson == "row":
        shape, valid = pairs.shape, keep
    elif level == "sequence" and grouping == "official":
        shape = (pairs.shape[1], -1)  # the authors' view(B, -1) of the [N, B, B] buffer
        valid = pairs.reshape(shape).any(-1)
    else:
        shape, valid = (pairs.shape[0], -1), keep.any(1)
    pairs = pairs.reshape(shape)

    student = _centred(_self_similarity(student, keep, normalize).reshape(shape), pairs)
    teacher = _centred(_self_similarity(teacher, keep, normalize).reshape(shape), pairs)
    # vector_norm, unlike a square root, has gradient 0 at 0: a constant Gram stays finite.
    norms = torch.linalg.vector_norm(student, dim=-1) * torch.linalg.vector_norm(teacher, dim=-1)
    rho = (student * teacher).sum(-1) / (norms + eps)
    return torch.where(valid, 1 - rho, 0).to(dtype), valid


def _self_similarity(x, keep, normalize):
    x = x.masked_fill(~keep[..., None], 0)  # [G, R, D]
    if normalize:
        x = F.normalize(x, dim=-1, eps=1e-12)
    return x @ x.transpose(1, 2)  # [G, R, R]


def _centred(entries, pairs):
    mean = entries.sum(-1, keepdim=True) / pairs.sum(-1, keepdim=True).clamp_min(1)  # masked entries hold 0
    return torch.where(pairs, entries - mean, 0)
