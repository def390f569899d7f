"""KL(teacher || student) between softmaxed relations, one number per query, computed as in flash attention, without V.

The maths. s and t are a query's scores x yᵀ scale of student and teacher. With running maxima and c = (s - max s) - (t - max t),
which is small and exact where student and teacher are close,

    a = e^(t - max t),   l = sum a,   X = sum a expm1(c),   A = sum a (expm1(c) - c),   E = X / l,   kappa = log1p(E):
    KL = A / l - (E - log1p(E)):   each term >= 0, nothing cancels as the student nears the teacher;
    q - p = p expm1(c - kappa) = dKL/ds,   W = g (q - p),   dx = scale W y,   dy = scale Wᵀ x.

Where |c| < 1/2 everything is built on expm1(c) by its series. When a block moves the maxima by m_t and m_s, c moves by
e = m_t - m_s; with alpha = e^-m_t and beta = e^-m_s, alpha expm1(e) = beta - alpha, and

    A <- alpha A + (beta - alpha) X + (beta - alpha - alpha e) l,   X <- beta X + (beta - alpha) l,   l <- alpha l.

Where |E| >= 1/2 the student has a sum of its own, S = sum e^(s - max s), since X has lost the digits of the smaller one:
KL = kappa - sum a c / l with kappa = log(S / l), and sum a c moves to alpha (sum a c + e l).

Forward: a program owns a block of queries, loops over the keys, and saves max t, 1 / l, max s and kappa.
Backward: a program owns a block of rows of x (or y) and loops over the others; both scores are computed again, and W is
never stored. For a relation of x with itself one tile yields W and Wᵀ, for one product with x. No two programs
add to the same number, so the order of every sum is fixed.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import contiguous_rows, logarithms, mask_bytes, phi

NEVER = tl.constexpr(-1e30)  # a masked score: finite, so that the difference of two is a number
WIDEST = 128  # head dimension; fastkd/ops/relation.py leaves wider heads to the reference
# Bytes of stack per thread, of the causal kernels; the forward has 160 on sm_80, 32 on sm_90. 32 of the backward's come from
# rounding scores before they are subtracted, without FP fusion.
SPILL_LIMIT = {"forward_kernel": 160, "backward_kernel": 56}


class Sums(NamedTuple):
    """l, S, X, A and sum a c of the maths."""

    mass: tl.tensor
    student: tl.tensor
    X: tl.tensor
    A: tl.tensor
    cross: tl.tensor


class Stats(NamedTuple):
    """Of queries: the upstream gradient, max t, max s, 1 / sum of exponentials on both sides, and kappa."""

    g: tl.tensor
    max_t: tl.tensor
    max_s: tl.tensor
    per_t: tl.tensor
    per_s: tl.tensor
    kappa: tl.tensor


@triton.jit
def valid_tokens(mask_ptr, b, o_l, L):
    """Which of the tokens exist and are not masked."""
    m_l = o_l < L
    return m_l if mask_ptr is None else m_l & (tl.load(mask_ptr + b * L + o_l, mask=m_l, other=0) != 0)


@triton.jit
def load_rows(x_ptr, strides, b, h, o_l, m_l, D, BLOCK_D: tl.constexpr):
    o_d = tl.arange(0, BLOCK_D)
    at = b * strides[0] + h * strides[1] + o_l.to(tl.int64) * strides[2]
    return tl.load(x_ptr + at[:, None] + o_d[None, :], mask=m_l[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def scores(x, y, scale):
    return tl.dot(x, tl.trans(y), input_precision="ieee") * scale


@triton.jit
def gap_and_excess(a, b, c):
    """b - a and b - a - a c, where b = a e^c, with all their digits where c is small."""
    near = tl.abs(c) < 0.5
    slack = phi(tl.where(near, c, 0.0))
    gap = tl.where(near, a * (c + slack), b - a)
    return gap, tl.where(near, a * slack, tl.fma(-a, c, gap))


@triton.jit
def shifted(b_s, b_t, max_s, max_t):
    """c. b_s - b_t is exact where the sides are close; where they are not, it is rounded at the size of the larger score."""
    offset = max_s - max_t
    return tl.where(tl.abs(offset) < 1, (b_s - b_t) - offset, (b_s - max_s) - (b_t - max_t))


@triton.jit
def move(sums, max_s, max_t, top_s, top_t):
    """The sums relative to new maxima."""
    alpha, beta = tl.exp(max_t - top_t), tl.exp(max_s - top_s)
    c = (top_t - max_t) - (top_s - max_s)
    gap, excess = gap_and_excess(alpha, beta, c)
    X = beta * sums.X + gap * sums.mass
    A = alpha * sums.A + gap * sums.X + excess * sums.mass
    return Sums(alpha * sums.mass, beta * sums.student, X, A, alpha * (sums.cross + c * sums.mass))


@triton.jit
def forward_kernel(
    x_s, y_s, x_t, y_t, strides, mask_ptr, rows_ptr, stats_ptr, H, L, D_s, D_t, scale_s, scale_t,
    CAUSAL: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start, h, b = tl.program_id(0) * BLOCK, tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    pair = b * H + h
    o_i = start + tl.arange(0, BLOCK)
    m_i = valid_tokens(mask_ptr, b, o_i, L)
    b_xs = load_rows(x_s, strides[0], b, h, o_i, m_i, D_s, BLOCK_S)  # [BLOCK, D]
    b_xt = load_rows(x_t, strides[2], b, h, o_i, m_i, D_t, BLOCK_T)
    max_s, max_t = tl.full([BLOCK], NEVER, tl.float32), tl.full([BLOCK], NEVER, tl.float32)
    zeros = tl.zeros([BLOCK], tl.float32)
    sums = Sums(zeros, zeros, zeros, zeros, zeros)
    stop = tl.minimum(start + BLOCK, L) if CAUSAL else L
    for j in range(0, stop, BLOCK):
        o_j = j + tl.arange(0, BLOCK)
        m_j = valid_tokens(mask_ptr, b, o_j, L)
        seen = m_j[None, :] & (o_j[None, :] <= o_i[:, None]) if CAUSAL else m_j[None, :] & m_i[:, None]
        b_t = scores(b_xt, load_rows(y_t, strides[3], b, h, o_j, m_j, D_t, BLOCK_T), scale_t)
        b_s = scores(b_xs, load_rows(y_s, strides[1], b, h, o_j, m_j, D_s, BLOCK_S), scale_s)
        b_t, b_s = tl.where(seen, b_t, NEVER), tl.where(seen, b_s, NEVER)  # [queries, keys]
        top_t, top_s = tl.maximum(max_t, tl.max(b_t, 1)), tl.maximum(max_s, tl.max(b_s, 1))
        sums = move(sums, max_s, max_t, top_s, top_t)
        max_s, max_t = top_s, top_t
        a, e_s = tl.exp(b_t - max_t[:, None]), tl.exp(b_s - max_s[:, None])
        c = shifted(b_s, b_t, max_s[:, None], max_t[:, None])
        gap, excess = gap_and_excess(a, e_s, c)
        sums = Sums(
            sums.mass + tl.sum(a, 1),
            sums.student + tl.sum(e_s, 1),
            sums.X + tl.sum(gap, 1),
            sums.A + tl.sum(excess, 1),
            sums.cross + tl.sum(a * c, 1),
        )
    mass = sums.mass
    near = tl.abs(sums.X) < 0.5 * mass  # else the difference of the sums has lost digits, and is not used
    kappa, excess = logarithms(sums.X / mass, sums.student / mass)
    value = tl.where(near, sums.A / mass - excess, kappa - sums.cross / mass)
    at = pair * L + o_i
    tl.store(rows_ptr + at, tl.where(m_i, value, 0.0), mask=o_i < L)
    at = pair * 4 * L + o_i
    tl.store(stats_ptr + at, max_t, mask=o_i < L)
    tl.store(stats_ptr + at + L, 1.0 / mass, mask=o_i < L)
    tl.store(stats_ptr + at + 2 * L, max_s, mask=o_i < L)
    tl.store(stats_ptr + at + 3 * L, kappa, mask=o_i < L)


@triton.jit
def load_stats(g_ptr, stats_ptr, pair, o_l, m_l, L):
    at = pair * 4 * L + o_l
    g = tl.load(g_ptr + pair * L + o_l, mask=m_l, other=0.0)
    max_t = tl.load(stats_ptr + at, mask=m_l, other=0.0)
    per_t = tl.load(stats_ptr + at + L, mask=m_l, other=1.0)
    max_s = tl.load(stats_ptr + at + 2 * L, mask=m_l, other=0.0)
    kappa = tl.load(stats_ptr + at + 3 * L, mask=m_l, other=0.0)
    return Stats(g, max_t, max_s, per_t, per_t * tl.exp(-kappa), kappa)


@triton.jit
def weights(b_s, b_t, queries, seen):
    """g (q - p), given the statistics of the queries."""
    p = tl.exp(b_t - queries.max_t) * queries.per_t
    c = shifted(b_s, b_t, queries.max_s, queries.max_t) - queries.kappa
    gap, _ = gap_and_excess(p, tl.exp(b_s - queries.max_s) * queries.per_s, c)
    return tl.where(seen, queries.g * gap, 0.0)


@triton.jit
def as_rows(of):
    return Stats(
        of.g[:, None], of.max_t[:, None], of.max_s[:, None], of.per_t[:, None], of.per_s[:, None], of.kappa[:, None]
    )


@triton.jit
def as_columns(of):
    return Stats(
        of.g[None, :], of.max_t[None, :], of.max_s[None, :], of.per_t[None, :], of.per_s[None, :], of.kappa[None, :]
    )


@triton.jit
def backward_kernel(
    own_s, other_s, own_t, other_t, strides, mask_ptr, g_ptr, stats_ptr, out_ptr, H, L, D_s, D_t, scale_s, scale_t,
    CAUSAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS: own are queries and other are keys. COLUMNS: the other way round. Both: x and y are one tensor."""
    start, h, b = tl.program_id(0) * BLOCK, tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    pair = b * H + h
    o_i = start + tl.arange(0, BLOCK)
    m_i = valid_tokens(mask_ptr, b, o_i, L)
    b_own_s = load_rows(own_s, strides[0], b, h, o_i, m_i, D_s, BLOCK_S)  # [BLOCK, D]
    b_own_t = load_rows(own_t, strides[2], b, h, o_i, m_i, D_t, BLOCK_T)
    if ROWS:
        of_own = load_stats(g_ptr, stats_ptr, pair, o_i, m_i, L)
    pulled = tl.zeros([BLOCK, BLOCK_S], tl.float32)
    # The forward's statistics hold for its own scores, bit for bit, so queries must be the first operand. Products of float32
    # are summed in the order of d whichever operand comes first.
    COMMUTES: tl.constexpr = own_s.dtype.element_ty == tl.float32
    begin = start if CAUSAL and not ROWS else 0
    stop = tl.minimum(start + BLOCK, L) if CAUSAL and not COLUMNS else L
    for j in range(begin, stop, BLOCK):
        o_j = j + tl.arange(0, BLOCK)
        m_j = valid_tokens(mask_ptr, b, o_j, L)
        b_other_s = load_rows(other_s, strides[1], b, h, o_j, m_j, D_s, BLOCK_S)
        b_other_t = load_rows(other_t, strides[3], b, h, o_j, m_j, D_t, BLOCK_T)
        both = m_i[:, None] & m_j[None, :]
        W = tl.zeros([BLOCK, BLOCK], tl.float32)
        if ROWS or COMMUTES:
            b_s, b_t = scores(b_own_s, b_other_s, scale_s), scores(b_own_t, b_other_t, scale_t)
        if ROWS:
            seen = both & (o_j[None, :] <= o_i[:, None]) if CAUSAL else both
            W += weights(b_s, b_t, as_rows(of_own), seen)
        if COLUMNS:
            of_other = load_stats(g_ptr, stats_ptr, pair, o_j, m_j, L)
            seen = both & (o_i[:, None] <= o_j[None, :]) if CAUSAL else both
            if COMMUTES:
                W += weights(b_s, b_t, as_columns(of_other), seen)
            else:
                b_s, b_t = scores(b_other_s, b_own_s, scale_s), scores(b_other_t, b_own_t, scale_t)
                W += tl.trans(weights(b_s, b_t, as_rows(of_other), tl.trans(seen)))
        pulled = tl.dot(W.to(b_other_s.dtype), b_other_s, pulled, input_precision="ieee")
    o_d = tl.arange(0, BLOCK_S)
    at = (pair * L + o_i)[:, None] * D_s + o_d[None, :]
    m_out = (o_i < L)[:, None] & (o_d < D_s)[None, :]
    tl.store(out_ptr + at, (tl.where(m_i[:, None], pulled, 0.0) * scale_s).to(out_ptr.dtype.element_ty), mask=m_out)


