"""What all of gram's kernels do with the rows of a group: load, scale and centre them, and turn W times the rows into their
gradient. For tiled groups also the lengths and means that must be known before the first tile, and a tile itself.
kernels/gram/launch.py has the maths.

Saved for a term of tiled groups, in one float32 tensor: per group [mean P, mean Q, weight of P, weight of Q]; per row 1 / |x|
in two parts, for both sides, whose sum is 0 for a row of zeros; the mean rows of both sides.
"""

import functools
from typing import NamedTuple

import triton
import triton.language as tl

from ..blocks import INTERPRET

LEAST_NORM = tl.constexpr(1e-12)
LEAST_SCALE = tl.constexpr(1e-37)  # of a valid row: 0 stands for one that is not valid
ALIGN = tl.constexpr(8)  # of widths and strides, in elements: 16 bytes of half precision
ROWS = tl.constexpr(32)  # per program of rows_kernel
SPILL_LIMIT = {"rows_kernel": 0, "means_kernel": 0}  # bytes of stack per thread


class Rows(NamedTuple):
    """What a Gram needs of some of its rows."""

    valid: tl.tensor  # which rows count
    live: tl.tensor  # which of them are not all zeros
    scale: tl.tensor  # 1 / |x|, 0 for a row that is not valid
    low: tl.tensor  # what 1 / |x| lacks in float32
    onto: tl.tensor  # <c, v>, of float32 rows
    own: tl.tensor  # <u, v>, of float32 rows


@triton.jit
def pick(choices, which):
    """choices[which]: tensors of one dtype, all of them arguments."""
    chosen = choices[0]
    for k in tl.static_range(1, len(choices)):
        chosen = tl.where(which == k, choices[k], chosen)
    return chosen


