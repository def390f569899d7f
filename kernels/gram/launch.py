"""1 - rho of two self-similarity matrices P (student) and Q (teacher), per group of rows; neither is written anywhere.

The maths. P = u uᵀ - mean, u = x / |x|. With c the mean row and v = u - c, the mean of u uᵀ is |c|², and exactly

    P_ij = <u_i, u_j> - |c|² = <v_i, v_j> + <c, v_i> + <c, v_j>.

float32 rows (float32 products, no tf32) take the second form: v is made as the rows are loaded, and what all rows have in
common, be it 200 times larger than what they have not, never meets a rounding. Half-precision rows go into the tensor cores
as they are, which is exact, and take the first. Either way a tile is centred as it leaves the accumulator, before anything
is squared; the mean of what rounding left is taken off too.

    rho = <P, Q> / (ab + eps), a = |P|, b = |Q|:   W = 2 g d(1 - rho)/dP = 2 g (<P, Q> b / (a den²) P - Q / den)
    d/du_i = sum_j W_ij u_j = sum_j W_ij v_j + (sum_j W_ij) c,   d/dx_i = (d/du_i - <d/du_i, u_i> u_i) / |x_i|

<d/du_i, u_i> = sum_j W_ij <u_j, u_i> comes out of the tile that makes W, so that no program needs a whole row of x; on the
sphere c = u_i - v_i counts as -v_i, small again. W of half-precision rows is W_ij / |x_j| in their dtype, and <d/du_i, u_i>
is made of the rounded one: the error of a sum that rows share would be larger than the gradient, and lies along u_i.

Row by row (row=True) every row of P has a mean, a and b of its own; W = D + Dᵀ, D_ij = what W_ij was, halved. So it is in
the official grouping, whose values are of the rows of several groups' P.

Groups that one program can hold, the 128 tokens of a sentence or a batch: in_cache.py, one launch each way. Longer ones,
and the official grouping: tiled.py, with gram/row_stats.py for correlations of rows. Level by level; pairs of layers of
the same widths, dtypes and strides share the launches. The sequence level reads rows where they lie, a position apart. Sums
are in an order that depends on shapes only.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import in_cache, tiled
from .rows import ALIGN, geometry, longest

ENOUGH = (2, 3, 3)  # rows of a group that count, by level (fastkd/ops/gram.py's LEVELS), under a mask
OFFICIAL = 2


class Launch:
    """Pairs that are alike, at one level: what every kernel is given."""

    def __init__(
        self, places: list[int], students: list[Tensor], teachers: list[Tensor], mask: Tensor | None, level: int,
        row: bool,
    ):  # fmt: skip
        self.places, self.level = places, level
        self.official = level == OFFICIAL and not row
        self.by_line = row or self.official
        self.students, self.teachers = (tuple(xs[place] for place in places) for xs in (students, teachers))
        s, t = self.students[0], self.teachers[0]
        by_group, by_row = (0, 1) if level == 0 else (1, 0)
        self.groups, self.rows = s.shape[by_group], s.shape[by_row]
        self.units = self.groups * len(places)
        self.widths = s.shape[2], t.shape[2]
        self.half = s.element_size() == 2 and t.element_size() == 2
        self.strides = s.stride(by_group), s.stride(by_row), t.stride(by_group), t.stride(by_row)
        self.of_student = self.strides[:2]
        self.mask = mask
        self.mask_strides = (0, 0) if mask is None else (mask.stride(by_group), mask.stride(by_row))
        self.enough = ENOUGH[level]

    @property
    def whole(self) -> bool:
        return self.rows <= longest(self.half) and not self.official

    def sizes(self) -> tuple:
        return self.groups, self.rows, *self.widths

    def of(self, terms: list, levels: list[int], at: int) -> tuple:
        """This launch's among a list of all terms."""
        return tuple(terms[place * len(levels) + at] for place in self.places)


def _aligned(x: Tensor) -> Tensor:
    """Rows that can be read 16 bytes at a time: a copy with columns of zeros, which change nothing, where they cannot."""
    wrong = x.shape[2] % ALIGN.value, x.stride(0) % ALIGN.value, x.stride(1) % ALIGN.value, x.data_ptr() % 16
    if x.stride(2) == 1 and not any(wrong):
        return x
    return F.pad(x, (0, -x.shape[2] % ALIGN.value)).clone(memory_format=torch.contiguous_format)


