"""The divergence of a sparse teacher: k words with log-probabilities per row, and the rest as one more word.

Where p is less than all of the mass, by e^log_mass, `plain` is a KL's sum a (log a - log b), else with Bregman's sum (b - a).
"""

import torch

from .divergence import rows_of


def divergence_topk(student, indices, log_probs, tail, mask, kind, temperature, beta, alpha):
    """student [N,V], indices, log_probs [N,k] -> rows [N]. The words outside the k become one more word: with no mass
    (tail None), with what the k leave over (True), or with the log-mass tail [N]; where the student can say nothing else,
    it is not compared. With a tail, the teacher's masses are made to sum to 1. In float64 where there is one: the rest is
    a sum over nearly all words, and near convergence its logarithm is compared to a part in 10^8."""
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    wide = torch.float32 if student.device.type == "mps" else torch.float64
    hidden = torch.zeros_like(indices[:, :1], dtype=torch.bool) if mask is None else ~mask[:, None]
    s, t = (x.to(wide).masked_fill(hidden, 0) for x in (student, log_probs))  # [N, V], [N, k]
    s = s / temperature
    outside = torch.ones_like(s, dtype=torch.bool).scatter(-1, indices.long(), False)
    some = (outside & (s != -torch.inf)).any(-1, keepdim=True)  # [N, 1]
    rest = torch.where(some, s, 0).masked_fill(some & ~outside, -torch.inf).logsumexp(-1, keepdim=True)
    if tail is None:
        left = torch.full_like(rest, -torch.inf)
    else:
        left = torch.log1p(-t.exp().sum(-1, keepdim=True).clamp(max=1)) if tail is True else tail.to(wide)[:, None]
        left = left.masked_fill(hidden, 0)
        whole = torch.cat([t, left], -1).logsumexp(-1, keepdim=True)
        t, left = t - whole, left - whole
    log_mass = t.logsumexp(-1, keepdim=True)
    log_mass = log_mass if tail is None else torch.where(some, 0, log_mass)
    s = torch.cat([s.gather(-1, indices.long()), torch.where(some, rest, -torch.inf)], -1)  # [N, k + 1]
    t = torch.cat([t, torch.where(some, left, -torch.inf)], -1)
    return rows_of(s, t, (log_mass, tail is None), mask, kind, 1.0, beta, alpha).to(dtype)
