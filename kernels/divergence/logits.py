"""divergence between two sets of logits [N, V]: the kernels of the forward and of the backward. kernels/divergence/row.py has the
maths."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..blocks import contiguous_rows, is_masked, load_pair, row_of
from .row import FORWARD_KL, MSE, compare, exact_differences, gradient, load_stats, second_pass, squares, store_stats


@triton.jit
def forward_kernel(
    s_ptr, t_ptr, mask_ptr, values_ptr, stats_ptr, s_stride, t_stride, V, inv_T, mix, rest,
    KIND: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program per row."""
    i_n = tl.program_id(0).to(tl.int64)
    if is_masked(mask_ptr, i_n):
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
def backward_kernel(
    g_ptr, s_ptr, t_ptr, mask_ptr, stats_ptr, grad_ptr, g_stride, s_stride, t_stride, V, blocks, inv_T, mix, rest,
    KIND: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per block of a row; the last come first, since the forward ended with them."""
    i = tl.num_programs(0) - 1 - tl.program_id(0)
    i_n, start = (i // blocks).to(tl.int64), i % blocks * BLOCK
    row = row_of(s_ptr, t_ptr, i_n, s_stride, t_stride, V, ALIGN)
    o_v = start + tl.arange(0, BLOCK)
    m_v = (o_v >= row.head) & (o_v < row.end)
    grad_ptr += i_n * V // ALIGN * ALIGN + o_v
    if is_masked(mask_ptr, i_n):
        tl.store(grad_ptr, tl.zeros([BLOCK], grad_ptr.dtype.element_ty), mask=m_v)
        return
    g = tl.load(g_ptr + i_n * g_stride).to(tl.float32)
    stats_ptr += 7 * i_n
    EXACT: tl.constexpr = exact_differences(s_ptr.dtype.element_ty, t_ptr.dtype.element_ty)
    if (start >= row.head) & (start + BLOCK <= row.end):
        b_s, b_t = load_pair(row, start, BLOCK, True)
        grad = gradient(b_s, b_t, g, load_stats(stats_ptr), inv_T, (mix, rest), KIND, EXACT)
        tl.store(grad_ptr, grad.to(grad_ptr.dtype.element_ty))
    else:
        b_s, b_t = load_pair(row, start, BLOCK, False)
        grad = gradient(b_s, b_t, g, load_stats(stats_ptr), inv_T, (mix, rest), KIND, EXACT)
        tl.store(grad_ptr, grad.to(grad_ptr.dtype.element_ty), mask=m_v)


@triton.jit
def shard_kernel(
    s_ptr, t_ptr, stats_ptr, terms_ptr, s_stride, t_stride, V, inv_T, mix, rest,
    KIND: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program per row, whose statistics are those of a longer row that these columns are a part of."""
    i_n = tl.program_id(0).to(tl.int64)
    row = row_of(s_ptr, t_ptr, i_n, s_stride, t_stride, V, ALIGN)
    EXACT: tl.constexpr = exact_differences(s_ptr.dtype.element_ty, t_ptr.dtype.element_ty)
    terms = second_pass(row, load_stats(stats_ptr + 7 * i_n), inv_T, (mix, rest), KIND, EXACT, BLOCK, STAGES)
    tl.store(terms_ptr + 3 * i_n, terms.value)
    tl.store(terms_ptr + 3 * i_n + 1, terms.mass)
    tl.store(terms_ptr + 3 * i_n + 2, terms.slope)


# Bytes of local memory a thread may use, whatever the kind, dtype and chip: tests/ops/test_triton.py asserts it. Only the
# forward of skew_kl on short float32 rows needs any, between the two passes and outside both loops, so that a fifth program
# fits on a multiprocessor.
SPILL_LIMIT = {"forward_kernel": 8, "backward_kernel": 0, "shard_kernel": 0}

# Columns of a row per step and warps of a program, forward and backward, by the width of the row. 8 and 16 columns a thread
# keep the sums in registers, with two programs or more on a multiprocessor: some versions of Triton need maxnreg for it.
SMALL = {"BLOCK": 1024, "STAGES": 1, "num_warps": 4}, {"BLOCK": 1024, "num_warps": 4}
LARGE = {"BLOCK": 2048, "STAGES": 3, "num_warps": 8, "maxnreg": 128}, {"BLOCK": 4096, "num_warps": 8}
# forward_kl keeps the fewest numbers: with 16 columns a thread, read 16 bytes at a time, its programs reduce half as often.
LONGER = {"num_warps": 4, "maxnreg": 160}


def geometry(s: Tensor, t: Tensor, kind: int | None = None) -> tuple[dict, dict, int]:
    """Launch options of the forward (a program per row) and of the backward (a program per block of a row), and blocks.

    Rows of 30522 or 50257 tokens begin at any element. Where student, teacher and gradient do so alike, programs begin up to
    7 elements earlier, so that every block inside a row is read and written 16 bytes at a time.
    """
    V = s.shape[1]
    return launch_options(V, (s.stride(0) - V) % 8 == 0 and (t.stride(0) - V) % 8 == 0, kind)


@functools.cache
def launch_options(V: int, alike: bool, kind: int | None) -> tuple[dict, dict, int]:
    forward, backward = SMALL if V <= 1024 else LARGE
    if alike and V > 1024 and kind == FORWARD_KL.value:
        forward = forward | LONGER
    align = 8 if alike else 1
    common = {"ALIGN": align, "enable_fp_fusion": True}
    return {**forward, **common}, {**backward, **common}, -(-(V + align - 1) // backward["BLOCK"])


def divergence_fwd(
    s: Tensor, t: Tensor, mask: Tensor | None, kind: int, temperature: float, mix: float
) -> tuple[Tensor, Tensor]:
    """s, t [N, V], mask [N] -> values [N], stats [N, 7]."""
    N, V = s.shape
    s, t, mask = contiguous_rows(s), contiguous_rows(t), contiguous_rows(mask)
    values, stats = (s.new_empty(shape, dtype=torch.float32) for shape in ((N,), (N, 7)))
    if N:
        options, _, _ = geometry(s, t, kind)
        forward_kernel[(N,)](
            s, t, mask, values, stats, s.stride(0), t.stride(0), V,
            1 / temperature, mix, 1 - mix, KIND=kind, **options,
        )  # fmt: skip
    return values, stats


def divergence_bwd(
    grad: Tensor, s: Tensor, t: Tensor, mask: Tensor | None, stats: Tensor, kind: int, temperature: float, mix: float
) -> Tensor:
    """grad [N] -> the gradient of s [N, V]."""
    N, V = s.shape
    s, t, mask = contiguous_rows(s), contiguous_rows(t), contiguous_rows(mask)
    out = torch.empty_like(s, memory_format=torch.contiguous_format)
    if N:
        _, options, blocks = geometry(s, t)
        backward_kernel[(N * blocks,)](
            grad, s, t, mask, stats, out, grad.stride(0), s.stride(0), t.stride(0),
            V, blocks, 1 / temperature, mix, 1 - mix, KIND=kind, **options,
        )  # fmt: skip
    return out


def divergence_shard_terms(s: Tensor, t: Tensor, stats: Tensor, kind: int, temperature: float, mix: float) -> Tensor:
    """s, t [N, V] of a shard, stats [N, 7] of whole rows -> [N, 3], the shard's sums of the value, of q and of q (h - centre)."""
    N, V = s.shape
    s, t, stats = contiguous_rows(s), contiguous_rows(t), stats.contiguous()
    terms = s.new_empty(N, 3, dtype=torch.float32)
    if N:
        options, _, _ = geometry(s, t)
        shard_kernel[(N,)](
            s, t, stats, terms, s.stride(0), t.stride(0), V, 1 / temperature, mix, 1 - mix, KIND=kind, **options
        )
    return terms.double()


def divergence_log_sum_exp(x: Tensor, temperature: float) -> Tensor:
    """[N, V] -> [N] in float64."""
    return (x.double() / temperature).logsumexp(-1)
