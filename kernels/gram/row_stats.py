"""gram of tiled groups where a correlation is not of a whole Gram: of each of its rows (pearson="row"), or of rows of many
Grams (grouping="official").

Row i of D is a row of P and one of Q, each less its own mean, times its own weights, and W = D + Dᵀ. kernels/gram/launch.py
has the maths. Official: row n R + a of the buffer [G, R, R] belongs to value (n R + a) // G, so that what is correlated has
the means of many Grams. Float32 tiles have these means subtracted; they are added back here, in float64.

Saved in addition to what tiled groups save: per row [mean P, mean Q, weight of P, weight of Q], each for all rows of a pair.
"""

import torch
import triton
import triton.language as tl

from .rows import aligned, conclude, load_scales, pick, tile, without_mean

# Bytes of stack per thread. row_stats_kernel has 24 on sm_80, since it finds rows of zeros after its loop.
SPILL_LIMIT = {"row_stats_kernel": 24, "official_kernel": 0}


@triton.jit
def row_stats_of(saved, G, R, D_s, D_t):
    return saved + 4 * G * (1 + R) + G * (D_s + D_t)


@triton.jit
def store_row_stats(saved, G, R, D_s, D_t, o_row, inside, valid, mean_p, mean_q, of_p, of_q):
    """Weights are halved, since W = D + Dᵀ."""
    at = row_stats_of(saved, G, R, D_s, D_t) + o_row
    tl.store(at, mean_p.to(tl.float32), mask=inside)
    tl.store(at + G * R, mean_q.to(tl.float32), mask=inside)
    tl.store(at + 2 * G * R, tl.where(valid, 0.5 * of_p, 0.0).to(tl.float32), mask=inside)
    tl.store(at + 3 * G * R, tl.where(valid, 0.5 * of_q, 0.0).to(tl.float32), mask=inside)


