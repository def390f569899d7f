"""1 - correlation of self-similarity matrices (FCD)."""

import torch
from torch import Tensor

from fastkd import checks, distributed, reductions
from fastkd.functional.inference_mode import takes_inference_tensors
from fastkd.ops import gram


@takes_inference_tensors
def gram_correlation_loss(
    student: Tensor | list[Tensor],
    teacher: Tensor | list[Tensor],
    *,
    level: str | dict[str, float] = "token",
    grouping: str = "position",
    pearson: str = "matrix",
    normalize: bool = True,
    mask: Tensor | None = None,
    eps: float = 1e-6,
    process_group=None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """1 - Pearson correlation of the student's and the teacher's self-similarities (FCD). [B, N, Ds], [B, N, Dt].

    level="token": one N x N matrix per sequence; "sequence": one B x B matrix per position (with `process_group`, B is
    the batch of all ranks); {"token": a, "sequence": b}: both at once, weighted and added up. pearson="row" correlates
    row by row (DIST) instead of whole matrices. grouping="official" groups the sequence level as the released code does.
    Lists are pairs of layers: "mean" and "sum" are over all of them, "none" has one row per pair. With a mask only valid
    pairs of rows count, and a group of fewer than 2 (token) or 3 (sequence) valid rows leaves the mean; under
    grouping="official" a mask must be all ones, and is then the same as none.
    """
    single = isinstance(student, Tensor)
    students, teachers = _paired_states(student, teacher, mask)
    weights = level if isinstance(level, dict) else {str(level): 1.0}
    for name, weight in (weights or {"": 1.0}).items():
        checks.one_of("level", name, ("token", "sequence"))
        checks.number(f"level[{name!r}]", weight)
    checks.one_of("grouping", grouping, ("position", "official"))
    checks.one_of("pearson", pearson, ("matrix", "row"))
    checks.one_of("reduction", reduction, reductions.REDUCTIONS)
    checks.positive("eps", eps)
    checks.flag("normalize", normalize)
    if reduction == "none" and len(weights) > 1:
        raise ValueError(f"reduction='none': levels have groups of their own, pass one at a time, got {list(weights)}")
    mask, hides_nothing = reductions.as_bool(mask), None
    if grouping == "official" and mask is not None:
        checks.values(
            "mask", mask, mask.all, "grouping='official' has no defined meaning under a mask that hides tokens"
        )
        # A mask of ones is no mask. Where looking would synchronise, one that hides tokens makes the loss NaN.
        mask, hides_nothing = None, None if checks.looks_are_free(mask) else mask.all()
    options = (grouping, pearson == "row", normalize, float(eps), reduction, backend)
    if process_group is None or "sequence" not in weights:
        found = _correlations(students, teachers, mask, weights, *options)
    else:  # at the sequence level the sequences of all ranks, at the token level those of this one
        gathered = [[distributed.gather_rows(x, process_group) for x in side] for side in (students, teachers, [mask])]
        found = _correlations(*gathered[:2], gathered[2][0], {"sequence": weights["sequence"]}, *options)
        if "token" in weights:
            found = found + _correlations(students, teachers, mask, {"token": weights["token"]}, *options)
    if hides_nothing is not None:
        found = found * torch.where(hides_nothing, 1.0, torch.nan)
    return found[0] if single and reduction == "none" else found


def _paired_states(student, teacher, mask) -> tuple[list[Tensor], list[Tensor]]:
    """Both sides as lists; whatever is in them fits together."""
    single = isinstance(student, Tensor) or isinstance(teacher, Tensor)
    students, teachers = ([student], [teacher]) if single else (student, teacher)
    checks.layers("student", students)
    checks.layers("teacher", teachers)
    checks.same_length("student", students, "teacher", teachers)
    for i, (s, t) in enumerate(zip(students, teachers, strict=True)):
        names = [name if single else f"{name}[{i}]" for name in ("student", "teacher")]
        for name, x in zip(names, (s, t), strict=True):
            checks.tensor(name, x, "[B, N, D]")
        checks.same_leading(names[0], s, names[1], t, 2)
        if i:
            checks.same_leading(names[0], s, "student[0]", students[0], 2)
        checks.same_device(**{names[0]: s, names[1]: t, "mask": mask})
        checks.frozen(names[1], t)
    checks.mask("mask", mask, students[0].shape[:2], "[B, N]")
    return list(students), list(teachers)


def _correlations(students, teachers, mask, weights, grouping, row, normalize, eps, reduction, backend) -> Tensor:
    """The weighted sum of the levels, each reduced over pairs and groups; unreduced [pairs, G] or (row) [pairs, G, R]."""
    official = grouping == "official" and not row  # row by row, both groupings hold the same rows
    levels = tuple("official" if name == "sequence" and official else name for name in weights)
    share = len(students) if reduction == "mean" else 1
    expected = None if reduction == "none" else ([w / share for w in weights.values()], reduction == "mean")
    values, valid = gram.gram(students, teachers, mask, levels, row, normalize, eps, backend, expected)
    total = []
    for k, weight in enumerate(weights.values()):
        rows = torch.stack(values[k :: len(levels)])  # [pairs, G]
        counted = None if mask is None else torch.stack(valid[k :: len(levels)])
        loss = reductions.reduce(rows, counted, reduction)
        total.append(loss if weight == 1 else weight * loss)
    return sum(total)
