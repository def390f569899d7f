"""gram where a correlation is not of a whole Gram: of each of its lines (row by row), or of lines of many Grams (official).

Line i of D is a line of P and one of Q, each less its own mean, times its own numbers, and W = D + Dᵀ. kernels/gram/launch.py has
the maths. Official: line n R + a of the buffer [G, R, R] belongs to value (n R + a) // G, so that what is correlated has the
means of many Grams; where rows are float32 these were left out of P and Q, and come back here, in float64.

Saved beside what longer groups save: of every line [mean P, mean Q, of P, of Q], each for all lines of a pair.
"""

import torch
import triton
import triton.language as tl

from .rows import aligned, conclude, load_scales, not_zero, pick, tile, without_mean

# Bytes of stack per thread. lines_kernel: 24 on sm_80 since rows of zeros are told apart after its loop, 16 before.
SPILL_LIMIT = {"lines_kernel": 24, "official_kernel": 0}


@triton.jit
def lines_of(saved, G, R, D_s, D_t):
    return saved + 4 * G * (1 + R) + G * (D_s + D_t)


@triton.jit
def keep_lines(saved, G, R, D_s, D_t, lines, there, counts, mean_p, mean_q, of_p, of_q):
    """Halved: W is of D and of its image."""
    at = lines_of(saved, G, R, D_s, D_t) + lines
    tl.store(at, mean_p.to(tl.float32), mask=there)
    tl.store(at + G * R, mean_q.to(tl.float32), mask=there)
    tl.store(at + 2 * G * R, tl.where(counts, 0.5 * of_p, 0.0).to(tl.float32), mask=there)
    tl.store(at + 3 * G * R, tl.where(counts, 0.5 * of_q, 0.0).to(tl.float32), mask=there)


