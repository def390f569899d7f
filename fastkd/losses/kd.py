"""Hinton, Vinyals, Dean (2015): (1 - alpha) CE(labels, student) + alpha T² KL(softmax(z_t / T) ‖ softmax(z_s / T))."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastkd import checks, functional, reductions
from fastkd.checks import Backend


class PredictionLoss(nn.Module):
    """soft · divergence(teacher, student) + hard · cross-entropy with the labels.

    Args:
        soft, hard: Weights of the two terms; both are means over the rows that count.
        ignore_index: Rows with this label do not count, in either term.
        backend: "auto" takes the fastest implementation that runs here; `fastkd doctor` lists them.
        divergence: Options of `fastkd.divergence`: kind, temperature, t_squared, beta, alpha.
    """

    def __init__(
        self, soft: float = 1.0, hard: float = 0.0, *, ignore_index: int = -100, backend: Backend = "auto", **divergence
    ):
        super().__init__()
        for name, weight in (("soft", soft), ("hard", hard)):
            checks.number(name, weight)
        self.soft, self.hard, self.divergence = float(soft), float(hard), divergence
        self.ignore_index, self.backend = ignore_index, backend

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """The loss, a scalar.

        Args:
            student_logits: [..., C], one row per example, or per token in language modelling (shift them first).
            teacher_logits: [..., C].
            labels: [...], needed where hard > 0.
            mask: [...], 1 where a row counts.
        """
        self._check_labels(labels)
        soft = self.soft_term(student_logits, teacher_logits, labels, mask)
        if not self.hard:
            return soft if self.soft == 1 else self.soft * soft
        return self.soft * soft + self.hard * self.hard_term(student_logits, labels, mask)

    if TYPE_CHECKING:
        __call__ = forward

    def soft_term(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """The divergence alone, without its weight."""
        return functional.divergence(
            student_logits, teacher_logits, mask=mask, labels=labels, ignore_index=self.ignore_index,
            backend=self.backend, **self.divergence,
        )  # fmt: skip

    def hard_term(self, student_logits: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """The cross-entropy with the labels alone, without its weight."""
        return hard_cross_entropy(student_logits, labels, mask, self.ignore_index)

    def from_hidden(
        self,
        student_hidden: Tensor,
        student_head: Tensor,
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        **heads,
    ) -> Tensor:
        """The loss from hidden states [..., D] and heads [V, D], both terms in one pass over the vocabulary.

        heads: student_bias, teacher_bias, logit_scale, logit_softcap, vocab, as functional.linear_divergence has them.
        """
        self._check_labels(labels)
        if not self.soft:
            raise ValueError("soft: is 0, so no teacher is needed; call hard_cross_entropy_from_hidden")
        if self.hard:
            heads["hard_weight"] = self.hard / self.soft
        loss = functional.linear_divergence(
            student_hidden, student_head, teacher_hidden, teacher_head, mask=mask, labels=labels,
            ignore_index=self.ignore_index, backend=self.backend, **heads, **self.divergence,
        )  # fmt: skip
        return loss if self.soft == 1 else self.soft * loss

    def _check_labels(self, labels: Tensor | None) -> None:
        if labels is None and self.hard:
            raise ValueError(f"labels: needed for the cross-entropy, which has the weight {self.hard:g}")

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}={x!r}" for name, x in {"soft": self.soft, "hard": self.hard, **self.divergence}.items()
        )


class HintonKDLoss(PredictionLoss):
    """Hinton's distillation: (1 - alpha) CE(labels, student) + alpha T² KL(softmax(z_t / T) ‖ softmax(z_s / T)).

    One row per example in classification, per token in language modelling (shift first).

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
        checks.positive("temperature", temperature)
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha: must lie in [0, 1], the weight of the teacher's term, got {alpha!r}")
        super().__init__(alpha, 1 - alpha, ignore_index=ignore_index, backend=backend, temperature=temperature)


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


def hard_cross_entropy_from_hidden(
    hidden: Tensor, head: Tensor, labels: Tensor, mask: Tensor | None, ignore_index: int, **shape
) -> Tensor:
    """The same from hidden states [..., D] and the head [V, D]. shape: student_bias, logit_scale, logit_softcap."""
    checks.integers("labels", labels, "[...]")
    counted = reductions.counted_rows(mask, labels, ignore_index, hidden.shape[:-1])
    target = torch.where(counted, labels, 0).long()[..., None]
    certain = functional.TopK(target, torch.zeros_like(target, dtype=torch.float32))  # a teacher that is sure of them
    return functional.linear_divergence(hidden, head, certain, kind="soft_ce", mask=counted, **shape)
