"""Zhao, Cui, Song, Qiu, Liang (CVPR 2022): alpha TCKD + beta NCKD, Hinton's divergence in two parts with weights of their own.

With p_y the probability of the label, KL(p ‖ q) = KL((p_y, 1 - p_y) ‖ (q_y, 1 - q_y)) + (1 - p_y) KL(p without y ‖ q without y).
TCKD is the first term. NCKD is the last divergence, without the factor 1 - p_y.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastkd import checks, functional, reductions
from fastkd.checks import Backend


class DecoupledKDLoss(nn.Module):
    """Decoupled knowledge distillation: T² (alpha TCKD + beta NCKD), without the cross-entropy that the paper adds.

    TCKD compares the probabilities of the label and of all other classes together; NCKD compares the other classes among
    each other.

    Args:
        alpha: Weight of TCKD.
        beta: Weight of NCKD.
        temperature: T > 0.
        ignore_index: Rows with this label do not count.
        backend: "auto" takes the fastest implementation that runs here; `fastkd doctor` lists them.

    Example:
        >>> loss = fastkd.DecoupledKDLoss(alpha=1.0, beta=8.0, temperature=4.0)
        >>> student_logits, teacher_logits = torch.randn(8, 3, requires_grad=True), torch.randn(8, 3)
        >>> loss(student_logits, teacher_logits, labels=torch.randint(3, (8,))).backward()
    """

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        *,
        ignore_index: int = -100,
        backend: Backend = "auto",
    ):
        super().__init__()
        for name, weight in (("alpha", alpha), ("beta", beta)):
            checks.number(name, weight)
        checks.positive("temperature", temperature)
        self.alpha, self.beta, self.temperature = float(alpha), float(beta), float(temperature)
        self.ignore_index, self.backend = ignore_index, backend

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """The loss, a scalar: the mean over the rows that count.

        Args:
            student_logits: [..., C], C ≥ 2.
            teacher_logits: [..., C].
            labels: [...], the true classes.
            mask: [...], 1 where a row counts.
        """
        checks.tensor("student_logits", student_logits, "[..., C]")
        checks.tensor("teacher_logits", teacher_logits, "[..., C]")
        checks.same_shape("teacher_logits", teacher_logits, "student_logits", student_logits)
        checks.frozen("teacher_logits", teacher_logits)
        checks.integers("labels", labels, "[...]")
        classes = student_logits.shape[-1]
        if classes < 2:
            raise ValueError(f"student_logits: expected at least two classes, got {checks.describe(student_logits)}")
        counted = reductions.counted_rows(mask, labels, self.ignore_index, student_logits.shape[:-1])
        label = torch.where(counted, labels, 0).long()[..., None]
        checks.indices_in_range("labels", label, classes, "classes")
        if not student_logits.dtype == teacher_logits.dtype == torch.float64:
            student_logits, teacher_logits = student_logits.float(), teacher_logits.float()
        # A row that does not count may hold NaN, which must not reach the backward of a logsumexp.
        sides = (x.masked_fill(~counted[..., None], 0) for x in (student_logits, teacher_logits))
        terms = [
            functional.divergence(s, t, temperature=self.temperature, mask=counted, backend=self.backend)
            for s, t in zip(*(self._parts(x, label) for x in sides), strict=True)
        ]
        return self.alpha * terms[0] + self.beta * terms[1]

    if TYPE_CHECKING:
        __call__ = forward

    def _parts(self, logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of (the label, all other classes) [..., 2]; and of the other classes [..., C], -inf for the label."""
        others = logits.scatter(-1, label, -torch.inf)
        together = self.temperature * torch.logsumexp(others / self.temperature, -1, keepdim=True)
        return torch.cat([logits.gather(-1, label), together], -1), others

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}, beta={self.beta:g}, temperature={self.temperature:g}"
