"""contrast's bank: draw the negatives of each example, and move rows of the bank towards new ones.

The maths is that of fastkd/reference/contrast_sample.py and contrast_bank.py, bit for bit where numbers are drawn. Draw k of
example b is a hash w of (seed, step, b, id, k). With replacement it is w mod R, where R is the size of the pool. Without, it
is what the k-th swap of a Fisher-Yates shuffle takes. That swap exchanges places k and t_k = k + w mod (R - k), and takes t_k
unless an earlier swap touched that place. The last one that did, j < k with t_j = t_k, put there what place j held then: j,
unless an earlier swap i < j with t_i = j had put something there, and so on. All draws follow their chains at once, and each
step scans the targets. Chains end after one step or two unless the pool is hardly larger than the draw.

A position in the pool becomes an id by skipping the block of the example's own class among the ids sorted by class.

Launches: one with replacement, two without; one for the bank's update. Nothing synchronises.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..blocks import contiguous_rows
from .loss import e4m3

SPILL_LIMIT = {"draw_kernel": 0, "shuffle_kernel": 0, "update_kernel": 0}


class Pool(NamedTuple):
    """What an example may draw: `extent` positions from `base` on, without `size` of them from `start` on."""

    base: tl.tensor
    extent: tl.tensor
    start: tl.tensor
    size: tl.tensor


@triton.jit
def mix(x):
    """The finaliser of splitmix64; masks make int64's arithmetic shifts logical."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def draws_of(index_ptr, label_ptr, bound_ptr, n_data, window, BLOCK: tl.constexpr):
    """A program's example, its draws, the example's id, and its pool."""
    i_b = tl.program_id(0).to(tl.int64)
    o_k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    own_id = tl.load(index_ptr + i_b).to(tl.int64)
    safe = tl.minimum(tl.maximum(own_id, 0), n_data - 1)  # an id that does not exist reads within bounds
    base, extent, start, size = safe * 0, safe * 0 + n_data, safe, safe * 0 + 1
    if label_ptr is not None:
        own = tl.load(label_ptr + safe)
        start = tl.load(bound_ptr + own)
        size = tl.load(bound_ptr + own + 1) - start
    else:
        if window > 0:
            extent = tl.minimum(extent, 2 * window + 1)
            base = tl.minimum(tl.maximum(safe - window, 0), n_data - extent)
            start = safe - base
    return i_b, o_k, own_id, Pool(base, extent, start, size)


@triton.jit
def id_at(position, order_ptr, mask, pool, n_data):
    position = pool.base + position + tl.where(position >= pool.start, pool.size, 0)
    position = tl.minimum(position, n_data - 1)
    if order_ptr is not None:
        position = tl.load(order_ptr + position, mask=mask, other=0)
    return position


