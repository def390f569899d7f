"""Mean squared differences between attention scores, [N, M], from queries and keys; no matrix of scores is stored.

The maths. With S_i = scale_i Q_i K_iᵀ (0 where a key is masked, or comes after its query), cost_ij = sum (S_i - T_j)² /
count over all entries of all heads. The gradient of a student, W = sum_j g_ij (S_i - T_j): dQ_i = 2 scale_i / count W K_i,
dK_i = 2 scale_i / count Wᵀ Q_i.

Forward: a program owns a block of queries of one head and a few students, and loops over the keys. It holds one block of
scores of each of its students and compares it with each teacher's. `total_kernel` of kernels/layer_cost/hidden.py adds up the
programs' partial sums in a fixed order. A masked key is read as zeros, so that its scores are 0.
Backward: a program owns a block of queries (or keys) of one student and loops over the others; the scores are computed again,
W is never stored, and teachers whose weight is 0 cost nothing.

The loops over layers run on the device: unrolled, the addresses of so many matrices do not fit into registers. A kernel
writes a table of the addresses from its arguments, so nothing is copied from the host, nothing synchronises, and a CUDA
graph can capture it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..blocks import contiguous_rows, mask_bytes
from .hidden import total_kernel

STUDENTS, TEACHERS = 3, 16  # of a program of the forward
# Columns of the table: queries, their three strides, keys, theirs, the head dimension, the gradients of queries and of keys.
COLUMNS = tl.constexpr(11)
# Bytes of stack per thread; 40 for unaligned float32 on sm_90.
SPILL_LIMIT = {"table_kernel": 0, "partial_kernel": 0, "gradient_kernel": 40}


@triton.jit
def table_kernel(
    table_ptr, scale_ptr, queries, keys, grads_q, grads_k, strides_q, strides_k, widths, scales, first,
    COUNT: tl.constexpr,
):  # fmt: skip
    """One row per layer. `grads` are any tensors where no gradient is written."""
    for i in tl.static_range(COUNT):
        row = table_ptr + (first + i) * COLUMNS
        tl.store(row, queries[i].to(tl.int64, bitcast=True))
        tl.store(row + 4, keys[i].to(tl.int64, bitcast=True))
        for axis in tl.static_range(3):
            tl.store(row + 1 + axis, strides_q[i][axis])
            tl.store(row + 5 + axis, strides_k[i][axis])
        tl.store(row + 8, widths[i])
        tl.store(row + 9, grads_q[i].to(tl.int64, bitcast=True))
        tl.store(row + 10, grads_k[i].to(tl.int64, bitcast=True))
        tl.store(scale_ptr + first + i, scales[i])


@triton.jit
def side(row_ptr, at, b, h, like_ptr, ALIGNED: tl.constexpr):
    """The head's first row, and the stride of its rows, of a layer's queries (at 0) or keys (at 4)."""
    stride = tl.load(row_ptr + at + 3)
    skipped = b * tl.load(row_ptr + at + 1) + h * tl.load(row_ptr + at + 2)
    base = tl.load(row_ptr + at).to(like_ptr.dtype)
    if ALIGNED:
        base, stride, skipped = tl.multiple_of(base, 16), tl.multiple_of(stride, 16), tl.multiple_of(skipped, 16)
    return base + skipped, stride


@triton.jit
def load_block(base, stride, o_l, m_l, o_d, D):
    at = base + (o_l.to(tl.int64) * stride)[:, None] + o_d[None, :]
    return tl.load(at, mask=m_l[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def scores(
    row_ptr, scale_ptr, X: tl.constexpr, Y: tl.constexpr, b, h, o_x, o_y, m_x, m_y, like_ptr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """scale X Yᵀ [BLOCK, BLOCK] of one head of one layer: its queries and keys, or the other way round."""
    D = tl.load(row_ptr + 8).to(tl.int32)
    if ALIGNED:
        D = tl.multiple_of(D, 16)
    x, stride_x = side(row_ptr, X, b, h, like_ptr, ALIGNED)
    y, stride_y = side(row_ptr, Y, b, h, like_ptr, ALIGNED)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for d in range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        b_x, b_y = load_block(x, stride_x, o_x, m_x, o_d, D), load_block(y, stride_y, o_y, m_y, o_d, D)
        total = tl.dot(b_x, tl.trans(b_y), total, input_precision="ieee")
    return total * tl.load(scale_ptr)


@triton.jit
def valid_keys(mask_ptr, b, o_k, K):
    """Which keys exist and are not masked."""
    m_k = o_k < K
    return m_k if mask_ptr is None else m_k & (tl.load(mask_ptr + b * K + o_k, mask=m_k, other=0) != 0)


@triton.jit
def partial_kernel(
    table_ptr, scale_ptr, like_ptr, mask_ptr, partial_ptr, N, M, H, Q, K, first, first_t, teachers,
    STUDENTS: tl.constexpr, TEACHERS: tl.constexpr, CAUSAL: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums of squares of one block of queries: STUDENTS students from `first` on, with `teachers` teachers from `first_t` on."""
    blocks = tl.cdiv(Q, BLOCK)
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    b, h, start = pair // H, pair % H, tl.program_id(0) % blocks * BLOCK
    o_q, o_m = start + tl.arange(0, BLOCK), tl.arange(0, TEACHERS)
    m_q = o_q < Q
    sums = ()
    for _ in tl.static_range(STUDENTS):
        sums = sums + (tl.zeros([BLOCK, TEACHERS], tl.float32),)  # noqa: RUF005 (Triton has no star in a tuple)
    stop = tl.minimum(start + BLOCK, K) if CAUSAL else K
    for k in range(0, stop, BLOCK):
        o_k = k + tl.arange(0, BLOCK)
        m_k = valid_keys(mask_ptr, b, o_k, K)
        b_s = ()
        for i in tl.static_range(STUDENTS):
            x = scores(
                table_ptr + (first + i) * COLUMNS, scale_ptr + first + i, 0, 4, b, h, o_q, o_k, m_q, m_k, like_ptr,
                ALIGNED, BLOCK, BLOCK_D,
            )  # fmt: skip
            b_s = b_s + (x,)  # noqa: RUF005
        for j in range(teachers):
            t = N + first_t + j
            b_t = scores(
                table_ptr + t * COLUMNS, scale_ptr + t, 0, 4, b, h, o_q, o_k, m_q, m_k, like_ptr,
                ALIGNED, BLOCK, BLOCK_D,
            )  # fmt: skip
            added = ()
            for i in tl.static_range(STUDENTS):
                difference = b_s[i] - b_t
                if CAUSAL:
                    difference = tl.where(o_k[None, :] <= o_q[:, None], difference, 0.0)
                own = tl.sum(difference * difference, 1)[:, None]
                added = added + (sums[i] + tl.where(o_m[None, :] == j, own, 0.0),)  # noqa: RUF005
            sums = added
    to = partial_ptr + tl.program_id(0).to(tl.int64) * N * M
    for i in tl.static_range(STUDENTS):
        tl.store(to + (first + i) * M + first_t + o_m, tl.sum(sums[i], 0), mask=o_m < teachers)