def geometry(d_s: int, d_t: int, half: bool, backward: bool) -> dict:
    """Blocks and warps for heads of these widths. Unless both sides are `half`, products are in float32: smaller tiles.

    No FP fusion: score - score must not become fma(product, scale, -score), which is not 0 where both scores are equal,
    and not what the forward saw."""
    widths = [max(16, triton.next_power_of_2(d)) for d in (d_s, d_t)]
    large = half and not backward and max(widths) <= 64
    warps = 8 if large or not half else 4
    launch = {"BLOCK_S": widths[0], "BLOCK_T": widths[1], "BLOCK": 64 if large else 32}
    return launch | {"num_warps": warps, "num_stages": 2, "enable_fp_fusion": False}


def _sides(xs: Tensor, ys: Tensor | None, xt: Tensor, yt: Tensor | None) -> list[Tensor]:
    """x and y of the student, x and y of the teacher, with contiguous rows; all float32 unless all are half precision."""
    sides = [xs, xs if ys is None else ys, xt, xt if yt is None else yt]
    return [contiguous_rows(x if _half(xs, xt) else x.float()) for x in sides]


def relation_fwd(
    xs: Tensor, ys: Tensor | None, xt: Tensor, yt: Tensor | None, mask: Tensor | None, causal: bool,
    scale_s: float, scale_t: float, gradient_in_forward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    B, H, L, d = xs.shape
    rows = torch.empty((B, H, L), dtype=torch.float32, device=xs.device)
    stats = torch.empty((B, H, 4, L), dtype=torch.float32, device=xs.device)
    no_gradients = [torch.empty((B, H, 0, d), dtype=_dtype(xs), device=xs.device) for _ in range(2)]
    if rows.numel():
        sides = _sides(xs, ys, xt, yt)
        launch = geometry(d, xt.shape[3], _half(xs, xt), False)
        forward_kernel[(triton.cdiv(L, launch["BLOCK"]), H, B)](
            *sides, tuple(x.stride()[:3] for x in sides), mask_bytes(mask), rows, stats, H, L, d, xt.shape[3],
            scale_s, scale_t, CAUSAL=causal, **launch,
        )  # fmt: skip
    return rows, stats, *no_gradients


def relation_bwd(
    grad: Tensor, xs: Tensor, ys: Tensor | None, xt: Tensor, yt: Tensor | None, mask: Tensor | None, stats: Tensor,
    unit_grad_x: Tensor, unit_grad_y: Tensor, causal: bool, scale_s: float, scale_t: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, H, L, d = xs.shape
    dx = torch.empty((B, H, L, d), dtype=_dtype(xs), device=xs.device)
    dy = torch.empty((B, H, 0 if ys is None else L, d), dtype=_dtype(xs), device=xs.device)
    if dx.numel() == 0:
        return dx, dy
    grad, largest = grad.contiguous(), None
    if xs.dtype == torch.float16:  # weights are rounded to float16 and must not become subnormal
        largest = grad.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
        grad = grad / largest
    x_s, y_s, x_t, y_t = _sides(xs, ys, xt, yt)
    launch = geometry(d, xt.shape[3], _half(xs, xt), True) | {"CAUSAL": causal}

    def pull(out, own_s, other_s, own_t, other_t, rows, columns):
        sides = (own_s, other_s, own_t, other_t)
        backward_kernel[(triton.cdiv(L, launch["BLOCK"]), H, B)](
            *sides, tuple(x.stride()[:3] for x in sides), mask_bytes(mask), grad, stats, out, H, L, d, xt.shape[3],
            scale_s, scale_t, ROWS=rows, COLUMNS=columns, **launch,
        )  # fmt: skip
        return out if largest is None else out.mul_(largest)

    dx = pull(dx, x_s, y_s, x_t, y_t, True, ys is None and yt is None)
    if ys is not None:
        return dx, pull(dy, y_s, x_s, y_t, x_t, False, True)
    if yt is not None:  # the student relates x to itself, the teacher does not: two halves
        dx = dx + pull(torch.empty_like(dx), y_s, x_s, y_t, x_t, False, True)
    return dx, dy


def _half(xs: Tensor, xt: Tensor) -> bool:
    return xs.element_size() == 2 and xt.element_size() == 2


def _dtype(x: Tensor) -> torch.dtype:
    return torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
