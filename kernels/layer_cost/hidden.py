"""The mean squared difference of every student layer from every teacher layer, [N, M], in one pass over all of them.

The maths. cost_ij = sum (s_i - t_j)² / count over the elements of the valid tokens; an element at or below `clamp` counts
as 0. Differences are taken directly: |s|² + |t|² - 2 <s, t> loses its digits exactly where a student nears its teacher.
The gradient is sum_j 2 g_ij / count (s_i - t_j), 0 where masked or clamped. Nothing is saved.

The layers come as tuples of tensors, not stacked and not as a table of addresses: every pointer is a kernel argument, so
nothing is copied to the device first, nothing synchronises, and a CUDA graph can capture it. The loops over layers are
unrolled; a tile of TILE_S x TILE_T pairs is one program's accumulators (one element of each per thread), and more layers
than that are several launches.

Forward: a program walks blocks of elements, all layers of its tile at once, and leaves one partial sum per pair; a second
kernel adds those up in a fixed order in float64. Backward: a program reads each weight and skips the teachers whose weight
is 0: of a transport plan at most N + M - 1 are left.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..blocks import contiguous_rows, mask_bytes

TILE_S, TILE_T = 6, 12
PROGRAMS = 528  # of the forward: 4 on each of an H200's 132 multiprocessors
MOST_BLOCKS = 256  # that one program adds up in float32
BACKWARD_PAIRS = 96
SPILL_LIMIT = {"partial_kernel": 0, "gradient_kernel": 16}  # bytes of stack per thread


@triton.jit
def read(x_ptr, o_x, m_x, clamp, CLAMP: tl.constexpr):
    """A block as float32, 0 where masked or clamped; and which elements are neither."""
    x = tl.load(x_ptr + o_x, mask=m_x, other=0.0).to(tl.float32)
    valid = m_x
    if CLAMP:
        valid = valid & ~(x <= clamp)  # NaN stays
    return tl.where(valid, x, 0.0), valid


@triton.jit
def valid_length(mask_ptr, row, L):
    """How many elements of a row are valid: all, or none if it is masked."""
    return L if mask_ptr is None else tl.where(tl.load(mask_ptr + row) != 0, L, 0)


@triton.jit
def zeros(COUNT: tl.constexpr, BLOCK: tl.constexpr):
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros([BLOCK], tl.float32),)  # noqa: RUF005 (Triton has no star in a tuple)
    return sums


@triton.jit
def partial_kernel(
    students, teachers, strides_s, strides_t, mask_ptr, partial_ptr, units, parts, S, L, clamp, first_i, first_j, M, NM,
    N_TILE: tl.constexpr, M_TILE: tl.constexpr, CLAMP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of squares of one program's blocks, all pairs of a tile. A unit is a block of one row (b, s) [L]."""
    i_program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    sums = zeros(N_TILE * M_TILE, BLOCK)
    for unit in range(i_program, units, programs):
        row = unit // parts
        o_b, o_s = row // S, row % S
        o_l = (unit % parts) * BLOCK + tl.arange(0, BLOCK)
        m_l = o_l < valid_length(mask_ptr, row, L)
        b_s = ()
        for i in tl.static_range(N_TILE):
            x, _ = read(students[i], o_b * strides_s[i][0] + o_s * strides_s[i][1] + o_l, m_l, clamp, CLAMP)
            b_s = b_s + (x,)  # noqa: RUF005
        added = ()
        for j in tl.static_range(M_TILE):
            b_t, _ = read(teachers[j], o_b * strides_t[j][0] + o_s * strides_t[j][1] + o_l, m_l, clamp, CLAMP)
            for i in tl.static_range(N_TILE):
                difference = b_s[i] - b_t
                added = added + (sums[j * N_TILE + i] + difference * difference,)  # noqa: RUF005
        sums = added
    for j in tl.static_range(M_TILE):
        for i in tl.static_range(N_TILE):
            o_pair = (first_i + i) * M + first_j + j
            tl.store(partial_ptr + i_program * NM + o_pair, tl.sum(sums[j * N_TILE + i], 0))


@triton.jit
def total_kernel(partial_ptr, count_ptr, cost_ptr, programs, NM, elements, BLOCK: tl.constexpr):
    """One pair: its partial sums in a fixed order, divided by the number of valid elements."""
    i_pair = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, programs, BLOCK):
        o_program = start + tl.arange(0, BLOCK).to(tl.int64)
        partial = tl.load(partial_ptr + o_program * NM + i_pair, mask=o_program < programs, other=0.0)
        total += partial.to(tl.float64)
    count = elements if count_ptr is None else tl.load(count_ptr) * elements
    tl.store(cost_ptr + i_pair, (tl.sum(total, 0) / count).to(tl.float32))


