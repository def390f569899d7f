"""InfoNCE against a shared bank for many queries, and the gradient of a trained bank: tile by tile of the scores, with the
library's products around one small kernel each way. kernels/contrast/loss.py has the maths.

    n = q Kᵀ / T                     of a tile [queries, keys], float32 out of the product
    weights = e^(n - maximum so far), sums = shrink · sums + weights K            (forward_kernel)
    weights = coefficient e^(n - lse), dK += weightsᵀ q                           (backward_kernel)

Every score is made once each way, and a tile of them is all that is stored. Products of half precision run on tensor cores:
where query and bank have one dtype, in it; a float32 query against a bfloat16 bank in three parts that hold all its digits,
and its weights in two. Weights of float16 are at most 2^14, which keeps small ones normal.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..blocks import multiply, narrow

FULL, SAME, SPLIT = 0, 1, 2  # how a product is formed
SCORES, MOST_QUERIES, MOST_KEYS = 1 << 24, 4096, 16384  # of a tile
SPILL_LIMIT = {"forward_kernel": 0, "parts_kernel": 0, "backward_kernel": 0}  # bytes of local memory a thread may use
LAUNCH = {"BLOCK": 1024, "num_warps": 4}


@triton.jit
def load_scores(score_ptr, row_scale_ptr, inverse, bank_ids, own, o_k, m_k):
    """n of some keys; -inf at those that do not exist or are excluded."""
    n = tl.load(score_ptr + o_k, mask=m_k, other=0.0)
    if row_scale_ptr is not None:
        n *= tl.load(row_scale_ptr + o_k, mask=m_k, other=0.0)
    if bank_ids is not None:
        m_k &= tl.load(bank_ids + o_k, mask=m_k, other=0) != own
    return tl.where(m_k, n * inverse, float("-inf"))


@triton.jit
def store_weights(weight_ptr, low_ptr, weight, o_k, m_k):
    """In the dtype of weight_ptr; and what it lacks."""
    high = narrow(weight, weight_ptr.dtype.element_ty)
    tl.store(weight_ptr + o_k, high, mask=m_k)
    if low_ptr is not None:
        tl.store(low_ptr + o_k, narrow(weight - high.to(tl.float32), low_ptr.dtype.element_ty), mask=m_k)


@triton.jit
def forward_kernel(
    score_ptr, row_scale_ptr, inverse_ptr, query_ids, bank_ids, largest_ptr, mass_ptr, sum_ptr, weight_ptr, low_ptr,
    K, D, score_stride, weight_stride, gain, BLOCK: tl.constexpr,
):  # fmt: skip
    """One query's scores of a tile: its maximum, its mass, its weights, and its sums rescaled to the new maximum."""
    i_b = tl.program_id(0).to(tl.int64)
    score_ptr += i_b * score_stride
    weight_ptr += i_b * weight_stride
    if low_ptr is not None:
        low_ptr += i_b * weight_stride
    inverse, own = tl.load(inverse_ptr).to(tl.float32), 0
    if query_ids is not None:
        own = tl.load(query_ids + i_b)
    tops = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, K, BLOCK):
        o_k = start + tl.arange(0, BLOCK)
        tops = tl.maximum(tops, load_scores(score_ptr, row_scale_ptr, inverse, bank_ids, own, o_k, o_k < K))
    before = tl.load(largest_ptr + i_b)
    largest = tl.maximum(before, tl.max(tops, 0))
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    shrink = tl.exp(before - shift)
    mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        o_k = start + tl.arange(0, BLOCK)
        weight = tl.exp(load_scores(score_ptr, row_scale_ptr, inverse, bank_ids, own, o_k, o_k < K) - shift)
        mass += weight
        if sum_ptr is not None:
            if row_scale_ptr is not None:
                weight *= tl.load(row_scale_ptr + o_k, mask=o_k < K, other=0.0)
            store_weights(weight_ptr, low_ptr, weight * gain, o_k, o_k < K)
    tl.store(largest_ptr + i_b, largest)
    tl.store(mass_ptr + i_b, tl.load(mass_ptr + i_b) * shrink + tl.sum(mass, 0))
    if sum_ptr is not None:
        sum_ptr += i_b * D
        for start in range(0, D, BLOCK):
            o_d = start + tl.arange(0, BLOCK)
            tl.store(sum_ptr + o_d, tl.load(sum_ptr + o_d, mask=o_d < D) * shrink, mask=o_d < D)