@triton.jit
def load_row_stats(saved, side, grads_ptr, G, R, group, o_r, D_s, D_t, OFFICIAL: tl.constexpr):
    """The mean of some rows of one side's Gram, and their weight times the upstream gradient."""
    inside, o_row = o_r < R, group * R + o_r
    at = row_stats_of(saved, G, R, D_s, D_t) + side * G * R + o_row
    if OFFICIAL:
        up = tl.load(grads_ptr + o_row // G, mask=inside, other=0.0)
    else:
        up = tl.load(grads_ptr + o_row, mask=inside, other=0.0)
    return tl.load(at, mask=inside, other=0.0), up * tl.load(at + 2 * G * R, mask=inside, other=0.0)


@triton.jit
def side_of_weights(base, saved, side, grads_ptr, G, R, group, o_i, o_j, D_s, D_t, OFFICIAL: tl.constexpr):
    """One side's part of a tile of W."""
    mean_i, of_i = load_row_stats(saved, side, grads_ptr, G, R, group, o_i, D_s, D_t, OFFICIAL)
    mean_j, of_j = load_row_stats(saved, side, grads_ptr, G, R, group, o_j, D_s, D_t, OFFICIAL)
    return of_i[:, None] * (base - mean_i[:, None]) + of_j[None, :] * (base - mean_j[None, :])


@triton.jit
def row_stats_kernel(
    students, teachers, saved, values, valids, moments_ptr, G, R, D_s, D_t, s_group, s_row, t_group, t_row, tiles, eps,
    OFFICIAL: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK rows of a group's P and Q: the number of valid entries, their means and sums of products about these, tile by
    tile; for pearson="row" also 1 - rho, and what the backward needs."""
    D_s, D_t, s_group, s_row, t_group, t_row = aligned((D_s, D_t, s_group, s_row, t_group, t_row))
    program = tl.program_id(0).to(tl.int64)
    unit = program // tiles
    pair, group = unit // G, unit % G
    o_i = (program % tiles) * BLOCK + tl.arange(0, BLOCK)
    saved_ptr = pick(saved, pair)
    s_ptr, t_ptr = pick(students, pair) + group * s_group, pick(teachers, pair) + group * t_group
    shift_p, shift_q = tl.load(saved_ptr + group * 4), tl.load(saved_ptr + group * 4 + 1)
    n = tl.full([], 0, tl.int32)
    mean_p, mean_q = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    pp, qq, pq = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for start in range(0, R, BLOCK):
        o_j = start + tl.arange(0, BLOCK)
        Q, rows, columns = tile(t_ptr, t_row, saved_ptr, 1, G, R, group, o_i, o_j, D_t, D_s, D_t, True, BLOCK, BLOCK_D)
        more = tl.sum(columns.valid.to(tl.int32), 0)
        both, entries = rows.valid[:, None] & columns.valid[None, :], tl.maximum(more, 1)
        Q, here_q = without_mean(Q - shift_q, both, entries, True)
        P, _, _ = tile(s_ptr, s_row, saved_ptr, 0, G, R, group, o_i, o_j, D_s, D_s, D_t, True, BLOCK, BLOCK_D)
        P, here_p = without_mean(P - shift_p, both, entries, True)
        weight = more.to(tl.float64) / tl.maximum(n + more, 1)
        to_p, to_q = here_p - mean_p, here_q - mean_q
        pp += tl.sum(P * P, 1) + to_p * to_p * (weight * n)
        qq += tl.sum(Q * Q, 1) + to_q * to_q * (weight * n)
        pq += tl.sum(P * Q, 1) + to_p * to_q * (weight * n)
        mean_p += to_p * weight
        mean_q += to_q * weight
        n += more
    scale_s, low_s, valid = load_scales(saved_ptr, 0, G, R, group, o_i)
    scale_t, low_t, _ = load_scales(saved_ptr, 1, G, R, group, o_i)
    live_s, live_t = scale_s + low_s != 0, scale_t + low_t != 0
    pp, qq = tl.where(live_s, pp, 0.0), tl.where(live_t, qq, 0.0)  # for a row of zeros they are rounding errors
    pq = tl.where(live_s & live_t, pq, 0.0)
    inside, o_row = o_i < R, group * R + o_i
    mean_p += shift_p
    mean_q += shift_q
    if OFFICIAL:
        at = moments_ptr + pair * 6 * G * R + o_row
        tl.store(at, tl.where(valid, n, 0).to(tl.float64), mask=inside)
        tl.store(at + G * R, mean_p, mask=inside)
        tl.store(at + 2 * G * R, mean_q, mask=inside)
        tl.store(at + 3 * G * R, pp, mask=inside)
        tl.store(at + 4 * G * R, qq, mask=inside)
        tl.store(at + 5 * G * R, pq, mask=inside)
    else:
        value, of_p, of_q = conclude(pp, qq, pq, n, eps)
        tl.store(pick(values, pair) + o_row, tl.where(valid, value, 0.0).to(tl.float32), mask=inside)
        tl.store(pick(valids, pair) + o_row, valid.to(tl.uint8), mask=inside)
        store_row_stats(saved_ptr, G, R, D_s, D_t, o_row, inside, valid, mean_p, mean_q, of_p, of_q)


@triton.jit
def load_moments(moments_ptr, levels_ptr, G, R, first, o, inside):
    """Of some rows of a value: the number of valid entries, and their means, those of the Grams included."""
    at, group = moments_ptr + first + o, (first + o) // R
    count = tl.load(at, mask=inside, other=0.0)
    mean_p = tl.load(at + G * R, mask=inside, other=0.0) + tl.load(levels_ptr + group * 2, mask=inside, other=0.0)
    mean_q = tl.load(at + 2 * G * R, mask=inside, other=0.0) + tl.load(
        levels_ptr + group * 2 + 1, mask=inside, other=0.0
    )
    return count, mean_p, mean_q


@triton.jit
def official_kernel(
    saved, values, valids, moments_ptr, levels_ptr, G, R, D_s, D_t, eps, NORMALIZE: tl.constexpr, BLOCK: tl.constexpr
):
    """One value: G rows of the buffer, one correlation."""
    program = tl.program_id(0).to(tl.int64)
    pair, value_at = program // R, program % R
    first = value_at * G
    moments_ptr += pair * 6 * G * R
    levels_ptr += pair * G * 2
    entries, sum_p, sum_q = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for start in range(0, G, BLOCK):
        o = start + tl.arange(0, BLOCK)
        count, mean_p, mean_q = load_moments(moments_ptr, levels_ptr, G, R, first, o, o < G)
        entries += count
        sum_p += count * mean_p
        sum_q += count * mean_q
    n = tl.sum(entries, 0)
    all_p, all_q = tl.sum(sum_p, 0) / tl.maximum(n, 1.0), tl.sum(sum_q, 0) / tl.maximum(n, 1.0)
    pp, qq, pq = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for start in range(0, G, BLOCK):
        o = start + tl.arange(0, BLOCK)
        inside, at = o < G, moments_ptr + first + o
        count, mean_p, mean_q = load_moments(moments_ptr, levels_ptr, G, R, first, o, inside)
        to_p, to_q = mean_p - all_p, mean_q - all_q
        pp += count * to_p * to_p + tl.load(at + 3 * G * R, mask=inside, other=0.0)
        qq += count * to_q * to_q + tl.load(at + 4 * G * R, mask=inside, other=0.0)
        pq += count * to_p * to_q + tl.load(at + 5 * G * R, mask=inside, other=0.0)
    alone = tl.where(NORMALIZE & (R == 1), 1, 2)  # for a single sequence all entries are 1
    value, of_p, of_q = conclude(tl.sum(pp, 0), tl.sum(qq, 0), tl.sum(pq, 0), alone, eps)
    tl.store(pick(values, pair) + value_at, tl.where(n > 0, value, 0.0).to(tl.float32))
    tl.store(pick(valids, pair) + value_at, (n > 0).to(tl.uint8))
    for start in range(0, G, BLOCK):
        o = start + tl.arange(0, BLOCK)
        inside, group = o < G, (first + o) // R
        count, _, _ = load_moments(moments_ptr, levels_ptr, G, R, first, o, inside)
        less_p = all_p - tl.load(levels_ptr + group * 2, mask=inside, other=0.0)
        less_q = all_q - tl.load(levels_ptr + group * 2 + 1, mask=inside, other=0.0)
        store_row_stats(pick(saved, pair), G, R, D_s, D_t, first + o, inside, count > 0, less_p, less_q, of_p, of_q)


def forward(launch, saved: tuple, levels: torch.Tensor | None, out: tuple, shape: dict, normalize: bool, eps: float):
    """levels [units, 2]: the means subtracted from P and Q of every group; None for pearson="row"."""
    moments, tiles = None, triton.cdiv(launch.rows, shape["BLOCK"])
    if launch.official:
        size = (len(launch.places), 6, launch.groups, launch.rows)
        moments = torch.empty(size, dtype=torch.float64, device=launch.students[0].device)
    row_stats_kernel[(launch.units * tiles,)](
        launch.students, launch.teachers, saved, *out, moments, *launch.sizes(), *launch.strides, tiles, eps,
        OFFICIAL=launch.official, **shape,
    )  # fmt: skip
    if launch.official:
        official_kernel[(launch.rows * len(launch.places),)](
            saved, *out, moments, levels, *launch.sizes(), eps, NORMALIZE=normalize, BLOCK=128, num_warps=4
        )
