"""Row-wise divergence between q = softmax(s / T) and p = softmax(t / T), s and t [N, V]: what one program computes of a row.

The maths. As the student nears the teacher, log q - log p loses its digits if both are formed. Here it never is. With a
reference per row and side (about the maximum) and c = ((s - t) - (ref_s - ref_t)) / T, which is small there,

    kappa = log sum_v p e^c = log1p(sum_v p expm1(c)),   d = log(q / p) = c - kappa,   q - p = p expm1(d).

For float32 logits, s - t is taken together with its rounding error: a constant between the two sides costs no digits. Where
|d| < 1/2 everything is built on expm1(d) by its series; elsewhere p and q on their own lose nothing. Every kind but mse is
a Bregman divergence of p, q and that difference, with lambda(y) = y - log1p(y) >= 0 and phi(x) = expm1(x) - x >= 0:

    KL(p || p + n) = sum p lambda(n / p) = sum p phi(log(1 + n / p))   when sum n = 0: each term >= 0, nothing cancels.

The gradient of a row is q (h - sum q h) / T, where h is the kind's derivative by q up to a constant; for forward_kl and
soft_ce it is (q - p) / T. For mse, on the logits themselves, the value is sum (s - t)^2.

Saved per row, instead of probabilities: both references, both sums of exponentials, kappa, a centre, and sum q (h - centre)
over the q that the backward will see, so that its rounding cancels. The centre is 0, unless h is nearly the same wherever q
has mass: then it is about sum q h, found by a pass of its own.

The passes. The first one sums what both log-sum-exps and forward_kl follow from. Its references are the first block's
maxima; a block with a token of much more mass moves them, which seldom happens, so that a token costs its arithmetic alone.
If an exponential gets out of range all the same, the row is done again from its true maxima. forward_kl and soft_ce are then
known, unless their sums cancel; the other kinds read the row once more, backwards, since the L2 cache still holds its end.
The backward goes through rows and blocks in the opposite order too.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..blocks import blocks_inside, edge_blocks, load_pair, logarithms, maxima, phi

# The order of fastkd.checks.KINDS.
FORWARD_KL, REVERSE_KL, SKEW_KL, JSD, TVD, SOFT_CE, MSE = (tl.constexpr(kind) for kind in range(7))
LOG2_E = tl.constexpr(1.4426950408889634)
TINY = tl.constexpr(1e-37)  # below it a probability counts as 0, so that no ratio overflows


class Sums(NamedTuple):
    """Sums over a row of e^s, e^t, e^s - e^t, e^t c, e^s - e^t - e^t c and e^t t, s and t less their references, over T. The
    third is that of the next two: whoever wants these does not sum it."""

    s: tl.tensor
    t: tl.tensor
    excess: tl.tensor
    first: tl.tensor
    bregman: tl.tensor
    energy: tl.tensor


class Stats(NamedTuple):
    """What the backward needs of a row: references, sums of exponentials, kappa, the mean of h - centre, the centre."""

    refs: tl.tuple
    sum_s: tl.tensor
    sum_t: tl.tensor
    kappa: tl.tensor
    mean: tl.tensor
    centre: tl.tensor


class Pair(NamedTuple):
    """p, q, n = q - p, d = log(q / p), e = expm1(d), and whether |d| < 1/2, where e means something."""

    p: tl.tensor
    q: tl.tensor
    n: tl.tensor
    d: tl.tensor
    e: tl.tensor
    near: tl.tensor


class Terms(NamedTuple):
    """Sums over a row of the value, q, q (h - centre) and q (h - centre)²."""

    value: tl.tensor
    mass: tl.tensor
    slope: tl.tensor
    square: tl.tensor


@triton.constexpr_function
def exact_differences(s_type, t_type):
    """Whether float32 holds s - t without rounding: where both are half precision."""
    return s_type != tl.float32 and t_type != tl.float32


@triton.jit
def difference(a, b):
    """a - b, and its rounding error: 0 where a or b is infinite."""
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
    """The sums with those of one block."""
    ref_s, ref_t = refs
    first, bregman, energy = sums.first, sums.bregman, sums.energy
    c = log_ratio(b_s, b_t, refs, inv_T, EXACT)
    e_s = tl.exp2((b_s - ref_s) * (inv_T * LOG2_E))
    e_t = tl.exp2((b_t - ref_t) * (inv_T * LOG2_E))
    near = tl.abs(c) < 0.5  # not if NaN: a token masked on both sides, where both exponentials are 0
    slight = e_t * phi(c)
    excess = sums.excess
    if KIND == FORWARD_KL or KIND == SOFT_CE:
        first_here = tl.where(e_t > 0, e_t * c, e_t)
        first += first_here
        bregman += tl.where(near, slight, (e_s - e_t) - first_here)
    else:
        excess += tl.where(near, e_t * c + slight, e_s - e_t)
    if KIND == SOFT_CE:
        energy += tl.where(e_t > 0, e_t * ((b_t - ref_t) * inv_T), e_t)
    return Sums(sums.s + e_s, sums.t + e_t, excess, first, bregman, energy)


@triton.jit
def move_references(b_s, b_t, refs, sums, inv_T):
    """Moves them to the block's maxima, if it has a token of at least seven times the mass: c must be small where mass is."""
    ref_s, ref_t = refs
    new_t = tl.max(b_t, 0)
    if (new_t - ref_t) * inv_T > 2.0:
        new_s = tl.max(b_s, 0)
        d_t = (new_t - ref_t) * inv_T
        d_c = ((new_s - new_t) - (ref_s - ref_t)) * inv_T  # c falls by it
        a_s, a_t = tl.exp2((ref_s - new_s) * (inv_T * LOG2_E)), tl.exp2(d_t * -LOG2_E)
        near = tl.abs(d_c) < 0.5
        slight = a_t * phi(-d_c)
        gap = tl.where(near, slight - a_t * d_c, a_s - a_t)  # a_t expm1(-d_c)
        slight = tl.where(near, slight, gap + a_t * d_c)  # a_t phi(-d_c)
        sums = Sums(
            a_s * sums.s,
            a_t * sums.t,
            a_s * sums.excess + gap * sums.t,
            a_t * (sums.first - d_c * sums.t),
            a_s * sums.bregman + gap * sums.first + slight * sums.t,
            a_t * (sums.energy - d_t * sums.t),
        )
        refs = (new_s, new_t)
    return refs, sums


