"""Sentence embeddings: the student's vector of a text learns the teacher's, by direction, by value, or by contrast."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastkd import checks, distributed, functional
from fastkd.checks import Backend
from fastkd.functional.inference_mode import takes_inference_tensors

from .distilbert import cosine_distance


class EmbeddingLoss(nn.Module):
    """cosine · (1 - cos(s, t)) + mse · mean((s - t)²) + contrast · InfoNCE, for the embeddings s and t of the same texts.

    InfoNCE is -log(exp(cos(s_i, t_i) / T) / Σ_j exp(cos(s_i, t_j) / T)) over the texts j of the batch.

    Args:
        cosine: Weight of the cosine distance.
        mse: Weight of the mean squared difference.
        contrast: Weight of InfoNCE, in which the student's vector must pick the teacher's of its text among the batch.
        temperature: T > 0, of InfoNCE.
        process_group: InfoNCE is then over the texts of all its ranks, which must hold equally many.
        backend: "auto" takes the fastest implementation that runs here; `fastkd doctor` lists them.

    Example:
        >>> loss = fastkd.EmbeddingLoss(contrast=0.1)
        >>> student_embedding, teacher_embedding = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16)
        >>> loss(student_embedding, teacher_embedding).backward()
    """

    def __init__(
        self,
        cosine: float = 1.0,
        mse: float = 0.0,
        contrast: float = 0.0,
        *,
        temperature: float = 0.05,
        process_group=None,
        backend: Backend = "auto",
    ):
        super().__init__()
        self.weights = {"cosine": cosine, "mse": mse, "contrast": contrast}
        for name, weight in self.weights.items():
            checks.number(name, weight)
        if not any(self.weights.values()):
            raise ValueError(
                "cosine, mse, contrast: all have the weight 0, so there is no loss; give one of them another"
            )
        checks.positive("temperature", temperature)
        self.temperature, self.process_group, self.backend = temperature, process_group, backend

    @takes_inference_tensors
    def forward(self, student_embedding: Tensor, teacher_embedding: Tensor) -> Tensor:
        """The loss, a scalar; each term is the mean over the texts.

        Args:
            student_embedding: [B, D], already projected to the teacher's width.
            teacher_embedding: [B, D].
        """
        checks.tensor("student_embedding", student_embedding, "[B, D]")
        hint = "project the student to the teacher's width first, for example with fastkd.Projection"
        checks.same_shape("student_embedding", student_embedding, "teacher_embedding", teacher_embedding, hint)
        checks.frozen("teacher_embedding", teacher_embedding)
        dtype = torch.float64 if student_embedding.dtype == torch.float64 else torch.float32
        sides = student_embedding.to(dtype), teacher_embedding.to(dtype)
        terms = {"cosine": self._cosine, "mse": self._mse, "contrast": self._contrast}
        return sum(weight * terms[name](*sides) for name, weight in self.weights.items() if weight)

    if TYPE_CHECKING:
        __call__ = forward

    def _cosine(self, student: Tensor, teacher: Tensor) -> Tensor:
        return cosine_distance(student, teacher, None)

    def _mse(self, student: Tensor, teacher: Tensor) -> Tensor:
        return functional.layer_costs([student[:, None]], [teacher[:, None]], backend=self.backend).squeeze()

    def _contrast(self, student: Tensor, teacher: Tensor) -> Tensor:
        sides = (distributed.gather_rows(x, self.process_group) for x in (student, teacher))
        student, teacher = (normalize(x, dim=-1) for x in sides)
        return functional.info_nce_loss(student, teacher, None, temperature=self.temperature, backend=self.backend)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={x}" for name, x in {**self.weights, "temperature": self.temperature}.items())