@triton.jit
def aligned(numbers):
    """The same numbers, which are multiples of ALIGN, so that the compiler sees it."""
    multiples = ()
    for k in tl.static_range(len(numbers)):
        multiples = multiples + (numbers[k] // ALIGN * ALIGN,)  # noqa: RUF005 (Triton has no star in a tuple)
    return multiples


@triton.jit
def product(a, b, acc):
    """a b + acc in float32; the interpreter multiplies bfloat16 wrongly."""
    if INTERPRET:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def count_valid(mask_ptr, row_stride, R, ENOUGH: tl.constexpr):
    """The number of valid rows in a group; 0 if they are too few."""
    if mask_ptr is None:
        return tl.full([], R, tl.int32)
    else:
        n = tl.full([], 0, tl.int32)
        for start in range(0, R, 256):
            o_r = start + tl.arange(0, 256).to(tl.int64)
            n += tl.sum((tl.load(mask_ptr + o_r * row_stride, mask=o_r < R, other=0) != 0).to(tl.int32), 0)
        return tl.where(n < ENOUGH, 0, n)


@triton.jit
def valid_rows(mask_ptr, row_stride, o_r, R, n):
    """Which of the rows o_r are valid; none if n is 0."""
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
    """1 / |x| in float64, for float32 rows; and (ZEROS) which rows are not all zeros."""
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
    """1 / length from the squared length in float64; 0 for a row that is not valid, and for no other."""
    length = tl.sqrt(squares)
    scale = 1.0 / tl.where(length < LEAST_NORM, LEAST_NORM, length)
    return tl.where(m_r, tl.where(scale < LEAST_SCALE, LEAST_SCALE, scale), 0.0)


@triton.jit
def normalised(b_x, scale, low):
    """A block of x / |x|, from the two parts of 1 / |x|."""
    return b_x * low[:, None] + b_x * scale[:, None]


@triton.jit
def centred(b_x, scale, low, centre, m_r):
    """v = x / |x| - c; the product must not be rounded before c is subtracted from it."""
    if INTERPRET:
        b_v = (b_x.to(tl.float64) * scale.to(tl.float64)[:, None] - centre.to(tl.float64)[None, :]).to(tl.float32)
    else:
        b_v = tl.fma(b_x, tl.broadcast_to(scale[:, None], b_x.shape), tl.broadcast_to(-centre[None, :], b_x.shape))
    return tl.where(m_r[:, None], b_x * low[:, None] + b_v, 0.0)


@triton.jit
def without_mean(base, both, n, ROW: tl.constexpr):
    """base less its mean, 0 unless both rows are valid; and the mean of each row (ROW), or of all of base, [R]. The mean is
    taken twice: the second one sees what the first lost to rounding."""
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
    """1 - rho, and the weights of P and Q in twice its derivative by the Gram; all in float64."""
    a, b = tl.sqrt(pp), tl.sqrt(qq)
    ab = a * b
    den = ab + eps
    none = (a == 0) | (n == 1)  # for a single row, P and Q are rounding errors
    of_p = tl.where(none, 0.0, 2.0 * pq * b / (tl.where(none, 1.0, a) * den * den))
    return (ab - pq + eps) / den, of_p, tl.where((b == 0) | (n == 1), 0.0, -2.0 / den)


@triton.jit
def to_half(W, scale, dtype: tl.constexpr):
    """W_ij / |x_j| in half precision, and the factor of each row that float16's range asks for."""
    weights = W * scale[None, :]
    gain = tl.max(tl.abs(weights), 1) / 16384.0
    gain = tl.where(gain == 0, 1.0, gain) if dtype == tl.float16 else tl.zeros_like(gain) + 1.0
    return (weights / gain[:, None]).to(dtype), gain


@triton.jit
def finish_rows(pulled, b_x, scale, project, along):
    """The gradient by x from that by u, for half-precision rows."""
    b_u = b_x.to(tl.float32) * scale[:, None]
    return (pulled - b_u * tl.where(project, along, 0.0)[:, None]) * scale[:, None]


@triton.jit
def finish_centred(pulled, b_v, centre, scale, project, along, total):
    """The same for float32 rows: pulled is sum_j W_ij v_j, and on the sphere -v is what is left of sum_j W_ij c."""
    of_v, of_c = tl.where(project, -total, 0.0), tl.where(project, 0.0, total)
    b_u = b_v + centre[None, :]
    pulled += of_v[:, None] * b_v + of_c[:, None] * centre[None, :]
    return (pulled - b_u * tl.where(project, along, 0.0)[:, None]) * scale[:, None]


@triton.jit
def store_gradient(out_ptr, row_stride, o_r, m_r, o_d, R, D, grad, ADD: tl.constexpr):
    at = out_ptr + o_r.to(tl.int64)[:, None] * row_stride + o_d[None, :]
    inside = (o_r < R)[:, None] & (o_d < D)[None, :]
    grad = tl.where(m_r[:, None], grad, 0.0)
    if ADD:
        grad += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, grad.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def scales_of(saved, side, G, R, group):
    """Where 1 / |x| of a group's rows begins; its second part begins G R further on."""
    return saved + 4 * G + (2 * side * G + group) * R


@triton.jit
def centre_of(saved, side, G, R, group, D_s, D_t):
    return saved + 4 * G * (1 + R) + group * (D_s + D_t) + side * D_s


@triton.jit
def rows_of_side(
    x_ptr, row_stride, saved, side, sums_ptr, G, R, group, o_r, m_r, D,
    NORMALIZE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Stores the scales of some rows, and the sum of the scaled rows."""
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
    """1 / |x| of ROWS rows of a group, for both sides, and the sums of the scaled rows."""
    D_s, D_t, s_group, s_row, t_group, t_row = aligned((D_s, D_t, s_group, s_row, t_group, t_row))
    program = tl.program_id(0).to(tl.int64)
    unit = program // blocks
    pair, group = unit // G, unit % G
    if mask_ptr is not None:
        mask_ptr += group * m_group
    n = count_valid(mask_ptr, m_row, R, ENOUGH)
    o_r = (program % blocks) * ROWS + tl.arange(0, ROWS)
    m_r = valid_rows(mask_ptr, m_row, o_r, R, n)
    saved_ptr = pick(saved, pair)
    s_ptr, t_ptr = pick(students, pair) + group * s_group, pick(teachers, pair) + group * t_group
    rows_of_side(s_ptr, s_row, saved_ptr, 0, sums_s + program * D_s, G, R, group, o_r, m_r, D_s, NORMALIZE, BLOCK_D)
    rows_of_side(t_ptr, t_row, saved_ptr, 1, sums_t + program * D_t, G, R, group, o_r, m_r, D_t, NORMALIZE, BLOCK_D)


@triton.jit
def means_kernel(
    saved, levels_ptr, sums_s, sums_t, mask_ptr, G, R, D_s, D_t, m_group, m_row, blocks,
    HALF_S: tl.constexpr, HALF_T: tl.constexpr, ENOUGH: tl.constexpr, PER_ROW: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The mean row c of one side of one group, and |c|², the mean of the Gram. Tiles of float32 rows have it subtracted: for
    them the saved mean is 0, and |c|² goes to levels_ptr."""
    program = tl.program_id(0).to(tl.int64)
    unit, of_t = program // 2, program % 2
    pair, group = unit // G, unit % G
    if mask_ptr is not None:
        mask_ptr += group * m_group
    n = count_valid(mask_ptr, m_row, R, ENOUGH)
    saved_ptr = pick(saved, pair)
    if PER_ROW:  # rows of zeros have no part in c
        for start in range(0, R, 256):
            scale, low, _ = load_scales(saved_ptr, of_t, G, R, group, start + tl.arange(0, 256))
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
            inside = (o_b < blocks)[:, None] & (o_d < D)[None, :]
            at = o_b.to(tl.int64)[:, None] * D + o_d[None, :]
            total += tl.sum(tl.load(sums_ptr + at, mask=inside, other=0.0), 0)
        centre = total / n
        square += centre.to(tl.float64) * centre
        tl.store(centre_of(saved_ptr, of_t, G, R, group, D_s, D_t) + o_d, centre, mask=o_d < D)
    level = tl.sum(square, 0)
    tl.store(saved_ptr + group * 4 + of_t, tl.where(half, level, 0.0).to(tl.float32))
    if levels_ptr is not None:
        tl.store(levels_ptr + program, tl.where(half, 0.0, level))


@triton.jit
def load_scales(saved, side, G, R, group, o_r):
    """The two parts of 1 / |x|, and which rows are valid: those where it is not 0."""
    at = scales_of(saved, side, G, R, group) + o_r
    scale = tl.load(at, mask=o_r < R, other=0.0)
    return scale, tl.load(at + G * R, mask=o_r < R, other=0.0), scale != 0


@triton.jit
def tile(
    x_ptr, row_stride, saved, side, G, R, group, o_i, o_j, D, D_s, D_t, PER_ROW: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """<u_i, u_j> of one side at rows o_i and columns o_j, less |c|² for float32 rows; and Rows of o_i and of o_j. PER_ROW: v of
    a row of zeros is 0, and c has no part of it."""
    scale_i, low_i, m_i = load_scales(saved, side, G, R, group, o_i)
    scale_j, low_j, m_j = load_scales(saved, side, G, R, group, o_j)
    live_i, live_j = scale_i + low_i != 0, scale_j + low_j != 0
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    if x_ptr.dtype.element_ty.primitive_bitwidth == 16:
        for k in range(0, D, BLOCK_D):
            o_d = k + tl.arange(0, BLOCK_D)
            b_i = load_rows(x_ptr, row_stride, o_i, m_i, o_d, D)
            b_j = load_rows(x_ptr, row_stride, o_j, m_j, o_d, D)
            acc = product(b_i, tl.trans(b_j), acc)
        base = acc * (scale_i[:, None] * scale_j[None, :])
        rows = Rows(m_i, live_i, scale_i, low_i, scale_i, scale_i)
        return base, rows, Rows(m_j, live_j, scale_j, low_j, scale_j, scale_j)
    else:
        onto_i, onto_j = tl.zeros([BLOCK, BLOCK_D], tl.float32), tl.zeros([BLOCK, BLOCK_D], tl.float32)
        own_i, own_j = tl.zeros([BLOCK, BLOCK_D], tl.float32), tl.zeros([BLOCK, BLOCK_D], tl.float32)
        square = tl.zeros([BLOCK_D], tl.float32)
        moved_i, moved_j = (live_i, live_j) if PER_ROW else (m_i, m_j)
        c_ptr = centre_of(saved, side, G, R, group, D_s, D_t)
        for k in range(0, D, BLOCK_D):
            o_d = k + tl.arange(0, BLOCK_D)
            centre = tl.load(c_ptr + o_d, mask=o_d < D, other=0.0)
            v_i = centred(load_rows(x_ptr, row_stride, o_i, m_i, o_d, D), scale_i, low_i, centre, moved_i)
            v_j = centred(load_rows(x_ptr, row_stride, o_j, m_j, o_d, D), scale_j, low_j, centre, moved_j)
            square += centre * centre
            onto_i += v_i * centre[None, :]
            onto_j += v_j * centre[None, :]
            own_i += v_i * (v_i + centre[None, :])
            own_j += v_j * (v_j + centre[None, :])
            acc = product(v_i, tl.trans(v_j), acc)
        rows = Rows(m_i, live_i, scale_i, low_i, tl.sum(onto_i, 1), tl.sum(own_i, 1))
        columns = Rows(m_j, live_j, scale_j, low_j, tl.sum(onto_j, 1), tl.sum(own_j, 1))
        base = acc + (rows.onto[:, None] + columns.onto[None, :])
        if PER_ROW:
            base = tl.where(live_i[:, None] & live_j[None, :], base, -tl.sum(square, 0))
        return base, rows, columns


def longest(half: bool) -> int:
    """Rows of the longest group that stays in cache; half: both sides are bfloat16 or float16."""
    return 128 if half else 64


@functools.cache
def geometry(rows: int, half: bool, per_row: bool = False) -> dict:
    """Launch options of a program that makes a tile of both Grams; per_row statistics leave registers for a smaller one."""
    block = min(max(16, triton.next_power_of_2(rows)), 64 if per_row else longest(half))
    launch = {"BLOCK": block, "BLOCK_D": 64, "num_warps": 8 if block > 64 else 4, "num_stages": 3}
    launch = launch if half else {"BLOCK": block, "BLOCK_D": 16, "num_warps": 8, "num_stages": 1}
    return launch | {"enable_fp_fusion": True}
