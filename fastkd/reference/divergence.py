"""divergence: how far q = softmax(student / T) is from p = softmax(teacher / T), one number per row of logits [N, V].

Everything is computed from d = log q - log p = y - log1p(sum p expm1(y)), where y = (student - teacher) / T less any number,
here about its mean under p; and a KL as its Bregman sum a (expm1(e) - e), e = log b - log a. So no digit is lost where
student and teacher nearly agree. Tokens at -inf on both sides do not exist. The caller multiplies by T^2.
"""

import torch

from .digits import difference, kl, log_ratio, mix, normalized


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
    (p, log_p), (q, log_q) = normalized(t, temperature), normalized(s, temperature)
    by_change = kind in OF_STUDENT and (kind, alpha) != ("skew_kl", 0)
    if by_change:
        student_q, moved = q, (s - s.detach()) / temperature
        s, q, log_q = s.detach(), q.detach(), log_q.detach()  # their derivatives: OF_STUDENT
    d, near = log_ratio(difference(s, t) / temperature, p, log_p, q, log_q)
    if partial is None:
        rows = compare(p, q, d, log_p, kind, beta, alpha, ~near)
    else:
        log_mass, plain = partial
        lacking = {"forward_kl": plain, "soft_ce": 1, "skew_kl": plain * (1 - alpha)}.get(kind, 0) * log_mass.expm1()
        p, d = p * log_mass.exp(), d - log_mass
        rows = compare(p, q, d, log_p + log_mass, kind, beta, alpha, ~near) + lacking[:, 0]
    if by_change:
        rows = rows + OF_STUDENT[kind](student_q, moved, q, p, d, alpha)
    return rows.masked_fill(blank, 0)


def _of_reverse_kl(q, moved, q_0, p, d_0, alpha):
    """The change of KL(q || p) when the student's logits move by `moved`, which is 0, from q_0 to q. With a fixed q_0 it is
    exactly sum (q - q_0) (log q_0 - log p) + KL(q || q_0). The first derivative of the second term is 0 token by token,
    and so it is computed, by KL(q || q_0) = sum q_0 (u e^u - expm1(u)), u = log q - log q_0: where one token has nearly all
    of q, the gradient is so small that rounding errors of a sum that is 0 would exceed it."""
    h = moved.masked_fill(q_0 == 0, 0)
    u = h - (q_0 * h.expm1()).sum(-1, keepdim=True).log1p()
    d_0 = d_0.clamp(-1e30, 1e30)
    centred = d_0 - (q_0 * d_0).sum(-1, keepdim=True).detach()
    return ((q - q_0) * centred).sum(-1) + (q_0 * (u * u.exp() - u.expm1())).sum(-1)


def _of_skew_kl(q, moved, q_0, p, d_0, alpha):
    """The change of KL(p || m), m = alpha p + rest q, when q_0 becomes q: sum (q - q_0) h - p (log1p(y) - y) with
    h = -rest p / m and y = rest (q - q_0) / m. Only differences of h count. They are taken from the likeliest token's, so that
    a gradient keeps its digits where that token has nearly all of q, and h + rest = rest^2 (q_0 - p) / m takes the place of h
    where student and teacher nearly agree on it."""
    rest = 1 - alpha
    m = alpha * p + rest * q_0
    m = m.masked_fill(m == 0, 1)
    y = rest * (q - q_0) / m
    minus_h, top = rest * p / m, q_0.argmax(-1, keepdim=True)
    h_plus_rest = rest**2 * torch.where(d_0.abs() < 1, p * d_0.clamp(-1, 1).expm1(), q_0 - p) / m
    h = torch.where(minus_h.gather(-1, top) < rest / 2, -minus_h, h_plus_rest)
    return ((q - q_0) * (h - h.gather(-1, top))).sum(-1) + (p * (y - y.log1p())).sum(-1)


OF_STUDENT = {"reverse_kl": _of_reverse_kl, "skew_kl": _of_skew_kl}


def compare(p, q, d, log_p, kind, beta, alpha, far=False):
    if kind == "reverse_kl":
        return kl(q, p, -d)
    if kind == "skew_kl" and alpha > 0:
        return kl(p, alpha * p + (1 - alpha) * q, mix(d, alpha, 1 - alpha))
    if kind == "jsd":
        m = beta * p + (1 - beta) * q
        return beta * kl(p, m, mix(d, beta, 1 - beta)) + (1 - beta) * kl(q, m, mix(-d, 1 - beta, beta))
    if kind == "tvd":
        # expm1(d) - its derivative is computed as expm1(d) + 1 - is for d about 0; where `far`, d has the error of log p,
        # which is large where p is small.
        direct = (d.abs() > 1) | (far & (p < 0.5))
        return torch.where(direct, (q - p).abs(), p * d.clamp(max=2).expm1().abs()).sum(-1) / 2
    return kl(p, q, d) - ((p * log_p.masked_fill(p == 0, 0)).sum(-1) if kind == "soft_ce" else 0)
