"""FCD's correlation of self-similarities, MiniLM's relations, and BERT-EMD's costs between layers."""

import torch

MINUS_INFINITY = -1e30  # as good as -inf in a softmax, and 0 times it is 0


def pearson(a, b, eps):
    """Of the last axis."""
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1) + eps)


def self_similarity(x, normalize):
    x = x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12) if normalize else x
    return torch.bmm(x[None], x.T[None])[0]  # as the authors do it: torch adds up small ones one number after another


def gram(student, teacher, level, grouping, by_row, normalize, mask, eps):
    """[B, N, Ds], [B, N, Dt] -> 1 - rho and whether it is valid, [G], or by row [G, R]. A group without a mask is whole."""
    keep = None if mask is None else mask.bool()
    if level == "sequence":
        student, teacher = student.transpose(0, 1), teacher.transpose(0, 1)  # [N, B, D]
        keep = None if mask is None else keep.T
        if grouping == "official" and not by_row:  # the released code's view(B, -1) of the [N, B, B] buffer
            buffers = [torch.stack([self_similarity(x, normalize) for x in xs]) for xs in (student, teacher)]
            values = 1 - pearson(*(x.reshape(x.shape[1], -1) for x in buffers), eps)
            return values, torch.ones(len(values), dtype=torch.bool)
    groups, length = student.shape[:2]
    fewest, zero = {"token": 2, "sequence": 3}[level], student.new_zeros(())
    values, valid = [], torch.zeros(groups, length, dtype=torch.bool)
    for g in range(groups):
        rows = torch.arange(length) if keep is None else keep[g].nonzero()[:, 0]
        if keep is not None and grouping == "position" and len(rows) < fewest:
            rows = rows[:0]
        valid[g, rows] = True
        a, b = (self_similarity(x[g][rows], normalize) for x in (student, teacher))
        if by_row:
            values.append(student.new_zeros(length).index_put((rows,), 1 - pearson(a, b, eps)))
        else:
            values.append(1 - pearson(a.flatten(), b.flatten(), eps) if len(rows) else zero)
    return torch.stack(values), valid if by_row else valid.any(1)


def split(x, heads):
    """[B, H, L, d] -> [B, heads, L, H d / heads]"""
    x = x.transpose(1, 2).flatten(2)
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def relation(student, teacher, heads, mask, causal, temperature):
    """x [B, H, L, d] or a pair (x, y), on either side -> KL(teacher || student) of each query, [B, H, L]."""
    logs = []
    for side in (student, teacher):
        x, y = side if isinstance(side, tuple) else (side, side)
        x, y = (x, y) if heads is None else (split(x, heads), split(y, heads))
        scores = x @ y.transpose(-1, -2) / (x.shape[-1] ** 0.5 if temperature is None else temperature)
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), MINUS_INFINITY)
        if mask is not None:
            scores = scores.masked_fill(~mask.bool()[:, None, None, :], MINUS_INFINITY)
        logs.append(torch.log_softmax(scores, -1))
    log_q, log_p = logs
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def layer_costs(students, teachers, mask, clamp):
    """[B, S, D] each -> [N, M], the mean squared difference over the valid tokens."""
    keep = torch.ones(students[0].shape[:2], dtype=torch.bool) if mask is None else mask.bool()

    def seen(x):
        x = x[keep]
        return x if clamp is None else torch.where(x <= clamp, 0 * x, x)

    rows = [[(seen(s) - seen(t)).square() for t in teachers] for s in students]
    return torch.stack([torch.stack([d.mean() if d.numel() else d.sum() for d in row]) for row in rows])


def attention_costs(students, teachers, mask, causal, scale, heads):
    """(q, k) or scores each -> [N, M], the mean over all B H S S entries; what is hidden counts 0."""

    def seen(x):
        if isinstance(x, tuple):
            q, k = x
            k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
            x = torch.einsum("bhid,bhjd->bhij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        else:
            x = torch.where(x <= -100, 0 * x, x)  # BERT-EMD's rule for a masked key
        hidden = torch.zeros(x.shape[-2:], dtype=torch.bool) if not causal else torch.ones(x.shape[-2:]).triu(1).bool()
        hidden = hidden if mask is None else hidden | ~mask.bool()[:, None, None, :]
        x = torch.where(hidden, 0 * x, x)
        return x.mean(1, keepdim=True) if heads == "mean" else x

    students, teachers = [seen(x) for x in students], [seen(x) for x in teachers]
    return torch.stack([torch.stack([(s - t).square().mean() for t in teachers]) for s in students])
