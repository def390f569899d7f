"""Correlation of two self-similarity matrices (FCD): which implementation runs."""

from torch import Tensor

from fastkd import backends
from fastkd.reference import gram as reference


def gram(student, teacher, mask, level, grouping, pearson, normalize, eps, backend) -> tuple[Tensor, Tensor]:
    """1 - rho and whether it counts, per group [G] (matrix) or per row of each group's matrix [G, R] (row)."""
    backends.choose("gram", backend, student)
    with backends.full_precision(student):
        return reference.gram(student, teacher, mask, level, grouping, pearson, normalize, eps)