@triton.jit
def parts_kernel(x_ptr, part_ptr, n, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Numbers in a narrower dtype, then what that lacks, and so on."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rest = tl.load(x_ptr + o, mask=o < n, other=0.0).to(tl.float32)
    for i in tl.static_range(COUNT):
        part = narrow(rest, part_ptr.dtype.element_ty)
        tl.store(part_ptr + i * n + o, part, mask=o < n)
        rest -= part.to(tl.float32)


@triton.jit
def backward_kernel(
    score_ptr, inverse_ptr, query_ids, bank_ids, lse_ptr, coefficient_ptr, weight_ptr, K, score_stride, weight_stride, gain,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One query's weights of a tile: coefficient e^(n - lse)."""
    i_b = tl.program_id(0).to(tl.int64)
    score_ptr += i_b * score_stride
    weight_ptr += i_b * weight_stride
    inverse, own = tl.load(inverse_ptr).to(tl.float32), 0
    if query_ids is not None:
        own = tl.load(query_ids + i_b)
    lse = tl.load(lse_ptr + i_b)
    lse, factor = tl.where(lse == float("-inf"), 0.0, lse), tl.load(coefficient_ptr + i_b) * gain
    for start in range(0, K, BLOCK):
        o_k = start + tl.arange(0, BLOCK)
        n = load_scores(score_ptr, None, inverse, bank_ids, own, o_k, o_k < K)
        store_weights(weight_ptr, None, tl.exp(n - lse) * factor, o_k, o_k < K)


def parts(x: Tensor, dtype: torch.dtype, count: int) -> Tensor:
    """[count, *x.shape] in this dtype, whose sum is x: three of bfloat16 hold a float32."""
    if count == 1:
        return x.to(dtype)[None]
    x = x.contiguous()
    found = torch.empty((count, *x.shape), dtype=dtype, device=x.device)
    parts_kernel[(triton.cdiv(x.numel(), LAUNCH["BLOCK"]),)](x, found, x.numel(), COUNT=count, **LAUNCH)
    return found


class Tiles:
    """A query and a bank as the products take them, and what a tile of scores is written to."""

    def __init__(self, query: Tensor, bank: Tensor, form: int, split_weights: bool = False):
        self.bank, self.dtype = bank, torch.float32 if form == FULL else bank.dtype
        if bank.dtype.itemsize == 1:
            self.bank, self.dtype = bank.view(torch.float8_e4m3fn), torch.float32 if form == FULL else torch.bfloat16
        self.query = parts(query, self.dtype, 3 if form == SPLIT else 1)
        B, K = len(query), len(bank)
        self.step_q = min(B, MOST_QUERIES)
        self.step_k = max(min(K, SCORES // self.step_q, MOST_KEYS), 1)
        self.scores = query.new_empty(self.step_q, self.step_k, dtype=torch.float32)
        planes = 2 if split_weights and form == SPLIT else 1
        self.weights = (
            [self.scores] if form == FULL else [torch.empty_like(self.scores, dtype=self.dtype) for _ in range(planes)]
        )
        self.gain = 2.0**14 if self.dtype == torch.float16 else 1.0

    def __iter__(self):
        for first in range(0, len(self.query[0]), self.step_q):
            for start in range(0, len(self.bank), self.step_k):
                yield slice(first, first + self.step_q), slice(start, start + self.step_k)

    def score(self, queries: slice, keys: slice) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The tile's scores, its keys, and where its weights go."""
        bank = self.bank[keys].to(self.dtype)
        sizes = slice(len(self.query[0][queries])), slice(len(bank))
        scores = self.scores[sizes]
        for i, part in enumerate(self.query):
            multiply(part[queries], bank.t(), scores, add=i > 0)
        return scores, bank, [x[sizes] for x in self.weights]


def _at(x: Tensor | None, part: slice) -> Tensor | None:
    return None if x is None else x[part]


def forward(query, bank, row_scale, inverse, query_ids, bank_ids, form: int, gradient_in_forward: bool) -> tuple:
    """Maxima and sums of exponentials [1, B], weighted sums of rows [1, B, D], as the splits of shared_kernel leave them."""
    B, D = query.shape
    largest = torch.full((1, B), float("-inf"), dtype=torch.float32, device=query.device)
    mass = torch.zeros_like(largest)
    sums = query.new_zeros(1, B, D, dtype=torch.float32) if gradient_in_forward else None
    tiles = Tiles(query, bank, form, split_weights=True)
    for queries, keys in tiles:
        scores, rows, weights = tiles.score(queries, keys)
        own_sums = None if sums is None else sums[0, queries]
        forward_kernel[(len(scores),)](
            scores, _at(row_scale, keys), inverse, _at(query_ids, queries), _at(bank_ids, keys), largest[0, queries],
            mass[0, queries], own_sums, weights[0], weights[1] if len(weights) > 1 else None, scores.shape[1], D,
            scores.stride(0), weights[0].stride(0), tiles.gain, **LAUNCH,
        )  # fmt: skip
        for part in weights if own_sums is not None else ():
            multiply(part, rows, own_sums, add=True)
    return largest, mass, sums if sums is None or tiles.gain == 1 else sums / tiles.gain


def bank_gradient(query, bank, inverse, query_ids, bank_ids, lse, coefficient, form: int) -> Tensor:
    """[K, D] in float32: coefficient e^(n - lse) q, over the queries in order."""
    grad = bank.new_zeros(bank.shape, dtype=torch.float32)
    if form == SPLIT:  # weights as exact as the query
        form, bank = FULL, bank.float()
    tiles, largest = Tiles(query, bank, form), None
    if tiles.gain != 1:
        largest = coefficient.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
        coefficient = coefficient / largest
    for queries, keys in tiles:
        scores, _, (weights,) = tiles.score(queries, keys)
        backward_kernel[(len(scores),)](
            scores, inverse, _at(query_ids, queries), _at(bank_ids, keys), lse[queries], coefficient[queries], weights,
            scores.shape[1], scores.stride(0), weights.stride(0), tiles.gain, **LAUNCH,
        )  # fmt: skip
        multiply(weights.t(), tiles.query[0][queries], grad[keys], add=True)
    return grad if largest is None else grad * (largest / tiles.gain)