@triton.jit
def draw_kernel(
    index_ptr, label_ptr, order_ptr, bound_ptr, state_ptr, target_ptr, out_ptr, count, n_data, window,
    REPLACEMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Ids for draws with replacement; otherwise the targets of the swaps."""
    i_b, o_k, own_id, pool = draws_of(index_ptr, label_ptr, bound_ptr, n_data, window, BLOCK)
    m_k = o_k < count
    step = mix(mix(tl.load(state_ptr)) + tl.load(state_ptr + 1))
    stream = mix(mix(step + i_b) + own_id)
    bits = mix(stream + (o_k + 1) * -0x61C8864680B583EB) & 0x7FFFFFFFFFFFFFFF
    available = pool.extent - pool.size
    repeat = available < count
    if REPLACEMENT:
        repeat = available == available
    drawn = bits % tl.where(repeat, tl.maximum(available, 1), tl.maximum(available - o_k, 1))
    if not REPLACEMENT:
        tl.store(target_ptr + i_b * count + o_k, tl.where(repeat, -1, drawn + o_k), mask=m_k)
    ids = id_at(tl.where(repeat, drawn, 0), order_ptr, m_k, pool, n_data)
    tl.store(out_ptr + i_b * count + o_k, ids, mask=m_k)


@triton.jit
def last_swap_into(target_ptr, place, before, count, SCAN: tl.constexpr):
    """The last swap i < before with target_i = place, -1 where there is none; all [BLOCK]."""
    last = place * 0 - 1
    for begin in range(0, count, SCAN):
        o_i = begin + tl.arange(0, SCAN).to(tl.int64)
        target = tl.load(target_ptr + o_i, mask=o_i < count, other=-1)
        hit = (target[None, :] == place[:, None]) & (o_i[None, :] < before[:, None])
        last = tl.maximum(last, tl.max(tl.where(hit, o_i[None, :], -1), 1))
    return last


@triton.jit
def shuffle_kernel(
    index_ptr, label_ptr, order_ptr, bound_ptr, target_ptr, out_ptr, count, n_data, window,
    BLOCK: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """What each swap takes, as ids. Examples whose pool is too small got theirs from draw_kernel, with replacement."""
    i_b, o_k, _own_id, pool = draws_of(index_ptr, label_ptr, bound_ptr, n_data, window, BLOCK)
    m_k = o_k < count
    if pool.extent - pool.size >= count:
        target_ptr += i_b * count
        taken = tl.load(target_ptr + o_k, mask=m_k, other=-2)
        at = last_swap_into(target_ptr, taken, o_k, count, SCAN)
        while tl.max(at, 0) >= 0:
            taken = tl.where(at >= 0, at, taken)  # what place `at` held, unless a swap into it came before
            at = last_swap_into(target_ptr, tl.where(at >= 0, at, -2), at, count, SCAN)
        ids = id_at(taken, order_ptr, m_k, pool, n_data)
        tl.store(out_ptr + i_b * count + o_k, ids, mask=m_k)


@triton.jit
def to_e4m3(x):
    """The bits of float8 e4m3fn, |x| <= 448, to nearest, ties to even. Below 2^-6 its numbers lie 2^-9 apart, as those of
    float32 do from 2^14 on. Not every chip has the conversion."""
    bits = x.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 960
    small = (tl.abs(x) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    code = tl.minimum(tl.where(tl.abs(x) < 0.015625, small, normal), 0x7E)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def update_kernel(
    bank_ptr, scale_ptr, index_ptr, row_ptr, momentum, B, K, D, bank_stride, row_stride,
    WIDTH: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """Moves the bank row of one example towards the new one, unless a later example has the same id."""
    i_b = tl.program_id(0).to(tl.int64)
    own_id = tl.load(index_ptr + i_b).to(tl.int64)
    later = own_id * 0
    for begin in range(0, B, SCAN):
        o_b = begin + tl.arange(0, SCAN)
        other = tl.load(index_ptr + o_b, mask=o_b < B, other=-1).to(tl.int64)
        later += tl.sum(((other == own_id) & (o_b > i_b)).to(tl.int64), 0)
    if (later == 0) & (own_id >= 0) & (own_id < K):
        o_d = tl.arange(0, WIDTH)
        m_d = o_d < D
        b_old = tl.load(bank_ptr + own_id * bank_stride + o_d, mask=m_d, other=0.0)
        if scale_ptr is not None:
            b_old = e4m3(b_old).to(tl.float32) * tl.load(scale_ptr + own_id)
        b_old = b_old.to(tl.float32)
        b_new = tl.load(row_ptr + i_b * row_stride + o_d, mask=m_d, other=0.0).to(tl.float32)
        mean = momentum * b_old + (1.0 - momentum) * b_new
        norm = tl.sqrt(tl.sum(mean * mean, 0))
        if norm < float("inf"):  # nor for NaN
            mean = mean / tl.maximum(norm, 1e-12)
            to_ptr = bank_ptr + own_id * bank_stride + o_d
            if scale_ptr is None:
                tl.store(to_ptr, mean, mask=m_d)
            else:
                scale = tl.maximum(tl.max(tl.abs(mean), 0), 1e-12) / 448.0
                tl.store(scale_ptr + own_id, scale)
                tl.store(to_ptr, to_e4m3(tl.minimum(tl.maximum(mean / scale, -448.0), 448.0)), mask=m_d)


def sample_negatives(
    index: Tensor, count: int, n_data: int, labels: Tensor | None, order: Tensor | None, bounds: Tensor | None,
    state: Tensor, replacement: bool, window: int,
) -> Tensor:  # fmt: skip
    index, state = index.contiguous(), state.contiguous()
    labels, order, bounds = map(contiguous_rows, (labels, order, bounds))
    out = torch.empty((index.shape[0], count), dtype=torch.int64, device=index.device)
    if index.shape[0] == 0:
        return out
    target = None if replacement else torch.empty_like(out)
    draw_kernel[(index.shape[0], triton.cdiv(count, 128))](
        index, labels, order, bounds, state, target, out, count, n_data, window,
        REPLACEMENT=replacement, BLOCK=128, num_warps=4,
    )  # fmt: skip
    if not replacement:
        shuffle_kernel[(index.shape[0], triton.cdiv(count, 64))](
            index, labels, order, bounds, target, out, count, n_data, window, BLOCK=64, SCAN=32, num_warps=4
        )
    return out


def update_bank(bank: Tensor, index: Tensor, rows: Tensor, momentum: float, scale: Tensor | None = None) -> None:
    B, D = rows.shape
    bank = bank if scale is None else bank.view(torch.uint8)
    rows = contiguous_rows(rows)
    if B:
        update_kernel[(B,)](
            bank, scale, index.contiguous(), rows, momentum, B, bank.shape[0], D, bank.stride(0), rows.stride(0),
            WIDTH=triton.next_power_of_2(D), SCAN=128, num_warps=4 if D <= 2048 else 8,
        )  # fmt: skip
