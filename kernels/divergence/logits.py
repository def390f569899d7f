"""Row-wise divergence between q = softmax(s / T) and p = softmax(t / T), s and t [N, V]: seven kinds.

The maths. As the student nears the teacher, log q - log p loses its digits if both are formed. Here it never is. With a
reference per row and side (about the maximum) and c = ((s - t) - (ref_s - ref_t)) / T, which is small there,

    kappa = log sum_v p e^c = log1p(sum_v p expm1(c)),   d = log(q / p) = c - kappa,   q - p = p expm1(d).

Of float32 logits s - t is taken with what its rounding loses: a constant between the two sides costs no digits. Where
|d| < 1/2 everything is built on expm1(d) by its series; elsewhere p and q on their own lose nothing. Every kind but mse is
a Bregman divergence of p, q and that difference, with lambda(y) = y - log1p(y) >= 0 and phi(x) = expm1(x) - x >= 0:

    KL(p || p + n) = sum p lambda(n / p) = sum p phi(log(1 + n / p))   when sum n = 0: each term >= 0, nothing cancels.

The gradient of a row is q (h - sum q h) / T, h the kind's derivative by q up to a constant; for forward_kl and soft_ce it
is (q - p) / T. For mse, on the logits themselves, the value is sum (s - t)^2.

Saved per row, instead of probabilities: both references, both sums of exponentials, kappa, a centre, and sum q (h - centre)
over the q that the backward will see, so that its rounding cancels. The centre is 0, unless h is nearly the same wherever q
has mass: then it is about sum q h, found by a pass of its own.

The passes. One sums what both log-sum-exps and forward_kl follow from. Its references are the first block's maxima; a block
with a word of much more mass moves them, which seldom happens, so that a word costs its arithmetic alone. Should an
exponential get out of range all the same, the row is done again from its true maxima. forward_kl and soft_ce then are
known, unless their sums cancel; the other kinds read the row once more, backwards, since its end is what the L2 cache still
holds. The backward goes through rows and blocks in the opposite order too.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..blocks import blocks_of, hidden, load_pair, logarithms, maxima, phi, row_of

# The order of fastkd.checks.KINDS.
FORWARD_KL, REVERSE_KL, SKEW_KL, JSD, TVD, SOFT_CE, MSE = (tl.constexpr(kind) for kind in range(7))
LOG2_E = tl.constexpr(1.4426950408889634)
TINY = tl.constexpr(1e-37)  # below it a probability counts as 0, so that no ratio overflows


@triton.constexpr_function
def exact_differences(s_type, t_type):
    """Of logits in half precision, float32 holds s - t."""
    return s_type != tl.float32 and t_type != tl.float32


@triton.jit
def difference(a, b):
    """a - b, and what its rounding loses: 0 where a or b is infinite."""
    x = a - b
    back = x - a
    lost = (a - (x - back)) - (b + back)
    return x, tl.where(lost == lost, lost, 0.0)


@triton.jit
def log_ratio(b_s, b_t, refs, inv_T, EXACT: tl.constexpr):
    """c = ((s - t) - (ref_s - ref_t)) / T."""
    if EXACT:
        c = (b_s - b_t) - (refs[0] - refs[1])
    else:
        x, lost = difference(b_s, b_t)
        offset, offset_lost = difference(refs[0], refs[1])
        c = (x - offset) + (lost - offset_lost)
    return c * inv_T


@triton.jit
def add_moments(b_s, b_t, refs, sums, inv_T, KIND: tl.constexpr, EXACT: tl.constexpr):
    """Adds e^s, e^t, e^s - e^t, e^t c, e^s - e^t - e^t c and e^t t, of s and t less their references, over T."""
    ref_s, ref_t = refs
    sum_s, sum_t, excess, first, bregman, energy = sums
    c = log_ratio(b_s, b_t, refs, inv_T, EXACT)
    e_s = tl.exp2((b_s - ref_s) * (inv_T * LOG2_E))
    e_t = tl.exp2((b_t - ref_t) * (inv_T * LOG2_E))
    near = tl.abs(c) < 0.5  # not if NaN: a word masked on both sides, where both exponentials are 0
    slight = e_t * phi(c)
    here = tl.where(near, e_t * c + slight, e_s - e_t)
    if KIND == FORWARD_KL or KIND == SOFT_CE:
        first_here = tl.where(e_t > 0, e_t * c, e_t)
        first += first_here
        bregman += tl.where(near, slight, here - first_here)
    if KIND == SOFT_CE:
        energy += tl.where(e_t > 0, e_t * ((b_t - ref_t) * inv_T), e_t)
    return sum_s + e_s, sum_t + e_t, excess + here, first, bregman, energy


@triton.jit
def move_references(b_s, b_t, refs, sums, inv_T):
    """To the block's maxima, if it has a word of seven times the mass at least: c is to be small where the mass is."""
    ref_s, ref_t = refs
    new_t = tl.max(b_t, 0)
    if (new_t - ref_t) * inv_T > 2.0:
        sum_s, sum_t, excess, first, bregman, energy = sums
        new_s = tl.max(b_s, 0)
        d_t = (new_t - ref_t) * inv_T
        d_c = ((new_s - new_t) - (ref_s - ref_t)) * inv_T  # c falls by it
        a_s, a_t = tl.exp2((ref_s - new_s) * (inv_T * LOG2_E)), tl.exp2(d_t * -LOG2_E)
        near = tl.abs(d_c) < 0.5
        slight = a_t * phi(-d_c)
        gap = tl.where(near, slight - a_t * d_c, a_s - a_t)  # a_t expm1(-d_c)
        slight = tl.where(near, slight, gap + a_t * d_c)  # a_t phi(-d_c)
        bregman = a_s * bregman + gap * first + slight * sum_t
        excess = a_s * excess + gap * sum_t
        first = a_t * (first - d_c * sum_t)
        energy = a_t * (energy - d_t * sum_t)
        sums = (a_s * sum_s, a_t * sum_t, excess, first, bregman, energy)
        refs = (new_s, new_t)
    return refs, sums


