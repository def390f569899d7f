"""The KL of softened labels as `torch.nn.KLDivLoss` returns it, for the packages that call it with two softmaxes."""

import torch
from torch import Tensor

from fastkd import functional, thresholds

REDUCTIONS = ("batchmean", "mean", "sum")


def worth_it(logits: int) -> bool:
    """With fewer, the checks of a call may take longer than two softmaxes."""
    return logits > 0 and thresholds.serves("soft_labels", logits) == thresholds.KERNELS


def takes(student_logits: Tensor, teacher_logits: Tensor) -> bool:
    """Whether kernels give what two softmaxes over these give: one shape, no gradient for the teacher; and enough elements."""
    teacher_learns = teacher_logits.requires_grad and torch.is_grad_enabled()
    floating = student_logits.is_floating_point() and teacher_logits.is_floating_point()
    return (
        worth_it(student_logits.numel())
        and floating
        and student_logits.shape == teacher_logits.shape
        and not teacher_learns
    )


def like_softmax(loss: Tensor, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """The loss in the dtype that softmax and log_softmax of these would give it: float32 under autocast."""
    if torch.is_autocast_enabled(student_logits.device.type):
        return loss
    return loss.to(torch.promote_types(student_logits.dtype, teacher_logits.dtype))


def kl_div(student_logits: Tensor, teacher_logits: Tensor, temperature: float, reduction: str) -> Tensor:
    """F.kl_div(log_softmax(student_logits / T, dim=1), softmax(teacher_logits / T, dim=1), reduction=reduction).

    Args:
        student_logits: [B, C, ...].
        teacher_logits: [B, C, ...].
        temperature: T.
        reduction: "batchmean", "mean" or "sum".
    """
    student, teacher = (x.movedim(1, -1) for x in (student_logits, teacher_logits))  # [B, ..., C]
    options = {"temperature": float(temperature), "t_squared": False}
    loss = functional.divergence(student, teacher, reduction=reduction, **options)
    if reduction == "mean":  # over the elements, not the rows
        loss = loss / student.shape[-1]
    return like_softmax(loss, student_logits, teacher_logits)