@triton.jit
def moments(row, refs, inv_T, KIND: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """The sums of a row, and the references they ended with."""
    zeros = tl.zeros([BLOCK], tl.float32)
    sums = Sums(zeros, zeros, zeros, zeros, zeros, zeros)
    begin, end = blocks_inside(row, BLOCK)
    for start in tl.range(begin, end, BLOCK, num_stages=STAGES):
        b_s, b_t = load_pair(row, start, BLOCK, True)
        refs, sums = move_references(b_s, b_t, refs, sums, inv_T)
        sums = add_moments(b_s, b_t, refs, sums, inv_T, KIND, EXACT)
    edge, edge_end, edge_step = edge_blocks(row, BLOCK)
    for start in range(edge, edge_end, edge_step):
        b_s, b_t = load_pair(row, start, BLOCK, False)
        refs, sums = move_references(b_s, b_t, refs, sums, inv_T)
        sums = add_moments(b_s, b_t, refs, sums, inv_T, KIND, EXACT)
    sum_t = tl.sum(sums.t.to(tl.float64))  # the logarithm of 1.0001 has few digits in float32
    sum_s, first, bregman = tl.sum(sums.s), tl.sum(sums.first), tl.sum(sums.bregman)
    if KIND == FORWARD_KL or KIND == SOFT_CE:  # by the smaller numbers, whose rounding errors are smaller
        difference = (sum_s - sum_t).to(tl.float32)
        excess = tl.where(tl.abs(first) + bregman < sum_s + sum_t, first + bregman, difference)
    else:
        excess = tl.sum(sums.excess)
    return refs, Sums(sum_s, sum_t, excess, first, bregman, tl.sum(sums.energy))


@triton.jit
def pair(b_s, b_t, stats, inv_T, EXACT: tl.constexpr):
    ref_s, ref_t = stats.refs
    p = tl.exp2((b_t - ref_t) * (inv_T * LOG2_E)) * (1.0 / stats.sum_t)
    q = tl.exp2((b_s - ref_s) * (inv_T * LOG2_E)) * (1.0 / stats.sum_s)
    d = log_ratio(b_s, b_t, stats.refs, inv_T, EXACT) - stats.kappa
    near = tl.abs(d) < 0.5
    e = d + phi(d)
    n = tl.where(near, p * e, q - p)
    return Pair(p, tl.where(near, p + n, q), n, d, e, near)


@triton.jit
def bregman_term(a, n, y, one_and_y):
    """a lambda(y), y = n / a: the term of KL(a || a + n), and log1p(y). If a is 0, the limit: n."""
    log1p, excess = logarithms(y, one_and_y)
    return tl.where(a > TINY, a * excess, n + a * 0.0), log1p  # a * 0: NaN stays


@triton.jit
def term_and_slope(both, centre, mixture, KIND: tl.constexpr):
    """A token's term of the value, and h - centre. m = rest p + mix q is the mixture of skew_kl and jsd: for a mix near 1,
    1 - mix has no digits in float32, so that rest is given beside it."""
    p, q, n, d, near = both.p, both.q, both.n, both.d, both.near
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
        value, _ = bregman_term(p, mix * n, mix * tl.where(near, both.e, n * per_p), m * per_p)
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
def add_terms(b_s, b_t, stats, terms, inv_T, mixture, KIND: tl.constexpr, EXACT: tl.constexpr):
    both = pair(b_s, b_t, stats, inv_T, EXACT)
    value, slope = term_and_slope(both, stats.centre, mixture, KIND)
    if KIND == FORWARD_KL or KIND == SOFT_CE:
        return Terms(terms.value + value, terms.mass, terms.slope, terms.square)
    weighted = both.q * slope
    return Terms(terms.value + value, terms.mass + both.q, terms.slope + weighted, terms.square + weighted * slope)


@triton.jit
def second_pass(
    row, stats, inv_T, mixture, KIND: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr
):
    """The sums of Terms, from the end of a row to its beginning."""
    zeros = tl.zeros([BLOCK], tl.float32)
    terms = Terms(zeros, zeros, zeros, zeros)
    edge, edge_end, edge_step = edge_blocks(row, BLOCK)
    for start in range(edge, edge_end, edge_step):
        b_s, b_t = load_pair(row, start, BLOCK, False)
        terms = add_terms(b_s, b_t, stats, terms, inv_T, mixture, KIND, EXACT)
    begin, end = blocks_inside(row, BLOCK)
    for start in tl.range(begin, end, BLOCK, num_stages=STAGES):
        b_s, b_t = load_pair(row, begin + end - BLOCK - start, BLOCK, True)
        terms = add_terms(b_s, b_t, stats, terms, inv_T, mixture, KIND, EXACT)
    if KIND == FORWARD_KL or KIND == SOFT_CE:
        return Terms(tl.sum(terms.value), 1.0, 0.0, 0.0)
    return Terms(tl.sum(terms.value), tl.sum(terms.mass), tl.sum(terms.slope), tl.sum(terms.square))


@triton.jit
def kl_from(kappa, x, first, bregman):
    """KL(p || q) from means under p, by whichever of two forms keeps its digits; -1 if neither does."""
    _, x_less_kappa = logarithms(x, 1.0 + x)
    direct = kappa - first
    shifted = bregman - x_less_kappa
    shifted = tl.where(shifted >= 0.125 * bregman, shifted, -1.0)
    return tl.where(direct >= 0.25 * (tl.abs(kappa) + tl.abs(first)), direct, shifted)


@triton.jit
def squares(row, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """sum (s - t)²."""
    total = tl.zeros([BLOCK], tl.float32)
    begin, end = blocks_inside(row, BLOCK)
    for start in tl.range(begin, end, BLOCK, num_stages=STAGES):
        b_s, b_t = load_pair(row, start, BLOCK, True)
        total += tl.where(b_s == b_t, 0.0, (b_s - b_t) * (b_s - b_t))
    edge, edge_end, edge_step = edge_blocks(row, BLOCK)
    for start in range(edge, edge_end, edge_step):
        b_s, b_t = load_pair(row, start, BLOCK, False)
        total += tl.where(b_s == b_t, 0.0, (b_s - b_t) * (b_s - b_t))
    return tl.sum(total)


@triton.jit
def compare(row, inv_T, mixture, KIND: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """The value of a row, and its statistics."""
    EXACT: tl.constexpr = exact_differences(row.s_ptr.dtype.element_ty, row.t_ptr.dtype.element_ty)
    refs, sums = (0.0, 0.0), Sums(0.0, tl.full([], 0, tl.float64), 0.0, 0.0, 0.0, 0.0)
    seen, stop = 0, tl.minimum(row.end, BLOCK)
    while seen < stop:
        refs, sums = moments(row, maxima(row, stop, BLOCK), inv_T, KIND, EXACT, BLOCK, STAGES)
        seen = stop
        in_range = (sums.s > 1e-25) & (sums.s < 1e25) & (sums.t > 1e-25) & (sums.t < 1e25)
        good = in_range & (sums.first == sums.first)
        if KIND == SOFT_CE:  # entropy = log sum_t - energy / sum_t must not cancel
            good = good & (sums.energy <= 0.875 * sums.t * tl.log(sums.t))
        stop = tl.where(good, stop, row.end)
    sum_s, sum_t = sums.s, sums.t.to(tl.float32)
    value, kappa, centre, mean = -1.0, 0.0, 0.0, 0.0
    if (sum_s == 0) & (sum_t == 0):  # all logits are -inf on both sides: the value is 0, and p = q = 0 in the backward
        value, sum_s, sum_t = 0.0, 1.0, 1.0
    else:
        x = sums.excess / sum_t
        kappa = logarithms(x, sum_s / sum_t)[0]
        if KIND == FORWARD_KL or KIND == SOFT_CE:
            value = kl_from(kappa, x, sums.first / sum_t, sums.bregman / sum_t)
        again = value < 0
        while again:
            stats = Stats(refs, sum_s, sum_t, kappa, mean, centre)
            terms = second_pass(row, stats, inv_T, mixture, KIND, EXACT, BLOCK, STAGES)
            value, mean, square = terms.value, terms.slope / terms.mass, terms.square / terms.mass
            again = (centre == 0) & (square - mean * mean < 0.05 * mean * mean)  # h - mean would cancel
            centre = tl.where(again, mean, centre)
            if KIND == SKEW_KL:  # h - mix is then taken without subtracting: small where the teacher is
                centre = tl.where(again & (mean > 0.5 * mixture[0]), mixture[0], centre)
        if KIND == SOFT_CE:
            value += (tl.log(sums.t) - sums.energy / sums.t).to(tl.float32)
    value = tl.where(value < 0, 0.0, value)  # from the rounding of logits near float32's largest
    return value, Stats(refs, sum_s, sum_t, kappa, mean, centre)


@triton.jit
def store_stats(stats_ptr, stats):
    tl.store(stats_ptr, stats.refs[0])
    tl.store(stats_ptr + 1, stats.refs[1])
    for i in tl.static_range(1, 4):
        tl.store(stats_ptr + 1 + i, stats[i])
    tl.store(stats_ptr + 5, stats.centre)
    tl.store(stats_ptr + 6, stats.mean)


@triton.jit
def load_stats(stats_ptr):
    refs = (tl.load(stats_ptr), tl.load(stats_ptr + 1))
    sum_s, sum_t = tl.load(stats_ptr + 2), tl.load(stats_ptr + 3)
    kappa, centre, mean = tl.load(stats_ptr + 4), tl.load(stats_ptr + 5), tl.load(stats_ptr + 6)
    return Stats(refs, sum_s, sum_t, kappa, mean, centre)


@triton.jit
def gradient(b_s, b_t, g, stats, inv_T, mixture, KIND: tl.constexpr, EXACT: tl.constexpr):
    """The gradient of one block of the student's row; g is the upstream gradient of the row's value."""
    if KIND == MSE:
        return tl.where(b_s == b_t, 0.0, (b_s - b_t) * (2.0 * g))
    both = pair(b_s, b_t, stats, inv_T, EXACT)
    if KIND == FORWARD_KL or KIND == SOFT_CE:
        return both.n * (g * inv_T)
    _, slope = term_and_slope(both, stats.centre, mixture, KIND)
    return both.q * (slope - stats.mean) * (g * inv_T)