@triton.jit
def moments(
    row, refs, inv_T, KIND: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    """The sums of `add_moments` over a row, and the references they ended with."""
    nothing = tl.zeros([BLOCK], tl.float32)
    sums = (nothing, nothing, nothing, nothing, nothing, nothing)
    whole, last, edge, edge_stop, edge_step = blocks_of(row, BLOCK)
    for start in tl.range(whole, last, BLOCK, num_stages=STAGES):
        b_s, b_t = load_pair(row, start, BLOCK, True)
        refs, sums = move_references(b_s, b_t, refs, sums, inv_T)
        sums = add_moments(b_s, b_t, refs, sums, inv_T, KIND, EXACT)
    for start in range(edge, edge_stop, edge_step):
        b_s, b_t = load_pair(row, start, BLOCK, False)
        refs, sums = move_references(b_s, b_t, refs, sums, inv_T)
        sums = add_moments(b_s, b_t, refs, sums, inv_T, KIND, EXACT)
    sum_s, sum_t, excess, first, bregman, energy = sums
    sum_t = sum_t.to(tl.float64)  # the logarithm of 1.0001 has few digits in float32
    return refs, (tl.sum(sum_s), tl.sum(sum_t), tl.sum(excess), tl.sum(first), tl.sum(bregman), tl.sum(energy))


@triton.jit
def pair(b_s, b_t, refs, per_sums, kappa, inv_T, EXACT: tl.constexpr):
    """p, q, their difference n = q - p, d = log(q / p), e = expm1(d), and whether |d| < 1/2, where e means something."""
    ref_s, ref_t = refs
    per_sum_s, per_sum_t = per_sums
    p = tl.exp2((b_t - ref_t) * (inv_T * LOG2_E)) * per_sum_t
    q = tl.exp2((b_s - ref_s) * (inv_T * LOG2_E)) * per_sum_s
    d = log_ratio(b_s, b_t, refs, inv_T, EXACT) - kappa
    near = tl.abs(d) < 0.5
    e = d + phi(d)
    n = tl.where(near, p * e, q - p)
    return p, tl.where(near, p + n, q), n, d, e, near


@triton.jit
def bregman_term(a, n, y, one_and_y):
    """a lambda(y), y = n / a: the term of KL(a || a + n), and log1p(y). Without a, n: the limit."""
    log1p, excess = logarithms(y, one_and_y)
    return tl.where(a > TINY, a * excess, n + a * 0.0), log1p  # a * 0: NaN stays


@triton.jit
def term_and_slope(p, q, n, d, e, near, centre, mixture, KIND: tl.constexpr):
    """The word's share of the value, and h - centre. m = rest p + mix q is the mixture of skew_kl and jsd; of a mix near 1, 1 - mix
    has no digits in float32."""
    mix, rest = mixture
    if KIND == FORWARD_KL or KIND == SOFT_CE:
        value = tl.where(near, p * phi(d), tl.where(p > 0, n - p * d, n))
        slope = n * 0.0
    elif KIND == REVERSE_KL:
        value = tl.where(near, q * phi(-d), tl.where(q > 0, q * d - n, -n))
        slope = tl.where(q > 0, d, q * 0.0) - centre
    elif KIND == TVD:
        value = 0.5 * tl.abs(n)
        slope = tl.where(n > 0, 0.5, tl.where(n < 0, -0.5, n * 0.0)) - centre
    else:
        m = rest * p + mix * q
        per_p = 1.0 / tl.where(p > TINY, p, 1.0)
        value, _ = bregman_term(p, mix * n, mix * tl.where(near, e, n * per_p), m * per_p)
        if KIND == SKEW_KL:
            per_m = mix / tl.where(m > TINY, m, 1.0)
            slope = tl.where(centre == mix, -p * per_m, mix * n * per_m - centre)
            slope = tl.where(m > TINY, slope, m * 0.0)
        else:
            per_q = 1.0 / tl.where(q > TINY, q, 1.0)
            other, log1p = bregman_term(q, -rest * n, -rest * (n * per_q), m * per_q)
            value = rest * value + mix * other
            slope = tl.where(q > TINY, -mix * log1p, q * 0.0) - centre
    return value, slope


@triton.jit
def add_terms(
    b_s, b_t, refs, per_sums, kappa, centre, terms, inv_T, mixture, KIND: tl.constexpr, EXACT: tl.constexpr
):  # fmt: skip
    p, q, n, d, e, near = pair(b_s, b_t, refs, per_sums, kappa, inv_T, EXACT)
    value, slope = term_and_slope(p, q, n, d, e, near, centre, mixture, KIND)
    if KIND == FORWARD_KL or KIND == SOFT_CE:
        return terms[0] + value, terms[1], terms[2], terms[3]
    return terms[0] + value, terms[1] + q, terms[2] + q * slope, terms[3] + q * slope * slope


@triton.jit
def second_pass(
    row, refs, per_sums, kappa, centre, inv_T, mixture, KIND: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The value, and the means of slope - centre and of its square, from the end of a row to its beginning."""
    nothing = tl.zeros([BLOCK], tl.float32)
    terms = (nothing, nothing, nothing, nothing)
    whole, last, edge, edge_stop, edge_step = blocks_of(row, BLOCK)
    for start in range(edge, edge_stop, edge_step):
        b_s, b_t = load_pair(row, start, BLOCK, False)
        terms = add_terms(b_s, b_t, refs, per_sums, kappa, centre, terms, inv_T, mixture, KIND, EXACT)
    for start in tl.range(whole, last, BLOCK, num_stages=STAGES):
        b_s, b_t = load_pair(row, whole + last - BLOCK - start, BLOCK, True)
        terms = add_terms(b_s, b_t, refs, per_sums, kappa, centre, terms, inv_T, mixture, KIND, EXACT)
    if KIND == FORWARD_KL or KIND == SOFT_CE:
        return tl.sum(terms[0]), 0.0, 0.0
    mass = tl.sum(terms[1])
    return tl.sum(terms[0]), tl.sum(terms[2]) / mass, tl.sum(terms[3]) / mass


@triton.jit
def kl_from(kappa, x, first, bregman):
    """KL(p || q) from means under p, by whichever of two forms keeps its digits; -1 if neither does."""
    _, x_less_kappa = logarithms(x, 1.0 + x)
    direct = kappa - first
    shifted = bregman - x_less_kappa
    found = tl.where(shifted >= 0.125 * bregman, shifted, -1.0)
    return tl.where(direct >= 0.25 * (tl.abs(kappa) + tl.abs(first)), direct, found)


@triton.jit
def squares(row, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    whole, last, edge, edge_stop, edge_step = blocks_of(row, BLOCK)
    for start in tl.range(whole, last, BLOCK, num_stages=STAGES):
        b_s, b_t = load_pair(row, start, BLOCK, True)
        total += tl.where(b_s == b_t, 0.0, (b_s - b_t) * (b_s - b_t))
    for start in range(edge, edge_stop, edge_step):
        b_s, b_t = load_pair(row, start, BLOCK, False)
        total += tl.where(b_s == b_t, 0.0, (b_s - b_t) * (b_s - b_t))
    return tl.sum(total)


@triton.jit
def compare(row, inv_T, mixture, KIND: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """The value of a row, and the statistics that the backward needs: references, sums, kappa, centre, mean slope."""
    end = row[3]
    EXACT: tl.constexpr = exact_differences(row[0].dtype.element_ty, row[1].dtype.element_ty)
    refs, sums = (0.0, 0.0), (0.0, tl.full([], 0, tl.float64), 0.0, 0.0, 0.0, 0.0)
    seen, stop = 0, tl.minimum(end, BLOCK)
    while seen < stop:
        refs, sums = moments(row, maxima(row, stop, BLOCK), inv_T, KIND, EXACT, BLOCK, STAGES)
        seen = stop
        in_range = (sums[0] > 1e-25) & (sums[0] < 1e25) & (sums[1] > 1e-25) & (sums[1] < 1e25)
        good = in_range & (sums[3] == sums[3])
        if KIND == SOFT_CE:  # entropy = log sum_t - energy / sum_t must not cancel
            good = good & (sums[5] <= 0.875 * sums[1] * tl.log(sums[1]))
        stop = tl.where(good, stop, end)
    sum_s, exact_sum_t, excess, first, bregman, energy = sums
    sum_t = exact_sum_t.to(tl.float32)
    value, kappa, centre, mean = -1.0, 0.0, 0.0, 0.0
    if (sum_s == 0) & (sum_t == 0):  # no word exists on either side: the value is 0, and p = q = 0 in the backward
        value, sum_s, sum_t = 0.0, 1.0, 1.0
    else:
        x = excess / sum_t
        kappa = logarithms(x, sum_s / sum_t)[0]
        if KIND == FORWARD_KL or KIND == SOFT_CE:
            value = kl_from(kappa, x, first / sum_t, bregman / sum_t)
        per_sums = (1.0 / sum_s, 1.0 / sum_t)
        again = value < 0
        while again:
            value, mean, square = second_pass(
                row, refs, per_sums, kappa, centre, inv_T, mixture, KIND, EXACT, BLOCK, STAGES
            )
            again = (centre == 0) & (square - mean * mean < 0.05 * mean * mean)  # h - mean would cancel
            centre = tl.where(again, mean, centre)
            if KIND == SKEW_KL:  # h - mix is then taken without subtracting: small where the teacher is
                centre = tl.where(again & (mean > 0.5 * mixture[0]), mixture[0], centre)
        if KIND == SOFT_CE:
            value += (tl.log(exact_sum_t) - energy / exact_sum_t).to(tl.float32)
    value = tl.where(value < 0, 0.0, value)  # from the rounding of logits near float32's largest
    return value, (refs, sum_s, sum_t, kappa, mean, centre)


@triton.jit
def store_stats(stats_ptr, stats):
    refs, sum_s, sum_t, kappa, mean, centre = stats
    tl.store(stats_ptr, refs[0])
    tl.store(stats_ptr + 1, refs[1])
    tl.store(stats_ptr + 2, sum_s)
    tl.store(stats_ptr + 3, sum_t)
    tl.store(stats_ptr + 4, kappa)
    tl.store(stats_ptr + 5, mean)
    tl.store(stats_ptr + 6, centre)


@triton.jit
def load_stats(stats_ptr):
    refs = (tl.load(stats_ptr), tl.load(stats_ptr + 1))
    sums = tl.load(stats_ptr + 2), tl.load(stats_ptr + 3)
    return refs, sums[0], sums[1], tl.load(stats_ptr + 4), tl.load(stats_ptr + 5), tl.load(stats_ptr + 6)


@triton.jit
def forward_kernel(
    s_ptr, t_ptr, mask_ptr, values_ptr, stats_ptr, s_stride, t_stride, V, inv_T, mix, rest,
    KIND: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program per row."""
    i_n = tl.program_id(0).to(tl.int64)
    if hidden(mask_ptr, i_n):
        tl.store(values_ptr + i_n, 0.0)
        return
    row = row_of(s_ptr, t_ptr, i_n, s_stride, t_stride, V, ALIGN)
    if KIND == MSE:
        tl.store(values_ptr + i_n, squares(row, BLOCK, STAGES))
    else:
        value, stats = compare(row, inv_T, (mix, rest), KIND, BLOCK, STAGES)
        tl.store(values_ptr + i_n, value)
        store_stats(stats_ptr + 7 * i_n, stats)


@triton.jit
def gradient(b_s, b_t, g, stats, inv_T, mixture, KIND: tl.constexpr, EXACT: tl.constexpr):
    """Of one block of the student's row, where g is the upstream gradient of the row's value."""
    if KIND == MSE:
        return tl.where(b_s == b_t, 0.0, (b_s - b_t) * (2.0 * g))
    refs, sum_s, sum_t, kappa, mean, centre = stats
    p, q, n, d, e, near = pair(b_s, b_t, refs, (1.0 / sum_s, 1.0 / sum_t), kappa, inv_T, EXACT)
    if KIND == FORWARD_KL or KIND == SOFT_CE:
        return n * (g * inv_T)
    _, slope = term_and_slope(p, q, n, d, e, near, centre, mixture, KIND)
    return q * (slope - mean) * (g * inv_T)


@triton.jit
def backward_kernel(
    g_ptr, s_ptr, t_ptr, mask_ptr, stats_ptr, grad_ptr, g_stride, s_stride, t_stride, V, blocks, inv_T, mix, rest,
    KIND: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per block of a row; the last come first, since the forward ended with them."""
    i = tl.num_programs(0) - 1 - tl.program_id(0)
    i_n, start = (i // blocks).to(tl.int64), i % blocks * BLOCK
    row = row_of(s_ptr, t_ptr, i_n, s_stride, t_stride, V, ALIGN)
    _, _, head, end = row
    o_v = start + tl.arange(0, BLOCK)
    m_v = (o_v >= head) & (o_v < end)
    grad_ptr += i_n * V // ALIGN * ALIGN + o_v
    if hidden(mask_ptr, i_n):
        tl.store(grad_ptr, tl.zeros([BLOCK], grad_ptr.dtype.element_ty), mask=m_v)
        return
    g = tl.load(g_ptr + i_n * g_stride).to(tl.float32)
    stats_ptr += 7 * i_n
    EXACT: tl.constexpr = exact_differences(s_ptr.dtype.element_ty, t_ptr.dtype.element_ty)
    if (start >= head) & (start + BLOCK <= end):
        b_s, b_t = load_pair(row, start, BLOCK, True)
        grad = gradient(b_s, b_t, g, load_stats(stats_ptr), inv_T, (mix, rest), KIND, EXACT)
        tl.store(grad_ptr, grad.to(grad_ptr.dtype.element_ty))
    else:
        b_s, b_t = load_pair(row, start, BLOCK, False)
        grad = gradient(b_s, b_t, g, load_stats(stats_ptr), inv_T, (mix, rest), KIND, EXACT)
        tl.store(grad_ptr, grad.to(grad_ptr.dtype.element_ty), mask=m_v)


# Bytes of local memory a thread may use, whatever the kind, dtype and chip: tests/ops/test_triton.py asserts it. Only the forward
# of SKEW on short float32 rows needs any: one word, kept between the two passes and outside of both loops, so that a fifth
# program fits on a multiprocessor.
SPILL_LIMIT = {"forward_kernel": 8, "backward_kernel": 0}

# Words of a row per step and warps of a program, forward and backward, by the width of the row. 8 and 16 words a thread keep
# the sums in registers, with two programs or more on a multiprocessor: not with every Triton, unless it is told the limit.
SMALL = {"BLOCK": 1024, "STAGES": 1, "num_warps": 4}, {"BLOCK": 1024, "num_warps": 4}
LARGE = {"BLOCK": 2048, "STAGES": 3, "num_warps": 8, "maxnreg": 128}, {"BLOCK": 4096, "num_warps": 8}


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
    """s, t [N, V], mask [N] -> values [N], stats [N, 7]."""
    N, V = s.shape
    s, t = _row(s), _row(t)
    values, stats = (s.new_empty(shape, dtype=torch.float32) for shape in ((N,), (N, 7)))
    if N:
        options, _, _ = geometry(s, t)
        forward_kernel[(N,)](
            s, t, None if mask is None else mask.contiguous(), values, stats, s.stride(0), t.stride(0), V,
            1 / temperature, mix, 1 - mix, KIND=kind, **options,
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
            V, blocks, 1 / temperature, mix, 1 - mix, KIND=kind, **options,
        )  # fmt: skip
    return out
