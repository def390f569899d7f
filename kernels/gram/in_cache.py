"""gram where one program holds both Gram matrices of a group: everything, means and lengths too, in one launch each way.

kernels/gram/launch.py has the maths. Here nothing is known beforehand and nothing is saved: the backward makes it all again.
"""

import triton
import triton.language as tl

from .rows import (
    LEAST_NORM,
    aligned,
    centred,
    conclude,
    counting,
    finish_centred,
    finish_rows,
    halved,
    inverse_norms,
    load_rows,
    normalised,
    pick,
    product,
    scale_of,
    store_gradient,
    which_count,
    without_mean,
)

SPILL_LIMIT = {"whole_forward_kernel": 192, "whole_backward_kernel": 232}  # bytes of stack per thread


@triton.jit
def whole_side(
    x_ptr, row_stride, o_r, m_r, D, ROW: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """<u_i, u_j>, less a number where rows are float32; which rows have a part in c: all or (row by row) those which are not
    all zeros; and of every row the scale (two parts), <c, v> and <u, v>."""
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
        return acc * (scale[:, None] * scale[None, :]), m_r & (squares != 0), scale, scale, scale, scale
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
        return base, live, scale, low, o_c, tl.sum(own, 1)


@triton.jit
def inner(P, Q, ROW: tl.constexpr):
    of_row = tl.sum(P * Q, 1).to(tl.float64)
    if ROW:
        return of_row
    else:
        return tl.sum(of_row, 0)


@triton.jit
def group_of_program(mask_ptr, G, R, m_group, m_row, ENOUGH: tl.constexpr, BLOCK: tl.constexpr):
    """Which pair's group a program has, how many of its rows count, and which."""
    unit = tl.program_id(0).to(tl.int64)
    pair, group = unit // G, unit % G
    if mask_ptr is not None:
        mask_ptr += group * m_group
    n = counting(mask_ptr, m_row, R, ENOUGH)
    o_r = tl.arange(0, BLOCK)
    return pair, group, n, o_r, which_count(mask_ptr, m_row, o_r, R, n)


@triton.jit
def both_sides(
    s_ptr, t_ptr, s_row, t_row, m_r, n, D_s, D_t, eps,
    ROW: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """P and Q; of the student's rows the mean and what whole_side says; and what conclude says of both."""
    both, rows = m_r[:, None] & m_r[None, :], tl.maximum(n, 1)
    o_r = tl.arange(0, BLOCK)
    Q, live, _, _, _, _ = whole_side(t_ptr, t_row, o_r, m_r, D_t, ROW, NORMALIZE, BLOCK, BLOCK_D)
    Q, _ = without_mean(Q, both, rows, ROW)
    if ROW:  # of a row of zeros what is left is rounding
        Q = tl.where(live[:, None], Q, 0.0)
    P, live, scale, low, onto, own = whole_side(s_ptr, s_row, o_r, m_r, D_s, ROW, NORMALIZE, BLOCK, BLOCK_D)
    P, mean = without_mean(P, both, rows, ROW)
    if ROW:
        P = tl.where(live[:, None], P, 0.0)
    value, of_p, of_q = conclude(inner(P, P, ROW), inner(Q, Q, ROW), inner(P, Q, ROW), n, eps)
    return P, Q, mean, live, scale, low, onto, own, value, of_p, of_q


@triton.jit
def whole_forward_kernel(
    students, teachers, values, valids, mask_ptr, G, R, D_s, D_t, s_group, s_row, t_group, t_row, m_group, m_row, eps,
    ENOUGH: tl.constexpr, ROW: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    D_s, D_t, s_group, s_row, t_group, t_row = aligned((D_s, D_t, s_group, s_row, t_group, t_row))
    pair, group, n, o_r, m_r = group_of_program(mask_ptr, G, R, m_group, m_row, ENOUGH, BLOCK)
    t_ptr, s_ptr = pick(teachers, pair) + group * t_group, pick(students, pair) + group * s_group
    _, _, _, _, _, _, _, _, value, _, _ = both_sides(
        s_ptr, t_ptr, s_row, t_row, m_r, n, D_s, D_t, eps, ROW, NORMALIZE, BLOCK, BLOCK_D
    )
    if ROW:
        at = group * R + o_r
        tl.store(pick(values, pair) + at, tl.where(m_r, value, 0.0).to(tl.float32), mask=o_r < R)
        tl.store(pick(valids, pair) + at, m_r.to(tl.uint8), mask=o_r < R)
    else:
        tl.store(pick(values, pair) + group, tl.where(n > 0, value, 0.0).to(tl.float32))
        tl.store(pick(valids, pair) + group, (n > 0).to(tl.uint8))


@triton.jit
def whole_backward_kernel(
    students, teachers, grads, outputs, mask_ptr, G, R, D_s, D_t, s_group, s_row, t_group, t_row, m_group, m_row,
    out_group, out_row, eps,
    ADD: tl.constexpr, ENOUGH: tl.constexpr, ROW: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    D_s, D_t, s_group, s_row, t_group, t_row = aligned((D_s, D_t, s_group, s_row, t_group, t_row))
    out_group, out_row = aligned((out_group, out_row))
    pair, group, n, o_r, m_r = group_of_program(mask_ptr, G, R, m_group, m_row, ENOUGH, BLOCK)
    t_ptr, s_ptr = pick(teachers, pair) + group * t_group, pick(students, pair) + group * s_group
    HALF: tl.constexpr = s_ptr.dtype.element_ty.primitive_bitwidth == 16
    P, Q, mean, live, scale, low, onto, own, _, of_p, of_q = both_sides(
        s_ptr, t_ptr, s_row, t_row, m_r, n, D_s, D_t, eps, ROW, NORMALIZE, BLOCK, BLOCK_D
    )
    if ROW:
        up = tl.load(pick(grads, pair) + group * R + o_r, mask=m_r, other=0.0)
        W = 0.5 * ((of_p * up).to(tl.float32)[:, None] * P + (of_q * up).to(tl.float32)[:, None] * Q)
        W += tl.trans(W)
    else:
        up = tl.where(n > 0, tl.load(pick(grads, pair) + group), 0.0)
        W = (of_p * up).to(tl.float32) * P + (of_q * up).to(tl.float32) * Q
    both = m_r[:, None] & live[None, :]  # what rows of zeros weigh would leave others' weights rounded away
    W, base = tl.where(both, W, 0.0), tl.where(both, P + mean[:, None], 0.0)
    project = m_r & NORMALIZE & (scale < 1.0 / LEAST_NORM)
    if HALF:
        weights, gain = halved(W, scale, s_ptr.dtype.element_ty)
        length = 1.0 / tl.where(m_r, scale, 1.0)
        along = tl.sum(weights.to(tl.float32) * length[None, :] * base, 1) * gain
        total = along
    else:
        weights, gain = W, scale
        total = tl.sum(W, 1)
        along = tl.sum(W * base, 1) - total * (onto + own)
    out_ptr = pick(outputs, pair) + group * out_group
    for k in range(0, D_s, BLOCK_D):
        o_d = k + tl.arange(0, BLOCK_D)
        b_x = load_rows(s_ptr, s_row, o_r, m_r, o_d, D_s)
        nothing = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        if HALF:
            pulled = product(weights, b_x, nothing) * gain[:, None]
            grad = finish_rows(pulled, b_x, scale, project, along)
        else:
            centre = tl.sum(normalised(b_x, scale, low), 0) / tl.maximum(tl.sum(live.to(tl.int32), 0), 1)
            b_v = centred(b_x, scale, low, centre, live)
            grad = finish_centred(product(weights, b_v, nothing), b_v, centre, scale, project, along, total)
        store_gradient(out_ptr, out_row, o_r, m_r, o_d, R, D_s, grad, ADD)
