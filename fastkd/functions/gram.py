"""1 - correlation of self-similarity matrices (FCD)."""

from torch import Tensor

from fastkd import checks, reduce
from fastkd.ops import gram


def gram_correlation_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    level: str = "token",
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
    the batch of all ranks). pearson="row" correlates row by row (DIST) instead of whole matrices. grouping="official"
    groups the sequence level as the released code does. With a mask only valid pairs count, and a group of fewer than
    2 (token) or 3 (sequence) valid rows leaves the mean.
    """
    checks.tensor("student", student, "[B, N, D]")
    checks.tensor("teacher", teacher, "[B, N, D]")
    checks.same_leading("student", student, "teacher", teacher, 2)
    checks.same_device(student=student, teacher=teacher, mask=mask)
    checks.frozen("teacher", teacher)
    checks.mask("mask", mask, student.shape[:2], "[B, N]")
    checks.one_of("level", level, ("token", "sequence"))
    checks.one_of("grouping", grouping, ("position", "official"))
    checks.one_of("pearson", pearson, ("matrix", "row"))
    checks.one_of("reduction", reduction, reduce.REDUCTIONS)
    checks.positive("eps", eps)
    mask = reduce.as_bool(mask)
    if grouping == "official" and mask is not None:
        checks.values(
            "mask", mask, mask.all, "grouping='official' has no defined meaning under a mask that hides tokens"
        )
    if level == "sequence":
        student, teacher, mask = (reduce.gather_rows(x, process_group) for x in (student, teacher, mask))
    values, valid = gram.gram(student, teacher, mask, level, grouping, pearson, normalize, float(eps), backend)
    return reduce.reduce(values, valid, reduction)
