"""A query against its positive and K negatives out of a bank: InfoNCE and NCE, loss and gradient in one read of the bank.

The maths. n_k = <q, bank_k> / T, p = <q, positive> / T. InfoNCE is attention with K = V = bank:

    lse = log sum_k e^n_k,   loss = softplus(lse - p),   w = sigmoid(lse - p),
    unit_grad = w (sum_k e^(n_k - lse) bank_k - positive) = T · d loss / d q,   d loss / d bank_k = w e^(n_k - lse) q / T.

NCE, where `shift` is everything that is subtracted from a score: u = <q, n> / T - shift,

    loss = softplus(-u_0) + sum_k softplus(u_k),   unit_grad = (sum_k sigmoid(u_k) bank_k - sigmoid(-u_0) bank_0) / T.

Saved: `unit_grad`, so that the backward need not read a bank without a gradient again; per query w and, for a trained bank, lse.

The passes. For few queries in half precision, the bank (or a query's row of the index) is split among programs; each reads its
blocks once with a running maximum and leaves (maximum, sum, weighted sum of rows) per query. A second kernel merges the splits
in order. Their number depends on sizes alone, so two runs are equal bit for bit. Nothing of size B x K is stored. For many
queries, or in float32, and for the gradient of a trained bank: tiles.py.

If query and bank have the same half precision, the products run on tensor cores in it. A float32 query against a bfloat16
bank is the sum of three parts there that hold all its digits, and its weights are a sum of two. Everything else is float32
without tf32.

Rows with a scale: n_k and the weight of bank_k in unit_grad are multiplied by it, rows are not. float8 e4m3 rows become
bfloat16, exactly, once they are read, so a float16 query is split as well. Chips before sm_89 cannot convert them: there
they are read as bytes, whose bits are moved into place.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..blocks import INTERPRET, contiguous_rows, narrow
from . import tiles
from .tiles import FULL, SAME, SPLIT

FEW = 32  # queries up to which one kernel reads the bank once, in half precision
CHUNKS = 6  # of 128 columns, that a program of shared_kernel sums at most; wider rows are scored again for the others
PROGRAMS = 528  # of gathered_kernel: 4 on each of an H200's 132 multiprocessors; shared_kernel has one on each
TWO_TO_120 = tl.constexpr(1329227995784915872903807060280344576.0)
# Bytes of local memory a thread may use, over every width, dtype and chip.
SPILL_LIMIT = {"shared_kernel": 136, "gathered_kernel": 16, "merge_kernel": 0}


@triton.jit
def product(a, b, total):
    """total + a @ b; the interpreter multiplies bfloat16 wrongly."""
    if INTERPRET:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def log1p_of_small(e):
    """log(1 + e) for 0 <= e <= 1 with all its digits."""
    z = e / (2.0 + e)
    w = z * z
    return 2 * z * (1 + w * (1 / 3 + w * (1 / 5 + w * (1 / 7 + w * (1 / 9 + w * (1 / 11 + w * (1 / 13)))))))


@triton.jit
def softplus_and_slope(x):
    """softplus(x) and its derivative; NaN stays."""
    e = tl.exp(-tl.abs(x))
    return tl.maximum(x, 0.0) + log1p_of_small(e) + (x - x), tl.where(x > 0, 1.0, e) / (1.0 + e)


@triton.jit
def e4m3(byte):
    """float8 e4m3fn out of its bits: the float32 of 2^-120 of its value has them in the same order."""
    bits = byte.to(tl.uint32)
    size = bits & 0x7F
    value = ((size << 20) | ((bits & 0x80) << 24)).to(tl.float32, bitcast=True) * TWO_TO_120
    return tl.where(size == 0x7F, float("nan"), value).to(tl.bfloat16)


@triton.jit
def tile(ptr, o_row, m_row, o_d, stride, D):
    """A block [rows, columns] in its own dtype, float8 as bfloat16; 0 outside."""
    mask = m_row[:, None] & (o_d < D)[None, :]
    block = tl.load(ptr + o_row[:, None] * stride + o_d[None, :], mask=mask, other=0.0)
    if block.dtype == tl.uint8:
        block = e4m3(block)
    elif block.dtype == tl.float8e4nv:
        block = block.to(tl.bfloat16)
    return block


@triton.jit
def scores_of(
    q_ptr, bank_ptr, row_scale_ptr, inverse_ptr, query_ids, bank_ids, o_b, m_b, o_k, m_k, part_stride, q_stride,
    bank_stride, D, PARTS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """n [BLOCK_K, BLOCK_B]; -inf at keys that do not exist or are excluded."""
    total = tl.zeros([o_k.shape[0], o_b.shape[0]], tl.float32)
    for start in range(0, D, INNER):
        o_d = start + tl.arange(0, INNER)
        b_k = tile(bank_ptr, o_k, m_k, o_d, bank_stride, D)
        for i in tl.static_range(PARTS):
            b_q = tile(q_ptr + i * part_stride, o_b, m_b, o_d, q_stride, D)
            total = product(b_k, tl.trans(b_q), total)
    if row_scale_ptr is not None:
        total = total * tl.load(row_scale_ptr + o_k, mask=m_k, other=0.0)[:, None]
    allowed = m_k[:, None]
    if query_ids is not None:
        own = tl.load(query_ids + o_b, mask=m_b, other=0)
        allowed = allowed & (own[None, :] != tl.load(bank_ids + o_k, mask=m_k, other=0)[:, None])
    return tl.where(allowed, total * tl.load(inverse_ptr).to(tl.float32), float("-inf"))


@triton.jit
def shared_kernel(
    q_ptr, bank_ptr, row_scale_ptr, inverse_ptr, query_ids, bank_ids, largest_ptr, mass_ptr, sum_ptr, B, K, D,
    part_stride, q_stride, bank_stride, blocks, splits,
    PARTS: tl.constexpr, UNIT_GRAD: tl.constexpr, INNER: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A block of queries against one split of the bank; the weighted sums of CHUNKS times WIDTH columns. Keys come first in every
    product, since tensor cores want 64 rows."""
    i_split, i_b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_b = i_b * BLOCK_B + tl.arange(0, BLOCK_B)
    m_b = o_b < B
    first = tl.program_id(2) * (CHUNKS * WIDTH)
    largest = tl.full([BLOCK_B], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_B], tl.float32)
    sums = ()
    for _ in tl.static_range(CHUNKS):
        sums = sums + (tl.zeros([WIDTH, BLOCK_B], tl.float32),)  # noqa: RUF005 (Triton has no star in a tuple)
    for block in range(i_split * blocks // splits, (i_split + 1) * blocks // splits):
        o_k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        m_k = o_k < K
        n = scores_of(
            q_ptr, bank_ptr, row_scale_ptr, inverse_ptr, query_ids, bank_ids, o_b, m_b, o_k, m_k, part_stride, q_stride,
            bank_stride, D, PARTS, INNER,
        )  # fmt: skip
        top = tl.maximum(largest, tl.max(n, 0))
        shift = tl.where(top == float("-inf"), 0.0, top)
        shrink = tl.exp(largest - shift)
        weight = tl.exp(n - shift[None, :])
        mass = mass * shrink + tl.sum(weight, 0)
        largest = top
        if UNIT_GRAD:
            if row_scale_ptr is not None:
                weight = weight * tl.load(row_scale_ptr + o_k, mask=m_k, other=0.0)[:, None]
            added = ()
            for i in tl.static_range(CHUNKS):
                b_k = tl.trans(tile(bank_ptr, o_k, m_k, first + i * WIDTH + tl.arange(0, WIDTH), bank_stride, D))
                high = narrow(weight, b_k.dtype)
                total = product(b_k, high, sums[i] * shrink[None, :])
                if PARTS > 1:
                    total = product(b_k, narrow(weight - high.to(tl.float32), b_k.dtype), total)
                added = added + (total,)  # noqa: RUF005
            sums = added
    o_out = i_split * B + o_b
    if first == 0:
        tl.store(largest_ptr + o_out, largest, mask=m_b)
        tl.store(mass_ptr + o_out, mass, mask=m_b)
    if UNIT_GRAD:
        for i in tl.static_range(CHUNKS):
            o_d = first + i * WIDTH + tl.arange(0, WIDTH)
            tl.store(sum_ptr + (o_out * D)[None, :] + o_d[:, None], sums[i], mask=m_b[None, :] & (o_d < D)[:, None])


@triton.jit
def gathered_kernel(
    q_ptr, bank_ptr, row_scale_ptr, index_ptr, scale_ptr, shift_ptr, z_ptr, query_ids, bank_ids, largest_ptr, mass_ptr,
    sum_ptr, B, K, D, count, q_stride, bank_stride, share, blocks, splits,
    NCE: tl.constexpr, UNIT_GRAD: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One query against one split of the rows that its index names. A row that does not exist makes the loss NaN. With z: the
    mass of the scores that are finite, and their number in largest_ptr; nothing where z is set. NCE is multiplied by `share`."""
    if False if z_ptr is None else tl.load(z_ptr) > 0:
        return
    program = tl.program_id(0).to(tl.int64)
    i_split, i_b = program % splits, program // splits
    o_d = tl.arange(0, WIDTH)
    b_q = tl.load(q_ptr + i_b * q_stride + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr)  # in two parts, so that float32 does not round them
    scale_high = scale.to(tl.float32)
    scale_low = (scale - scale_high.to(tl.float64)).to(tl.float32)
    if NCE:
        nce_shift = tl.load(shift_ptr)
        shift_high = nce_shift.to(tl.float32)
        shift_low = (nce_shift - shift_high.to(tl.float64)).to(tl.float32)
    largest = tl.full([1], float("-inf"), tl.float32)
    mass = tl.zeros([1], tl.float32)
    total = tl.zeros([WIDTH], tl.float32)
    for block in range(i_split * blocks // splits, (i_split + 1) * blocks // splits):
        o_k = block * BLOCK + tl.arange(0, BLOCK)
        m_k = o_k < count
        row = tl.load(index_ptr + i_b * count + o_k, mask=m_k, other=0)
        exists = (row >= 0) & (row < K)
        b_k = tile(bank_ptr, row, m_k & exists, o_d, bank_stride, D).to(tl.float32)
        if row_scale_ptr is not None:
            b_k = b_k * tl.load(row_scale_ptr + row, mask=m_k & exists, other=0.0)[:, None]
        score = tl.sum(b_k * b_q[None, :], 1)
        score = tl.where(exists, score, float("nan"))
        if NCE:
            u = (score * scale_high - shift_high) + (score * scale_low - shift_low)
            sign = tl.where(o_k == 0, -1.0, 1.0)
            loss, slope = softplus_and_slope(u * sign)
            mass += tl.sum(tl.where(m_k, loss, 0.0), 0)
            weight = tl.where(m_k, slope * sign, 0.0)
        elif z_ptr is not None:
            n = score * scale_high + score * scale_low
            weight = tl.where(m_k & (tl.abs(n) < float("inf")), 1.0, 0.0)
            largest = tl.maximum(largest, 0.0) + tl.sum(weight, 0)
            mass += tl.sum(tl.where(weight > 0, tl.exp(n), 0.0), 0)
        else:
            allowed = m_k
            if query_ids is not None:
                own = tl.load(query_ids + i_b)
                allowed = allowed & (tl.load(bank_ids + row, mask=m_k & exists, other=0) != own)
            n = tl.where(allowed, score * scale_high + score * scale_low, float("-inf"))
            top = tl.maximum(largest, tl.max(n, 0))
            shift = tl.where(top == float("-inf"), 0.0, top)
            shrink = tl.exp(largest - shift)
            weight = tl.exp(n - shift)
            mass = mass * shrink + tl.sum(weight, 0)
            total = total * shrink
            largest = top
        if UNIT_GRAD:
            total += tl.sum(b_k * weight[:, None], 0)
    o_out = i_split * B + i_b
    one = tl.arange(0, 1)
    tl.store(mass_ptr + o_out + one, mass * share if NCE else mass)
    if not NCE:
        tl.store(largest_ptr + o_out + one, largest)
    if UNIT_GRAD:
        tl.store(sum_ptr + o_out * D + o_d, total * (scale_high * share) if NCE else total, mask=o_d < D)


@triton.jit
def merge_kernel(
    q_ptr, positive_ptr, inverse_ptr, largest_ptr, mass_ptr, sum_ptr, loss_ptr, weight_ptr, lse_ptr, unit_grad_ptr,
    B, D, q_stride, positive_stride, splits,
    UNIT_GRAD: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One query and WIDTH columns: merges its splits in order, then writes loss, w, lse and unit_grad."""
    i_b, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDTH
    products = tl.zeros([WIDTH], tl.float32)
    for start in range(0, D, WIDTH):
        o_d = start + tl.arange(0, WIDTH)
        b_q = tl.load(q_ptr + i_b * q_stride + o_d, mask=o_d < D, other=0.0).to(tl.float32)
        products += b_q * tl.load(positive_ptr + i_b * positive_stride + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    p = tl.sum(products, 0) * tl.load(inverse_ptr).to(tl.float32)
    tops = tl.full([SPLITS], float("-inf"), tl.float32)
    for start in range(0, splits, SPLITS):
        o_s = start + tl.arange(0, SPLITS)
        tops = tl.maximum(tops, tl.load(largest_ptr + o_s * B + i_b, mask=o_s < splits, other=float("-inf")))
    largest = tl.max(tops, 0)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    masses = tl.zeros([SPLITS], tl.float32)
    mean = tl.zeros([WIDTH], tl.float32)
    o_d = first + tl.arange(0, WIDTH)
    for start in range(0, splits, SPLITS):
        o_s = start + tl.arange(0, SPLITS)
        m_s, o_in = o_s < splits, o_s.to(tl.int64) * B + i_b
        factor = tl.exp(tl.load(largest_ptr + o_in, mask=m_s, other=float("-inf")) - shift)
        masses += factor * tl.load(mass_ptr + o_in, mask=m_s, other=0.0)
        if UNIT_GRAD:
            b_sum = tl.load(
                sum_ptr + (o_in * D)[:, None] + o_d[None, :], mask=m_s[:, None] & (o_d < D)[None, :], other=0.0
            )
            mean += tl.sum(factor[:, None] * b_sum, 0)
    mass = tl.sum(masses, 0) + p * 0.0
    lse = largest + tl.log(mass)
    loss, weight = softplus_and_slope(tl.where(mass == 0, -1e30, lse - p))  # without a negative the loss is 0
    if first == 0:
        tl.store(loss_ptr + i_b, loss)
        tl.store(weight_ptr + i_b, weight)
        tl.store(lse_ptr + i_b, lse)
    if UNIT_GRAD:
        mean = mean / tl.where(mass == 0, 1.0, mass)
        b_p = tl.load(positive_ptr + i_b * positive_stride + o_d, mask=o_d < D, other=0.0).to(tl.float32)
        tl.store(unit_grad_ptr + i_b * D + o_d, weight * (mean - b_p), mask=o_d < D)


def how(query: Tensor, bank: Tensor) -> int:
    if bank.dtype == torch.float32:
        return FULL
    if bank.dtype.itemsize == 1:
        return SAME if query.dtype == torch.bfloat16 else SPLIT
    if query.dtype == bank.dtype:
        return SAME
    return SPLIT if query.dtype == torch.float32 and bank.dtype == torch.bfloat16 else FULL


def geometry(queries: int, width: int, limit: int = CHUNKS) -> dict:
    """Tiles and launch options of shared_kernel, which sums up to `limit` chunks. tl.dot needs at least 16 on every side."""
    chunk = min(max(triton.next_power_of_2(width), 16), 128)
    block = min(max(triton.next_power_of_2(queries), 16), FEW)
    chunks = triton.cdiv(width, chunk)
    return {"WIDTH": chunk, "CHUNKS": triton.cdiv(chunks, triton.cdiv(chunks, limit)), "INNER": min(chunk, 64),
            "BLOCK_B": block, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3}  # fmt: skip


def most_chunks(query: Tensor, bank: Tensor) -> int:
    """How many chunks fit into registers: fewer before sm_90, and one where loads are not of 16 bytes."""
    if any(n % 16 for x in (query, bank) for n in (*x.stride()[:-1], x.shape[-1])):
        return 1
    return CHUNKS if not bank.is_cuda or torch.cuda.get_device_capability(bank.device)[0] >= 9 else 2


@functools.cache
def gathered_geometry(width: int, as_bytes: bool = False) -> dict:
    """A block has about 4096 elements, or 2048 bytes of float8."""
    chunk = triton.next_power_of_2(max(width, 16))
    rows = (2048 if as_bytes else 4096) // chunk
    return {"WIDTH": chunk, "BLOCK": min(max(rows, 1), 64), "num_warps": 4 if chunk <= 4096 else 16}


def _readable(bank: Tensor) -> Tensor:
    """The bank with contiguous rows; float8 as bytes if the chip (or the interpreter) does not convert it."""
    bank = contiguous_rows(bank)
    if bank.dtype != torch.float8_e4m3fn or (bank.is_cuda and torch.cuda.get_device_capability(bank.device) >= (8, 9)):
        return bank
    return bank.view(torch.uint8)


class Partials(NamedTuple):
    """What the splits leave: maxima and sums of exponentials [S, B], weighted sums of rows [S, B, D]."""

    largest: Tensor
    mass: Tensor
    sums: Tensor | None


def empty_partials(query: Tensor, splits: int, gradient_in_forward: bool) -> Partials:
    B, D = query.shape
    empty = lambda *shape: torch.empty(shape, dtype=torch.float32, device=query.device)  # noqa: E731
    splits = max(splits, 1)
    return Partials(empty(splits, B), empty(splits, B), empty(splits, B, D) if gradient_in_forward else None)


def info_nce_fwd(
    query: Tensor, positive: Tensor, bank: Tensor, index: Tensor | None, inverse_temperature: Tensor,
    query_ids: Tensor | None, bank_ids: Tensor | None, gradient_in_forward: bool, scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (B, D), query, positive, bank = query.shape, contiguous_rows(query), contiguous_rows(positive), _readable(bank)
    (query_ids, bank_ids, scale), K = map(contiguous_rows, (query_ids, bank_ids, scale)), bank.shape[0]
    loss, weight, lse = (torch.empty(B, dtype=torch.float32, device=query.device) for _ in range(3))
    unit_grad = torch.empty((B if gradient_in_forward else 0, D), dtype=torch.float32, device=query.device)
    if B == 0:
        return loss, unit_grad, weight, lse
    form, ids = how(query, bank), (query_ids, bank_ids)
    if index is not None:
        parts = gathered(query, bank, scale, index, inverse_temperature, gradient_in_forward, ids=ids)
    elif form == FULL or B > FEW:
        parts = Partials(*tiles.forward(query, bank, scale, inverse_temperature, *ids, form, gradient_in_forward))
    else:
        q = tiles.parts(query, torch.bfloat16, 3) if form == SPLIT else query[None]
        launch = geometry(B, D, most_chunks(q, bank))
        blocks = triton.cdiv(K, launch["BLOCK_K"])
        groups = triton.cdiv(D, launch["WIDTH"] * launch["CHUNKS"]) if gradient_in_forward else 1
        parts = empty_partials(query, min(blocks, PROGRAMS // 4 // groups), gradient_in_forward)
        splits = len(parts.largest)
        shared_kernel[(splits, triton.cdiv(B, launch["BLOCK_B"]), groups)](
            q, bank, scale, inverse_temperature, query_ids, bank_ids, *parts, B, K, D,
            q.stride(0), q.stride(1), bank.stride(0), blocks, splits, PARTS=len(q), UNIT_GRAD=gradient_in_forward, **launch,
        )  # fmt: skip
    columns = min(triton.next_power_of_2(D), 256)
    merge_kernel[(B, triton.cdiv(D, columns) if gradient_in_forward else 1)](
        query, positive, inverse_temperature, *parts, loss, weight, lse, unit_grad,
        B, D, query.stride(0), positive.stride(0), len(parts.largest),
        UNIT_GRAD=gradient_in_forward, WIDTH=columns, SPLITS=16, num_warps=4,
    )  # fmt: skip
    return loss, unit_grad, weight, lse


def gathered(
    query, bank, row_scale, index, scale, gradient_in_forward, shift=None, z=None, ids=(None, None), share=1.0
) -> Partials:
    (B, D), index, count = query.shape, index.contiguous(), index.shape[1]
    launch = gathered_geometry(D, bank.dtype == torch.uint8)
    blocks = -(-count // launch["BLOCK"])
    parts = empty_partials(query, min(blocks, PROGRAMS // B), gradient_in_forward)
    splits = len(parts.largest)
    gathered_kernel[(splits * B,)](
        query, bank, row_scale, index, scale, shift, z, *ids, *parts,
        B, bank.shape[0], D, count, query.stride(0), bank.stride(0), share, blocks, splits,
        NCE=shift is not None, UNIT_GRAD=gradient_in_forward, **launch,
    )  # fmt: skip
    return parts


def info_nce_bank_bwd(
    query: Tensor, bank: Tensor, inverse_temperature: Tensor, query_ids: Tensor | None, bank_ids: Tensor | None,
    lse: Tensor, coefficient: Tensor,
) -> Tensor:  # fmt: skip
    query, bank = contiguous_rows(query), contiguous_rows(bank)
    rest = contiguous_rows(query_ids), contiguous_rows(bank_ids), lse.contiguous(), coefficient.contiguous()
    return tiles.bank_gradient(query, bank, inverse_temperature, *rest, how(query, bank))
