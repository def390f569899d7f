"""What several stems need of a block of rows: tensors as the kernels read them, the library's products, where a row of logits
[N, V] begins and which of its blocks lie entirely inside it; and series for arguments near 0, where the plain expression would
cancel."""

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


def contiguous_rows(x: Tensor | None) -> Tensor | None:
    """x with its last dimension contiguous: a copy if it is not. Rows may lie anywhere."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def mask_bytes(mask: Tensor | None) -> Tensor | None:
    """A mask as contiguous bytes."""
    return None if mask is None else mask.contiguous().view(torch.uint8)


# An accumulated product that keeps float32 sums of half-precision factors, where torch has it.
_ADDS = hasattr(torch.ops.aten.addmm, "dtype_out")


def multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out (float32) = a b, or out += a b. The library's float32 sums are not rounded on the way."""
    if a.dtype != b.dtype:
        a, b = a.float(), b.float()
    if a.dtype == torch.float32 or a.device.type == "cpu":  # in the interpreter
        out.addmm_(a.float(), b.float(), beta=1.0 if add else 0.0)
    elif not add:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    elif _ADDS:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        out += torch.mm(a, b, out_dtype=torch.float32)


class Row(NamedTuple):
    """A row of both logits: where to read from, and the first column there and the end of the columns."""

    s_ptr: tl.tensor
    t_ptr: tl.tensor
    head: tl.tensor
    end: tl.tensor


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """x in this dtype, rounded to nearest; the interpreter would cut bfloat16 off."""
    if INTERPRET and dtype == tl.bfloat16:
        x = ((x.to(tl.int32, bitcast=True) + 0x8000) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def is_masked(mask_ptr, i_n):
    """Whether row i_n is masked."""
    return False if mask_ptr is None else tl.load(mask_ptr + i_n) == 0


@triton.jit
def row_of(s_ptr, t_ptr, i_n, s_stride, t_stride, V, ALIGN: tl.constexpr):
    """Row i_n, read from the last multiple of ALIGN before it."""
    head = (i_n * s_stride % ALIGN).to(tl.int32)
    return Row(s_ptr + i_n * s_stride // ALIGN * ALIGN, t_ptr + i_n * t_stride // ALIGN * ALIGN, head, head + V)


@triton.jit
def load_pair(row, start, BLOCK: tl.constexpr, INSIDE: tl.constexpr):
    """One block of both rows as float32; -inf, which is probability 0, outside the row, unless the block is INSIDE it."""
    o_v = start + tl.arange(0, BLOCK)
    if INSIDE:
        b_s = tl.load(row.s_ptr + o_v).to(tl.float32)  # [BLOCK]
        b_t = tl.load(row.t_ptr + o_v).to(tl.float32)
    else:
        m_v = (o_v >= row.head) & (o_v < row.end)
        b_s = tl.where(m_v, tl.load(row.s_ptr + o_v, mask=m_v, other=0.0).to(tl.float32), float("-inf"))
        b_t = tl.where(m_v, tl.load(row.t_ptr + o_v, mask=m_v, other=0.0).to(tl.float32), float("-inf"))
    return b_s, b_t


@triton.jit
def blocks_inside(row, BLOCK: tl.constexpr):
    """Beginning and end of the blocks that lie entirely inside the row."""
    return tl.where(row.head > 0, BLOCK, 0), row.end // BLOCK * BLOCK


@triton.jit
def edge_blocks(row, BLOCK: tl.constexpr):
    """range() over the blocks that do not: at most the row's first and its last."""
    last = row.end // BLOCK * BLOCK
    return tl.where(row.head > 0, 0, last), tl.where(row.end > last, last + 1, last), tl.maximum(last, 1)


@triton.jit
def maxima(row, stop, BLOCK: tl.constexpr):
    """The maximum of each side up to `stop`; 0 where all are -inf."""
    top_s = tl.full([BLOCK], float("-inf"), tl.float32)
    top_t = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, stop, BLOCK):
        b_s, b_t = load_pair(Row(row.s_ptr, row.t_ptr, row.head, stop), start, BLOCK, False)
        top_s, top_t = tl.maximum(top_s, b_s), tl.maximum(top_t, b_t)
    best_s, best_t = tl.max(top_s, 0), tl.max(top_t, 0)
    return tl.where(best_s > float("-inf"), best_s, 0.0), tl.where(best_t > float("-inf"), best_t, 0.0)


@triton.jit
def phi(x):
    """expm1(x) - x for |x| < 1/2, with a relative error of 4e-8: near 1/2 + x / 6 + x² / 24 + ..., but best over all such x."""
    y = tl.fma(x, 1.986335264518857e-4, 1.3975331094115973e-3)
    y = tl.fma(y, x, 8.33347998559475e-3)
    y = tl.fma(y, x, 4.1666001081466675e-2)
    y = tl.fma(y, x, 1.666666567325592e-1)
    return x * x * tl.fma(y, x, 1 / 2)


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
