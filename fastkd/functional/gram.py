"""1 - correlation of self-similarity matrices (FCD)."""

import operator
from typing import Literal

import torch
from torch import Tensor

from fastkd import checks, distributed, reductions
from fastkd.checks import Backend, Reduction
from fastkd.deprecation import renamed
from fastkd.functional.inference_mode import takes_inference_tensors
from fastkd.ops import gram

Level = Literal["token", "sequence"]


@renamed(student="student_hidden", teacher="teacher_hidden")
@takes_inference_tensors
def gram_correlation_loss(
    student_hidden: Tensor | list[Tensor],
    teacher_hidden: Tensor | list[Tensor],
    *,
    level: Level | dict[Level, float] = "token",
    grouping: Literal["position", "official"] = "position",
    pearson: Literal["matrix", "row"] = "matrix",
    normalize: bool = True,
    mask: Tensor | None = None,
    eps: float = 1e-6,
    process_group=None,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Tensor:
    """1 - the Pearson correlation of the student's and the teacher's self-similarity (Gram) matrices, as in FCD.

    1 - corr(S Sᵀ, T Tᵀ) with S [R, Ds] and T [R, Dt] the states of one group, each row scaled to length 1. The widths
    may differ, since only the R x R matrices are compared.

    Args:
        student_hidden: [B, N, Ds], or a list of layers.
        teacher_hidden: [B, N, Dt], or a list of as many layers.
        level: "token": a group is a sequence, its matrix N x N. "sequence": a group is a position, its matrix B x B.
            {"token": a, "sequence": b} is the weighted sum of both.
        grouping: "official" forms the groups of the sequence level as the released code does; see `FCDLoss`.
        pearson: "matrix" correlates whole matrices; "row" correlates row by row, as DIST does.
        normalize: Scale each row to length 1 first.
        mask: [B, N], 1 = real token. Only pairs of real tokens count, and a group with fewer than 2 (token level) or 3
            (sequence level) of them leaves the mean. With grouping="official" the mask must be all ones.
        eps: Added to the denominator of the correlation.
        process_group: The sequence level then uses the batch of all its ranks.
        reduction: "mean" over groups and layers, "sum", or "none".
        backend: "auto" takes the fastest implementation that runs here; `fastkd doctor` lists them.

    Returns:
        A scalar; for reduction="none" [G], or [G, R] with pearson="row", with a leading axis of layers for lists.

    Example:
        >>> student_hidden = torch.randn(4, 16, 32, requires_grad=True)
        >>> teacher_hidden = torch.randn(4, 16, 64)
        >>> loss = fastkd.gram_correlation_loss(student_hidden, teacher_hidden, level={"token": 1.0, "sequence": 0.5})
        >>> loss.backward()
        >>> fastkd.gram_correlation_loss(student_hidden, teacher_hidden, reduction="none").shape  # one per sequence
        torch.Size([4])
    """
    single = isinstance(student_hidden, Tensor)
    students, teachers = _paired_states(student_hidden, teacher_hidden, mask)
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
        raise ValueError(f"reduction='none': the levels have different groups, so pass one level, got {list(weights)}")
    mask, hides_nothing = reductions.as_bool(mask), None
    if grouping == "official" and mask is not None:
        checks.values(
            "mask", mask, mask.all, "grouping='official' has no defined meaning under a mask that hides tokens"
        )
        # Where reading the mask would synchronise, one that hides tokens makes the loss NaN.
        mask, hides_nothing = None, None if checks.looks_are_free(mask) else mask.all()
    options = (grouping, pearson == "row", normalize, float(eps), reduction, backend)
    if process_group is None or "sequence" not in weights:
        loss = _correlations(students, teachers, mask, weights, *options)
    else:  # at the sequence level the sequences of all ranks, at the token level those of this one
        gathered = [[distributed.gather_rows(x, process_group) for x in side] for side in (students, teachers, [mask])]
        loss = _correlations(*gathered[:2], gathered[2][0], {"sequence": weights["sequence"]}, *options)
        if "token" in weights:
            loss = loss + _correlations(students, teachers, mask, {"token": weights["token"]}, *options)
    if hides_nothing is not None:
        loss = loss * torch.where(hides_nothing, 1.0, torch.nan)
    return loss[0] if single and reduction == "none" else loss


def _paired_states(student, teacher, mask) -> tuple[list[Tensor], list[Tensor]]:
    """Both sides as lists of layers, checked."""
    single = isinstance(student, Tensor) or isinstance(teacher, Tensor)
    students, teachers = ([student], [teacher]) if single else (student, teacher)
    checks.layers("student_hidden", students)
    checks.layers("teacher_hidden", teachers)
    checks.same_length("student_hidden", students, "teacher_hidden", teachers)
    for i, (s, t) in enumerate(zip(students, teachers, strict=True)):
        names = [name if single else f"{name}[{i}]" for name in ("student_hidden", "teacher_hidden")]
        for name, x in zip(names, (s, t), strict=True):
            checks.tensor(name, x, "[B, N, D]")
        checks.same_leading(names[0], s, names[1], t, 2)
        if i:
            checks.same_leading(names[0], s, "student_hidden[0]", students[0], 2)
        checks.same_device(**{names[0]: s, names[1]: t, "mask": mask})
        checks.frozen(names[1], t)
    checks.mask("mask", mask, students[0].shape[:2], "[B, N]")
    return list(students), list(teachers)


def _correlations(students, teachers, mask, weights, grouping, row, normalize, eps, reduction, backend) -> Tensor:
    """The weighted sum of the levels, each reduced over pairs and groups; unreduced [pairs, G] or (row) [pairs, G, R]."""
    official = grouping == "official" and not row  # row by row, both groupings hold the same rows
    levels = tuple("official" if name == "sequence" and official else name for name in weights)
    divisor = len(students) if reduction == "mean" else 1
    expected = None if reduction == "none" else ([w / divisor for w in weights.values()], reduction == "mean")
    values, valid = gram.gram(students, teachers, mask, levels, row, normalize, eps, backend, expected)
    total = None
    for k, weight in enumerate(weights.values()):
        join = torch.stack if len(students) > 1 or reduction == "none" else operator.itemgetter(0)  # the only pair
        rows = join(values[k :: len(levels)])  # [pairs, G]
        counted = None if mask is None else join(valid[k :: len(levels)])
        loss = reductions.reduce(rows, counted, reduction)
        loss = loss if weight == 1 else weight * loss
        total = loss if total is None else total + loss
    return total
