"""Rows of a group, as all forms of gram load, scale, centre and finish them; and, for longer groups, what must be known of
all rows before the first tile, lengths and means, and a tile itself. kernels/gram/launch.py has the maths.

Saved of a term of longer groups, in one tensor of float32: per group [mean P, mean Q, of P, of Q]; of every row 1 / |x| in
two parts, for both sides, whose sum is 0 for a row of zeros; the mean rows of both.
"""

import os

import triton
import triton.language as tl

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
LEAST_NORM = tl.constexpr(1e-12)
LEAST_SCALE = tl.constexpr(1e-37)  # of a row that counts: 0 stands for one that does not
ALIGN = tl.constexpr(8)  # of widths and strides, in elements: 16 bytes of half precision
ROWS = tl.constexpr(32)  # of a program of rows_kernel
SPILL_LIMIT = {"rows_kernel": 0, "means_kernel": 0}  # bytes of stack per thread


@triton.jit
def pick(choices, which):
    """choices[which]: tensors of one dtype, all of them arguments."""
    found = choices[0]
    for k in tl.static_range(1, len(choices)):
        found = tl.where(which == k, choices[k], found)
    return found


@triton.jit
def aligned(numbers):
    """The same, seen to be multiples of ALIGN by the compiler too."""
    found = ()
    for k in tl.static_range(len(numbers)):
        found = found + (numbers[k] // ALIGN * ALIGN,)  # noqa: RUF005 (Triton has no star in a tuple)
    return found


@triton.jit
def product(a, b, acc):
    """a b + acc in float32; the interpreter multiplies bfloat16 wrongly."""
    if INTERPRET:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def counting(mask_ptr, row_stride, R, ENOUGH: tl.constexpr):
    """How many rows of a group count; 0 where they are too few."""
    if mask_ptr is None:
        return tl.full([], R, tl.int32)
    else:
        n = tl.full([], 0, tl.int32)
        for start in range(0, R, 256):
            o_r = start + tl.arange(0, 256).to(tl.int64)
            n += tl.sum((tl.load(mask_ptr + o_r * row_stride, mask=o_r < R, other=0) != 0).to(tl.int32), 0)
        return tl.where(n < ENOUGH, 0, n)


@triton.jit
def which_count(mask_ptr, row_stride, o_r, R, n):
    m_r = o_r < tl.where(n > 0, R, 0)
    return m_r if mask_ptr is None else m_r & (tl.load(mask_ptr + o_r * row_stride, mask=m_r, other=0) != 0)


@triton.jit
def load_rows(x_ptr, row_stride, o_r, m_r, o_d, D):
    at = o_r.to(tl.int64)[:, None] * row_stride + o_d[None, :]
    return tl.load(x_ptr + at, mask=m_r[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def inverse_norms(
    x_ptr, row_stride, o_r, m_r, D, NORMALIZE: tl.constexpr, ZEROS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """1 / |x| in float64, for rows that need all their digits; and (ZEROS) which rows are not all zeros."""
    if NORMALIZE or ZEROS:
        squares = tl.zeros([BLOCK], tl.float64)
        for k in range(0, D, BLOCK_D):
            b_x = load_rows(x_ptr, row_stride, o_r, m_r, k + tl.arange(0, BLOCK_D), D).to(tl.float64)
            squares += tl.sum(b_x * b_x, 1)
        inverse = scale_of(squares, m_r) if NORMALIZE else m_r.to(tl.float64)
        return inverse, m_r & (squares != 0)
    else:
        return m_r.to(tl.float64), m_r


@triton.jit
def scale_of(squares, m_r):
    """1 / length, of squares in float64; 0 for a row that does not count, and for no other."""
    length = tl.sqrt(squares)
    scale = 1.0 / tl.where(length < LEAST_NORM, LEAST_NORM, length)
    return tl.where(m_r, tl.where(scale < LEAST_SCALE, LEAST_SCALE, scale), 0.0)


@triton.jit
def normalised(b_x, scale, low):
    """x / |x|, a block of it, as two factors of x."""
    return b_x * low[:, None] + b_x * scale[:, None]


@triton.jit
def centred(b_x, scale, low, centre, m_r):
    """v = x / |x| - c; the product must not be rounded before c is taken away from it."""
    if INTERPRET:
        b_v = (b_x.to(tl.float64) * scale.to(tl.float64)[:, None] - centre.to(tl.float64)[None, :]).to(tl.float32)
    else:
        b_v = tl.fma(b_x, tl.broadcast_to(scale[:, None], b_x.shape), tl.broadcast_to(-centre[None, :], b_x.shape))
    return tl.where(m_r[:, None], b_x * low[:, None] + b_v, 0.0)


@triton.jit
def without_mean(base, both, n, ROW: tl.constexpr):
    """base less its mean, 0 where not both rows count; and that mean, [1] or, by rows, [R]. Twice: what the first sum
    rounded away, the second one sees."""
    base = tl.where(both, base, 0.0)
    if ROW:
        mean = tl.sum(base, 1) / n
        more = tl.sum(tl.where(both, base - mean[:, None], 0.0), 1) / n
        return tl.where(both, (base - mean[:, None]) - more[:, None], 0.0), mean + more
    else:
        mean = tl.sum(tl.sum(base, 1), 0) / n / n
        more = tl.sum(tl.sum(tl.where(both, base - mean, 0.0), 1), 0) / n / n
        return tl.where(both, (base - mean) - more, 0.0), tl.zeros([base.shape[0]], tl.float32) + (mean + more)


@triton.jit
def conclude(pp, qq, pq, n, eps):
    """1 - rho, and what P and Q weigh in twice its derivative by the Gram; all in float64."""
    a, b = tl.sqrt(pp), tl.sqrt(qq)
    ab = a * b
    den = ab + eps
    none = (a == 0) | (n == 1)  # of a single row, P and Q are rounding
    of_p = tl.where(none, 0.0, 2.0 * pq * b / (tl.where(none, 1.0, a) * den * den))
    return (ab - pq + eps) / den, of_p, tl.where((b == 0) | (n == 1), 0.0, -2.0 / den)


@triton.jit
def halved(W, scale, dtype: tl.constexpr):
    """W_ij / |x_j| rounded, and per row a number to multiply by: float16's range is short."""
    weights = W * scale[None, :]
    gain = tl.max(tl.abs(weights), 1) / 16384.0
    gain = tl.where(gain == 0, 1.0, gain) if dtype == tl.float16 else tl.zeros_like(gain) + 1.0
    return (weights / gain[:, None]).to(dtype), gain


@triton.jit
def finish_rows(pulled, b_x, scale, project, along):
    """Gradient by x from that by u where rows are half precision."""
    b_u = b_x.to(tl.float32) * scale[:, None]
    return (pulled - b_u * tl.where(project, along, 0.0)[:, None]) * scale[:, None]


@triton.jit
def finish_centred(pulled, b_v, centre, scale, project, along, total):
    """The same where they are float32: pulled is sum_j W_ij v_j, and what is left of sum_j W_ij c on the sphere is -v."""
    of_v, of_c = tl.where(project, -total, 0.0), tl.where(project, 0.0, total)
    b_u = b_v + centre[None, :]
    pulled += of_v[:, None] * b_v + of_c[:, None] * centre[None, :]
    return (pulled - b_u * tl.where(project, along, 0.0)[:, None]) * scale[:, None]


@triton.jit
def store_gradient(out_ptr, row_stride, o_r, m_r, o_d, R, D, grad, ADD: tl.constexpr):
    at = out_ptr + o_r.to(tl.int64)[:, None] * row_stride + o_d[None, :]
    there = (o_r < R)[:, None] & (o_d < D)[None, :]
    grad = tl.where(m_r[:, None], grad, 0.0)
    if ADD:
        grad += tl.load(at, mask=there, other=0.0).to(tl.float32)
    tl.store(at, grad.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit
def scales_of(saved, side, G, R, group):
    """Where 1 / |x| of a group's rows begins; its second part is G R further."""
    return saved + 4 * G + (2 * side * G + group) * R


@triton.jit
def centre_of(saved, side, G, R, group, D_s, D_t):
    return saved + 4 * G * (1 + R) + group * (D_s + D_t) + side * D_s


@triton.jit
def rows_of_side(
    x_ptr, row_stride, saved, side, sums_ptr, G, R, group, o_r, m_r, D,
    NORMALIZE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scales of some rows, and the sum of what they are with them."""
    HALF: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth == 16
    if HALF:
        squares = tl.zeros([ROWS, BLOCK_D], tl.float32)
        for k in range(0, D, BLOCK_D):
            b_x = load_rows(x_ptr, row_stride, o_r, m_r, k + tl.arange(0, BLOCK_D), D).to(tl.float32)
            squares += b_x * b_x
        total = tl.sum(squares.to(tl.float64), 1)
        inverse, live = scale_of(total, m_r) if NORMALIZE else m_r.to(tl.float64), m_r & (total != 0)
    else:
        inverse, live = inverse_norms(x_ptr, row_stride, o_r, m_r, D, NORMALIZE, True, ROWS, BLOCK_D)
    scale = inverse.to(tl.float32)
    low = tl.where(m_r & ~live, -scale, (inverse - scale.to(tl.float64)).to(tl.float32))
    at = scales_of(saved, side, G, R, group) + o_r
    tl.store(at, scale, mask=o_r < R)
    tl.store(at + G * R, low, mask=o_r < R)
    for k in range(0, D, BLOCK_D):
        o_d = k + tl.arange(0, BLOCK_D)
        b_x = load_rows(x_ptr, row_stride, o_r, m_r, o_d, D).to(tl.float32)
        tl.store(sums_ptr + o_d, tl.sum(normalised(b_x, scale, low), 0), mask=o_d < D)


@triton.jit
def rows_kernel(
    students, teachers, saved, sums_s, sums_t, mask_ptr, G, R, D_s, D_t, s_group, s_row, t_group, t_row, m_group, m_row,
    blocks, ENOUGH: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """1 / |x| of ROWS rows of a group, on both sides, and the sums of the rows after it."""
    D_s, D_t, s_group, s_row, t_group, t_row = aligned((D_s, D_t, s_group, s_row, t_group, t_row))
    program = tl.program_id(0).to(tl.int64)
    unit = program // blocks
    pair, group = unit // G, unit % G
    if mask_ptr is not None:
        mask_ptr += group * m_group
    n = counting(mask_ptr, m_row, R, ENOUGH)
    o_r = (program % blocks) * ROWS + tl.arange(0, ROWS)
    m_r = which_count(mask_ptr, m_row, o_r, R, n)
    kept = pick(saved, pair)
    s_ptr, t_ptr = pick(students, pair) + group * s_group, pick(teachers, pair) + group * t_group
    rows_of_side(s_ptr, s_row, kept, 0, sums_s + program * D_s, G, R, group, o_r, m_r, D_s, NORMALIZE, BLOCK_D)
    rows_of_side(t_ptr, t_row, kept, 1, sums_t + program * D_t, G, R, group, o_r, m_r, D_t, NORMALIZE, BLOCK_D)


@triton.jit
def means_kernel(
    saved, levels_ptr, sums_s, sums_t, mask_ptr, G, R, D_s, D_t, m_group, m_row, blocks,
    HALF_S: tl.constexpr, HALF_T: tl.constexpr, ENOUGH: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One side of one group: its mean row c, and |c|², which is the mean of the Gram; where rows are centred it is no part
    of a tile: 0, and |c|² goes to levels_ptr."""
    program = tl.program_id(0).to(tl.int64)
    unit, of_t = program // 2, program % 2
    pair, group = unit // G, unit % G
    if mask_ptr is not None:
        mask_ptr += group * m_group
    n = counting(mask_ptr, m_row, R, ENOUGH)
    kept = pick(saved, pair)
    if LINES:  # rows of zeros have no part in c
        for start in range(0, R, 256):
            scale, low, _ = load_scales(kept, of_t, G, R, group, start + tl.arange(0, 256))
            n -= tl.sum(((scale != 0) & (scale + low == 0)).to(tl.int32), 0)
    n = tl.maximum(n, 1)
    D = tl.where(of_t == 1, D_t, D_s)
    sums_ptr = tl.where(of_t == 1, sums_t, sums_s) + unit * blocks * D
    half = tl.where(of_t == 1, HALF_T, HALF_S)
    square = tl.zeros([BLOCK_D], tl.float64)
    for k in range(0, D, BLOCK_D):
        o_d = k + tl.arange(0, BLOCK_D)
        total = tl.zeros([BLOCK_D], tl.float32)
        for start in range(0, blocks, BLOCK):
            o_b = start + tl.arange(0, BLOCK)
            there = (o_b < blocks)[:, None] & (o_d < D)[None, :]
            at = o_b.to(tl.int64)[:, None] * D + o_d[None, :]
            total += tl.sum(tl.load(sums_ptr + at, mask=there, other=0.0), 0)
        centre = total / n
        square += centre.to(tl.float64) * centre
        tl.store(centre_of(kept, of_t, G, R, group, D_s, D_t) + o_d, centre, mask=o_d < D)
    level = tl.sum(square, 0)
    tl.store(kept + group * 4 + of_t, tl.where(half, level, 0.0).to(tl.float32))
    if levels_ptr is not None:
        tl.store(levels_ptr + program, tl.where(half, 0.0, level))


@triton.jit
def load_scales(saved, side, G, R, group, o_r):
    """Two parts of 1 / |x|, and which rows count: those where it is not 0."""
    at = scales_of(saved, side, G, R, group) + o_r
    scale = tl.load(at, mask=o_r < R, other=0.0)
    return scale, tl.load(at + G * R, mask=o_r < R, other=0.0), scale != 0


@triton.jit
def not_zero(scale, low):
    """Which rows count and are not all zeros."""
    return scale + low != 0


@triton.jit
def tile(
    x_ptr, row_stride, saved, side, G, R, group, o_i, o_j, D, D_s, D_t, LINES: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of one side, at rows o_i and columns o_j: <u_i, u_j>, less |c|² where rows are float32; the scales of both; and, where
    rows are float32, <c, v_i>, <c, v_j>, <u_i, v_i> and <u_j, v_j>. LINES: v of a row of zeros is 0, and c has no part of it."""
    scale_i, low_i, m_i = load_scales(saved, side, G, R, group, o_i)
    scale_j, low_j, m_j = load_scales(saved, side, G, R, group, o_j)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    if x_ptr.dtype.element_ty.primitive_bitwidth == 16:
        for k in range(0, D, BLOCK_D):
            o_d = k + tl.arange(0, BLOCK_D)
            b_i = load_rows(x_ptr, row_stride, o_i, m_i, o_d, D)
            b_j = load_rows(x_ptr, row_stride, o_j, m_j, o_d, D)
            acc = product(b_i, tl.trans(b_j), acc)
        base = acc * (scale_i[:, None] * scale_j[None, :])
        return base, scale_i, scale_j, m_i, m_j, scale_i, scale_j, scale_i, scale_j
    else:
        onto_i, onto_j = tl.zeros([BLOCK, BLOCK_D], tl.float32), tl.zeros([BLOCK, BLOCK_D], tl.float32)
        own_i, own_j = tl.zeros([BLOCK, BLOCK_D], tl.float32), tl.zeros([BLOCK, BLOCK_D], tl.float32)
        square = tl.zeros([BLOCK_D], tl.float32)
        live_i, live_j = m_i, m_j
        if LINES:
            live_i, live_j = not_zero(scale_i, low_i), not_zero(scale_j, low_j)
        c_ptr = centre_of(saved, side, G, R, group, D_s, D_t)
        for k in range(0, D, BLOCK_D):
            o_d = k + tl.arange(0, BLOCK_D)
            centre = tl.load(c_ptr + o_d, mask=o_d < D, other=0.0)
            v_i = centred(load_rows(x_ptr, row_stride, o_i, m_i, o_d, D), scale_i, low_i, centre, live_i)
            v_j = centred(load_rows(x_ptr, row_stride, o_j, m_j, o_d, D), scale_j, low_j, centre, live_j)
            square += centre * centre
            onto_i += v_i * centre[None, :]
            onto_j += v_j * centre[None, :]
            own_i += v_i * (v_i + centre[None, :])
            own_j += v_j * (v_j + centre[None, :])
            acc = product(v_i, tl.trans(v_j), acc)
        o_ci, o_cj = tl.sum(onto_i, 1), tl.sum(onto_j, 1)
        base = acc + (o_ci[:, None] + o_cj[None, :])
        if LINES:
            base = tl.where(live_i[:, None] & live_j[None, :], base, -tl.sum(square, 0))
        return base, scale_i, scale_j, m_i, m_j, o_ci, o_cj, tl.sum(own_i, 1), tl.sum(own_j, 1)


def longest(half: bool) -> int:
    """Rows of the longest group that one program holds; half: both sides are bfloat16 or float16."""
    return 128 if half else 64


def geometry(rows: int, half: bool, by_line: bool = False) -> dict:
    """Of a program that makes a tile of both Grams; by_line: with numbers for every column, registers hold a smaller one."""
    block = min(max(16, triton.next_power_of_2(rows)), 64 if by_line else longest(half))
    launch = {"BLOCK": block, "BLOCK_D": 64, "num_warps": 8 if block > 64 else 4, "num_stages": 3}
    launch = launch if half else {"BLOCK": block, "BLOCK_D": 16, "num_warps": 8, "num_stages": 1}
    return launch | {"enable_fp_fusion": True}
