"""linear_divergence: `divergence` between two models' logits, hidden @ head.T + bias, from what makes the logits."""

import torch

from .divergence import divergence


def linear_divergence(
    student_hidden, student_head, student_bias, teacher_hidden, teacher_head, teacher_bias,
    mask, kind, temperature, beta, alpha,
):  # fmt: skip
    """hidden [N,D], head [V,D], bias [V], mask [N] -> rows [N]."""
    dtype = torch.float64 if student_hidden.dtype == torch.float64 else torch.float32
    s = _logits(student_hidden, student_head, student_bias, mask, dtype)  # [N, V]
    t = _logits(teacher_hidden, teacher_head, teacher_bias, mask, dtype)
    return divergence(s, t, mask, kind, temperature, beta, alpha)


def _logits(hidden, head, bias, mask, dtype):
    # A masked row may hold NaN, and the gradient of the head would multiply it by 0.
    hidden = hidden if mask is None else hidden.masked_fill(~mask[:, None], 0)
    return torch.nn.functional.linear(hidden.to(dtype), head.to(dtype), None if bias is None else bias.to(dtype))
