"""divergence against a sparse teacher: per row k tokens with log-probabilities and, if a tail is given, the log-mass of all
other tokens, the rest, as one more token.

The student's softmax is over its whole vocabulary; everything else happens on k + 1 numbers, in float64. The gradient of a
token is (q h - q mean) / T, and the rest's is shared among its tokens in proportion to their probability: q h is bounded
where h, which may hold p / q, is not. The mass of the rest is summed without the k tokens, never taken as a difference, so
that it is known however small it is. Near p = q, h is small, since it is known up to a constant only.

Saved per row, each as two floats, the second what the first lacks: T logsumexp(s / T) of the vocabulary and of the rest (with
1 / T as given, so that log q keeps its digits), and the mean of h under q; last, q (h - mean) of the rest.

A bitmap of the k tokens, 1/8 byte per token of the vocabulary, tells the pass which tokens belong to the rest. The backward
writes the whole row as if it were the rest, then the k tokens again.
"""

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..blocks import contiguous_rows, is_masked
from .row import JSD, LOG2_E, REVERSE_KL, SKEW_KL, SOFT_CE, TVD

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def mark_kernel(indices_ptr, marks_ptr, k, V, width, TOKENS: tl.constexpr):
    """Sets the bit of each of the k tokens in a row's bitmap [width]. The order of the atomics does not matter."""
    i_n, o_k = tl.program_id(0).to(tl.int64), tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    b_i = tl.load(indices_ptr + i_n * k + o_k, mask=o_k < k, other=-1)  # [TOKENS]
    bits = tl.full([TOKENS], 1, tl.int32) << (b_i & 31).to(tl.int32)
    tl.atomic_or(marks_ptr + i_n * width + b_i // 32, bits, mask=(b_i >= 0) & (b_i < V), sem="relaxed")


@triton.jit
def load_rest(s_ptr, marks_ptr, start, stop, BLOCK: tl.constexpr):
    """A block of the student's row as float32; -inf past its end and at the k tokens."""
    o_v = start + tl.arange(0, BLOCK)
    m_v = o_v < stop
    taken = (tl.load(marks_ptr + o_v // 32, mask=m_v, other=0) >> (o_v & 31)) & 1
    b_s = tl.load(s_ptr + o_v, mask=m_v, other=0.0).to(tl.float32)  # [BLOCK]
    return tl.where(m_v & (taken == 0), b_s, float("-inf"))


@triton.jit
def wide_exp2(y):
    """2^y in float64 to 2e-10, without the library's branches. y is clamped to [-1000, 1000]."""
    y = tl.where(y < -1000.0, -1000.0, tl.where(y > 1000.0, 1000.0, y))  # NaN stays
    n = tl.floor(y + 0.5)
    r = (y - n) * LN_2
    x = r * (1 / 40320) + 1 / 5040
    x = x * r + 1 / 720
    x = x * r + 1 / 120
    x = x * r + 1 / 24
    x = x * r + 1 / 6
    x = x * r + 0.5
    x = x * r + 1.0
    x = x * r + 1.0
    return x * ((n.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def rest_moments(s_ptr, marks_ptr, stop, V, k_high, k_low, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """The maximum of the rest among the first `stop` tokens (0 if all are -inf), and the rest's sum of exponentials relative to
    it, in float64: float32 would give its logarithm to 1e-8 at best, and log q - log p is 1e-3 near convergence."""
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, stop, BLOCK):
        top = tl.maximum(top, load_rest(s_ptr, marks_ptr, start, stop, BLOCK))
    ref = tl.max(top, 0)
    ref = tl.where(ref > float("-inf"), ref, 0.0)
    total = tl.zeros([BLOCK], tl.float64)
    per_2 = both_parts(k_high, k_low)
    for start in tl.range(0, V, BLOCK, num_stages=STAGES):
        x = load_rest(s_ptr, marks_ptr, start, V, BLOCK).to(tl.float64) - ref.to(tl.float64)
        total += tl.where(x == float("-inf"), 0.0, wide_exp2(x * per_2))
    return ref, tl.sum(total)


@triton.jit
def one_over_temperature(k_high, k_low):
    return both_parts(k_high, k_low) * LN_2


@triton.jit
def both_parts(high, low):
    return tl.full([], high, tl.float64) + tl.full([], low, tl.float64)


@triton.jit
def store_parts(ptr, x, nan_or_0):
    high = x.to(tl.float32)
    tl.store(ptr, high + nan_or_0)
    tl.store(ptr + 1, (x - high.to(tl.float64)).to(tl.float32))


@triton.jit
def kl_term(a, log_a, log_b, SAME_MASS: tl.constexpr):
    """a (log a - log b); a phi(log b - log a) where both sides have the same mass, so that no term is negative."""
    d = log_b - log_a
    if SAME_MASS:
        series = d * d * (1 / 2 + d * (1 / 6 + d * (1 / 24 + d / 120)))
        return tl.where(a == 0, tl.exp(log_b), a * tl.where(tl.abs(d) < 1e-2, series, tl.exp(d) - 1.0 - d))
    return tl.where(a == 0, 0.0, -a * d)


@triton.jit
def token_terms(log_p, log_q, mix, KIND: tl.constexpr, SAME_MASS: tl.constexpr):
    """Of one of the k tokens, or of the rest: q, the term of the value, and q h, where h has the constant that makes it small
    near p = q."""
    p, q = tl.exp(log_p), tl.exp(log_q)
    if KIND == SKEW_KL or KIND == JSD:
        m = (1.0 - mix) * p + mix * q
        log_m = tl.log(m)
        value = kl_term(p, log_p, log_m, SAME_MASS)
        if KIND == SKEW_KL:
            weighted = tl.where(m > 0, mix * mix * (q - p) * (q / tl.where(m > 0, m, 1.0)), 0.0)
        else:
            value = (1.0 - mix) * value + mix * kl_term(q, log_q, log_m, SAME_MASS)
            weighted = tl.where(q > 0, mix * q * (log_q - log_m), 0.0)
    elif KIND == REVERSE_KL:
        value = kl_term(q, log_q, log_p, SAME_MASS)
        weighted = tl.where(q > 0, q * (log_q - log_p), 0.0)
    elif KIND == TVD:
        value = tl.abs(q - p) * 0.5
        weighted = tl.where(q > p, 0.5 * q, tl.where(q < p, -0.5 * q, 0.0))
    else:
        value = tl.where(p > 0, -p * log_q, 0.0) if KIND == SOFT_CE else kl_term(p, log_p, log_q, SAME_MASS)
        weighted = q - p
    return q, value, weighted


@triton.jit
def load_tokens(s_ptr, indices_ptr, log_probs_ptr, start, k, V, per_T, TOKENS: tl.constexpr):
    """Some of the k tokens of a row: ids, which ids exist, s / T and log p in float64; -inf past the k."""
    o_k = start + tl.arange(0, TOKENS)
    b_i = tl.load(indices_ptr + o_k, mask=o_k < k, other=0)  # [TOKENS]
    m_k = (o_k < k) & (b_i >= 0) & (b_i < V)
    b_s = tl.load(s_ptr + b_i, mask=m_k, other=0.0).to(tl.float64)
    log_p = tl.load(log_probs_ptr + o_k, mask=m_k, other=0.0).to(tl.float64)
    return b_i, m_k, tl.where(m_k, b_s * per_T, float("-inf")), tl.where(m_k, log_p, float("-inf"))


@triton.jit
def topk_forward_kernel(
    s_ptr, indices_ptr, log_probs_ptr, tail_ptr, marks_ptr, mask_ptr, values_ptr, stats_ptr, s_stride, V, k, width,
    k_high, k_low, mix_high, mix_low, KIND: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One program per row."""
    i_n = tl.program_id(0).to(tl.int64)
    if is_masked(mask_ptr, i_n):
        tl.store(values_ptr + i_n, 0.0)
        return
    s_ptr += i_n * s_stride
    marks_ptr += i_n * width
    indices_ptr += i_n * k
    log_probs_ptr += i_n * k
    ref, total, seen = 0.0, tl.full([], 0.0, tl.float64), 0
    stop = tl.minimum(V, BLOCK)
    while seen < stop:
        ref, total = rest_moments(s_ptr, marks_ptr, stop, V, k_high, k_low, BLOCK, STAGES)
        seen = stop
        stop = tl.where((total > 1e-25) & (total < 1e25), stop, V)
    per_T, mix = one_over_temperature(k_high, k_low), both_parts(mix_high, mix_low)
    log_rest = ref.to(tl.float64) * per_T + tl.log(total)
    top = log_rest  # of the log-sum-exp over all tokens
    mass = tl.where(log_rest == float("-inf"), 0.0, tl.exp(log_rest - log_rest))
    invalid = 0
    for start in range(0, k, TOKENS):
        b_i, m_k, x, log_p = load_tokens(s_ptr, indices_ptr, log_probs_ptr, start, k, V, per_T, TOKENS)
        invalid += tl.sum(((b_i < 0) | (b_i >= V)).to(tl.int32))
        larger = tl.maximum(top, tl.max(x, 0))
        mass = tl.where(top == larger, mass, mass * tl.exp(top - larger)) + tl.sum(tl.exp(x - larger))
        top = larger
    log_sum = top + tl.log(mass)
    # If every other logit is -inf, the student has no rest, and the teacher's is left out too.
    log_tail = log_rest if tail_ptr is None else tl.load(tail_ptr + i_n).to(tl.float64)
    log_tail = tl.where((log_rest == float("-inf")) | (tail_ptr is None), float("-inf"), log_tail)
    q, value, rest_weighted = token_terms(log_tail, log_rest - log_sum, mix, KIND, tail_ptr is not None)
    mean = rest_weighted
    for start in range(0, k, TOKENS):
        b_i, m_k, x, log_p = load_tokens(s_ptr, indices_ptr, log_probs_ptr, start, k, V, per_T, TOKENS)
        _q, values, weighted = token_terms(log_p, x - log_sum, mix, KIND, tail_ptr is not None)
        value += tl.sum(tl.where(m_k, values, 0.0))
        mean += tl.sum(tl.where(m_k, weighted, 0.0))
    nan_or_0 = tl.where(invalid > 0, float("nan"), 0.0)  # an index outside the vocabulary: raising would synchronise
    tl.store(values_ptr + i_n, value.to(tl.float32) + nan_or_0)
    stats_ptr += 7 * i_n
    store_parts(stats_ptr, log_sum / per_T, nan_or_0)
    store_parts(stats_ptr + 2, tl.where(log_rest == float("-inf"), log_sum, log_rest) / per_T, nan_or_0)
    store_parts(stats_ptr + 4, mean, nan_or_0)
    tl.store(stats_ptr + 6, (rest_weighted - q * mean).to(tl.float32))


@triton.jit
def rest_backward_kernel(
    g_ptr, s_ptr, mask_ptr, stats_ptr, grad_ptr, g_stride, s_stride, V, blocks, inv_T, BLOCK: tl.constexpr
):
    """The gradient of every token as if it belonged to the rest; a program per block of a row."""
    i = tl.num_programs(0) - 1 - tl.program_id(0)
    i_n, o_v = (i // blocks).to(tl.int64), i % blocks * BLOCK + tl.arange(0, BLOCK)
    m_v = o_v < V
    grad_ptr += i_n * V
    if is_masked(mask_ptr, i_n):
        tl.store(grad_ptr + o_v, tl.zeros([BLOCK], grad_ptr.dtype.element_ty), mask=m_v)
        return
    b_s = tl.load(s_ptr + i_n * s_stride + o_v, mask=m_v, other=0.0).to(tl.float32)  # [BLOCK]
    stats_ptr += 7 * i_n
    high, low, slope = tl.load(stats_ptr + 2), tl.load(stats_ptr + 3), tl.load(stats_ptr + 6)
    # The probability within the rest. The k tokens, written afterwards, may overflow here.
    part = tl.exp2(((b_s - high) - low) * (inv_T * LOG2_E))
    grad = part * (slope * (tl.load(g_ptr + i_n * g_stride).to(tl.float32) * inv_T))
    tl.store(grad_ptr + o_v, grad.to(grad_ptr.dtype.element_ty), mask=m_v)


@triton.jit
def topk_backward_kernel(
    g_ptr, s_ptr, indices_ptr, log_probs_ptr, mask_ptr, stats_ptr, grad_ptr, g_stride, s_stride, V, k, k_high, k_low, mix_high,
    mix_low, KIND: tl.constexpr, SAME_MASS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Overwrites the gradient of the k tokens with their own."""
    i_n = tl.program_id(0).to(tl.int64)
    if is_masked(mask_ptr, i_n):
        return
    per_T, mix = one_over_temperature(k_high, k_low), both_parts(mix_high, mix_low)
    stats_ptr += 7 * i_n
    raw = both_parts(tl.load(stats_ptr), tl.load(stats_ptr + 1))
    mean = both_parts(tl.load(stats_ptr + 4), tl.load(stats_ptr + 5))
    s_ptr += i_n * s_stride
    indices_ptr += i_n * k
    log_probs_ptr += i_n * k
    start = tl.program_id(1) * TOKENS
    b_i, m_k, x, log_p = load_tokens(s_ptr, indices_ptr, log_probs_ptr, start, k, V, per_T, TOKENS)
    q, _, weighted = token_terms(log_p, x - raw * per_T, mix, KIND, SAME_MASS)
    grad = (weighted - q * mean) * (tl.load(g_ptr + i_n * g_stride) * per_T)
    tl.store(grad_ptr + i_n * V + b_i, grad.to(tl.float32).to(grad_ptr.dtype.element_ty), mask=m_k)


# Bytes of local memory a thread may use, whatever the kind, dtype and chip: tests/ops/test_triton.py asserts it.
SPILL_LIMIT = {"mark_kernel": 0, "topk_forward_kernel": 0, "rest_backward_kernel": 0, "topk_backward_kernel": 0}

# Columns of a row per step and warps of a program, by the width of the row; how many of the k tokens at a time at most.
SMALL = {"BLOCK": 1024, "STAGES": 1, "num_warps": 4}, {"BLOCK": 1024, "num_warps": 4}
LARGE = {"BLOCK": 2048, "STAGES": 3, "num_warps": 8}, {"BLOCK": 4096, "num_warps": 8}
MOST_TOKENS = 128


def geometry(V: int, k: int) -> tuple[dict, dict, dict]:
    """Launch options of the forward and the rest's backward (programs per row, per block of a row), and of the k tokens."""
    forward, backward = SMALL if V <= 1024 else LARGE
    tokens = {"TOKENS": min(triton.next_power_of_2(k), MOST_TOKENS)}
    fused = {"enable_fp_fusion": True}
    return {**forward, **tokens, **fused}, {**backward, **fused}, {**tokens, "num_warps": 4, **fused}


def _split(x: float) -> tuple[float, float]:
    """x as a float32 and what it lacks."""
    high = struct.unpack("f", struct.pack("f", x))[0]
    return high, x - high


def _contiguous(s: Tensor, *others: Tensor | None):
    """s with contiguous rows, and the small tensors contiguous."""
    return contiguous_rows(s), *(None if x is None else x.contiguous() for x in others)


def divergence_topk_fwd(
    s: Tensor, indices: Tensor, log_probs: Tensor, tail: Tensor | None, mask: Tensor | None, kind: int,
    temperature: float, mix: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """s [N, V], indices and log_probs [N, k], tail and mask [N] -> values [N], stats [N, 7]. log_probs and tail float64."""
    (N, V), k = s.shape, indices.shape[1]
    s, indices, log_probs, tail, mask = _contiguous(s, indices, log_probs, tail, mask)
    values, stats = (s.new_empty(shape, dtype=torch.float32) for shape in ((N,), (N, 7)))
    if N:
        forward, _, tokens = geometry(V, k)
        width = triton.cdiv(V, 32)
        marks = s.new_zeros(N, width, dtype=torch.int32)
        mark_kernel[(N, triton.cdiv(k, tokens["TOKENS"]))](indices, marks, k, V, width, **tokens)
        topk_forward_kernel[(N,)](
            s, indices, log_probs, tail, marks, mask, values, stats, s.stride(0), V, k, width,
            *_split(LOG2_E.value / temperature), *_split(mix), KIND=kind, **forward,
        )  # fmt: skip
    return values, stats


def divergence_topk_bwd(
    grad: Tensor, s: Tensor, indices: Tensor, log_probs: Tensor, tail: Tensor | None, mask: Tensor | None, stats: Tensor,
    kind: int, temperature: float, mix: float,
) -> Tensor:  # fmt: skip
    """grad [N] -> the gradient of s [N, V]."""
    (N, V), k = s.shape, indices.shape[1]
    s, indices, log_probs, mask = _contiguous(s, indices, log_probs, mask)
    out = torch.empty_like(s, memory_format=torch.contiguous_format)
    if N:
        _, rest, tokens = geometry(V, k)
        blocks = triton.cdiv(V, rest["BLOCK"])
        rest_backward_kernel[(N * blocks,)](
            grad, s, mask, stats, out, grad.stride(0), s.stride(0), V, blocks, 1 / temperature, **rest
        )
        topk_backward_kernel[(N, triton.cdiv(k, tokens["TOKENS"]))](
            grad, s, indices, log_probs, mask, stats, out, grad.stride(0), s.stride(0), V, k,
            *_split(LOG2_E.value / temperature), *_split(mix), KIND=kind, SAME_MASS=tail is not None, **tokens,
        )  # fmt: skip
    return out
