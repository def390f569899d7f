"""divergence against a sparse teacher: k tokens with log-probabilities per row, and the rest of the vocabulary as one more.

If the mass of p is e^log_mass < 1, `plain` says that a KL is sum a (log a - log b), without the sum (b - a) of its Bregman form.
"""

import torch

from .divergence import rows_of


def divergence_topk(student, indices, log_probs, tail, mask, kind, temperature, beta, alpha):
    """student [N,V], indices, log_probs [N,k] -> rows [N]. The rest, all other tokens, has no mass (tail None), what
    the k tokens leave (True), or the log-mass tail [N]; it is left out if all its logits of the student are -inf. With a
    tail, the teacher's masses are made to sum to 1. In float64 if the device has it: the rest is a sum over nearly all tokens,
    and near convergence its logarithm is compared to a part in 10^8."""
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    wide = torch.float32 if student.device.type == "mps" else torch.float64
    masked = torch.zeros_like(indices[:, :1], dtype=torch.bool) if mask is None else ~mask[:, None]
    s, t = (x.to(wide).masked_fill(masked, 0) for x in (student, log_probs))  # [N, V], [N, k]
    s = s / temperature
    outside = torch.ones_like(s, dtype=torch.bool).scatter(-1, indices.long(), False)
    has_rest = (outside & (s != -torch.inf)).any(-1, keepdim=True)  # [N, 1]
    rest = torch.where(has_rest, s, 0).masked_fill(has_rest & ~outside, -torch.inf).logsumexp(-1, keepdim=True)
    return compared(s.gather(-1, indices.long()), rest, has_rest, t, tail, masked, kind, beta, alpha).to(dtype)


def compared(s, rest, has_rest, t, tail, masked, kind, beta, alpha):
    """Rows [N] of the student's logits at the k tokens s [N,k] and those of the rest as one token [N,1], both divided by the
    temperature, and the teacher's t [N,k]; has_rest, masked [N,1]."""
    if tail is None:
        log_rest = torch.full_like(rest, -torch.inf)
    else:
        log_rest = (
            torch.log1p(-t.exp().sum(-1, keepdim=True).clamp(max=1)) if tail is True else tail.to(t.dtype)[:, None]
        )
        log_rest = log_rest.masked_fill(masked, 0)
        all_mass = torch.cat([t, log_rest], -1).logsumexp(-1, keepdim=True)
        t, log_rest = t - all_mass, log_rest - all_mass
    log_mass = t.logsumexp(-1, keepdim=True)
    log_mass = log_mass if tail is None else torch.where(has_rest, 0, log_mass)
    s = torch.cat([s, torch.where(has_rest, rest, -torch.inf)], -1)  # [N, k + 1]
    t = torch.cat([t, torch.where(has_rest, log_rest, -torch.inf)], -1)
    return rows_of(s, t, (log_mass, tail is None), ~masked[:, 0], kind, 1.0, beta, alpha)
