"""relation: KL(teacher || student) between softmaxed relations, one number per query row.

A relation is softmax(x yᵀ · scale) over the keys: Q·Kᵀ is attention itself, Q·Qᵀ, K·Kᵀ, V·Vᵀ are MiniLM's. Widths may
differ between the two sides. The mask takes keys out of the softmax, and the rows of masked queries count 0.
"""

import torch

from .digits import kl


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
    rows = _kl_of_scores(t, s)
    return rows if mask is None else torch.where(mask[:, None, :], rows, 0)


def _scores(x, y, keep, allowed, scale):
    if keep is not None:
        x, y = x.masked_fill(~keep, 0), y.masked_fill(~keep, 0)
    scores = (x @ y.transpose(-1, -2)) * scale  # [B, H, L, L]
    # The most negative number, not -inf: a row without any key becomes uniform instead of NaN.
    return scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)


def _kl_of_scores(t, s):
    """log q - log p is taken from the difference of the scores, less its mean, where that is small."""
    log_p, log_q = torch.log_softmax(t, -1), torch.log_softmax(s, -1)
    p, x = log_p.exp(), s - t
    y = x - (p * x).sum(-1, keepdim=True).detach()
    rise = (p * y.clamp(max=60).expm1()).sum(-1, keepdim=True)  # [B, H, L, 1] log1p of it: what q's sum has more
    near = (rise < 1) & (y < 60).all(-1, keepdim=True)  # elsewhere expm1 may overflow, and nothing cancels
    ratio = torch.where(near, y - rise.masked_fill(~near, 0).log1p(), log_q - log_p)  # [B, H, L, L]
    return kl(p, log_q.exp(), ratio)