@triton.jit
def load_lines(saved, side, grads_ptr, G, R, group, o_r, D_s, D_t, OFFICIAL: tl.constexpr):
    """Of some rows of a group, what the lines have on one side: a mean, and a weight times the upstream gradient."""
    there, lines = o_r < R, group * R + o_r
    at = lines_of(saved, G, R, D_s, D_t) + side * G * R + lines
    if OFFICIAL:
        up = tl.load(grads_ptr + lines // G, mask=there, other=0.0)
    else:
        up = tl.load(grads_ptr + lines, mask=there, other=0.0)
    return tl.load(at, mask=there, other=0.0), up * tl.load(at + 2 * G * R, mask=there, other=0.0)


@triton.jit
def side_of_weights(base, saved, side, grads_ptr, G, R, group, o_i, o_j, D_s, D_t, OFFICIAL: tl.constexpr):
    """One side's part of a tile of W."""
    mean_i, of_i = load_lines(saved, side, grads_ptr, G, R, group, o_i, D_s, D_t, OFFICIAL)
    mean_j, of_j = load_lines(saved, side, grads_ptr, G, R, group, o_j, D_s, D_t, OFFICIAL)
    return of_i[:, None] * (base - mean_i[:, None]) + of_j[None, :] * (base - mean_j[None, :])


@triton.jit
def lines_kernel(
    students, teachers, saved, values, valids, moments_ptr, G, R, D_s, D_t, s_group, s_row, t_group, t_row, tiles, eps,
    OFFICIAL: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK lines of a group's P and Q: how many entries count, their means and sums of products about these, tile after
    tile. Row by row that is 1 - rho, and what the backward needs of it."""
    D_s, D_t, s_group, s_row, t_group, t_row = aligned((D_s, D_t, s_group, s_row, t_group, t_row))
    program = tl.program_id(0).to(tl.int64)
    unit = program // tiles
    pair, group = unit // G, unit % G
    o_i = (program % tiles) * BLOCK + tl.arange(0, BLOCK)
    kept = pick(saved, pair)
    s_ptr, t_ptr = pick(students, pair) + group * s_group, pick(teachers, pair) + group * t_group
    shift_p, shift_q = tl.load(kept + group * 4), tl.load(kept + group * 4 + 1)
    n = tl.full([], 0, tl.int32)
    mean_p, mean_q = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    pp, qq, pq = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for start in range(0, R, BLOCK):
        o_j = start + tl.arange(0, BLOCK)
        Q, _, _, m_i, m_j, _, _, _, _ = tile(
            t_ptr, t_row, kept, 1, G, R, group, o_i, o_j, D_t, D_s, D_t, True, BLOCK, BLOCK_D
        )
        more = tl.sum(m_j.to(tl.int32), 0)
        both, entries = m_i[:, None] & m_j[None, :], tl.maximum(more, 1)
        Q, here_q = without_mean(Q - shift_q, both, entries, True)
        P, _, _, _, _, _, _, _, _ = tile(
            s_ptr, s_row, kept, 0, G, R, group, o_i, o_j, D_s, D_s, D_t, True, BLOCK, BLOCK_D
        )
        P, here_p = without_mean(P - shift_p, both, entries, True)
        share = more.to(tl.float64) / tl.maximum(n + more, 1)
        to_p, to_q = here_p - mean_p, here_q - mean_q
        pp += tl.sum(P * P, 1) + to_p * to_p * (share * n)
        qq += tl.sum(Q * Q, 1) + to_q * to_q * (share * n)
        pq += tl.sum(P * Q, 1) + to_p * to_q * (share * n)
        mean_p += to_p * share
        mean_q += to_q * share
        n += more
    scale_s, low_s, counts = load_scales(kept, 0, G, R, group, o_i)
    scale_t, low_t, _ = load_scales(kept, 1, G, R, group, o_i)
    live_s, live_t = not_zero(scale_s, low_s), not_zero(scale_t, low_t)
    pp, qq = tl.where(live_s, pp, 0.0), tl.where(live_t, qq, 0.0)  # of a row of zeros they are rounding
    pq = tl.where(live_s & live_t, pq, 0.0)
    there, lines = o_i < R, group * R + o_i
    mean_p += shift_p
    mean_q += shift_q
    if OFFICIAL:
        at = moments_ptr + pair * 6 * G * R + lines
        tl.store(at, tl.where(counts, n, 0).to(tl.float64), mask=there)
        tl.store(at + G * R, mean_p, mask=there)
        tl.store(at + 2 * G * R, mean_q, mask=there)
        tl.store(at + 3 * G * R, pp, mask=there)
        tl.store(at + 4 * G * R, qq, mask=there)
        tl.store(at + 5 * G * R, pq, mask=there)
    else:
        value, of_p, of_q = conclude(pp, qq, pq, n, eps)
        tl.store(pick(values, pair) + lines, tl.where(counts, value, 0.0).to(tl.float32), mask=there)
        tl.store(pick(valids, pair) + lines, counts.to(tl.uint8), mask=there)
        keep_lines(kept, G, R, D_s, D_t, lines, there, counts, mean_p, mean_q, of_p, of_q)


@triton.jit
def load_moments(moments_ptr, levels_ptr, G, R, first, o, there):
    """Of some of a value's lines: how many entries count, and their means, those of the Grams included."""
    at, group = moments_ptr + first + o, (first + o) // R
    count = tl.load(at, mask=there, other=0.0)
    mean_p = tl.load(at + G * R, mask=there, other=0.0) + tl.load(levels_ptr + group * 2, mask=there, other=0.0)
    mean_q = tl.load(at + 2 * G * R, mask=there, other=0.0) + tl.load(levels_ptr + group * 2 + 1, mask=there, other=0.0)
    return count, mean_p, mean_q


@triton.jit
def official_kernel(
    saved, values, valids, moments_ptr, levels_ptr, G, R, D_s, D_t, eps, NORMALIZE: tl.constexpr, BLOCK: tl.constexpr
):
    """One value: G lines of the buffer, one correlation."""
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
        there, at = o < G, moments_ptr + first + o
        count, mean_p, mean_q = load_moments(moments_ptr, levels_ptr, G, R, first, o, there)
        to_p, to_q = mean_p - all_p, mean_q - all_q
        pp += count * to_p * to_p + tl.load(at + 3 * G * R, mask=there, other=0.0)
        qq += count * to_q * to_q + tl.load(at + 4 * G * R, mask=there, other=0.0)
        pq += count * to_p * to_q + tl.load(at + 5 * G * R, mask=there, other=0.0)
    alone = tl.where(NORMALIZE & (R == 1), 1, 2)  # of a single sequence all entries are 1
    value, of_p, of_q = conclude(tl.sum(pp, 0), tl.sum(qq, 0), tl.sum(pq, 0), alone, eps)
    tl.store(pick(values, pair) + value_at, tl.where(n > 0, value, 0.0).to(tl.float32))
    tl.store(pick(valids, pair) + value_at, (n > 0).to(tl.uint8))
    for start in range(0, G, BLOCK):
        o = start + tl.arange(0, BLOCK)
        there, group = o < G, (first + o) // R
        count, _, _ = load_moments(moments_ptr, levels_ptr, G, R, first, o, there)
        less_p = all_p - tl.load(levels_ptr + group * 2, mask=there, other=0.0)
        less_q = all_q - tl.load(levels_ptr + group * 2 + 1, mask=there, other=0.0)
        keep_lines(pick(saved, pair), G, R, D_s, D_t, first + o, there, count > 0, less_p, less_q, of_p, of_q)


def forward(launch, saved: tuple, levels: torch.Tensor | None, out: tuple, shape: dict, normalize: bool, eps: float):
    """levels: the means that P and Q of every group lost, [units, 2]; None row by row."""
    moments, tiles = None, triton.cdiv(launch.rows, shape["BLOCK"])
    if launch.official:
        size = (len(launch.places), 6, launch.groups, launch.rows)
        moments = torch.empty(size, dtype=torch.float64, device=launch.students[0].device)
    lines_kernel[(launch.units * tiles,)](
        launch.students, launch.teachers, saved, *out, moments, *launch.sizes(), *launch.strides, tiles, eps,
        OFFICIAL=launch.official, **shape,
    )  # fmt: skip
    if launch.official:
        official_kernel[(launch.rows * len(launch.places),)](
            saved, *out, moments, levels, *launch.sizes(), eps, NORMALIZE=normalize, BLOCK=128, num_warps=4
        )
