"""divergence: how far q = softmax(student / T) is from p = softmax(teacher / T), one number per row of logits [N, V].

All of it is written on d = log q - log p = y - log1p(sum p expm1(y)), y = (student - teacher) / T less its mean under
p, and a KL as its Bregman sum a (expm1(e) - e), e = log b - log a: no digit is lost where student and teacher nearly
agree. Words at -inf on both sides do not exist. The factor T^2 is the caller's.
"""

import math

import torch


def divergence(student, teacher, mask, kind, temperature, beta, alpha):
    """student, teacher [N,V], mask [N] -> rows [N]."""
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    return rows_of(student.to(dtype), teacher.to(dtype), None, mask, kind, temperature, beta, alpha)


def rows_of(s, t, partial, mask, kind, temperature, beta, alpha):
    """partial: None, or of a sparse teacher (log_mass, plain); see divergence_topk."""
    missing = (s == -torch.inf) & (t == -torch.inf)  # [N, V]
    blank = missing.all(-1) if mask is None else missing.all(-1) | ~mask  # [N]
    s, t = s.masked_fill(blank[:, None], 0), t.masked_fill(blank[:, None], 0)
    if kind == "mse":
        return (s.masked_fill(missing, 0) - t.masked_fill(missing, 0)).square().sum(-1)
    p, q = torch.softmax(t / temperature, -1), torch.softmax(s / temperature, -1)
    silent = (p == 0) & (q == 0)  # words that neither side can say
    x = (_difference(s, t) / temperature).masked_fill(silent, 0)
    y = (x - (p * x.clamp(-1e30, 1e30)).sum(-1, keepdim=True).detach()).masked_fill(silent, 0)
    rise = (p * y.clamp(max=60).expm1()).sum(-1, keepdim=True)  # [N, 1] log1p of it: difference of the log-sum-exps
    near = (rise < 1) & (y < 60).all(-1, keepdim=True)  # elsewhere expm1 may overflow, and nothing cancels
    far = torch.log_softmax(s / temperature, -1) - torch.log_softmax(t / temperature, -1)
    d = torch.where(near, y - rise.masked_fill(~near, 0).log1p(), far.masked_fill(silent, 0))  # [N, V] log q - log p
    if partial is None:
        return _compare(p, q, d, kind, beta, alpha).masked_fill(blank, 0)
    log_mass, plain = partial
    lacking = {"forward_kl": plain, "soft_ce": 1, "skew_kl": plain * (1 - alpha)}.get(kind, 0) * log_mass.expm1()
    return (_compare(p * log_mass.exp(), q, d - log_mass, kind, beta, alpha) + lacking[:, 0]).masked_fill(blank, 0)


def _difference(s, t):
    """s - t less that of the maxima, so that a constant offset of one side costs no digits: what s - t loses is added."""
    x = s - t
    with torch.no_grad():
        back = x - s
        lost = ((s - (x - back)) - (t + back)).nan_to_num(0, 0, 0)  # NaN where s or t is infinite
        offset = (s.amax(-1, keepdim=True) - t.amax(-1, keepdim=True)).nan_to_num(0, 0, 0)
    return (x - offset) + lost


def _compare(p, q, d, kind, beta, alpha):
    if kind == "reverse_kl":
        return _kl(q, p, -d)
    if kind == "skew_kl" and alpha > 0:
        return _kl(p, alpha * p + (1 - alpha) * q, _mix(d, alpha, 1 - alpha))
    if kind == "jsd":
        m = beta * p + (1 - beta) * q
        return beta * _kl(p, m, _mix(d, beta, 1 - beta)) + (1 - beta) * _kl(q, m, _mix(-d, 1 - beta, beta))
    if kind == "tvd":
        return torch.where(d > 1, q - p, p * d.clamp(max=1).expm1().abs()).sum(-1) / 2
    return _kl(p, q, d) + (torch.special.entr(p).sum(-1) if kind == "soft_ce" else 0)


def _mix(r, rest, w):
    """log(rest + w e^r), rest = 1 - w; past e^80 nothing of it is left beside what it multiplies."""
    r = r.clamp(max=80)
    x = w * r.expm1()
    near = x.abs() < 0.5  # elsewhere 1 + x may have lost the digits of rest
    far = torch.logaddexp(r + math.log(w), torch.full_like(r, math.log(rest)))
    return torch.where(near, x.masked_fill(~near, 0).log1p(), far)


def _kl(a, b, e):
    """sum a (log a - log b), with sum (b - a) = 0 added; e = log b - log a."""
    near = a * _bregman(e.clamp(max=1))
    return torch.where(e > 1, b - a - a * e.clamp(1, 1e30), near).sum(-1)


def _bregman(e):
    """b(e) = expm1(e) - e >= 0, by its series where that would cancel. To differentiate (any number of times, in either
    mode): b(x + h) = b(x) + expm1(x) h + e^x b(h) at h = 0, since the derivative, expm1, never cancels."""
    small = e.clamp(-0.5, 0.5)
    x, series = small.detach(), 1.0
    for k in range(14, 2, -1):
        series = 1 + x / k * series
    h = small - x  # 0
    near = x.square() / 2 * series + x.expm1() * h + x.exp() * (h.expm1() - h)
    return torch.where(e.abs() < 0.5, near, e.expm1() - e)
