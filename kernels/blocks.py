"""What several stems need of a block of rows: where a row of logits [N, V] begins, its blocks, those that lie in it whole;
and series for arguments near 0, where the plain expression would cancel."""

import triton
import triton.language as tl


@triton.jit
def hidden(mask_ptr, i_n):
    """Whether row i_n is masked."""
    return False if mask_ptr is None else tl.load(mask_ptr + i_n) == 0


@triton.jit
def row_of(s_ptr, t_ptr, i_n, s_stride, t_stride, V, ALIGN: tl.constexpr):
    """Where row i_n of both sides is read from, and the first and the end of its columns there."""
    head = (i_n * s_stride % ALIGN).to(tl.int32)
    return s_ptr + i_n * s_stride // ALIGN * ALIGN, t_ptr + i_n * t_stride // ALIGN * ALIGN, head, head + V


@triton.jit
def load_pair(row, start, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """One block of both rows as float32; outside of them -inf, which is probability 0."""
    s_ptr, t_ptr, head, end = row
    o_v = start + tl.arange(0, BLOCK)
    if WHOLE:
        b_s = tl.load(s_ptr + o_v).to(tl.float32)  # [BLOCK]
        b_t = tl.load(t_ptr + o_v).to(tl.float32)
    else:
        m_v = (o_v >= head) & (o_v < end)
        b_s = tl.where(m_v, tl.load(s_ptr + o_v, mask=m_v, other=0.0).to(tl.float32), float("-inf"))
        b_t = tl.where(m_v, tl.load(t_ptr + o_v, mask=m_v, other=0.0).to(tl.float32), float("-inf"))
    return b_s, b_t


@triton.jit
def blocks_of(row, BLOCK: tl.constexpr):
    """The blocks that lie in the row whole, from and to; and range() over those that do not: its first, its last."""
    _, _, head, end = row
    first, last = tl.where(head > 0, BLOCK, 0), end // BLOCK * BLOCK
    return first, last, tl.where(head > 0, 0, last), tl.where(end > last, last + 1, last), tl.maximum(last, 1)


@triton.jit
def maxima(row, stop, BLOCK: tl.constexpr):
    """Of both sides up to `stop`; 0 where nothing but -inf is found."""
    s_ptr, t_ptr, head, _ = row
    top_s = tl.full([BLOCK], float("-inf"), tl.float32)
    top_t = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, stop, BLOCK):
        b_s, b_t = load_pair((s_ptr, t_ptr, head, stop), start, BLOCK, False)
        top_s, top_t = tl.maximum(top_s, b_s), tl.maximum(top_t, b_t)
    best_s, best_t = tl.max(top_s, 0), tl.max(top_t, 0)
    return tl.where(best_s > float("-inf"), best_s, 0.0), tl.where(best_t > float("-inf"), best_t, 0.0)


@triton.jit
def phi(x):
    """expm1(x) - x for |x| < 1/2, to 4e-8 of itself."""
    y = tl.fma(x, 1 / 40320, 1 / 5040)
    y = tl.fma(y, x, 1 / 720)
    y = tl.fma(y, x, 1 / 120)
    y = tl.fma(y, x, 1 / 24)
    y = tl.fma(y, x, 1 / 6)
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
