"""gram of tiled groups: lengths and means first, then a program per tile of both Gram matrices, then one per group.

kernels/gram/launch.py has the maths. Of the symmetric matrices only the tiles on and above the diagonal are computed. The
backward computes them again, turns them into W and stores it, in half precision if the rows are; then W times the rows is a
batched product. W alone has the size of a Gram, and is made for as many groups, or as many rows of one, as BUDGET holds.
"""

import torch
import triton
import triton.language as tl

from . import row_stats
from .row_stats import side_of_weights
from .rows import (
    LEAST_NORM,
    ROWS,
    aligned,
    centre_of,
    centred,
    conclude,
    count_valid,
    finish_centred,
    finish_rows,
    geometry,
    load_rows,
    load_scales,
    means_kernel,
    pick,
    product,
    rows_kernel,
    store_gradient,
    tile,
    to_half,
)

BUDGET = 64 << 20  # bytes of W at a time
SPILL_LIMIT = {"moments_kernel": 16, "conclude_kernel": 0, "weights_kernel": 232, "pull_kernel": 0}  # bytes per thread


@triton.jit
def place_of(place, tiles):
    """Row and column of the place-th tile on or above the diagonal, row by row."""
    i = (((2 * tiles + 1) - tl.sqrt(((2 * tiles + 1) * (2 * tiles + 1) - 8 * place).to(tl.float64))) * 0.5).to(tl.int64)
    i = tl.where(i * tiles - i * (i - 1) // 2 > place, i - 1, i)
    i = tl.where((i + 1) * tiles - i * (i + 1) // 2 <= place, i + 1, i)
    return i, i + place - (i * tiles - i * (i - 1) // 2)


@triton.jit
def moments_kernel(
    students, teachers, saved, partial_ptr, G, R, D_s, D_t, s_group, s_row, t_group, t_row, tiles, places,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile's sums of P, Q, P P, Q Q and P Q, twice if it is above the diagonal."""
    D_s, D_t, s_group, s_row, t_group, t_row = aligned((D_s, D_t, s_group, s_row, t_group, t_row))
    program = tl.program_id(0).to(tl.int64)
    unit = program // places
    pair, group = unit // G, unit % G
    i, j = place_of(program % places, tiles)
    o_i, o_j = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    saved_ptr = pick(saved, pair)
    s_ptr, t_ptr = pick(students, pair) + group * s_group, pick(teachers, pair) + group * t_group
    Q, rows, columns = tile(t_ptr, t_row, saved_ptr, 1, G, R, group, o_i, o_j, D_t, D_s, D_t, False, BLOCK, BLOCK_D)
    both = rows.valid[:, None] & columns.valid[None, :]
    Q = tl.where(both, Q - tl.load(saved_ptr + group * 4 + 1), 0.0)
    P, _, _ = tile(s_ptr, s_row, saved_ptr, 0, G, R, group, o_i, o_j, D_s, D_s, D_t, False, BLOCK, BLOCK_D)
    P = tl.where(both, P - tl.load(saved_ptr + group * 4), 0.0)
    twice = tl.where(i == j, 1.0, 2.0)
    partial_ptr += program * 5
    tl.store(partial_ptr, twice * tl.sum(tl.sum(P, 1), 0))
    tl.store(partial_ptr + 1, twice * tl.sum(tl.sum(Q, 1), 0))
    tl.store(partial_ptr + 2, twice * tl.sum(tl.sum(P * P, 1), 0))
    tl.store(partial_ptr + 3, twice * tl.sum(tl.sum(Q * Q, 1), 0))
    tl.store(partial_ptr + 4, twice * tl.sum(tl.sum(P * Q, 1), 0))


@triton.jit
def total(partial_ptr, which, places, BLOCK: tl.constexpr):
    """One of the five sums, over all tiles of a group."""
    sums = tl.zeros([BLOCK], tl.float64)
    for start in range(0, places, BLOCK):
        o = start + tl.arange(0, BLOCK).to(tl.int64)
        sums += tl.load(partial_ptr + o * 5 + which, mask=o < places, other=0.0).to(tl.float64)
    return tl.sum(sums, 0)


@triton.jit
def conclude_kernel(
    saved, values, valids, partial_ptr, mask_ptr, G, R, m_group, m_row, places, eps,
    ENOUGH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One group: its tiles' sums in a fixed order, 1 - rho, and what the backward needs of it."""
    unit = tl.program_id(0).to(tl.int64)
    pair, group = unit // G, unit % G
    if mask_ptr is not None:
        mask_ptr += group * m_group
    n = count_valid(mask_ptr, m_row, R, ENOUGH)
    entries = tl.maximum(n, 1).to(tl.float64)
    entries *= entries
    stats_ptr = pick(saved, pair) + group * 4
    partial_ptr += unit * places * 5
    mean_p, mean_q = total(partial_ptr, 0, places, BLOCK) / entries, total(partial_ptr, 1, places, BLOCK) / entries
    pp = total(partial_ptr, 2, places, BLOCK) - entries * mean_p * mean_p  # these means are rounding errors
    qq = total(partial_ptr, 3, places, BLOCK) - entries * mean_q * mean_q
    pq = total(partial_ptr, 4, places, BLOCK) - entries * mean_p * mean_q
    value, of_p, of_q = conclude(tl.where(pp < 0, 0.0, pp), tl.where(qq < 0, 0.0, qq), pq, n, eps)
    tl.store(pick(values, pair) + group, tl.where(n > 0, value, 0.0).to(tl.float32))
    tl.store(pick(valids, pair) + group, (n > 0).to(tl.uint8))
    tl.store(stats_ptr, (tl.load(stats_ptr) + mean_p).to(tl.float32))
    tl.store(stats_ptr + 1, (tl.load(stats_ptr + 1) + mean_q).to(tl.float32))
    tl.store(stats_ptr + 2, tl.where(n > 0, of_p, 0.0).to(tl.float32))
    tl.store(stats_ptr + 3, tl.where(n > 0, of_q, 0.0).to(tl.float32))


@triton.jit
def store_weights(
    W, base, rows, columns, weights_ptr, slots_ptr, o_i, o_j, first, R, stride, slot, PER_ROW: tl.constexpr
):
    """Stores a tile of W as the product will read it, and per row what it adds to <u, gradient> and to W's sum, or its gain.
    The weights of a row of zeros, up to 1 / eps and 1e12 for its length, would round the others away."""
    DTYPE: tl.constexpr = weights_ptr.dtype.element_ty
    if DTYPE.primitive_bitwidth == 16 or PER_ROW:
        W = tl.where(columns.live[None, :], W, 0.0)
    if DTYPE.primitive_bitwidth == 16:
        weights, factor = to_half(W, columns.scale, DTYPE)
        length = 1.0 / tl.where(columns.scale == 0, 1.0, columns.scale)
        along = tl.sum(weights.to(tl.float32) * length[None, :] * base, 1) * factor
    else:
        weights, factor = W, tl.sum(W, 1)
        along = tl.sum(W * base, 1) - factor * (rows.onto + rows.own)
    at = (o_i - first)[:, None] * stride + o_j[None, :]
    tl.store(weights_ptr + at, weights, mask=(o_i < R)[:, None] & (o_j < R)[None, :])
    tl.store(slots_ptr + slot * 2 * R + o_i, along, mask=o_i < R)
    tl.store(slots_ptr + (slot * 2 + 1) * R + o_i, factor, mask=o_i < R)


@triton.jit
def weights_kernel(
    students, teachers, grads, saved, weights_ptr, slots_ptr, first_unit, first_tile, G, R, D_s, D_t,
    s_group, s_row, t_group, t_row, stride, height, tiles, places,
    PER_ROW: tl.constexpr, OFFICIAL: tl.constexpr, SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of W. SYMMETRIC: and its transpose; otherwise every tile of the rows from first_tile on has a program."""
    D_s, D_t, s_group, s_row, t_group, t_row = aligned((D_s, D_t, s_group, s_row, t_group, t_row))
    program = tl.program_id(0).to(tl.int64)
    here = program // places
    unit = first_unit + here
    pair, group = unit // G, unit % G
    if SYMMETRIC:
        i, j = place_of(program % places, tiles)
    else:
        i, j = first_tile + program % places // tiles, program % places % tiles
    o_i, o_j = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    saved_ptr = pick(saved, pair)
    s_ptr, t_ptr = pick(students, pair) + group * s_group, pick(teachers, pair) + group * t_group
    Q, rows, columns = tile(t_ptr, t_row, saved_ptr, 1, G, R, group, o_i, o_j, D_t, D_s, D_t, PER_ROW, BLOCK, BLOCK_D)
    both = rows.valid[:, None] & columns.valid[None, :]
    up_ptr, stats_ptr = pick(grads, pair), saved_ptr + group * 4
    if PER_ROW:
        W = side_of_weights(Q, saved_ptr, 1, up_ptr, G, R, group, o_i, o_j, D_s, D_t, OFFICIAL)
    else:
        W = (tl.load(stats_ptr + 3) * tl.load(up_ptr + group)) * (Q - tl.load(stats_ptr + 1))
    P, rows, columns = tile(s_ptr, s_row, saved_ptr, 0, G, R, group, o_i, o_j, D_s, D_s, D_t, PER_ROW, BLOCK, BLOCK_D)
    if PER_ROW:
        W += side_of_weights(P, saved_ptr, 0, up_ptr, G, R, group, o_i, o_j, D_s, D_t, OFFICIAL)
    else:
        W += (tl.load(stats_ptr + 2) * tl.load(up_ptr + group)) * (P - tl.load(stats_ptr))
    W, P = tl.where(both, W, 0.0), tl.where(both, P, 0.0)
    weights_ptr += here * height * stride
    slots_ptr += here * tiles * 2 * R
    first = first_tile * BLOCK
    store_weights(W, P, rows, columns, weights_ptr, slots_ptr, o_i, o_j, first, R, stride, j, PER_ROW)
    if SYMMETRIC:  # noqa: SIM102 (known when compiled; the other when run)
        if i != j:
            W, P = tl.trans(W), tl.trans(P)
            store_weights(W, P, columns, rows, weights_ptr, slots_ptr, o_j, o_i, first, R, stride, i, PER_ROW)


@triton.jit
def pull_kernel(
    students, outputs, saved, weights_ptr, slots_ptr, first_unit, first_tile, G, R, D_s, D_t, s_group, s_row,
    out_group, out_row, stride, height, tiles, row_tiles, columns,
    ADD: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK rows and BLOCK_D columns of the gradient, from W times the rows."""
    D_s, D_t, s_group, s_row, out_group, out_row = aligned((D_s, D_t, s_group, s_row, out_group, out_row))
    program = tl.program_id(0).to(tl.int64)
    here = program // (row_tiles * columns)
    unit = first_unit + here
    pair, group = unit // G, unit % G
    of_strip = program // columns % row_tiles
    o_w = of_strip * BLOCK + tl.arange(0, BLOCK)
    o_i = first_tile * BLOCK + o_w
    o_d = (program % columns) * BLOCK_D + tl.arange(0, BLOCK_D)
    saved_ptr = pick(saved, pair)
    s_ptr = pick(students, pair) + group * s_group
    HALF: tl.constexpr = s_ptr.dtype.element_ty.primitive_bitwidth == 16
    GAIN: tl.constexpr = s_ptr.dtype.element_ty == tl.float16
    weights_ptr += here * height * stride
    slots_ptr += here * tiles * 2 * R
    scale, low, m_i = load_scales(saved_ptr, 0, G, R, group, o_i)
    along, factor = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for slot in range(0, tiles):
        along += tl.load(slots_ptr + slot * 2 * R + o_i, mask=o_i < R, other=0.0)
        factor += tl.load(slots_ptr + (slot * 2 + 1) * R + o_i, mask=o_i < R, other=0.0)
    if not HALF:
        centre = tl.load(centre_of(saved_ptr, 0, G, R, group, D_s, D_t) + o_d, mask=o_d < D_s, other=0.0)
    pulled = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for start in range(0, R, BLOCK_J):
        o_j = start + tl.arange(0, BLOCK_J)
        at = o_w[:, None] * stride + o_j[None, :]
        b_w = tl.load(weights_ptr + at, mask=(o_i < R)[:, None] & (o_j < R)[None, :], other=0.0)
        scale_j, low_j, m_j = load_scales(saved_ptr, 0, G, R, group, o_j)
        b_j = load_rows(s_ptr, s_row, o_j, m_j, o_d, D_s)
        if not HALF:
            b_j = centred(b_j, scale_j, low_j, centre, m_j)
        if GAIN:
            gain = tl.load(slots_ptr + (start // BLOCK * 2 + 1) * R + o_i, mask=o_i < R, other=0.0)
            pulled += product(b_w, b_j, tl.zeros([BLOCK, BLOCK_D], tl.float32)) * gain[:, None]
        else:
            pulled = product(b_w, b_j, pulled)
    b_x = load_rows(s_ptr, s_row, o_i, m_i, o_d, D_s)
    project = m_i & NORMALIZE & (scale < 1.0 / LEAST_NORM)
    if HALF:
        grad = finish_rows(pulled, b_x, scale, project, along)
    else:
        grad = finish_centred(pulled, centred(b_x, scale, low, centre, m_i), centre, scale, project, along, factor)
    out_ptr = pick(outputs, pair) + group * out_group
    store_gradient(out_ptr, out_row, o_i, m_i, o_d, R, D_s, grad, ADD)


def pull_geometry(shape: dict, half: bool) -> dict:
    """Launch options of pull_kernel from those of the tiles, `shape`."""
    inner, columns = (64, 128) if half else (32, 64)
    if shape["BLOCK"] <= 32:
        shape = shape | {"num_warps": 4}
    return shape | {"BLOCK_J": min(inner, shape["BLOCK"]), "BLOCK_D": columns}


def saved_size(groups: int, rows: int, width_s: int, width_t: int, per_row: bool) -> int:
    return groups * (4 + (8 if per_row else 4) * rows + width_s + width_t)


def forward(launch, out: tuple, normalize: bool, eps: float) -> tuple:
    """Writes values and valid; returns what is saved, one tensor per pair."""
    like, units = launch.students[0], launch.units
    empty = lambda *size, dtype=torch.float32: torch.empty(size, dtype=dtype, device=like.device)  # noqa: E731
    saved = tuple(empty(saved_size(*launch.sizes(), launch.per_row)) for _ in launch.places)
    blocks, shape = triton.cdiv(launch.rows, ROWS.value), geometry(launch.rows, launch.half, launch.per_row)
    sums = tuple(empty(units, blocks, width) for width in launch.widths)
    levels = empty(units, 2, dtype=torch.float64) if launch.official else None
    mask = launch.mask, *launch.sizes()
    rows_kernel[(units * blocks,)](
        launch.students, launch.teachers, saved, *sums, *mask, *launch.strides, *launch.mask_strides, blocks,
        ENOUGH=launch.enough, NORMALIZE=normalize, BLOCK_D=128, num_warps=4,
    )  # fmt: skip
    means_kernel[(2 * units,)](
        saved, levels, *sums, *mask, *launch.mask_strides, blocks, HALF_S=launch.students[0].element_size() == 2,
        HALF_T=launch.teachers[0].element_size() == 2, ENOUGH=launch.enough,
        PER_ROW=launch.per_row, BLOCK=16, BLOCK_D=128, num_warps=4,
    )  # fmt: skip
    if launch.per_row:
        row_stats.forward(launch, saved, levels, out, shape, normalize, eps)
        return saved
    tiles = triton.cdiv(launch.rows, shape["BLOCK"])
    places = tiles * (tiles + 1) // 2
    partial = empty(units, places, 5)
    moments_kernel[(units * places,)](
        launch.students, launch.teachers, saved, partial, *launch.sizes(), *launch.strides, tiles, places, **shape
    )
    conclude_kernel[(units,)](
        saved, *out, partial, launch.mask, launch.groups, launch.rows, *launch.mask_strides, places, eps,
        ENOUGH=launch.enough, BLOCK=128, num_warps=4,
    )  # fmt: skip
    return saved


def strips(units: int, rows: int, block: int, row_bytes: int):
    """(first group, groups, first tile, tiles) such that each W fits into BUDGET: of some groups, or of some rows of one."""
    tiles = triton.cdiv(rows, block)
    together = BUDGET // (tiles * block * row_bytes)
    if together:
        for unit in range(0, units, together):
            yield unit, min(together, units - unit), 0, tiles
        return
    step = max(1, BUDGET // (block * row_bytes))
    for unit in range(units):
        for tile_row in range(0, tiles, step):
            yield unit, 1, tile_row, min(step, tiles - tile_row)


def backward(
    launch, grads: tuple, saved: tuple, outputs: tuple, out_strides: tuple, add: bool, normalize: bool
) -> None:
    _, R, D_s, _ = launch.sizes()
    x, shape = launch.students[0], geometry(R, launch.half, launch.per_row)
    pull = pull_geometry(shape, launch.half)
    block, stride = shape["BLOCK"], triton.cdiv(R, 16) * 16
    tiles, columns = triton.cdiv(R, block), triton.cdiv(D_s, pull["BLOCK_D"])
    for unit, units, first, height in strips(launch.units, R, block, stride * x.element_size()):
        symmetric = height == tiles
        weights = torch.empty((units, height * block, stride), dtype=x.dtype, device=x.device)
        slots = torch.empty((units, tiles, 2, R), dtype=torch.float32, device=x.device)
        places = tiles * (tiles + 1) // 2 if symmetric else height * tiles
        weights_kernel[(units * places,)](
            launch.students, launch.teachers, grads, saved, weights, slots, unit, first, *launch.sizes(), *launch.strides,
            stride, height * block, tiles, places, PER_ROW=launch.per_row, OFFICIAL=launch.official, SYMMETRIC=symmetric, **shape,
        )  # fmt: skip
        pull_kernel[(units * height * columns,)](
            launch.students, outputs, saved, weights, slots, unit, first, *launch.sizes(), *launch.of_student,
            *out_strides, stride, height * block, tiles, height, columns,
            ADD=add, NORMALIZE=normalize, **pull,
        )  # fmt: skip
