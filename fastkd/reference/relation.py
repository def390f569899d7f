"""relation: KL(teacher || student) between softmaxed relations, one number per query row.

A relation is softmax(x yᵀ · scale) over the keys: Q·Kᵀ is attention itself, Q·Qᵀ, K·Kᵀ, V·Vᵀ are MiniLM's. Student and
teacher may have different head dimensions. Masked keys are not in the softmax, and the rows of masked queries are 0.
"""

import torch

from .digits import difference, kl, log_ratio, normalized


def relation(xs, ys, xt, yt, mask, causal, scale_s, scale_t):
    """x, y [B,H,L,d], mask [B,L] -> rows [B,H,L]."""
    dtype = torch.float64 if xs.dtype == torch.float64 else torch.float32
    allowed = torch.ones(xs.shape[2], ys.shape[2], dtype=torch.bool, device=xs.device)  # [L, L]
    allowed = allowed.tril() if causal else allowed
    keep = None
    if mask is not None:
        keep = mask[:, None, :, None]  # [B, 1, L, 1]
        allowed = allowed & mask[:, None, None, :]  # [B, 1, L, L]
    t = _scores(xt.to(dtype), yt.to(dtype), keep, allowed, scale_t)
    s = _scores(xs.to(dtype), ys.to(dtype), keep, allowed, scale_s)
    (p, log_p), (q, log_q) = normalized(t, 1), normalized(s, 1)
    ratio, _ = log_ratio(difference(s, t), p, log_p, q, log_q)  # [B, H, L, L]
    rows = kl(p, q, ratio)
    return rows if mask is None else torch.where(mask[:, None, :], rows, 0)


def _scores(x, y, keep, allowed, scale):
    if keep is not None:
        x, y = x.masked_fill(~keep, 0), y.masked_fill(~keep, 0)
    scores = (x @ y.transpose(-1, -2)) * scale  # [B, H, L, L]
    # The most negative number, not -inf: a row without any key becomes uniform instead of NaN.
    return scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