def _launches(students, teachers, mask, levels, row) -> Iterator[tuple[int, Launch]]:
    """(place of the level, launch), such that levels come in their order for each pair."""
    students, teachers = ([_aligned(x) for x in xs] for xs in (students, teachers))
    alike: dict = {}
    for place, (s, t) in enumerate(zip(students, teachers, strict=True)):
        alike.setdefault((s.dtype, s.shape[2], s.stride(), t.dtype, t.shape[2], t.stride()), []).append(place)
    mask = None if mask is None else mask.contiguous().view(torch.uint8)
    for places in alike.values():
        for at, level in enumerate(levels):
            yield at, Launch(places, students, teachers, mask, level, row)


def gram_fwd(
    students: list[Tensor], teachers: list[Tensor], mask: Tensor | None, levels: list[int], row: bool, normalize: bool,
    eps: float, with_gradient: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:  # fmt: skip
    B, N, _ = students[0].shape
    of_level = [(B, N), (N, B), (N, B)] if row else [(B,), (N,), (B,)]
    values = [students[0].new_empty(of_level[level], dtype=torch.float32) for _ in students for level in levels]
    valid = [torch.empty_like(x, dtype=torch.bool) for x in values]
    saved: list = [None] * len(values)
    for at, launch in _launches(students, teachers, mask, levels, row):
        out = launch.of(values, levels, at), tuple(x.view(torch.uint8) for x in launch.of(valid, levels, at))
        if launch.units == 0:
            for x in (y for side in out for y in side):
                x.zero_()
            continue
        if launch.whole:
            _whole_forward(launch, out, row, normalize, eps)
            continue
        kept = tiled.forward(launch, out, normalize, eps)
        for place, x in zip(launch.places, kept, strict=True):
            saved[place * len(levels) + at] = x
    return values, valid, [x for x in saved if x is not None and with_gradient]


def _whole_forward(launch: Launch, out: tuple, row: bool, normalize: bool, eps: float) -> None:
    in_cache.whole_forward_kernel[(launch.units,)](
        launch.students, launch.teachers, *out, launch.mask, *launch.sizes(), *launch.strides, *launch.mask_strides,
        eps, ENOUGH=launch.enough, ROW=row, NORMALIZE=normalize, **geometry(launch.rows, launch.half),
    )  # fmt: skip


def gram_bwd(
    grads: list[Tensor], students: list[Tensor], teachers: list[Tensor], mask: Tensor | None, saved: list[Tensor],
    levels: list[int], row: bool, normalize: bool, eps: float,
) -> list[Tensor]:  # fmt: skip
    widths = [x.shape[2] for x in students]
    out = [
        torch.empty((*x.shape[:2], width + -width % ALIGN.value), dtype=x.dtype, device=x.device)
        for x, width in zip(students, widths, strict=True)
    ]
    grads = [x.contiguous() for x in grads]
    launches = list(_launches(students, teachers, mask, levels, row))
    kept = _by_term(launches, saved, len(grads), levels)
    for at, launch in launches:
        outputs = tuple(out[place] for place in launch.places)
        if launch.units == 0 or outputs[0].numel() == 0:
            continue
        up, add = launch.of(grads, levels, at), at > 0
        by_group, by_row = (0, 1) if launch.level == 0 else (1, 0)
        strides = outputs[0].stride(by_group), outputs[0].stride(by_row)
        if launch.whole:
            in_cache.whole_backward_kernel[(launch.units,)](
                launch.students, launch.teachers, up, outputs, launch.mask, *launch.sizes(), *launch.strides,
                *launch.mask_strides, *strides, eps, ADD=add, ENOUGH=launch.enough, ROW=row, NORMALIZE=normalize,
                **geometry(launch.rows, launch.half),
            )  # fmt: skip
        else:
            tiled.backward(launch, up, launch.of(kept, levels, at), outputs, strides, add, normalize)
    return [x[..., :width].contiguous() for x, width in zip(out, widths, strict=True)]


def _by_term(launches: list, saved: list[Tensor], terms: int, levels: list[int]) -> list:
    """What was saved, in the places of all terms: those of whole groups save nothing."""
    long = {place * len(levels) + at for at, launch in launches for place in launch.places if not launch.whole}
    left = iter(saved)
    return [next(left) if term in long else None for term in range(terms)]
