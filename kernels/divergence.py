"""Row-wise divergence between q = softmax(s / T) and p = softmax(t / T), s and t [N, V]; seven kinds, and a top-k teacher.

The maths. As the student nears the teacher, log q - log p loses its digits if both are formed. Here it never is. With
reference points S and T' of a row (maxima, or guesses of them) and c = ((s - t) - (S - T')) / T, which is small there,

    kappa = log sum_v p e^c = log1p(sum_v p expm1(c)),   d = log(q / p) = c - kappa,   q - p = p expm1(d).

Where |d| < 1/2 everything is built on expm1(d) by its series; elsewhere p and q on their own lose nothing. Every kind but
mse is a Bregman divergence of p, q and that difference, with lambda(y) = y - log1p(y) >= 0 and phi(x) = expm1(x) - x >= 0:

    KL(p || p + n) = sum p lambda(n / p) = sum p phi(log(1 + n / p))   when sum n = 0: each term >= 0, nothing cancels.

The gradient of a row is q (h - sum q h) / T, h the kind's derivative by q up to a constant; for forward_kl and soft_ce it
is (q - p) / T. For mse, on the logits themselves, the value is sum (s - t)^2.

Saved per row, instead of probabilities: both reference points, both sums of exponentials, kappa, and sum q h over the q
that the backward will see, so that its rounding cancels.

The passes. A pass needs reference points that keep its exponentials in range, not the maxima: the maxima of the first
block will do, and a row where they do not (an exponential out of range) is done again with the true ones. forward_kl and
soft_ce follow from the sums of that one pass, unless they would cancel; the other kinds read the row once more, backwards,
since its end is what the L2 cache still holds. The backward goes through rows and blocks in the opposite order too.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.kernels.divergence_topk import divergence_topk_bwd, divergence_topk_fwd  # noqa: F401 - the stem's other form

# The order of fastkd.checks.KINDS.
FORWARD_KL, REVERSE_KL, SKEW_KL, JSD, TVD, SOFT_CE, MSE = (tl.constexpr(kind) for kind in range(7))
LOG2_E = tl.constexpr(1.4426950408889634)
TINY = tl.constexpr(1e-37)  # below it a probability counts as 0, so that no ratio overflows


@triton.jit
def hidden(mask_ptr, i_n):
    """Whether row i_n is masked."""
    return False if mask_ptr is None else tl.load(mask_ptr + i_n) == 0


@triton.jit
def phi_series(x):
    """(expm1(x) - x) / x² for |x| < 1/2, to 4e-8."""
    y = 1 / 40320 * x + 1 / 5040
    y = y * x + 1 / 720
    y = y * x + 1 / 120
    y = y * x + 1 / 24
    y = y * x + 1 / 6
    return y * x + 1 / 2


@triton.jit
def logarithms(y, one_and_y):
    """log1p(y), and y - log1p(y) with all its digits and never negative; 1 + y may be known better than y."""
    near = tl.abs(y) < 0.4
    z = tl.where(near, y, 0.0)
    z = z / (2.0 + z)  # log(1 + y) = 2 z + 2 z³ / 3 + 2 z⁵ / 5 + ...
    w = z * z
    rest = z * w * (2 / 3 + w * (2 / 5 + w * (2 / 7 + w * (2 / 9 + w * (2 / 11)))))
    log1p = tl.where(near, 2.0 * z + rest, tl.log(one_and_y))
    return log1p, tl.where(near, y * z - rest, y - log1p)


@triton.jit
def load_pair(s_ptr, t_ptr, start, head, end, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """One block of both rows as float32; outside of them -inf, which is probability 0."""
    o_v = start + tl.arange(0, BLOCK)
    if WHOLE:
        b_s = tl.load(s_ptr + o_v).to(tl.float32)  # [BLOCK]
        b_t = tl.load(t_ptr + o_v).to(tl.float32)
    else:
        m_v = (o_v >= head) & (o_v < end)
        b_s = tl.where(m_v, tl.load(s_ptr + o_v, mask=m_v, other=0.0).to(tl.float32), float("-inf"))
        b_t = tl.where(m_v, tl.load(t_ptr + o_v, mask=m_v, other=0.0).to(tl.float32), float("-inf"))
    return b_s, b_t


@triton.jit
def maxima(s_ptr, t_ptr, head, end, BLOCK: tl.constexpr):
    """Of both rows up to `end`; 0 where nothing but -inf is found."""
    top_s = tl.full([BLOCK], float("-inf"), tl.float32)
    top_t = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, end, BLOCK):
        b_s, b_t = load_pair(s_ptr, t_ptr, start, head, end, BLOCK, False)
        top_s, top_t = tl.maximum(top_s, b_s), tl.maximum(top_t, b_t)
    best_s, best_t = tl.max(top_s, 0), tl.max(top_t, 0)
    return tl.where(best_s > float("-inf"), best_s, 0.0), tl.where(best_t > float("-inf"), best_t, 0.0)


@triton.jit
def add_moments(b_s, b_t, ref_s, ref_t, inv_T, sum_s, sum_t, excess, first, bregman, energy, KIND: tl.constexpr):
    """Adds e^s, e^t, e^s - e^t, e^t c, e^s - e^t - e^t c and e^t t, of s and t less their references, over T."""
    c = ((b_s - b_t) - (ref_s - ref_t)) * inv_T
    e_s = tl.exp2((b_s - ref_s) * (inv_T * LOG2_E))
    e_t = tl.exp2((b_t - ref_t) * (inv_T * LOG2_E))
    near = tl.abs(c) < 0.5  # not if NaN: a word masked on both sides, where both exponentials are 0
    slight = e_t * (c * c * phi_series(c))
    sum_s += e_s
    sum_t += e_t
    here = tl.where(near, e_t * c + slight, e_s - e_t)
    excess += here
    if KIND == FORWARD_KL or KIND == SOFT_CE:
        first_here = tl.where(e_t > 0, e_t * c, e_t)
        first += first_here
        bregman += tl.where(near, slight, here - first_here)
    if KIND == SOFT_CE:
        energy += tl.where(e_t > 0, e_t * ((b_t - ref_t) * inv_T), e_t)
    return sum_s, sum_t, excess, first, bregman, energy


@triton.jit
def edges(head, end, BLOCK: tl.constexpr):
    """The blocks of a row that lie in it whole, from and to; and range() over those that do not: its first, its last."""
    first, last = tl.where(head > 0, BLOCK, 0), end // BLOCK * BLOCK
    return first, last, tl.where(head > 0, 0, last), tl.where(end > last, last + 1, last), tl.maximum(last, 1)


@triton.jit
def moments(s_ptr, t_ptr, head, end, ref_s, ref_t, inv_T, KIND: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """The sums of `add_moments` over a row."""
    sum_s = tl.zeros([BLOCK], tl.float32)
    sum_t = tl.zeros([BLOCK], tl.float32)
    excess = tl.zeros([BLOCK], tl.float32)
    first = tl.zeros([BLOCK], tl.float32)
    bregman = tl.zeros([BLOCK], tl.float32)
    energy = tl.zeros([BLOCK], tl.float32)
    whole, last, edge, edge_stop, edge_step = edges(head, end, BLOCK)
    for start in tl.range(whole, last, BLOCK, num_stages=STAGES):
        b_s, b_t = load_pair(s_ptr, t_ptr, start, head, end, BLOCK, True)
        sum_s, sum_t, excess, first, bregman, energy = add_moments(
            b_s, b_t, ref_s, ref_t, inv_T, sum_s, sum_t, excess, first, bregman, energy, KIND
        )
    for start in range(edge, edge_stop, edge_step):
        b_s, b_t = load_pair(s_ptr, t_ptr, start, head, end, BLOCK, False)
        sum_s, sum_t, excess, first, bregman, energy = add_moments(
            b_s, b_t, ref_s, ref_t, inv_T, sum_s, sum_t, excess, first, bregman, energy, KIND
        )
    return tl.sum(sum_s), tl.sum(sum_t), tl.sum(excess), tl.sum(first), tl.sum(bregman), tl.sum(energy)


@triton.jit
def pair(b_s, b_t, ref_s, ref_t, per_sum_s, per_sum_t, kappa, inv_T):
    """p, q, their difference n = q - p, d = log(q / p), e = expm1(d), and whether |d| < 1/2, where e means something."""
    k = inv_T * LOG2_E
    p = tl.exp2((b_t - ref_t) * k) * per_sum_t
    q = tl.exp2((b_s - ref_s) * k) * per_sum_s
    d = ((b_s - b_t) - (ref_s - ref_t)) * inv_T - kappa
    near = tl.abs(d) < 0.5
    e = d + d * d * phi_series(d)
    n = tl.where(near, p * e, q - p)
    return p, tl.where(near, p + n, q), n, d, e, near


@triton.jit
def bregman_term(a, n, y, one_and_y):
    """a lambda(y), y = n / a: the term of KL(a || a + n), and log1p(y). Without a, n: the limit."""
    log1p, excess = logarithms(y, one_and_y)
    return tl.where(a > TINY, a * excess, n + a * 0.0), log1p  # a * 0: NaN stays


@triton.jit
def term_and_slope(p, q, n, d, e, near, mix, KIND: tl.constexpr):
    """The word's share of the value, and h. m = p + mix n is the mixture of skew_kl and jsd."""
    if KIND == FORWARD_KL or KIND == SOFT_CE:
        value = tl.where(near, p * (d * d * phi_series(d)), tl.where(p > 0, n - p * d, n))
        slope = n * 0.0
    elif KIND == REVERSE_KL:
        value = tl.where(near, q * (d * d * phi_series(-d)), tl.where(q > 0, q * d - n, -n))
        slope = tl.where(q > 0, d, q * 0.0)
    elif KIND == TVD:
        value = 0.5 * tl.abs(n)
        slope = tl.where(n > 0, 0.5, tl.where(n < 0, -0.5, n * 0.0))
    else:
        m = (1.0 - mix) * p + mix * q
        per_p = 1.0 / tl.where(p > TINY, p, 1.0)
        value, _ = bregman_term(p, mix * n, mix * tl.where(near, e, n * per_p), m * per_p)
        if KIND == SKEW_KL:
            some_m = tl.where(m > TINY, m, 1.0)
            slope = tl.where(m > TINY, mix * mix * n / some_m, m * 0.0)
        else:
            per_q = 1.0 / tl.where(q > TINY, q, 1.0)
            other, log1p = bregman_term(q, (mix - 1.0) * n, (mix - 1.0) * (n * per_q), m * per_q)
            value = (1.0 - mix) * value + mix * other
            slope = tl.where(q > TINY, -mix * log1p, q * 0.0)
    return value, slope


