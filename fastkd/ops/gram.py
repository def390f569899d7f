"""Correlation of two self-similarity matrices (FCD): the autograd Function, and which implementation runs."""

import torch
from torch import Tensor

from fastkd import backends
from fastkd.reference import gram as reference

# What a kernel looks like: fwd(student, teacher, mask, sequence, normalize, eps, with_gradient) -> (1 - rho [G], whether
# it counts [G], the student's gradient for upstream 1 [B, N, D], or [B, 0, D]), and bwd(grad [G], that, sequence).
KERNELS = backends.kernels("gram", "gram_fwd", "gram_bwd")


def _values_fake(student, teacher, mask, sequence, normalize, eps, with_gradient):
    B, N, D = student.shape
    G = N if sequence else B
    dtype = torch.bfloat16 if student.dtype == torch.bfloat16 else torch.float32
    values, valid = (student.new_empty(G, dtype=d) for d in (torch.float32, torch.bool))
    return values, valid, student.new_empty((B, N if with_gradient else 0, D), dtype=dtype)


backends.fake("gram_fwd", _values_fake)
backends.fake("gram_bwd", lambda grad, unit, sequence: torch.empty_like(unit))


class Gram(torch.autograd.Function):
    """Saves the gradient for upstream 1, which needs nothing from outside its group; the backward scales it."""

    @staticmethod
    def forward(ctx, backend, student, teacher, mask, sequence, normalize, eps, with_gradient):
        values, valid, unit = KERNELS[backend].fwd(student, teacher, mask, sequence, normalize, eps, with_gradient)
        ctx.save_for_backward(unit)
        ctx.mark_non_differentiable(valid)
        ctx.backend, ctx.sequence, ctx.dtype = backend, sequence, student.dtype
        return values, valid

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        (unit,) = ctx.saved_tensors
        found = KERNELS[ctx.backend].bwd(grad, unit, ctx.sequence)
        return None, found.to(ctx.dtype), None, None, None, None, None, None


def gram(student, teacher, mask, level, grouping, pearson, normalize, eps, backend) -> tuple[Tensor, Tensor]:
    """1 - rho and whether it counts, per group [G] (matrix) or per row of each group's matrix [G, R] (row)."""
    backend = backends.choose("gram", backend, student)
    # Kernels correlate whole matrices of a group. Row by row (the random relation, 128 tokens), and the released code's
    # groups that straddle positions, are the reference's on every backend.
    official = level == "sequence" and grouping == "official"
    if backend == "reference" or pearson == "row" or official:
        with backends.full_precision(student):
            return reference.gram(student, teacher, mask, level, grouping, pearson, normalize, eps)
    teacher = teacher.float() if teacher.dtype == torch.float64 else teacher
    with_gradient = student.requires_grad and torch.is_grad_enabled()
    return Gram.apply(backend, student, teacher, mask, level == "sequence", normalize, eps, with_gradient)
