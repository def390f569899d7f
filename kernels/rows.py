"""How kernels read rows of two logit matrices [N, V]: where a row begins, its blocks, those that lie in it whole."""

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