@triton.jit
def add_terms(b_s, b_t, ref_s, ref_t, per_s, per_t, kappa, inv_T, mix, values, mass, weighted, KIND: tl.constexpr):
    p, q, n, d, e, near = pair(b_s, b_t, ref_s, ref_t, per_s, per_t, kappa, inv_T)
    value, slope = term_and_slope(p, q, n, d, e, near, mix, KIND)
    return values + value, mass + q, weighted + q * slope


@triton.jit
def second_pass(
    s_ptr, t_ptr, head, end, ref_s, ref_t, sum_s, sum_t, kappa, inv_T, mix, KIND: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The value and the mean slope of a row, from its end to its beginning."""
    values = tl.zeros([BLOCK], tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    per_s, per_t = 1.0 / sum_s, 1.0 / sum_t
    whole, last, edge, edge_stop, edge_step = edges(head, end, BLOCK)
    for start in range(edge, edge_stop, edge_step):
        b_s, b_t = load_pair(s_ptr, t_ptr, start, head, end, BLOCK, False)
        values, mass, weighted = add_terms(
            b_s, b_t, ref_s, ref_t, per_s, per_t, kappa, inv_T, mix, values, mass, weighted, KIND
        )
    for start in tl.range(whole, last, BLOCK, num_stages=STAGES):
        b_s, b_t = load_pair(s_ptr, t_ptr, whole + last - BLOCK - start, head, end, BLOCK, True)
        values, mass, weighted = add_terms(
            b_s, b_t, ref_s, ref_t, per_s, per_t, kappa, inv_T, mix, values, mass, weighted, KIND
        )
    return tl.sum(values), tl.sum(weighted) / tl.sum(mass)


@triton.jit
def kl_from(kappa, x, first, bregman):
    """KL(p || q) from means under p, by whichever of two forms keeps its digits; -1 if neither does."""
    _, x_less_kappa = logarithms(x, 1.0 + x)
    direct = kappa - first
    shifted = bregman - x_less_kappa
    found = tl.where(shifted >= 0.125 * bregman, shifted, -1.0)
    return tl.where(direct >= 0.25 * (tl.abs(kappa) + tl.abs(first)), direct, found)


@triton.jit
def squares(s_ptr, t_ptr, head, end, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    whole, last, edge, edge_stop, edge_step = edges(head, end, BLOCK)
    for start in tl.range(whole, last, BLOCK, num_stages=STAGES):
        b_s, b_t = load_pair(s_ptr, t_ptr, start, head, end, BLOCK, True)
        total += tl.where(b_s == b_t, 0.0, (b_s - b_t) * (b_s - b_t))
    for start in range(edge, edge_stop, edge_step):
        b_s, b_t = load_pair(s_ptr, t_ptr, start, head, end, BLOCK, False)
        total += tl.where(b_s == b_t, 0.0, (b_s - b_t) * (b_s - b_t))
    return tl.sum(total)


@triton.jit
def forward_kernel(
    s_ptr, t_ptr, mask_ptr, values_ptr, stats_ptr, s_stride, t_stride, V, inv_T, mix,
    KIND: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program per row."""
    i_n = tl.program_id(0).to(tl.int64)
    if hidden(mask_ptr, i_n):
        tl.store(values_ptr + i_n, 0.0)
        return
    head = (i_n * s_stride % ALIGN).to(tl.int32)
    end = head + V
    s_ptr += i_n * s_stride // ALIGN * ALIGN
    t_ptr += i_n * t_stride // ALIGN * ALIGN
    if KIND == MSE:
        tl.store(values_ptr + i_n, squares(s_ptr, t_ptr, head, end, BLOCK, STAGES))
    else:
        ref_s, ref_t, sum_s, sum_t, excess, first, bregman, energy = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        seen = 0
        stop = tl.minimum(end, BLOCK)
        while seen < stop:
            ref_s, ref_t = maxima(s_ptr, t_ptr, head, stop, BLOCK)
            sum_s, sum_t, excess, first, bregman, energy = moments(
                s_ptr, t_ptr, head, end, ref_s, ref_t, inv_T, KIND, BLOCK, STAGES
            )
            seen = stop
            good = (sum_s > 1e-25) & (sum_s < 1e25) & (sum_t > 1e-25) & (sum_t < 1e25)
            stop = tl.where(good, stop, end)
        if (sum_s == 0) & (sum_t == 0):  # no word exists on either side: a row of value 0, and p = q = 0 in the backward
            value, kappa, mean, sum_s, sum_t = 0.0, 0.0, 0.0, 1.0, 1.0
        else:
            x = excess / sum_t
            kappa, _ = logarithms(x, sum_s / sum_t)
            mean = 0.0
            value = -1.0
            if KIND == FORWARD_KL or KIND == SOFT_CE:
                value = kl_from(kappa, x, first / sum_t, bregman / sum_t)
            if value < 0:
                value, mean = second_pass(
                    s_ptr, t_ptr, head, end, ref_s, ref_t, sum_s, sum_t, kappa, inv_T, mix, KIND, BLOCK, STAGES
                )
            if KIND == SOFT_CE:
                value += tl.log(sum_t) - energy / sum_t
        tl.store(values_ptr + i_n, tl.where(value < 0, 0.0, value))  # rounding of logits near float32's largest
        stats_ptr += 6 * i_n
        tl.store(stats_ptr, ref_s)
        tl.store(stats_ptr + 1, ref_t)
        tl.store(stats_ptr + 2, sum_s)
        tl.store(stats_ptr + 3, sum_t)
        tl.store(stats_ptr + 4, kappa)
        tl.store(stats_ptr + 5, mean)


@triton.jit
def gradient(b_s, b_t, g, stats_ptr, inv_T, mix, KIND: tl.constexpr):
    """Of one block of the student's row, where g is the upstream gradient of the row's value."""
    if KIND == MSE:
        return tl.where(b_s == b_t, 0.0, (b_s - b_t) * (2.0 * g))
    ref_s, ref_t = tl.load(stats_ptr), tl.load(stats_ptr + 1)
    per_s, per_t = 1.0 / tl.load(stats_ptr + 2), 1.0 / tl.load(stats_ptr + 3)
    kappa, mean = tl.load(stats_ptr + 4), tl.load(stats_ptr + 5)
    p, q, n, d, e, near = pair(b_s, b_t, ref_s, ref_t, per_s, per_t, kappa, inv_T)
    if KIND == FORWARD_KL or KIND == SOFT_CE:
        return n * (g * inv_T)
    _, slope = term_and_slope(p, q, n, d, e, near, mix, KIND)
    return q * (slope - mean) * (g * inv_T)


@triton.jit
def backward_kernel(
    g_ptr, s_ptr, t_ptr, mask_ptr, stats_ptr, grad_ptr, g_stride, s_stride, t_stride, V, blocks, inv_T, mix,
    KIND: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per block of a row; the last come first, since the forward ended with them."""
    i = tl.num_programs(0) - 1 - tl.program_id(0)
    i_n, start = (i // blocks).to(tl.int64), i % blocks * BLOCK
    head = (i_n * s_stride % ALIGN).to(tl.int32)
    end = head + V
    o_v = start + tl.arange(0, BLOCK)
    m_v = (o_v >= head) & (o_v < end)
    grad_ptr += i_n * V // ALIGN * ALIGN + o_v
    if hidden(mask_ptr, i_n):
        tl.store(grad_ptr, tl.zeros([BLOCK], grad_ptr.dtype.element_ty), mask=m_v)
        return
    s_ptr += i_n * s_stride // ALIGN * ALIGN
    t_ptr += i_n * t_stride // ALIGN * ALIGN
    stats_ptr += 6 * i_n
    g = tl.load(g_ptr + i_n * g_stride).to(tl.float32)
    if (start >= head) & (start + BLOCK <= end):
        b_s, b_t = load_pair(s_ptr, t_ptr, start, head, end, BLOCK, True)
        grad = gradient(b_s, b_t, g, stats_ptr, inv_T, mix, KIND)
        tl.store(grad_ptr, grad.to(grad_ptr.dtype.element_ty))
    else:
        b_s, b_t = load_pair(s_ptr, t_ptr, start, head, end, BLOCK, False)
        grad = gradient(b_s, b_t, g, stats_ptr, inv_T, mix, KIND)
        tl.store(grad_ptr, grad.to(grad_ptr.dtype.element_ty), mask=m_v)


# Words of a row per step and warps of a program, forward and backward, by the width of the row: what was compiled for sm_80
# and sm_90 with fewest registers per byte in flight (tests/test_triton.py asserts their spills).
SMALL = {"BLOCK": 1024, "STAGES": 1, "num_warps": 4}, {"BLOCK": 1024, "num_warps": 4}
LARGE = {"BLOCK": 2048, "STAGES": 3, "num_warps": 8}, {"BLOCK": 4096, "num_warps": 8}


def geometry(s: Tensor, t: Tensor) -> tuple[dict, dict, int]:
    """Launch options of the forward (a program per row) and of the backward (a program per block of a row), and blocks.

    Rows of 30522 or 50257 words begin at any element. Where student, teacher and gradient do so alike, programs begin up to
    7 elements earlier, so that every whole block is read and written 16 bytes at a time.
    """
    V = s.shape[1]
    forward, backward = SMALL if V <= 1024 else LARGE
    align = 8 if (s.stride(0) - V) % 8 == 0 and (t.stride(0) - V) % 8 == 0 else 1
    common = {"ALIGN": align, "enable_fp_fusion": True}
    return {**forward, **common}, {**backward, **common}, triton.cdiv(V + align - 1, backward["BLOCK"])


def _row(x: Tensor) -> Tensor:
    """Rows may lie anywhere; the words of one lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def divergence_fwd(
    s: Tensor, t: Tensor, mask: Tensor | None, kind: int, temperature: float, mix: float
) -> tuple[Tensor, Tensor]:
    """s, t [N, V], mask [N] -> values [N], stats [N, 6]."""
    N, V = s.shape
    s, t = _row(s), _row(t)
    values, stats = (s.new_empty(shape, dtype=torch.float32) for shape in ((N,), (N, 6)))
    if N:
        options, _, _ = geometry(s, t)
        forward_kernel[(N,)](
            s, t, None if mask is None else mask.contiguous(), values, stats, s.stride(0), t.stride(0), V,
            1 / temperature, mix, KIND=kind, **options,
        )  # fmt: skip
    return values, stats


def divergence_bwd(
    grad: Tensor, s: Tensor, t: Tensor, mask: Tensor | None, stats: Tensor, kind: int, temperature: float, mix: float
) -> Tensor:
    """grad [N] -> the gradient of s [N, V]."""
    N, V = s.shape
    s, t = _row(s), _row(t)
    out = torch.empty_like(s, memory_format=torch.contiguous_format)
    if N:
        _, options, blocks = geometry(s, t)
        backward_kernel[(N * blocks,)](
            grad, s, t, None if mask is None else mask.contiguous(), stats, out, grad.stride(0), s.stride(0), t.stride(0),
            V, blocks, 1 / temperature, mix, KIND=kind, **options,
        )  # fmt: skip
    return out
