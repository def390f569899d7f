"""gram of groups in cache: one program holds both Gram matrices of a group, and one launch each way does everything.

kernels/gram/launch.py has the maths. Nothing is saved: the backward computes it all again.
"""

import triton
import triton.language as tl

from .rows import (
    LEAST_NORM,
    Rows,
    aligned,
    centred,
    conclude,
    count_valid,
    finish_centred,
    finish_rows,
    inverse_norms,
    load_rows,
    normalised,
    pick,
    product,
    scale_of,
    store_gradient,
    to_half,
    valid_rows,
    without_mean,
)

SPILL_LIMIT = {"forward_kernel": 192, "backward_kernel": 232}  # bytes of stack per thread


@triton.jit
def self_similarity(
    x_ptr, row_stride, o_r, m_r, D, ROW: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """<u_i, u_j>, less a number for float32 rows; and Rows, where `live` is `valid` for float32 rows unless ROW."""
    HALF: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth == 16
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    if HALF:
        for k in range(0, D, BLOCK_D):
            b_x = load_rows(x_ptr, row_stride, o_r, m_r, k + tl.arange(0, BLOCK_D), D)
            acc = product(b_x, tl.trans(b_x), acc)
        o = tl.arange(0, BLOCK)
        squares = tl.sum(tl.where(o[:, None] == o[None, :], acc, 0.0), 1)
        if NORMALIZE:
            scale = scale_of(squares.to(tl.float64), m_r).to(tl.float32)
        else:
            scale = m_r.to(tl.float32)
        return acc * (scale[:, None] * scale[None, :]), Rows(m_r, m_r & (squares != 0), scale, scale, scale, scale)
    else:
        inverse, live = inverse_norms(x_ptr, row_stride, o_r, m_r, D, NORMALIZE, ROW, BLOCK, BLOCK_D)
        if not ROW:
            live = m_r
        n = tl.maximum(tl.sum(live.to(tl.int32), 0), 1)
        square = tl.zeros([BLOCK_D], tl.float32)
        scale = inverse.to(tl.float32)
        low = (inverse - scale.to(tl.float64)).to(tl.float32)
        onto, own = tl.zeros([BLOCK, BLOCK_D], tl.float32), tl.zeros([BLOCK, BLOCK_D], tl.float32)
        for k in range(0, D, BLOCK_D):
            b_x = load_rows(x_ptr, row_stride, o_r, m_r, k + tl.arange(0, BLOCK_D), D)
            centre = tl.sum(normalised(b_x, scale, low), 0) / n
            b_v = centred(b_x, scale, low, centre, live)
            square += centre * centre
            onto += b_v * centre[None, :]
            own += b_v * (b_v + centre[None, :])
            acc = product(b_v, tl.trans(b_v), acc)
        o_c = tl.sum(onto, 1)
        base = acc + (o_c[:, None] + o_c[None, :])
        if ROW:  # <0, u> is 0
            base = tl.where(live[:, None] & live[None, :], base, -tl.sum(square, 0))
        return base, Rows(m_r, live, scale, low, o_c, tl.sum(own, 1))


@triton.jit
def inner(P, Q, ROW: tl.constexpr):
    """<P, Q>, of each row (ROW) or of all."""
    per_row = tl.sum(P * Q, 1).to(tl.float64)
    if ROW:
        return per_row
    else:
        return tl.sum(per_row, 0)


@triton.jit
def group_of_program(mask_ptr, G, R, m_group, m_row, o_r, ENOUGH: tl.constexpr):
    """The pair and group of a program, how many of its rows o_r are valid, and which."""
    unit = tl.program_id(0).to(tl.int64)
    pair, group = unit // G, unit % G
    if mask_ptr is not None:
        mask_ptr += group * m_group
    n = count_valid(mask_ptr, m_row, R, ENOUGH)
    return pair, group, n, valid_rows(mask_ptr, m_row, o_r, R, n)


@triton.jit
def centred_gram(
    x_ptr, row_stride, m_r, n, D, ROW: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    """P (or Q), its mean, and Rows."""
    base, rows = self_similarity(x_ptr, row_stride, tl.arange(0, BLOCK), m_r, D, ROW, NORMALIZE, BLOCK, BLOCK_D)
    base, mean = without_mean(base, m_r[:, None] & m_r[None, :], tl.maximum(n, 1), ROW)
    if ROW:  # in a row of zeros only rounding errors are left
        base = tl.where(rows.live[:, None], base, 0.0)
    return base, mean, rows


@triton.jit
def forward_kernel(
    students, teachers, values, valids, mask_ptr, G, R, D_s, D_t, s_group, s_row, t_group, t_row, m_group, m_row, eps,
    ENOUGH: tl.constexpr, ROW: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    D_s, D_t, s_group, s_row, t_group, t_row = aligned((D_s, D_t, s_group, s_row, t_group, t_row))
    o_r = tl.arange(0, BLOCK)
    pair, group, n, m_r = group_of_program(mask_ptr, G, R, m_group, m_row, o_r, ENOUGH)
    t_ptr, s_ptr = pick(teachers, pair) + group * t_group, pick(students, pair) + group * s_group
    Q, _, _ = centred_gram(t_ptr, t_row, m_r, n, D_t, ROW, NORMALIZE, BLOCK, BLOCK_D)
    P, _, _ = centred_gram(s_ptr, s_row, m_r, n, D_s, ROW, NORMALIZE, BLOCK, BLOCK_D)
    value, _, _ = conclude(inner(P, P, ROW), inner(Q, Q, ROW), inner(P, Q, ROW), n, eps)
    if ROW:
        at = group * R + o_r
        tl.store(pick(values, pair) + at, tl.where(m_r, value, 0.0).to(tl.float32), mask=o_r < R)
        tl.store(pick(valids, pair) + at, m_r.to(tl.uint8), mask=o_r < R)
    else:
        tl.store(pick(values, pair) + group, tl.where(n > 0, value, 0.0).to(tl.float32))
        tl.store(pick(valids, pair) + group, (n > 0).to(tl.uint8))


@triton.jit
def backward_kernel(
    students, teachers, grads, outputs, mask_ptr, G, R, D_s, D_t, s_group, s_row, t_group, t_row, m_group, m_row,
    out_group, out_row, eps,
    ADD: tl.constexpr, ENOUGH: tl.constexpr, ROW: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    D_s, D_t, s_group, s_row, t_group, t_row = aligned((D_s, D_t, s_group, s_row, t_group, t_row))
    out_group, out_row = aligned((out_group, out_row))
    o_r = tl.arange(0, BLOCK)
    pair, group, n, m_r = group_of_program(mask_ptr, G, R, m_group, m_row, o_r, ENOUGH)
    t_ptr, s_ptr = pick(teachers, pair) + group * t_group, pick(students, pair) + group * s_group
    HALF: tl.constexpr = s_ptr.dtype.element_ty.primitive_bitwidth == 16
    Q, _, _ = centred_gram(t_ptr, t_row, m_r, n, D_t, ROW, NORMALIZE, BLOCK, BLOCK_D)
    P, mean, rows = centred_gram(s_ptr, s_row, m_r, n, D_s, ROW, NORMALIZE, BLOCK, BLOCK_D)
    _, of_p, of_q = conclude(inner(P, P, ROW), inner(Q, Q, ROW), inner(P, Q, ROW), n, eps)
    if ROW:
        up = tl.load(pick(grads, pair) + group * R + o_r, mask=m_r, other=0.0)
        W = 0.5 * ((of_p * up).to(tl.float32)[:, None] * P + (of_q * up).to(tl.float32)[:, None] * Q)
        W += tl.trans(W)
    else:
        up = tl.where(n > 0, tl.load(pick(grads, pair) + group), 0.0)
        W = (of_p * up).to(tl.float32) * P + (of_q * up).to(tl.float32) * Q
    both = m_r[:, None] & rows.live[None, :]  # the weights of rows of zeros would round the others away
    W, base = tl.where(both, W, 0.0), tl.where(both, P + mean[:, None], 0.0)
    scale, low = rows.scale, rows.low
    project = m_r & NORMALIZE & (scale < 1.0 / LEAST_NORM)
    if HALF:
        weights, gain = to_half(W, scale, s_ptr.dtype.element_ty)
        length = 1.0 / tl.where(m_r, scale, 1.0)
        along = tl.sum(weights.to(tl.float32) * length[None, :] * base, 1) * gain
        total = along
    else:
        weights, gain = W, scale
        total = tl.sum(W, 1)
        along = tl.sum(W * base, 1) - total * (rows.onto + rows.own)
    out_ptr = pick(outputs, pair) + group * out_group
    for k in range(0, D_s, BLOCK_D):
        o_d = k + tl.arange(0, BLOCK_D)
        b_x = load_rows(s_ptr, s_row, o_r, m_r, o_d, D_s)
        zeros = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        if HALF:
            pulled = product(weights, b_x, zeros) * gain[:, None]
            grad = finish_rows(pulled, b_x, scale, project, along)
        else:
            centre = tl.sum(normalised(b_x, scale, low), 0) / tl.maximum(tl.sum(rows.live.to(tl.int32), 0), 1)
            b_v = centred(b_x, scale, low, centre, rows.live)
            grad = finish_centred(product(weights, b_v, zeros), b_v, centre, scale, project, along, total)
        store_gradient(out_ptr, out_row, o_r, m_r, o_d, R, D_s, grad, ADD)