@triton.jit
def gradient_kernel(
    table_ptr, scale_ptr, like_ptr, mask_ptr, grad_ptr, factor, N, M, H, OWN, OTHER,
    OF_KEYS: tl.constexpr, CAUSAL: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of one student's queries, and columns of their gradient; OF_KEYS: of its keys."""
    X: tl.constexpr = 4 if OF_KEYS else 0
    Y: tl.constexpr = 0 if OF_KEYS else 4
    blocks = tl.cdiv(OWN, BLOCK)
    pair, i_student, i_part = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(1) % N, tl.program_id(1) // N
    b, h, start = pair // H, pair % H, tl.program_id(0) % blocks * BLOCK
    row, scale = table_ptr + i_student * COLUMNS, scale_ptr + i_student
    D = tl.load(row + 8).to(tl.int32)
    o_own, o_d = start + tl.arange(0, BLOCK), i_part * BLOCK_D + tl.arange(0, BLOCK_D)
    m_own = valid_keys(mask_ptr, b, o_own, OWN) if OF_KEYS else o_own < OWN
    pulled = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    begin = start if CAUSAL and OF_KEYS else 0
    stop = tl.minimum(start + BLOCK, OTHER) if CAUSAL and not OF_KEYS else OTHER
    for k in range(begin, stop, BLOCK):
        o_other = k + tl.arange(0, BLOCK)
        m_other = o_other < OTHER if OF_KEYS else valid_keys(mask_ptr, b, o_other, OTHER)
        b_s = scores(row, scale, X, Y, b, h, o_own, o_other, m_own, m_other, like_ptr, ALIGNED, BLOCK, BLOCK_D)
        slope = tl.zeros([BLOCK, BLOCK], tl.float32)
        for j in range(M):
            weight = tl.load(grad_ptr + i_student * M + j)
            if weight != 0:
                b_t = scores(
                    table_ptr + (N + j) * COLUMNS, scale_ptr + N + j, X, Y, b, h, o_own, o_other, m_own, m_other, like_ptr,
                    ALIGNED, BLOCK, BLOCK_D,
                )  # fmt: skip
                slope += weight * (b_s - b_t)
        if CAUSAL:
            seen = o_own[:, None] <= o_other[None, :] if OF_KEYS else o_other[None, :] <= o_own[:, None]
            slope = tl.where(seen, slope, 0.0)
        base, stride = side(row, Y, b, h, like_ptr, ALIGNED)
        b_other = load_block(base, stride, o_other, m_other, o_d, D)
        if like_ptr.dtype.element_ty == tl.float32:
            pulled = tl.dot(slope, b_other, pulled, input_precision="ieee")
        else:  # half precision fits tf32, and slopes lose less there than in it
            pulled = tl.dot(slope, b_other.to(tl.float32), pulled, input_precision="tf32")
    pulled = tl.where(m_own[:, None], pulled * (factor * tl.load(scale)), 0.0)
    to = tl.load(row + 9 + OF_KEYS).to(like_ptr.dtype) + ((pair * OWN + o_own) * D)[:, None] + o_d[None, :]
    tl.store(to, pulled.to(like_ptr.dtype.element_ty), mask=(o_own < OWN)[:, None] & (o_d < D)[None, :])


def geometry(widest: int, half: bool, aligned: bool) -> dict:
    """Blocks and warps. Products of float32 are made without tensor cores, and unaligned rows take a register per address:
    smaller tiles. No FP fusion: score - score must not become fma(product, scale, -score), which is not 0 for equal ones."""
    columns = min(max(16, triton.next_power_of_2(widest)), 64)
    launch = {"BLOCK": 64, "num_warps": 8} if half and aligned else {"BLOCK": 32, "num_warps": 4}
    return {"BLOCK_D": columns, "num_stages": 2 if half else 1, "enable_fp_fusion": False} | launch


class Layers:
    """Queries and keys of all layers, students first, as the kernels take them: in one dtype and in a table."""

    def __init__(self, sq, sk, tq, tk, scales: list[float], mask: Tensor | None, grads=((), ())):
        self.n, self.m = len(sq), len(tq)
        self.B, self.H, self.Q = sq[0].shape[:3]
        self.K = sk[0].shape[2]
        same = len({x.dtype for x in (*sq, *tq)}) == 1
        q, k = ([contiguous_rows(x if same else x.float()) for x in xs] for xs in ((*sq, *tq), (*sk, *tk)))
        self.like, self.alive = q[0], (q, k)  # what the table points at must live until the launches are queued
        widths = [x.shape[3] for x in q]
        self.width = max(widths[: self.n])
        self.aligned = all(
            x.data_ptr() % 16 == 0 and all(step % 16 == 0 for step in (*x.stride()[:3], x.shape[3])) for x in (*q, *k)
        )
        self.mask = mask_bytes(mask)
        self.elements = max(self.B * self.H * self.Q * self.K, 1)
        self.launch = geometry(max(widths), self.like.element_size() == 2, self.aligned)
        self.table = torch.empty((len(q), COLUMNS.value), dtype=torch.int64, device=self.like.device)
        self.scales = torch.empty(len(q), dtype=torch.float32, device=self.like.device)
        to = [[*side, *[self.like] * (len(q) - len(side))] for side in grads]
        for first in range(0, len(q), 8):
            some = slice(first, first + 8)
            count = len(q[some])
            table_kernel[(1,)](
                self.table, self.scales, tuple(q[some]), tuple(k[some]), tuple(to[0][some]), tuple(to[1][some]),
                tuple(x.stride()[:3] for x in q[some]), tuple(x.stride()[:3] for x in k[some]), tuple(widths[some]),
                tuple(scales[some]), first, count, num_warps=1,
            )  # fmt: skip

    def blocks(self, length: int) -> int:
        return triton.cdiv(length, self.launch["BLOCK"])


def attention_cost_fwd(
    sq: list[Tensor], sk: list[Tensor], tq: list[Tensor], tk: list[Tensor], scales: list[float],
    mask: Tensor | None, causal: bool,
) -> Tensor:  # fmt: skip
    layers = Layers(sq, sk, tq, tk, scales, mask)
    n, m = layers.n, layers.m
    costs = torch.empty((n, m), dtype=torch.float32, device=sq[0].device)
    programs = layers.blocks(layers.Q) * layers.B * layers.H
    partial = torch.empty((programs, n, m), dtype=torch.float32, device=sq[0].device)
    for i in range(0, n, STUDENTS):
        for j in range(0, m, TEACHERS):
            partial_kernel[(programs,)](
                layers.table, layers.scales, layers.like, layers.mask, partial, n, m, layers.H, layers.Q, layers.K, i, j,
                min(TEACHERS, m - j), min(STUDENTS, n - i), TEACHERS, causal, layers.aligned, **layers.launch,
            )  # fmt: skip
    total_kernel[(n * m,)](partial, None, costs, len(partial), n * m, layers.elements, 128)
    return costs


def attention_cost_bwd(
    grad: Tensor, sq: list[Tensor], sk: list[Tensor], tq: list[Tensor], tk: list[Tensor], scales: list[float],
    mask: Tensor | None, causal: bool,
) -> list[Tensor]:  # fmt: skip
    grad, students = grad.contiguous(), (sq, sk)
    dtype = sq[0].dtype if len({x.dtype for x in (*sq, *tq)}) == 1 else torch.float32
    grads = [[torch.empty(x.shape, dtype=dtype, device=x.device) for x in side] for side in students]
    layers = Layers(sq, sk, tq, tk, scales, mask, grads)
    parts = triton.cdiv(layers.width, layers.launch["BLOCK_D"])
    for of_keys, (own, other) in enumerate(((layers.Q, layers.K), (layers.K, layers.Q))):
        if grads[of_keys][0].numel():
            gradient_kernel[(layers.blocks(own) * layers.B * layers.H, layers.n * parts)](
                layers.table, layers.scales, layers.like, layers.mask, grad, 2.0 / layers.elements, layers.n, layers.m,
                layers.H, own, other, of_keys, causal, layers.aligned, **layers.launch,
            )  # fmt: skip
    return [new.to(x.dtype) for side, xs in zip(grads, students, strict=True) for new, x in zip(side, xs, strict=True)]
