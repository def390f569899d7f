"""Hinton, Vinyals, Dean (2015): (1 - alpha) CE(labels, student) + alpha T² KL(softmax(z_t / T) ‖ softmax(z_s / T))."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastkd import checks, functional, reductions
from fastkd.checks import Backend


class HintonKDLoss(nn.Module):
    """Hinton's distillation: (1 - alpha) CE(labels, student) + alpha T² KL(softmax(z_t / T) ‖ softmax(z_s / T)).

    Args:
        alpha: Weight of the teacher's term, in [0, 1].
        temperature: T > 0.
        ignore_index: Rows with this label do not count, in either term.
        backend: "auto" takes the fastest implementation that runs here; `fastkd doctor` lists them.

    Example:
        >>> loss = fastkd.HintonKDLoss(alpha=0.5, temperature=2.0)
        >>> student_logits, teacher_logits = torch.randn(8, 3, requires_grad=True), torch.randn(8, 3)
        >>> loss(student_logits, teacher_logits, labels=torch.randint(3, (8,))).backward()
    """

    def __init__(
        self, alpha: float = 0.5, temperature: float = 2.0, *, ignore_index: int = -100, backend: Backend = "auto"
    ):
        super().__init__()
        checks.positive("temperature", temperature)
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha: must lie in [0, 1], the weight of the teacher's term, got {alpha!r}")
        self.alpha, self.temperature, self.ignore_index, self.backend = alpha, temperature, ignore_index, backend

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """The loss, a scalar; both terms are means over the rows that count.

        Args:
            student_logits: [..., C], one row per example, or per token in language modelling (shift them first).
            teacher_logits: [..., C].
            labels: [...]. None is allowed with alpha=1.
            mask: [...], 1 where a row counts.
        """
        if labels is None and self.alpha < 1:
            raise ValueError(
                f"labels: alpha={self.alpha} needs labels for the cross-entropy; pass them, or use alpha=1"
            )
        soft = functional.divergence(
            student_logits, teacher_logits, temperature=self.temperature, mask=mask, labels=labels,
            ignore_index=self.ignore_index, backend=self.backend,
        )  # fmt: skip
        if self.alpha == 1:
            return soft
        hard = hard_cross_entropy(student_logits, labels, mask, self.ignore_index)
        return (1 - self.alpha) * hard + self.alpha * soft

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, temperature={self.temperature}"


def hard_cross_entropy(logits: Tensor, labels: Tensor, mask: Tensor | None, ignore_index: int) -> Tensor:
    """Mean cross entropy over the rows that count, 0 where none does; logits [..., C], labels [...]."""
    checks.integers("labels", labels, "[...]")
    counted = reductions.counted_rows(mask, labels, ignore_index, logits.shape[:-1])
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    # A row that does not count may hold NaN, which must not reach a product.
    logits = logits.to(dtype).masked_fill(~counted[..., None], 0)
    target = torch.where(counted, labels, 0).long()
    checks.indices_in_range("labels", target, logits.shape[-1], "classes")
    rows = nn.functional.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="none")  # [N]
    return reductions.reduce(rows.reshape(labels.shape), counted, "mean")
