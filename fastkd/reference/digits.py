"""Softmax, and the sums of divergence.py, computed without cancellation."""

import math

import torch


def normalized(x, temperature):
    """softmax and log_softmax of x / temperature. All terms but the largest, which is 1, are summed first: in float32, small
    terms added to 1 one by one are lost. Dividing by a 1 that depends on all p subtracts the mean from a gradient before it
    is rounded."""
    top = x.detach().argmax(-1, keepdim=True)
    x = (x - x.detach().gather(-1, top)) / temperature
    masses = x.exp()
    others = masses.scatter_add(-1, top, torch.full_like(masses[..., :1], -1)).sum(-1, keepdim=True)
    p = masses / (1 + others)
    return p / (1 + (p - p.detach()).sum(-1, keepdim=True)), x - others.log1p()


def difference(s, t):
    """s - t less that of the maxima, so that a constant offset of one side costs no digits: what s - t loses is added."""
    x = s - t
    with torch.no_grad():
        back = x - s
        lost = ((s - (x - back)) - (t + back)).nan_to_num(0, 0, 0)  # NaN where s or t is infinite
        offset = (s.amax(-1, keepdim=True) - t.amax(-1, keepdim=True)).nan_to_num(0, 0, 0)
    return (x - offset) + lost


def total(x):
    return x.sum(-1, keepdim=True)


def log_ratio(x, p, log_p, q, log_q, total=total, largest=lambda x: x.amax(-1, keepdim=True)):
    """log q - log p, and where it was computed without cancellation [.., 1], from x = student - teacher less any number per
    row: y - log1p(sum p expm1(y)), where y is x less about its mean under p. total and largest reduce over the vocabulary,
    which may be sharded."""
    absent = (p == 0) & (q == 0)  # tokens of probability 0 on both sides
    x = x.masked_fill(absent, 0)
    y = (x - total((p * x.clamp(-1, 1)).detach())).masked_fill(absent, 0)
    rise = total(p * y.clamp(max=60).expm1())  # log1p of it is the difference of the two log-sum-exps
    near = (rise.abs() < 0.9) & (largest(y.detach()) < 60)  # elsewhere expm1 may overflow, and nothing cancels
    far = (log_q - log_p).masked_fill(absent, 0)
    return torch.where(near, y - rise.masked_fill(~near, 0).log1p(), far), near


def mix(r, rest, w):
    """log(rest + w e^r), rest = 1 - w; past e^80 nothing of it is left beside what it multiplies."""
    r = r.clamp(-1e3, 80)  # -inf, too, as a number: e^-1000 is 0
    at = r.detach()
    h = r - at  # 0: PyTorch's derivative of expm1 is expm1(r) + 1, which has no digits for r << 0
    x = w * (at.expm1() + at.exp() * h.expm1())
    near = x.abs() < 0.5  # elsewhere 1 + x may have lost the digits of rest
    far = torch.logaddexp(r + math.log(w), torch.full_like(r, math.log(rest)))
    return torch.where(near, x.masked_fill(~near, 0).log1p(), far)


def kl(a, b, e):
    """sum a (log a - log b), with sum (b - a) = 0 added; e = log b - log a."""
    near = a * bregman(e.clamp(max=2))  # limits lie beyond 1: at them the derivative of a clamp is PyTorch's choice
    return torch.where(e > 1, b - a - a * e.clamp(0.5, 1e30), near).sum(-1)


def bregman(e):
    """b(e) = expm1(e) - e >= 0, by its series where that would cancel. To differentiate (any number of times, in either
    mode): b(x + h) = b(x) + expm1(x) h + e^x b(h) at h = 0, since the derivative, expm1, never cancels."""
    small = e.clamp(-0.5, 0.5)
    x, series = small.detach(), 1.0
    for k in range(14, 2, -1):
        series = 1 + x / k * series
    h = small - x  # 0
    near = x.square() / 2 * series + x.expm1() * h + x.exp() * (h.expm1() - h)
    return torch.where(e.abs() < 0.5, near, e.expm1() - e)
