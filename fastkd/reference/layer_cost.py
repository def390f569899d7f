"""layer_cost: the mean squared difference of every student layer from every teacher layer, [N, M].

Differences are taken directly. |s|² + |t|² - 2<s, t> would lose its digits exactly where a student nears its teacher.
Only the N + M layers are valid_part for the backward, never the N M differences.
"""

import torch
import torch.nn.functional as F

MASKED_SCORE = -100.0  # the authors' rule: a score at or below it is a masked key


def layer_cost(students, teachers, mask, clamp):
    """Lists of [B,S,...], mask [B,S] -> [N,M], the mean over valid tokens. Values <= clamp are taken as 0."""
    dtype = torch.float64 if students[0].dtype == torch.float64 else torch.float32

    def valid_part(x):
        x = x.to(dtype)
        if mask is not None:
            x = x.masked_fill(~mask.reshape(mask.shape + (1,) * (x.dim() - 2)), 0)
        return x if clamp is None else x.masked_fill(x <= clamp, 0)

    count = max(students[0].numel(), 1)
    if mask is not None:
        count = mask.sum().clamp_min(1) * (count // max(mask.numel(), 1))
    return _squared_differences([valid_part(x) for x in students], [valid_part(x) for x in teachers]) / count


def attention_cost(students, teachers, mask, causal, scale, heads):
    """Lists of (q, k), each [B,H,S,d], or of scores [B,H,S,S], mask [B,S] over keys -> [N,M], mean over all entries.

    Scores hidden by the mask or by causality are 0 and stay in the denominator; queries are never masked. heads="mean"
    compares the mean over the heads.
    """
    first = students[0][0] if isinstance(students[0], (tuple, list)) else students[0]
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    students = [_scores(x, dtype, mask, causal, scale, heads) for x in students]
    teachers = [_scores(x, dtype, mask, causal, scale, heads) for x in teachers]
    return _squared_differences(students, teachers) / max(students[0].numel(), 1)


def _scores(x, dtype, mask, causal, scale, heads):
    if isinstance(x, (tuple, list)):
        q, k = x[0].to(dtype), x[1].to(dtype)
        k = k if mask is None else k.masked_fill(~mask[:, None, :, None], 0)  # a masked key then scores 0
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)  # grouped-query heads
        x = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)  # [B, H, S, S]
    else:
        x = x.to(dtype)
        x = x if mask is None else x.masked_fill(~mask[:, None, None, :], 0)
        x = x.masked_fill(x <= MASKED_SCORE, 0)
    x = x.tril() if causal else x
    return x.mean(1, keepdim=True) if heads == "mean" else x


def _squared_differences(students, teachers):
    return torch.stack([torch.stack([F.mse_loss(s, t, reduction="sum") for t in teachers]) for s in students])
