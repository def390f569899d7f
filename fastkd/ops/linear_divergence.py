"""Row-wise divergence from hidden states and LM heads: which implementation runs."""

from torch import Tensor

from fastkd import backends
from fastkd.reference import linear_divergence as reference


def linear_divergence(
    student_hidden, student_head, student_bias, teacher_hidden, teacher_head, teacher_bias,
    mask, kind, temperature, beta, alpha, memory, backend,
) -> Tensor:  # fmt: skip
    """One value per row of student_hidden [N, Ds], without the T² factor; masked rows give 0."""
    backends.choose("linear_divergence", backend, student_hidden)
    with backends.full_precision(student_hidden):
        return reference.linear_divergence(
            student_hidden, student_head, student_bias, teacher_hidden, teacher_head, teacher_bias,
            mask, kind, temperature, beta, alpha,
        )  # fmt: skip
