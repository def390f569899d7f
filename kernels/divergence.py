"""Row-wise divergence between q = softmax(s / T) and p = softmax(t / T), one program per row.

As the student nears the teacher, log q - log p loses its digits if both are formed. Here it never is: s - t is exact where
they are close, c = ((s - t) - (max s - max t)) / T is small, and

    kappa = log sum_v p e^c = log1p(sum_v p expm1(c)),   d = log(q / p) = c - kappa,   q - p = p expm1(d).

Every kind but mse is then a Bregman divergence of p, q and their accurate difference: with lambda(y) = y - log1p(y),

    KL(p || p + n) = sum p lambda(n / p)   when sum n = 0:   each term >= 0, nothing cancels,

and its gradient is q (h - sum q h) / T. forward_kl and soft_ce need one pass less: they follow from the sums of
e^t expm1(c), e^t c and e^t (expm1(c) - c). Saved per row, for the backward: both maxima and sums, kappa, and sum q h.
The logits are read two or three times, each time in the direction opposite to the last, so that what is still in L2 comes
first; the backward reads them once and writes the gradient once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

FORWARD_KL, REVERSE_KL, SKEW_KL, JSD, TVD, SOFT_CE, MSE = (tl.constexpr(i) for i in range(7))  # order of checks.KINDS
NEGATIVE_INFINITY = tl.constexpr(float("-inf"))
TINY = tl.constexpr(1e-37)  # below it a probability counts as 0, so that no ratio overflows

# Bytes of stack a thread may spill, per kernel; the offline compilation tests assert it.
SPILL_LIMIT = {"_forward": 16, "_backward": 0, "_sparse_forward": 0, "_sparse_backward": 0}


@triton.jit
def _expm1_parts(x):
    """e^x - 1 and e^x - 1 - x, by their series where the subtraction would cancel."""
    small = tl.abs(x) < 0.5
    y = tl.where(small, x, 0.0)
    w = y * (1.0 / 362880) + 1.0 / 40320
    w = w * y + 1.0 / 5040
    w = w * y + 1.0 / 720
    w = w * y + 1.0 / 120
    w = w * y + 1.0 / 24
    w = w * y + 1.0 / 6
    w = (w * y + 0.5) * (y * y)
    e = tl.exp(x) - 1.0
    return tl.where(small, y + w, e), tl.where(small, w, e - x)


@triton.jit
def _log1p_parts(y):
    """log(1 + y) and y - log(1 + y), the latter with all its digits as y -> 0."""
    small = tl.abs(y) < 0.4
    z = tl.where(small, y, 0.0)
    s = z / (2.0 + z)  # log(1 + z) = 2 s + 2 s^3 / 3 + 2 s^5 / 5 + …
    s2 = s * s
    tail = s * s2 * (2.0 / 3 + s2 * (2.0 / 5 + s2 * (2.0 / 7 + s2 * (2.0 / 9 + s2 * (2.0 / 11)))))
    large = tl.log(1.0 + tl.where(small, 0.0, y))
    return tl.where(small, 2.0 * s + tail, large), tl.where(small, z * s - tail, y - large)


@triton.jit
def _load(ptr, o_v, V):
    return tl.where(o_v < V, tl.load(ptr + o_v, mask=o_v < V, other=0.0).to(tl.float32), NEGATIVE_INFINITY)


@triton.jit
def _pair(a, b, max_s, max_t, sum_s, sum_t, kappa, inverse_T):
    """p, q, q - p and log(q / p). Where d < 1 the accurate way; elsewhere, and where both sides mask, q on its own."""
    p = tl.exp((b - max_t) * inverse_T) / sum_t
    d = ((a - b) - (max_s - max_t)) * inverse_T - kappa
    near = d < 1.0
    grown, _ = _expm1_parts(tl.where(near, d, 0.0))
    far = tl.exp((a - max_s) * inverse_T) / sum_s
    difference = tl.where(near, p * grown, far - p)
    return p, tl.where(near, p + difference, far), difference, d


@triton.jit
def _bregman(p, n):
    """p lambda(n / p): the term of KL(p || p + n); n, its limit, where p vanishes."""
    there = p > TINY
    _, lost = _log1p_parts(n / tl.where(there, p, 1.0))
    return tl.where(there, p * lost, n + p * 0.0)


@triton.jit
def _bregman_known(p, n, log_ratio):
    """The same where log(1 + n / p) is known: 1 + n / p itself says little once p + n is much smaller than p."""
    there = p > TINY
    y = n / tl.where(there, p, 1.0)
    _, lost = _log1p_parts(y)
    return tl.where(there, tl.where(tl.abs(y) < 0.4, p * lost, n - p * log_ratio), n + p * 0.0)


@triton.jit
def _slope(p, q, difference, d, mix, KIND: tl.constexpr):
    """h of the gradient q (h - sum q h), up to a constant per row: small where p and q agree."""
    if KIND == REVERSE_KL:
        h = tl.where(q > 0, d, q * 0.0)
    elif KIND == SKEW_KL:
        m = p + mix * difference
        h = tl.where(m > TINY, mix * mix * difference / tl.where(m > TINY, m, 1.0), m * 0.0)
    elif KIND == JSD:
        log_ratio, _ = _log1p_parts((mix - 1.0) * difference / tl.where(q > TINY, q, 1.0))
        h = tl.where(q > TINY, -mix * log_ratio, q * 0.0)
    else:
        h = tl.where(difference > 0, 0.5, tl.where(difference < 0, -0.5, difference * 0.0))
    return h


@triton.jit
def _term(p, q, difference, d, mix, KIND: tl.constexpr):
    if KIND == REVERSE_KL:
        term = _bregman_known(q, -difference, -d)
    elif KIND == SKEW_KL:
        term = _bregman(p, mix * difference)
    elif KIND == JSD:
        term = (1.0 - mix) * _bregman(p, mix * difference) + mix * _bregman(q, (mix - 1.0) * difference)
    elif KIND == TVD:
        term = 0.5 * tl.abs(difference)
    else:
        term = _bregman_known(p, difference, d)
    return term


@triton.jit
def _forward(
    s_ptr, t_ptr, mask_ptr, rows_ptr, stats_ptr, stride_s, stride_t, V, inverse_T, mix,
    HAS_MASK: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0).to(tl.int64)
    kept = True
    if HAS_MASK:
        kept = tl.load(mask_ptr + i_n) != 0
    value = 0.0
    max_s, max_t, sum_s, sum_t, kappa, mean = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    if kept:
        s_ptr += i_n * stride_s
        t_ptr += i_n * stride_t
        tiles = tl.cdiv(V, BLOCK)
        if KIND == MSE:
            total = tl.zeros([BLOCK], tl.float32)
            for tile in range(tiles):
                o_v = tile * BLOCK + tl.arange(0, BLOCK)
                a, b = _load(s_ptr, o_v, V), _load(t_ptr, o_v, V)
                total += tl.where(a == b, 0.0, (a - b) * (a - b))
            value = tl.sum(total, 0)
        else:
            b_s = tl.full([BLOCK], NEGATIVE_INFINITY, tl.float32)
            b_t = tl.full([BLOCK], NEGATIVE_INFINITY, tl.float32)
            for tile in range(tiles):
                o_v = tile * BLOCK + tl.arange(0, BLOCK)
                b_s = tl.maximum(b_s, _load(s_ptr, o_v, V))
                b_t = tl.maximum(b_t, _load(t_ptr, o_v, V))
            max_s, max_t = tl.max(b_s, 0), tl.max(b_t, 0)
            b_sum = tl.zeros([BLOCK], tl.float32)
            b_excess, b_mean_c, b_bregman, b_entropy = b_sum, b_sum, b_sum, b_sum
            for step in range(tiles):
                o_v = (tiles - 1 - step) * BLOCK + tl.arange(0, BLOCK)
                a, b = _load(s_ptr, o_v, V), _load(t_ptr, o_v, V)
                e = tl.exp((b - max_t) * inverse_T)
                c = ((a - b) - (max_s - max_t)) * inverse_T
                near = c < 1.0
                grown, curved = _expm1_parts(tl.where(near, c, 0.0))
                far = tl.exp((a - max_s) * inverse_T)
                b_sum += e
                b_excess += tl.where(near, e * grown, far - e)
                if (KIND == FORWARD_KL) or (KIND == SOFT_CE):
                    there = e > 0
                    e_c = tl.where(there, e * c, e)
                    b_mean_c += e_c
                    b_bregman += tl.where(there, tl.where(near, e * curved, far - e - e_c), tl.where(near, e, far))
                if KIND == SOFT_CE:
                    b_entropy -= tl.where(e > 0, e * ((b - max_t) * inverse_T), e)
            sum_t = tl.sum(b_sum, 0)
            x = tl.sum(b_excess, 0) / sum_t
            sum_s = sum_t + tl.sum(b_excess, 0)
            kappa, x_minus_kappa = _log1p_parts(x)
            again = True
            if (KIND == FORWARD_KL) or (KIND == SOFT_CE):
                mean_c, bregman = tl.sum(b_mean_c, 0) / sum_t, tl.sum(b_bregman, 0) / sum_t
                direct, shifted = kappa - mean_c, bregman - x_minus_kappa
                direct_is_sound = direct > 0.25 * (tl.abs(kappa) + tl.abs(mean_c))
                value = tl.where(direct_is_sound, direct, tl.where(bregman == 0, 0.0, shifted))
                # Both lost too many digits: once more with the final kappa. Never for a NaN.
                again = (value <= 0.25 * bregman) & (bregman > 0) & (direct_is_sound == 0)
            if again:
                b_value, b_q, b_mean = b_sum * 0.0, b_sum * 0.0, b_sum * 0.0
                for tile in range(tiles):
                    o_v = tile * BLOCK + tl.arange(0, BLOCK)
                    a, b = _load(s_ptr, o_v, V), _load(t_ptr, o_v, V)
                    p, q, difference, d = _pair(a, b, max_s, max_t, sum_s, sum_t, kappa, inverse_T)
                    b_value += _term(p, q, difference, d, mix, KIND)
                    if (KIND != FORWARD_KL) and (KIND != SOFT_CE):
                        b_q += q
                        b_mean += q * _slope(p, q, difference, d, mix, KIND)
                value = tl.sum(b_value, 0)
                if (KIND != FORWARD_KL) and (KIND != SOFT_CE):
                    mean = tl.sum(b_mean, 0) / tl.sum(b_q, 0)
            if KIND == SOFT_CE:
                value += tl.sum(b_entropy, 0) / sum_t + tl.log(sum_t)
            # No class exists on either side: the row has nothing to say. Its maxima become 0 for the backward to see.
            nothing = (max_s == NEGATIVE_INFINITY) & (max_t == NEGATIVE_INFINITY)
            value = tl.where(nothing, 0.0, value)
            sum_t = tl.where(nothing, 0.0, sum_t)
    tl.store(rows_ptr + i_n, value)
    stats_ptr += i_n * 6
    tl.store(stats_ptr, max_s)
    tl.store(stats_ptr + 1, max_t)
    tl.store(stats_ptr + 2, sum_s)
    tl.store(stats_ptr + 3, sum_t)
    tl.store(stats_ptr + 4, kappa)
    tl.store(stats_ptr + 5, mean)


@triton.jit
def _backward(
    grad_ptr, s_ptr, t_ptr, mask_ptr, stats_ptr, out_ptr, stride_s, stride_t, V, inverse_T, mix,
    HAS_MASK: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0).to(tl.int64)
    o_v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    kept = True
    if HAS_MASK:
        kept = tl.load(mask_ptr + i_n) != 0
    out = tl.zeros([BLOCK], tl.float32)
    if kept:
        a, b = _load(s_ptr + i_n * stride_s, o_v, V), _load(t_ptr + i_n * stride_t, o_v, V)
        upstream = tl.load(grad_ptr + i_n).to(tl.float32)
        if KIND == MSE:
            out = tl.where(a == b, 0.0, (a - b) * 2.0 * upstream)
        else:
            stats_ptr += i_n * 6
            max_s, max_t = tl.load(stats_ptr), tl.load(stats_ptr + 1)
            sum_s, sum_t = tl.load(stats_ptr + 2), tl.load(stats_ptr + 3)
            kappa, mean = tl.load(stats_ptr + 4), tl.load(stats_ptr + 5)
            p, q, difference, d = _pair(a, b, max_s, max_t, sum_s, sum_t, kappa, inverse_T)
            if (KIND == FORWARD_KL) or (KIND == SOFT_CE):
                out = difference
            else:
                out = q * (_slope(p, q, difference, d, mix, KIND) - mean)
            out = tl.where(sum_t == 0.0, 0.0, out * (upstream * inverse_T))
    tl.store(out_ptr + i_n * V + o_v, out.to(out_ptr.dtype.element_ty), mask=o_v < V)


def _geometry(V: int) -> tuple[int, int]:
    """BLOCK and num_warps: 8 elements a thread, so that the accumulators stay in registers; never all of a large row."""
    block = min(max(triton.next_power_of_2(V), 128), 2048)
    return block, max(block // 256, 1)


def _dense_rows(x: Tensor) -> Tensor:
    """Rows may lie apart, elements of a row may not."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def divergence_fwd(
    s: Tensor, t: Tensor, mask: Tensor | None, kind: int, temperature: float, mix: float
) -> tuple[Tensor, Tensor]:
    s, t = _dense_rows(s), _dense_rows(t)
    N, V = s.shape
    rows = torch.empty(N, dtype=torch.float32, device=s.device)
    stats = torch.empty(N, 6, dtype=torch.float32, device=s.device)
    block, warps = _geometry(V)
    if N:
        _forward[(N,)](
            s, t, s if mask is None else mask, rows, stats, s.stride(0), t.stride(0), V, 1.0 / temperature, mix,
            HAS_MASK=mask is not None, KIND=kind, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return rows, stats


def divergence_bwd(
    grad: Tensor, s: Tensor, t: Tensor, mask: Tensor | None, stats: Tensor, kind: int, temperature: float, mix: float
) -> Tensor:
    s, t, grad = _dense_rows(s), _dense_rows(t), grad.contiguous()
    N, V = s.shape
    out = torch.empty(N, V, dtype=s.dtype, device=s.device)
    block, warps = _geometry(V)
    if N:
        _backward[(N, triton.cdiv(V, block))](
            grad, s, t, s if mask is None else mask, stats, out, s.stride(0), t.stride(0), V, 1.0 / temperature, mix,
            HAS_MASK=mask is not None, KIND=kind, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return out


# ---- A sparse teacher: k words per row, and perhaps the log-mass of the rest as one more word. The student's softmax is
# ---- over the whole vocabulary; `rest` is s with the k words at -inf, so that the rest's sum is not a difference.


@triton.jit
def _kl_term(a, log_a, log_b, SAME_MASS: tl.constexpr):
    """a (log a - log b); where both sides have the same mass Bregman's form of it, which is never negative."""
    d = tl.where(a > 0, log_b - log_a, 0.0)
    if SAME_MASS:
        _, curved = _expm1_parts(d)
        term = tl.where(a > 0, a * curved, tl.exp(log_b))
    else:
        term = tl.where(a > 0, -a * d, a * 0.0)
    return term


@triton.jit
def _word(log_p, log_q, mix, KIND: tl.constexpr, SAME_MASS: tl.constexpr):
    """A word's contribution to its row, and h."""
    p, q = tl.exp(log_p), tl.exp(log_q)
    m = p + mix * (q - p)
    log_m = tl.log(m)
    alive = q > 0
    if KIND == REVERSE_KL:
        value, h = _kl_term(q, log_q, log_p, SAME_MASS), tl.where(alive, log_q - log_p, 0.0)
    elif KIND == SKEW_KL:
        value, h = _kl_term(p, log_p, log_m, SAME_MASS), tl.where(m > 0, -mix * p / m, 0.0)
    elif KIND == JSD:
        value = (1.0 - mix) * _kl_term(p, log_p, log_m, SAME_MASS) + mix * _kl_term(q, log_q, log_m, SAME_MASS)
        h = tl.where(alive, mix * (log_q - log_m), 0.0)
    elif KIND == TVD:
        value, h = tl.abs(q - p) * 0.5, tl.where(q > p, 0.5, tl.where(q < p, -0.5, (q - p) * 0.0))
    elif KIND == SOFT_CE:
        value, h = tl.where(p > 0, -p * log_q, p * 0.0), tl.where(alive, -p / q, 0.0)
    else:
        value, h = _kl_term(p, log_p, log_q, SAME_MASS), tl.where(alive, -p / q, 0.0)
    return value, h


@triton.jit
def _sparse_forward(
    s_ptr, rest_ptr, index_ptr, log_probs_ptr, tail_ptr, mask_ptr, rows_ptr, stats_ptr, stride_s, V, k, inverse_T, mix,
    HAS_MASK: tl.constexpr, HAS_TAIL: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0).to(tl.int64)
    kept = True
    if HAS_MASK:
        kept = tl.load(mask_ptr + i_n) != 0
    value, top, log_sum, mean, rest_h = 0.0, 0.0, 0.0, 0.0, 0.0
    if kept:
        rest_ptr += i_n * V
        o_k = tl.arange(0, WORDS)
        m_k = o_k < k
        index = tl.load(index_ptr + i_n * k + o_k, mask=m_k, other=0)
        valid = tl.min(((index >= 0) & (index < V)).to(tl.int32), 0)
        index = tl.where((index >= 0) & (index < V), index, 0)
        a = tl.load(s_ptr + i_n * stride_s + index, mask=m_k, other=0.0).to(tl.float32) * inverse_T
        a = tl.where(m_k, a, NEGATIVE_INFINITY)
        log_p = tl.load(log_probs_ptr + i_n * k + o_k, mask=m_k, other=0.0)
        b_top = tl.full([BLOCK], NEGATIVE_INFINITY, tl.float32)
        for tile in range(tl.cdiv(V, BLOCK)):
            b_top = tl.maximum(b_top, _load(rest_ptr, tile * BLOCK + tl.arange(0, BLOCK), V))
        top = tl.maximum(tl.max(b_top, 0) * inverse_T, tl.max(a, 0))
        b_sum = tl.zeros([BLOCK], tl.float32)
        for tile in range(tl.cdiv(V, BLOCK)):
            b_sum += tl.exp(_load(rest_ptr, tile * BLOCK + tl.arange(0, BLOCK), V) * inverse_T - top)
        rest_sum = tl.sum(b_sum, 0)
        log_sum = tl.log(rest_sum + tl.sum(tl.exp(a - top), 0))
        log_q = a - top - log_sum
        values, h = _word(log_p, log_q, mix, KIND, HAS_TAIL)
        rest_log_q = tl.log(rest_sum) - log_sum
        rest_log_p = NEGATIVE_INFINITY
        if HAS_TAIL:
            rest_log_p = tl.load(tail_ptr + i_n)
        rest_value, rest_h = _word(rest_log_p, rest_log_q, mix, KIND, HAS_TAIL)
        value = rest_value + tl.sum(tl.where(m_k, values, 0.0), 0)
        mean = tl.exp(rest_log_q) * rest_h + tl.sum(tl.where(m_k, tl.exp(log_q) * h, 0.0), 0)
        value = tl.where(valid != 0, value, float("nan"))
    tl.store(rows_ptr + i_n, value)
    tl.store(stats_ptr + i_n * 4, top)
    tl.store(stats_ptr + i_n * 4 + 1, log_sum)
    tl.store(stats_ptr + i_n * 4 + 2, mean)
    tl.store(stats_ptr + i_n * 4 + 3, rest_h)


@triton.jit
def _sparse_backward(
    grad_ptr, s_ptr, index_ptr, log_probs_ptr, mask_ptr, stats_ptr, out_ptr, words_ptr, stride_s, V, k, inverse_T, mix,
    HAS_MASK: tl.constexpr, HAS_TAIL: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0).to(tl.int64)
    o_v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    o_k = tl.arange(0, WORDS)
    kept = True
    if HAS_MASK:
        kept = tl.load(mask_ptr + i_n) != 0
    out, words = tl.zeros([BLOCK], tl.float32), tl.zeros([WORDS], tl.float32)
    if kept:
        s_ptr += i_n * stride_s
        top, log_sum = tl.load(stats_ptr + i_n * 4), tl.load(stats_ptr + i_n * 4 + 1)
        mean, rest_h = tl.load(stats_ptr + i_n * 4 + 2), tl.load(stats_ptr + i_n * 4 + 3)
        scale = tl.load(grad_ptr + i_n).to(tl.float32) * inverse_T
        out = tl.exp(_load(s_ptr, o_v, V) * inverse_T - top - log_sum) * ((rest_h - mean) * scale)
        if tl.program_id(1) == 0:
            index = tl.load(index_ptr + i_n * k + o_k, mask=o_k < k, other=0)
            index = tl.where((index >= 0) & (index < V), index, 0)
            a = tl.load(s_ptr + index, mask=o_k < k, other=0.0).to(tl.float32) * inverse_T
            log_q = a - top - log_sum
            _, h = _word(tl.load(log_probs_ptr + i_n * k + o_k, mask=o_k < k, other=0.0), log_q, mix, KIND, HAS_TAIL)
            words = tl.exp(log_q) * (h - mean) * scale
    tl.store(out_ptr + i_n * V + o_v, out.to(out_ptr.dtype.element_ty), mask=o_v < V)
    if tl.program_id(1) == 0:
        tl.store(words_ptr + i_n * k + o_k, words.to(words_ptr.dtype.element_ty), mask=o_k < k)


def divergence_topk_fwd(
    s: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    tail: Tensor | None,
    mask: Tensor | None,
    kind: int,
    temperature: float,
    mix: float,
) -> tuple[Tensor, Tensor]:
    s, indices, log_probs = _dense_rows(s), indices.contiguous(), log_probs.contiguous()
    (N, V), k = s.shape, indices.shape[1]
    # An index out of range must not fault the device: here it goes to 0, and in the kernel it makes its row NaN.
    rest = s.scatter(1, torch.where((indices >= 0) & (indices < V), indices, 0), float("-inf"))  # [N, V]
    rows = torch.empty(N, dtype=torch.float32, device=s.device)
    stats = torch.empty(N, 4, dtype=torch.float32, device=s.device)
    block, warps = _geometry(V)
    if N:
        _sparse_forward[(N,)](
            s, rest, indices, log_probs, s if tail is None else tail, s if mask is None else mask, rows, stats,
            s.stride(0), V, k, 1.0 / temperature, mix, HAS_MASK=mask is not None, HAS_TAIL=tail is not None, KIND=kind,
            BLOCK=block, WORDS=triton.next_power_of_2(k), num_warps=warps,
        )  # fmt: skip
    return rows, stats


def divergence_topk_bwd(
    grad: Tensor,
    s: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    tail: Tensor | None,
    mask: Tensor | None,
    stats: Tensor,
    kind: int,
    temperature: float,
    mix: float,
) -> Tensor:
    s, indices, log_probs, grad = _dense_rows(s), indices.contiguous(), log_probs.contiguous(), grad.contiguous()
    (N, V), k = s.shape, indices.shape[1]
    out = torch.empty(N, V, dtype=s.dtype, device=s.device)
    words = torch.empty(N, k, dtype=s.dtype, device=s.device)
    block, warps = _geometry(V)
    if N:
        _sparse_backward[(N, triton.cdiv(V, block))](
            grad, s, indices, log_probs, s if mask is None else mask, stats, out, words,
            s.stride(0), V, k, 1.0 / temperature, mix, HAS_MASK=mask is not None, HAS_TAIL=tail is not None, KIND=kind,
            BLOCK=block, WORDS=triton.next_power_of_2(k), num_warps=warps,
        )  # fmt: skip
        out.scatter_(1, torch.where((indices >= 0) & (indices < V), indices, 0), words)
    return out
