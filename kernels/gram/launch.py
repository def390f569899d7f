"""1 - rho of two self-similarity matrices P (student) and Q (teacher), per group of rows; neither is written anywhere.

The maths. P = u uᵀ - mean, u = x / |x|. With c the mean row and v = u - c, the mean of u uᵀ is |c|², and exactly

    P_ij = <u_i, u_j> - |c|² = <v_i, v_j> + <c, v_i> + <c, v_j>.

float32 rows (float32 products, no tf32) take the second form: v is computed as the rows are loaded, so that a part which
all rows share costs no digits, even if it is 200 times larger than the rest. Half-precision rows go into the tensor cores as
they are, which is exact, and take the first. Either way a tile is centred as it leaves the accumulator, before anything is
squared; the mean of the rounding errors is subtracted too.

    rho = <P, Q> / (ab + eps), a = |P|, b = |Q|:   W = 2 g d(1 - rho)/dP = 2 g (<P, Q> b / (a den²) P - Q / den)
    d/du_i = sum_j W_ij u_j = sum_j W_ij v_j + (sum_j W_ij) c,   d/dx_i = (d/du_i - <d/du_i, u_i> u_i) / |x_i|

<d/du_i, u_i> = sum_j W_ij <u_j, u_i> is computed from the tile that makes W, so that no program needs all of a row of x; on
the sphere c = u_i - v_i acts as -v_i, which is small again. For half-precision rows W is W_ij / |x_j| in their dtype, and
<d/du_i, u_i> is computed from the rounded W: the error of a sum that rows share would exceed the gradient, along u_i.

Per row (row=True) every row of P has a mean, a and b of its own; W = D + Dᵀ, where D_ij is half of W_ij above. The same holds
for the official grouping, whose values are of rows of several groups' P.

Groups in cache, such as the 128 tokens of a sentence or a batch: in_cache.py, one launch each way. Longer groups, and the
official grouping: tiled.py, with row_stats.py for correlations of rows. Levels are launched one after the other; pairs of
layers with the same widths, dtypes and strides share the launches. The sequence level reads rows in place, one position
apart. The order of every sum depends on shapes only.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..blocks import mask_bytes
from . import in_cache, tiled
from .rows import ALIGN, geometry, longest

ENOUGH = (2, 3, 3)  # valid rows that a group needs, by level (LEVELS in fastkd/ops/gram.py)
OFFICIAL = 2


class Launch:
    """Pairs with the same layout at one level: the arguments that all kernels share."""

    def __init__(
        self, places: list[int], students: list[Tensor], teachers: list[Tensor], mask: Tensor | None, level: int,
        row: bool,
    ):  # fmt: skip
        self.places, self.level = places, level
        self.official = level == OFFICIAL and not row
        self.per_row = row or self.official
        self.students = tuple([students[place] for place in places])
        self.teachers = tuple([teachers[place] for place in places])
        s, t = self.students[0], self.teachers[0]
        by_group, by_row = (0, 1) if level == 0 else (1, 0)
        self.groups, self.rows = s.shape[by_group], s.shape[by_row]
        self.units = self.groups * len(places)
        self.widths = s.shape[2], t.shape[2]
        self.half = s.element_size() == 2 and t.element_size() == 2
        of_s, of_t = s.stride(), t.stride()
        self.strides = of_s[by_group], of_s[by_row], of_t[by_group], of_t[by_row]
        self.of_student = self.strides[:2]
        self.mask = mask
        self.mask_strides = (0, 0) if mask is None else (mask.stride(by_group), mask.stride(by_row))
        self.enough = ENOUGH[level]

    @property
    def in_cache(self) -> bool:
        return self.rows <= longest(self.half) and not self.official

    def sizes(self) -> tuple:
        return self.groups, self.rows, *self.widths

    def of(self, terms: list, levels: list[int], at: int) -> tuple:
        """The terms of this launch, from a list of all."""
        return tuple(terms[place * len(levels) + at] for place in self.places)


def _aligned(x: Tensor) -> Tensor:
    """x with rows that can be read 16 bytes at a time: if needed, a copy padded with columns of zeros, which change nothing."""
    by_group, by_row, step = x.stride()
    if step == 1 and not (x.shape[2] | by_group | by_row) % ALIGN.value and not x.data_ptr() % 16:
        return x
    return F.pad(x, (0, -x.shape[2] % ALIGN.value)).clone(memory_format=torch.contiguous_format)


def _launches(students, teachers, mask, levels, row) -> Iterator[tuple[int, Launch]]:
    """(index of the level, launch); for each pair, levels come in their order."""
    students, teachers = ([_aligned(x) for x in xs] for xs in (students, teachers))
    alike: dict = {}
    for place, (s, t) in enumerate(zip(students, teachers, strict=True)):
        alike.setdefault((s.dtype, s.shape[2], s.stride(), t.dtype, t.shape[2], t.stride()), []).append(place)
    mask = mask_bytes(mask)
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
        if launch.in_cache:
            in_cache.forward_kernel[(launch.units,)](
                launch.students, launch.teachers, *out, launch.mask, *launch.sizes(), *launch.strides,
                *launch.mask_strides, eps, ENOUGH=launch.enough, ROW=row, NORMALIZE=normalize,
                **geometry(launch.rows, launch.half),
            )  # fmt: skip
            continue
        for place, x in zip(launch.places, tiled.forward(launch, out, normalize, eps), strict=True):
            saved[place * len(levels) + at] = x
    return values, valid, [x for x in saved if x is not None and with_gradient]


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
    saved_by_term = _by_term(launches, saved, len(grads), levels)
    for at, launch in launches:
        outputs = tuple(out[place] for place in launch.places)
        if launch.units == 0 or outputs[0].numel() == 0:
            continue
        up, add = launch.of(grads, levels, at), at > 0
        by_group, by_row = (0, 1) if launch.level == 0 else (1, 0)
        strides = outputs[0].stride(by_group), outputs[0].stride(by_row)
        if launch.in_cache:
            in_cache.backward_kernel[(launch.units,)](
                launch.students, launch.teachers, up, outputs, launch.mask, *launch.sizes(), *launch.strides,
                *launch.mask_strides, *strides, eps, ADD=add, ENOUGH=launch.enough, ROW=row, NORMALIZE=normalize,
                **geometry(launch.rows, launch.half),
            )  # fmt: skip
        else:
            tiled.backward(launch, up, launch.of(saved_by_term, levels, at), outputs, strides, add, normalize)
    return [x if x.shape[2] == width else x[..., :width].contiguous() for x, width in zip(out, widths, strict=True)]


def _by_term(launches: list, saved: list[Tensor], terms: int, levels: list[int]) -> list:
    """What was saved, in a list of all terms: groups in cache save nothing."""
    if not saved:
        return [None] * terms
    tiled_terms = {
        place * len(levels) + at for at, launch in launches for place in launch.places if not launch.in_cache
    }
    remaining = iter(saved)
    return [next(remaining) if term in tiled_terms else None for term in range(terms)]
