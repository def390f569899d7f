"""DistilBERT (Sanh et al., 2019): 5 · T² KL(teacher ‖ student) + 2 · MLM + 1 · (1 - cos(last hidden states)), T = 2."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastkd import checks, functional, reductions
from fastkd.checks import Backend

from .kd import hard_cross_entropy


class DistilBERTLoss(nn.Module):
    """DistilBERT: alpha_kl T² KL(teacher ‖ student) + alpha_mlm CE(labels, student) + alpha_cosine (1 - cos(hidden states)).

    Args:
        temperature: T > 0.
        alpha_kl: Weight of the KL term.
        alpha_mlm: Weight of the language-modelling term.
        alpha_cosine: Weight of the cosine term.
        ignore_index: The label of tokens that are not predicted.
        backend: "auto" takes the fastest implementation that runs here; `fastkd doctor` lists them.

    Example:
        >>> loss = fastkd.DistilBERTLoss()
        >>> student_logits, student_hidden = (torch.randn(2, 8, n, requires_grad=True) for n in (100, 16))
        >>> teacher_logits, teacher_hidden = (torch.randn(2, 8, n) for n in (100, 16))
        >>> labels = torch.randint(100, (2, 8))
        >>> loss(student_logits, teacher_logits, student_hidden, teacher_hidden, labels, torch.ones(2, 8)).backward()
    """

    def __init__(
        self,
        temperature: float = 2.0,
        *,
        alpha_kl: float = 5.0,
        alpha_mlm: float = 2.0,
        alpha_cosine: float = 1.0,
        ignore_index: int = -100,
        backend: Backend = "auto",
    ):
        super().__init__()
        checks.positive("temperature", temperature)
        self.temperature, self.ignore_index, self.backend = temperature, ignore_index, backend
        self.alpha_kl, self.alpha_mlm, self.alpha_cosine = alpha_kl, alpha_mlm, alpha_cosine

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        student_hidden: Tensor,
        teacher_hidden: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The loss, a scalar. The KL and the cosine term are means over the real tokens, the third over the labelled ones.

        Args:
            student_logits: [B, S, V].
            teacher_logits: [B, S, V].
            student_hidden: [B, S, D], the last hidden states.
            teacher_hidden: [B, S, D].
            labels: [B, S], for a causal model shifted by the caller. None leaves the language-modelling term out.
            mask: [B, S], 1 = real token.
        """
        checks.tensor("student_hidden", student_hidden, "[..., D]")
        hint = "DistilBERT's student has the teacher's width; project it first"
        checks.same_shape("student_hidden", student_hidden, "teacher_hidden", teacher_hidden, hint)
        checks.frozen("teacher_hidden", teacher_hidden)
        loss = self.alpha_kl * functional.divergence(
            student_logits, teacher_logits, temperature=self.temperature, mask=mask, backend=self.backend
        )
        loss = loss + self.alpha_cosine * cosine_distance(student_hidden, teacher_hidden, mask)
        if labels is None:
            return loss
        return loss + self.alpha_mlm * hard_cross_entropy(student_logits, labels, mask, self.ignore_index)

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"


def cosine_distance(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """1 - cos of the states [..., D], the mean over the real tokens."""
    counted = reductions.as_bool(mask)
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    student, teacher = student.to(dtype), teacher.to(dtype)
    if counted is not None:
        student, teacher = (x.masked_fill(~counted[..., None], 1) for x in (student, teacher))
    rows = 1 - nn.functional.cosine_similarity(student, teacher, dim=-1)  # [...]
    return reductions.reduce(rows, counted, "mean")