@triton.jit
def gradient_kernel(
    grad_ptr, students, teachers, strides_s, strides_t, outputs, mask_ptr, count_ptr, parts, S, L, clamp, elements,
    first_i, M,
    N_TILE: tl.constexpr, M_TILE: tl.constexpr, CLAMP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile's students in one block of one row."""
    unit = tl.program_id(0).to(tl.int64)
    row = unit // parts
    o_b, o_s = row // S, row % S
    o_l = (unit % parts) * BLOCK + tl.arange(0, BLOCK)
    m_l = o_l < valid_length(mask_ptr, row, L)
    scale = 2.0 / (elements if count_ptr is None else tl.load(count_ptr) * elements)
    for i in tl.static_range(N_TILE):
        b_s, valid = read(students[i], o_b * strides_s[i][0] + o_s * strides_s[i][1] + o_l, m_l, clamp, CLAMP)
        total = tl.zeros([BLOCK], tl.float32)
        for j in tl.static_range(M_TILE):
            weight = tl.load(grad_ptr + (first_i + i) * M + j)
            if weight != 0:
                b_t, _ = read(teachers[j], o_b * strides_t[j][0] + o_s * strides_t[j][1] + o_l, m_l, clamp, CLAMP)
                total += (b_s - b_t) * (weight * scale)
        total = tl.where(valid, total, 0.0)
        tl.store(outputs[i] + row * L + o_l, total.to(outputs[i].dtype.element_ty), mask=o_l < L)


class Layout:
    """All layers as contiguous rows (b, s) of L elements, with strides for b and s; a layer is copied if it must be."""

    def __init__(self, students: list[Tensor], teachers: list[Tensor], mask: Tensor | None):
        B, S = students[0].shape[:2]
        L = students[0][0, 0].numel() if B and S else 0
        students, teachers = (
            [contiguous_rows(x.flatten(2) if x.dim() > 2 else x[..., None]) for x in xs] for xs in (students, teachers)
        )  # [B, S, L]
        if mask is None and all(x.is_contiguous() for x in (*students, *teachers)):
            students, teachers = ([x.view(1, 1, -1) for x in xs] for xs in (students, teachers))
            B, S, L = 1, 1, B * S * L
        self.students, self.teachers = tuple(students), tuple(teachers)
        self.strides_s, self.strides_t = (tuple(x.stride()[:2] for x in xs) for xs in (students, teachers))
        self.S, self.L, self.rows = S, L, B * S
        self.mask = mask_bytes(mask)
        self.count = None if mask is None else mask.sum().clamp_min(1)
        self.elements = max(L if mask is not None else L * self.rows, 1)  # with a mask, of a row

    def parts(self, longest: int) -> tuple[int, int]:
        """(elements of a block, blocks of a row): the longest power of two that wastes less than an eighth, if any."""
        block = longest
        while block > 64 and triton.cdiv(self.L, block) * block > 1.125 * self.L:
            block //= 2
        return block, triton.cdiv(self.L, block)


def layer_cost_fwd(
    students: list[Tensor], teachers: list[Tensor], mask: Tensor | None, clamp: float | None
) -> Tensor:  # [N, M]
    n, m, x = len(students), len(teachers), students[0]
    costs = torch.empty((n, m), dtype=torch.float32, device=x.device)
    layout = Layout(students, teachers, mask)
    block, parts = layout.parts(256)
    units = layout.rows * parts
    programs = max(min(units, max(PROGRAMS, triton.cdiv(units, MOST_BLOCKS))), 1)
    partial = torch.empty((programs, n, m), dtype=torch.float32, device=x.device)
    for i in range(0, n, TILE_S):
        for j in range(0, m, TILE_T):
            tile_s, tile_t = layout.students[i : i + TILE_S], layout.teachers[j : j + TILE_T]
            partial_kernel[(programs,)](
                tile_s, tile_t, layout.strides_s[i : i + TILE_S], layout.strides_t[j : j + TILE_T],
                layout.mask, partial, units, parts, layout.S, layout.L, clamp or 0.0, i, j, m,
                n * m, len(tile_s), len(tile_t), clamp is not None, block, num_warps=block // 32,
            )  # fmt: skip
    total_kernel[(n * m,)](partial, layout.count, costs, programs, n * m, layout.elements, 128)
    return costs


def layer_cost_bwd(
    grad: Tensor, students: list[Tensor], teachers: list[Tensor], mask: Tensor | None, clamp: float | None
) -> list[Tensor]:
    n, m = len(students), len(teachers)
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in students]
    layout, grad = Layout(students, teachers, mask), grad.contiguous()
    block, parts = layout.parts(1024)
    tile = max(BACKWARD_PAIRS // m, 1)
    for i in range(0, n if layout.rows * layout.L else 0, tile):
        tile_s = layout.students[i : i + tile]
        gradient_kernel[(layout.rows * parts,)](
            grad, tile_s, layout.teachers, layout.strides_s[i : i + tile], layout.strides_t,
            tuple(grads[i : i + tile]), layout.mask, layout.count, parts,
            layout.S, layout.L, clamp or 0.0, layout.elements, i, m, len(tile_s), m, clamp is not None, block,
            num_warps=4,
        )  # fmt: skip
    return grads
