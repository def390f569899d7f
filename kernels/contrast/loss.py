"""A query against its positive and K negatives out of a bank: InfoNCE and NCE, loss and gradient in one read of the bank.

The maths. n_k = <q, bank_k> / T, p = <q, positive> / T. InfoNCE is attention with K = V = bank:

    lse = log sum_k e^n_k,   loss = softplus(lse - p),   w = sigmoid(lse - p),
    unit_grad = w (sum_k e^(n_k - lse) bank_k - positive) = T · d loss / d q,   d loss / d bank_k = w e^(n_k - lse) q / T.

NCE, where `shift` is everything that is subtracted from a score: u = <q, n> / T - shift,

    loss = softplus(-u_0) + sum_k softplus(u_k),   unit_grad = (sum_k sigmoid(u_k) bank_k - sigmoid(-u_0) bank_0) / T.

Saved: `unit_grad`, so that the backward need not read a bank without a gradient again; per query w and, for a trained bank, lse.

The passes. The bank (or a query's row of the index) is split among programs; each reads its blocks once with a running
maximum and leaves (maximum, sum, weighted sum of rows) per query. A second kernel merges the splits in order. Their number
depends on sizes alone, so two runs are equal bit for bit. Nothing of size B x K is stored.

If query and bank have the same half precision, the products run on tensor cores in it. A float32 query against a bfloat16
bank is split into a high and a low part there, and so are its weights. Everything else is float32 without tf32. A row wider
than a program has registers for goes in chunks: each program sums one of them, but reads them all for its scores.

Rows with a scale: n_k and the weight of bank_k in unit_grad are multiplied by it, rows are not. float8 e4m3 rows become
bfloat16, exactly, once they are read, so a float16 query is split as well. Chips before sm_89 cannot convert them: there
they are read as bytes, whose bits are moved into place.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..blocks import contiguous_rows

FULL, SAME, SPLIT = 0, 1, 2  # how a product is formed
WIDEST = (64, 256, 128)  # columns that a program sums, by how its products are formed; wider rows go in chunks
PROGRAMS = 528  # 4 on each of an H200's 132 multiprocessors
TWO_TO_120 = tl.constexpr(1329227995784915872903807060280344576.0)
# Bytes of local memory a thread may use, over every width, dtype and chip.
SPILL_LIMIT = {"shared_kernel": 24, "bank_kernel": 8, "gathered_kernel": 16, "merge_kernel": 0}


@triton.jit
def product(a, b, total, HOW: tl.constexpr):
    """total + a @ b, where b has the dtype of the bank."""
    if HOW == 0:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    high = a.to(b.dtype)
    if HOW == 2:
        total = tl.dot((a - high.to(tl.float32)).to(b.dtype), b, total)
    return tl.dot(high, b, total)


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
    q_ptr, bank_ptr, row_scale_ptr, inverse_ptr, query_ids, bank_ids, o_b, m_b, o_k, m_k, q_stride, bank_stride, D,
    HOW: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """n [BLOCK_B, BLOCK_K]; -inf at keys that do not exist or are excluded."""
    total = tl.zeros([o_b.shape[0], o_k.shape[0]], tl.float32)
    for start in range(0, D, INNER):
        o_d = start + tl.arange(0, INNER)
        b_q = tile(q_ptr, o_b, m_b, o_d, q_stride, D)
        b_k = tile(bank_ptr, o_k, m_k, o_d, bank_stride, D)
        total = product(b_q, tl.trans(b_k), total, HOW)
    if row_scale_ptr is not None:
        total = total * tl.load(row_scale_ptr + o_k, mask=m_k, other=0.0)[None, :]
    allowed = m_k[None, :]
    if query_ids is not None:
        own = tl.load(query_ids + o_b, mask=m_b, other=0)
        allowed = allowed & (own[:, None] != tl.load(bank_ids + o_k, mask=m_k, other=0)[None, :])
    return tl.where(allowed, total * tl.load(inverse_ptr).to(tl.float32), float("-inf"))


@triton.jit
def shared_kernel(
    q_ptr, bank_ptr, row_scale_ptr, inverse_ptr, query_ids, bank_ids, largest_ptr, mass_ptr, sum_ptr, B, K, D,
    q_stride, bank_stride, blocks, splits,
    HOW: tl.constexpr, UNIT_GRAD: tl.constexpr, INNER: tl.constexpr, WIDTH: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A block of queries against one split of the bank; the weighted sum of one chunk of columns."""
    i_split, i_b, i_chunk = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    o_b = i_b * BLOCK_B + tl.arange(0, BLOCK_B)
    m_b = o_b < B
    o_d = i_chunk * WIDTH + tl.arange(0, WIDTH)
    largest = tl.full([BLOCK_B], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_B], tl.float32)
    total = tl.zeros([BLOCK_B, WIDTH], tl.float32)
    for block in range(i_split * blocks // splits, (i_split + 1) * blocks // splits):
        o_k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        m_k = o_k < K
        n = scores_of(
            q_ptr, bank_ptr, row_scale_ptr, inverse_ptr, query_ids, bank_ids, o_b, m_b, o_k, m_k, q_stride,
            bank_stride, D, HOW, INNER,
        )  # fmt: skip
        top = tl.maximum(largest, tl.max(n, 1))
        shift = tl.where(top == float("-inf"), 0.0, top)
        shrink = tl.exp(largest - shift)
        weight = tl.exp(n - shift[:, None])
        mass = mass * shrink + tl.sum(weight, 1)
        largest = top
        if UNIT_GRAD:
            if row_scale_ptr is not None:
                weight = weight * tl.load(row_scale_ptr + o_k, mask=m_k, other=0.0)[None, :]
            b_k = tile(bank_ptr, o_k, m_k, o_d, bank_stride, D)
            total = product(weight, b_k, total * shrink[:, None], HOW)
    o_out = i_split * B + o_b
    if i_chunk == 0:
        tl.store(largest_ptr + o_out, largest, mask=m_b)
        tl.store(mass_ptr + o_out, mass, mask=m_b)
    if UNIT_GRAD:
        tl.store(sum_ptr + o_out[:, None] * D + o_d[None, :], total, mask=m_b[:, None] & (o_d < D)[None, :])


@triton.jit
def bank_kernel(
    q_ptr, bank_ptr, inverse_ptr, query_ids, bank_ids, lse_ptr, factor_ptr, grad_ptr, B, K, D, q_stride, bank_stride,
    HOW: tl.constexpr, INNER: tl.constexpr, WIDTH: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of the bank, one chunk of columns: the sum over the queries, in order."""
    i_k, i_chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = o_k < K
    o_d = i_chunk * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros([BLOCK_K, WIDTH], tl.float32)
    for start in range(0, B, BLOCK_B):
        o_b = start + tl.arange(0, BLOCK_B).to(tl.int64)
        m_b = o_b < B
        n = scores_of(
            q_ptr, bank_ptr, None, inverse_ptr, query_ids, bank_ids, o_b, m_b, o_k, m_k, q_stride, bank_stride, D,
            HOW, INNER,
        )  # fmt: skip
        lse = tl.load(lse_ptr + o_b, mask=m_b, other=0.0)
        factor = tl.load(factor_ptr + o_b, mask=m_b, other=0.0)
        probability = tl.exp(n - tl.where(lse == float("-inf"), 0.0, lse)[:, None])
        weight = tl.where(m_b[:, None], probability * factor[:, None], 0.0)
        b_q = tile(q_ptr, o_b, m_b, o_d, q_stride, D).to(tl.float32)
        total = tl.dot(tl.trans(weight), b_q, total, input_precision="ieee")
    tl.store(grad_ptr + o_k[:, None] * D + o_d[None, :], total, mask=m_k[:, None] & (o_d < D)[None, :])


@triton.jit
def gathered_kernel(
    q_ptr, bank_ptr, row_scale_ptr, index_ptr, scale_ptr, shift_ptr, query_ids, bank_ids, largest_ptr, mass_ptr,
    sum_ptr, B, K, D, count, q_stride, bank_stride, blocks, splits,
    NCE: tl.constexpr, UNIT_GRAD: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One query against one split of the rows that its index names. A row that does not exist makes the loss NaN."""
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
    tl.store(mass_ptr + o_out + one, mass)
    if not NCE:
        tl.store(largest_ptr + o_out + one, largest)
    if UNIT_GRAD:
        tl.store(sum_ptr + o_out * D + o_d, total * scale_high if NCE else total, mask=o_d < D)


@triton.jit
def merge_kernel(
    q_ptr, positive_ptr, inverse_ptr, largest_ptr, mass_ptr, sum_ptr, loss_ptr, weight_ptr, lse_ptr, unit_grad_ptr,
    B, D, q_stride, positive_stride, splits,
    UNIT_GRAD: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One query: merges its splits in order, then writes loss, w, lse and unit_grad."""
    i_b = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, WIDTH)
    m_d = o_d < D
    b_q = tl.load(q_ptr + i_b * q_stride + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_p = tl.load(positive_ptr + i_b * positive_stride + o_d, mask=m_d, other=0.0).to(tl.float32)
    p = tl.sum(b_q * b_p, 0) * tl.load(inverse_ptr).to(tl.float32)
    largest = tl.load(largest_ptr + i_b)
    for i_split in range(1, splits):
        largest = tl.maximum(largest, tl.load(largest_ptr + (i_b + i_split * B)))
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    mass = p * 0.0
    mean = tl.zeros([WIDTH], tl.float32)
    for i_split in range(0, splits):
        o_in = i_b + i_split * B
        factor = tl.exp(tl.load(largest_ptr + o_in) - shift)
        mass += factor * tl.load(mass_ptr + o_in)
        if UNIT_GRAD:
            mean += factor * tl.load(sum_ptr + o_in * D + o_d, mask=m_d, other=0.0)
    lse = largest + tl.log(mass)
    loss, weight = softplus_and_slope(tl.where(mass == 0, -1e30, lse - p))  # without a negative the loss is 0
    tl.store(loss_ptr + i_b, loss)
    tl.store(weight_ptr + i_b, weight)
    tl.store(lse_ptr + i_b, lse)
    if UNIT_GRAD:
        mean = mean / tl.where(mass == 0, 1.0, mass)
        tl.store(unit_grad_ptr + i_b * D + o_d, weight * (mean - b_p), mask=m_d)


def how(query: Tensor, bank: Tensor) -> int:
    if query.device.type == "cpu" or bank.dtype == torch.float32:  # the interpreter's dot is wrong in bfloat16
        return FULL
    if bank.dtype.itemsize == 1:
        return SAME if query.dtype == torch.bfloat16 else SPLIT
    if query.dtype == bank.dtype:
        return SAME
    return SPLIT if query.dtype == torch.float32 and bank.dtype == torch.bfloat16 else FULL


def geometry(queries: int, width: int, form: int, as_bytes: bool = False) -> dict:
    """Tiles and launch options of shared_kernel and bank_kernel. tl.dot needs at least 16 on every side. Tiles are as large
    as registers allow: float32 products have their operands there, tensor cores read them from shared memory, but bytes
    pass through registers on their way."""
    full = form == FULL
    chunk = min(max(triton.next_power_of_2(width), 16), WIDEST[form])
    block = min(max(triton.next_power_of_2(queries), 16), 64 if form == SAME else 32)
    return {"WIDTH": chunk, "INNER": min(chunk, 32 if full else 64), "BLOCK_B": block, "BLOCK_K": 32 if full or as_bytes else 64,
            "num_warps": 4 if full else 8, "num_stages": 2}  # fmt: skip


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


class Partials:
    """What the splits leave: maxima and sums of exponentials [S, B], weighted sums of rows [S, B, D]."""

    def __init__(self, query: Tensor, blocks: int, others: int, gradient_in_forward: bool):
        B, D = query.shape
        self.splits = max(min(blocks, PROGRAMS // max(others, 1)), 1)
        empty = lambda *shape: torch.empty(shape, dtype=torch.float32, device=query.device)  # noqa: E731
        self.largest, self.mass = empty(self.splits, B), empty(self.splits, B)
        self.sums = empty(self.splits, B, D) if gradient_in_forward else None


def info_nce_fwd(
    query: Tensor, positive: Tensor, bank: Tensor, index: Tensor | None, inverse_temperature: Tensor,
    query_ids: Tensor | None, bank_ids: Tensor | None, gradient_in_forward: bool, scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (B, D), query, positive, bank = query.shape, contiguous_rows(query), contiguous_rows(positive), _readable(bank)
    query_ids, bank_ids, scale, K = (
        contiguous_rows(query_ids),
        contiguous_rows(bank_ids),
        contiguous_rows(scale),
        bank.shape[0],
    )
    loss, weight, lse = (torch.empty(B, dtype=torch.float32, device=query.device) for _ in range(3))
    unit_grad = torch.empty((B if gradient_in_forward else 0, D), dtype=torch.float32, device=query.device)
    if B == 0:
        return loss, unit_grad, weight, lse
    if index is None:
        form = how(query, bank)
        launch = geometry(B, D, form, bank.dtype == torch.uint8)
        blocks, rows = triton.cdiv(K, launch["BLOCK_K"]), triton.cdiv(B, launch["BLOCK_B"])
        chunks = triton.cdiv(D, launch["WIDTH"]) if gradient_in_forward else 1
        parts = Partials(query, blocks, rows * chunks, gradient_in_forward)
        shared_kernel[(parts.splits, rows, chunks)](
            query, bank, scale, inverse_temperature, query_ids, bank_ids, parts.largest, parts.mass, parts.sums,
            B, K, D, query.stride(0), bank.stride(0), blocks, parts.splits,
            HOW=form, UNIT_GRAD=gradient_in_forward, **launch,
        )  # fmt: skip
    else:
        parts = _gathered(
            query, bank, scale, index, inverse_temperature, None, query_ids, bank_ids, gradient_in_forward
        )
    merge_kernel[(B,)](
        query, positive, inverse_temperature, parts.largest, parts.mass, parts.sums, loss, weight, lse, unit_grad,
        B, D, query.stride(0), positive.stride(0), parts.splits,
        UNIT_GRAD=gradient_in_forward, WIDTH=triton.next_power_of_2(D), num_warps=4,
    )  # fmt: skip
    return loss, unit_grad, weight, lse


def _gathered(query, bank, row_scale, index, scale, shift, query_ids, bank_ids, gradient_in_forward) -> Partials:
    (B, D), index, count = query.shape, index.contiguous(), index.shape[1]
    launch = gathered_geometry(D, bank.dtype == torch.uint8)
    blocks = triton.cdiv(count, launch["BLOCK"])
    parts = Partials(query, blocks, B, gradient_in_forward)
    gathered_kernel[(parts.splits * B,)](
        query, bank, row_scale, index, scale, shift, query_ids, bank_ids, parts.largest, parts.mass, parts.sums,
        B, bank.shape[0], D, count, query.stride(0), bank.stride(0), blocks, parts.splits,
        NCE=shift is not None, UNIT_GRAD=gradient_in_forward, **launch,
    )  # fmt: skip
    return parts


def info_nce_bank_bwd(
    query: Tensor, bank: Tensor, inverse_temperature: Tensor, query_ids: Tensor | None, bank_ids: Tensor | None,
    lse: Tensor, coefficient: Tensor,
) -> Tensor:  # fmt: skip
    (B, D), K, query, bank = query.shape, bank.shape[0], contiguous_rows(query), contiguous_rows(bank)
    grad = torch.empty((K, D), dtype=torch.float32, device=bank.device)
    form = how(query, bank)
    launch = geometry(B, D, FULL)  # the second product is in float32 whatever the bank is
    chunks = triton.cdiv(D, launch["WIDTH"])
    if K:
        bank_kernel[(triton.cdiv(K, launch["BLOCK_K"]), chunks)](
            query, bank, inverse_temperature, contiguous_rows(query_ids), contiguous_rows(bank_ids), lse.contiguous(),
            coefficient.contiguous(), grad, B, K, D, query.stride(0), bank.stride(0), HOW=form, **launch,
        )  # fmt: skip
    return grad


def nce_fwd(
    query: Tensor, bank: Tensor, index: Tensor, shift: Tensor, temperature: float, gradient_in_forward: bool,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    query, bank, row_scale = contiguous_rows(query), _readable(bank), contiguous_rows(scale)
    if query.shape[0] == 0:
        empty = query.new_empty(query.shape, dtype=torch.float32)
        return empty.sum(1), empty
    inverse = torch.full((), 1 / temperature, dtype=torch.float64, device=query.device)
    parts = _gathered(query, bank, row_scale, index, inverse, shift, None, None, gradient_in_forward)
    unit_grad = parts.sums.sum(0) if gradient_in_forward else query.new_empty((0, query.shape[1]), dtype=torch.float32)
    return parts.mass.sum(0), unit_grad
