"""relation: KL(teacher || student) between softmaxed relations, one number per query row.

A relation is softmax(x yᵀ · scale) over the keys: Q·Kᵀ is attention itself, Q·Qᵀ, K·Kᵀ, V·Vᵀ are MiniLM's. Widths may
differ between the two sides. The mask takes keys out of the softmax, and the rows of masked queries count 0.
"""

import torch


def relation(xs, ys, xt, yt, mask, causal, scale_s, scale_t):
    """x, y [B,H,L,d], mask [B,L] -> rows [B,H,L]."""
    dtype = torch.float64 if xs.dtype == torch.float64 else torch.float32
    allowed = torch.ones(xs.shape[2], ys.shape[2], dtype=torch.bool, device=xs.device)  # [L, L]
    allowed = allowed.tril() if causal else allowed
    keep = None
    if mask is not None:
        keep = mask[:, None, :, None]  # [B, 1, L, 1]
        allowed = allowed & mask[:, None, None, :]  # [B, 1, L, L]
    log_p = _log_relation(xt.to(dtype), yt.to(dtype), keep, allowed, scale_t)
    log_q = _log_relation(xs.to(dtype), ys.to(dtype), keep, allowed, scale_s)
    rows = _kl(log_p, log_q)
    return rows if mask is None else torch.where(mask[:, None, :], rows, 0)


def _log_relation(x, y, keep, allowed, scale):
    if keep is not None:
        x, y = x.masked_fill(~keep, 0), y.masked_fill(~keep, 0)
    scores = (x @ y.transpose(-1, -2)) * scale  # [B, H, L, L]
    # The most negative number, not -inf: a row without any key becomes uniform instead of NaN.
    return torch.log_softmax(scores.masked_fill(~allowed, torch.finfo(scores.dtype).min), -1)


def _kl(log_p, log_q):
    """sum p (log p - log q), with sum (q - p) = 0 added: every term is then >= 0, and none cancels as q nears p."""
    p, ratio = log_p.exp(), log_q - log_p
    near = ratio.clamp(max=1)
    return torch.where(ratio < 1, p * (near.expm1() - near), log_q.exp() - p - p * ratio).sum(-1)
