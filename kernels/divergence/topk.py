"""The divergence of `divergence.py` against a sparse teacher: k words with log-probabilities per row, and perhaps the
log-mass of the rest as one more word.

The student's softmax is over all of its words; everything else happens on k + 1 numbers, in float64. The gradient of a word
is (q h - q mean) / T, and the rest's is shared out by each word's part of it: q h is bounded where h, which may hold p / q,
is not. The rest's mass is summed without the k words, never as a difference, so it is known however small it is. Near p = q,
h is small, being known up to a constant only.

Saved per row, each as two floats, the second what the first lacks: T logsumexp(s / T) of all words and of the rest (as 1 / T
is given, so that log q keeps its digits), and the mean of h under q; last, the rest's q (h - mean).

A bitmap of the k words, 1/8 byte per word of the vocabulary, tells the pass which words are of the rest. The backward
writes the whole row as if it were the rest, then the k words again.
"""

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..blocks import hidden
from .logits import JSD, LOG2_E, REVERSE_KL, SKEW_KL, SOFT_CE, TVD

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def mark_kernel(indices_ptr, marks_ptr, k, V, width, WORDS: tl.constexpr):
    """Sets the bit of each of the k words in a row's bitmap [width]: the order of the atomics does not show."""
    i_n, o_k = tl.program_id(0).to(tl.int64), tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    b_i = tl.load(indices_ptr + i_n * k + o_k, mask=o_k < k, other=-1)  # [WORDS]
    bits = tl.full([WORDS], 1, tl.int32) << (b_i & 31).to(tl.int32)
    tl.atomic_or(marks_ptr + i_n * width + b_i // 32, bits, mask=(b_i >= 0) & (b_i < V), sem="relaxed")


@triton.jit
def load_rest(s_ptr, marks_ptr, start, stop, BLOCK: tl.constexpr):
    """A block of the student's row as float32; -inf past its end and where a word is one of the k."""
    o_v = start + tl.arange(0, BLOCK)
    m_v = o_v < stop
    taken = (tl.load(marks_ptr + o_v // 32, mask=m_v, other=0) >> (o_v & 31)) & 1
    b_s = tl.load(s_ptr + o_v, mask=m_v, other=0.0).to(tl.float32)  # [BLOCK]
    return tl.where(m_v & (taken == 0), b_s, float("-inf"))


@triton.jit
def wide_exp2(y):
    """2^y in float64 to 2e-10, without the branches of the library's; -1000 <= y <= 1000, beyond which it is as there."""
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
    """The maximum of the first `stop` words outside the k (0 if all are -inf), and the sum of exponentials over it, float64:
    float32 would know its logarithm to 1e-8 at best, of a log q - log p that is 1e-3 near convergence."""
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
def store_parts(ptr, x, nothing):
    high = x.to(tl.float32)
    tl.store(ptr, high + nothing)
    tl.store(ptr + 1, (x - high.to(tl.float64)).to(tl.float32))


@triton.jit
def kl_word(a, log_a, log_b, SAME_MASS: tl.constexpr):
    """a (log a - log b); a phi(log b - log a) where both sides have the same mass, so that no term is negative."""
    d = log_b - log_a
    if SAME_MASS:
        series = d * d * (1 / 2 + d * (1 / 6 + d * (1 / 24 + d / 120)))
        return tl.where(a == 0, tl.exp(log_b), a * tl.where(tl.abs(d) < 1e-2, series, tl.exp(d) - 1.0 - d))
    return tl.where(a == 0, 0.0, -a * d)


@triton.jit
def word(log_p, log_q, mix, KIND: tl.constexpr, SAME_MASS: tl.constexpr):
    """One of the k words, or the rest: q, its share of the value, and q h, h up to a constant that makes it small near p = q."""
    p, q = tl.exp(log_p), tl.exp(log_q)
    if KIND == SKEW_KL or KIND == JSD:
        m = (1.0 - mix) * p + mix * q
        log_m = tl.log(m)
        value = kl_word(p, log_p, log_m, SAME_MASS)
        if KIND == SKEW_KL:
            weighted = tl.where(m > 0, mix * mix * (q - p) * (q / tl.where(m > 0, m, 1.0)), 0.0)
        else:
            value = (1.0 - mix) * value + mix * kl_word(q, log_q, log_m, SAME_MASS)
            weighted = tl.where(q > 0, mix * q * (log_q - log_m), 0.0)
    elif KIND == REVERSE_KL:
        value = kl_word(q, log_q, log_p, SAME_MASS)
        weighted = tl.where(q > 0, q * (log_q - log_p), 0.0)
    elif KIND == TVD:
        value = tl.abs(q - p) * 0.5
        weighted = tl.where(q > p, 0.5 * q, tl.where(q < p, -0.5 * q, 0.0))
    else:
        value = tl.where(p > 0, -p * log_q, 0.0) if KIND == SOFT_CE else kl_word(p, log_p, log_q, SAME_MASS)
        weighted = q - p
    return q, value, weighted


@triton.jit
def load_words(s_ptr, indices_ptr, log_probs_ptr, start, k, V, per_T, WORDS: tl.constexpr):
    """Some of the k words of a row: where they lie, which are there, s / T and log p, float64; -inf past the k."""
    o_k = start + tl.arange(0, WORDS)
    b_i = tl.load(indices_ptr + o_k, mask=o_k < k, other=0)  # [WORDS]
    m_k = (o_k < k) & (b_i >= 0) & (b_i < V)
    b_s = tl.load(s_ptr + b_i, mask=m_k, other=0.0).to(tl.float64)
    log_p = tl.load(log_probs_ptr + o_k, mask=m_k, other=0.0).to(tl.float64)
    return b_i, m_k, tl.where(m_k, b_s * per_T, float("-inf")), tl.where(m_k, log_p, float("-inf"))


@triton.jit
def topk_forward_kernel(
    s_ptr, indices_ptr, log_probs_ptr, tail_ptr, marks_ptr, mask_ptr, values_ptr, stats_ptr, s_stride, V, k, width,
    k_high, k_low, mix_high, mix_low, KIND: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """One program per row."""
    i_n = tl.program_id(0).to(tl.int64)
    if hidden(mask_ptr, i_n):
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
    top = log_rest  # of the log-sum-exp over all words
    mass = tl.where(log_rest == float("-inf"), 0.0, tl.exp(log_rest - log_rest))
    wrong = 0
    for start in range(0, k, WORDS):
        b_i, m_k, x, log_p = load_words(s_ptr, indices_ptr, log_probs_ptr, start, k, V, per_T, WORDS)
        wrong += tl.sum(((b_i < 0) | (b_i >= V)).to(tl.int32))
        larger = tl.maximum(top, tl.max(x, 0))
        mass = tl.where(top == larger, mass, mass * tl.exp(top - larger)) + tl.sum(tl.exp(x - larger))
        top = larger
    log_sum = top + tl.log(mass)
    # A student that can say nothing but the k words has no rest: then the teacher's is not compared either.
    log_tail = log_rest if tail_ptr is None else tl.load(tail_ptr + i_n).to(tl.float64)
    log_tail = tl.where((log_rest == float("-inf")) | (tail_ptr is None), float("-inf"), log_tail)
    q, value, of_rest = word(log_tail, log_rest - log_sum, mix, KIND, tail_ptr is not None)
    mean = of_rest
    for start in range(0, k, WORDS):
        b_i, m_k, x, log_p = load_words(s_ptr, indices_ptr, log_probs_ptr, start, k, V, per_T, WORDS)
        _q, values, weighted = word(log_p, x - log_sum, mix, KIND, tail_ptr is not None)
        value += tl.sum(tl.where(m_k, values, 0.0))
        mean += tl.sum(tl.where(m_k, weighted, 0.0))
    nothing = tl.where(wrong > 0, float("nan"), 0.0)  # an index outside the vocabulary: NaN, since to raise is to wait
    tl.store(values_ptr + i_n, value.to(tl.float32) + nothing)
    stats_ptr += 7 * i_n
    store_parts(stats_ptr, log_sum / per_T, nothing)
    store_parts(stats_ptr + 2, tl.where(log_rest == float("-inf"), log_sum, log_rest) / per_T, nothing)
    store_parts(stats_ptr + 4, mean, nothing)
    tl.store(stats_ptr + 6, (of_rest - q * mean).to(tl.float32))


@triton.jit
def rest_backward_kernel(
    g_ptr, s_ptr, mask_ptr, stats_ptr, grad_ptr, g_stride, s_stride, V, blocks, inv_T, BLOCK: tl.constexpr
):
    """The gradient of every word as if it were one of the rest; a program per block of a row."""
    i = tl.num_programs(0) - 1 - tl.program_id(0)
    i_n, o_v = (i // blocks).to(tl.int64), i % blocks * BLOCK + tl.arange(0, BLOCK)
    m_v = o_v < V
    grad_ptr += i_n * V
    if hidden(mask_ptr, i_n):
        tl.store(grad_ptr + o_v, tl.zeros([BLOCK], grad_ptr.dtype.element_ty), mask=m_v)
        return
    b_s = tl.load(s_ptr + i_n * s_stride + o_v, mask=m_v, other=0.0).to(tl.float32)  # [BLOCK]
    stats_ptr += 7 * i_n
    high, low, of_rest = tl.load(stats_ptr + 2), tl.load(stats_ptr + 3), tl.load(stats_ptr + 6)
    part = tl.exp2(
        ((b_s - high) - low) * (inv_T * LOG2_E)
    )  # of the rest; the k words, written afterwards, may overflow
    grad = part * (of_rest * (tl.load(g_ptr + i_n * g_stride).to(tl.float32) * inv_T))
    tl.store(grad_ptr + o_v, grad.to(grad_ptr.dtype.element_ty), mask=m_v)


@triton.jit
def words_backward_kernel(
    g_ptr, s_ptr, indices_ptr, log_probs_ptr, mask_ptr, stats_ptr, grad_ptr, g_stride, s_stride, V, k, k_high, k_low, mix_high,
    mix_low, KIND: tl.constexpr, SAME_MASS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Overwrites the gradient of the k words with their own."""
    i_n = tl.program_id(0).to(tl.int64)
    if hidden(mask_ptr, i_n):
        return
    per_T, mix = one_over_temperature(k_high, k_low), both_parts(mix_high, mix_low)
    stats_ptr += 7 * i_n
    raw = both_parts(tl.load(stats_ptr), tl.load(stats_ptr + 1))
    mean = both_parts(tl.load(stats_ptr + 4), tl.load(stats_ptr + 5))
    s_ptr += i_n * s_stride
    indices_ptr += i_n * k
    log_probs_ptr += i_n * k
    start = tl.program_id(1) * WORDS
    b_i, m_k, x, log_p = load_words(s_ptr, indices_ptr, log_probs_ptr, start, k, V, per_T, WORDS)
    q, _, weighted = word(log_p, x - raw * per_T, mix, KIND, SAME_MASS)
    grad = (weighted - q * mean) * (tl.load(g_ptr + i_n * g_stride) * per_T)
    tl.store(grad_ptr + i_n * V + b_i, grad.to(tl.float32).to(grad_ptr.dtype.element_ty), mask=m_k)


# Bytes of local memory a thread may use, whatever the kind, dtype and chip: tests/ops/test_triton.py asserts it.
SPILL_LIMIT = {"mark_kernel": 0, "topk_forward_kernel": 0, "rest_backward_kernel": 0, "words_backward_kernel": 0}

# Words of a row per step and warps of a program, by the width of the row; at most so many of the k words at a time.
SMALL = {"BLOCK": 1024, "STAGES": 1, "num_warps": 4}, {"BLOCK": 1024, "num_warps": 4}
LARGE = {"BLOCK": 2048, "STAGES": 3, "num_warps": 8}, {"BLOCK": 4096, "num_warps": 8}
MOST_WORDS = 128


def geometry(V: int, k: int) -> tuple[dict, dict, dict]:
    """Launch options of the forward and the rest's backward (programs per row, per block of a row), and of the k words."""
    forward, backward = SMALL if V <= 1024 else LARGE
    words = {"WORDS": min(triton.next_power_of_2(k), MOST_WORDS)}
    fused = {"enable_fp_fusion": True}
    return {**forward, **words, **fused}, {**backward, **fused}, {**words, "num_warps": 4, **fused}


def _split(x: float) -> tuple[float, float]:
    """x as a float32 and what it lacks."""
    high = struct.unpack("f", struct.pack("f", x))[0]
    return high, x - high


def _dense(s: Tensor, *others: Tensor | None):
    """Rows of s may lie anywhere, the words of one side by side; the small tensors without gaps."""
    return s if s.stride(-1) == 1 else s.contiguous(), *(None if x is None else x.contiguous() for x in others)


def divergence_topk_fwd(
    s: Tensor, indices: Tensor, log_probs: Tensor, tail: Tensor | None, mask: Tensor | None, kind: int,
    temperature: float, mix: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """s [N, V], indices and log_probs [N, k], tail and mask [N] -> values [N], stats [N, 7]. log_probs and tail float64."""
    (N, V), k = s.shape, indices.shape[1]
    s, indices, log_probs, tail, mask = _dense(s, indices, log_probs, tail, mask)
    values, stats = (s.new_empty(shape, dtype=torch.float32) for shape in ((N,), (N, 7)))
    if N:
        forward, _, words = geometry(V, k)
        width = triton.cdiv(V, 32)
        marks = s.new_zeros(N, width, dtype=torch.int32)
        mark_kernel[(N, triton.cdiv(k, words["WORDS"]))](indices, marks, k, V, width, **words)
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
    s, indices, log_probs, mask = _dense(s, indices, log_probs, mask)
    out = torch.empty_like(s, memory_format=torch.contiguous_format)
    if N:
        _, rest, words = geometry(V, k)
        blocks = triton.cdiv(V, rest["BLOCK"])
        rest_backward_kernel[(N * blocks,)](
            grad, s, mask, stats, out, grad.stride(0), s.stride(0), V, blocks, 1 / temperature, **rest
        )
        words_backward_kernel[(N, triton.cdiv(k, words["WORDS"]))](
            grad, s, indices, log_probs, mask, stats, out, grad.stride(0), s.stride(0), V, k,
            *_split(LOG2_E.value / temperature), *_split(mix), KIND=kind, SAME_MASS=tail is not None, **words,
        )  # fmt: skip
    return out
