"""DIST (Huang et al., NeurIPS 2022): Pearson's correlation of predictions, within each example and within each class.

1 - cos(a, b) = ½ ‖â - b̂‖² with vectors of length 1, which keeps its digits where student and teacher almost agree.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastkd import checks, reductions

EPS = 1e-8  # the released code's least length of a vector


class DISTLoss(nn.Module):
    """T² (beta inter + gamma intra), each 1 - the correlation of the student's probabilities with the teacher's.

    inter: of the classes of one example, the mean over the examples. intra: of the examples for one class, the mean over the
    classes.

    Args:
        beta: Weight of inter.
        gamma: Weight of intra.
        temperature: T > 0.

    Example:
        >>> loss = fastkd.DISTLoss(beta=2.0, gamma=2.0)
        >>> loss(torch.randn(8, 5, requires_grad=True), torch.randn(8, 5)).backward()
    """

    def __init__(self, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0):
        super().__init__()
        for name, weight in (("beta", beta), ("gamma", gamma)):
            checks.number(name, weight)
        checks.positive("temperature", temperature)
        self.beta, self.gamma, self.temperature = float(beta), float(gamma), float(temperature)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss, a scalar.

        Args:
            student_logits: [..., C].
            teacher_logits: [..., C].
            mask: [...], 1 where a row counts.
        """
        for name, x in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
            checks.tensor(name, x, "[..., C]")
        checks.same_shape("teacher_logits", teacher_logits, "student_logits", student_logits)
        checks.same_device(student_logits=student_logits, teacher_logits=teacher_logits, mask=mask)
        checks.frozen("teacher_logits", teacher_logits)
        checks.mask("mask", mask, student_logits.shape[:-1], "[...]")
        counted = student_logits.new_ones(student_logits.shape[:-1]) if mask is None else reductions.as_bool(mask)
        counted = counted.bool().reshape(-1, 1)  # [N, 1]
        count = counted.sum().clamp_min(1)
        s, t = (self._probabilities(x, counted) for x in (student_logits, teacher_logits))  # [N, C]
        inter = _dissimilarity(*(x - x.mean(1, keepdim=True) for x in (s, t)), dim=1)  # [N]
        inter = inter.masked_fill(~counted[:, 0], 0).sum() / count
        intra = _dissimilarity(*((x - x.sum(0) / count).masked_fill(~counted, 0) for x in (s, t)), dim=0).mean()
        loss = self.temperature**2 * (self.beta * inter + self.gamma * intra)
        return torch.where(counted.any(), loss, 0.0)

    if TYPE_CHECKING:
        __call__ = forward

    def _probabilities(self, logits: Tensor, counted: Tensor) -> Tensor:
        x = logits.flatten(0, -2).masked_fill(~counted, 0)  # a row that does not count may hold NaN
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return (x / self.temperature).softmax(-1).masked_fill(~counted, 0)

    def extra_repr(self) -> str:
        return f"beta={self.beta:g}, gamma={self.gamma:g}, temperature={self.temperature:g}"


def _dissimilarity(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """1 - cos(a, b), in which a vector shorter than EPS is divided by EPS."""
    norms = [torch.linalg.vector_norm(x, dim=dim, keepdim=True) for x in (a, b)]
    a, b = (x / norm.clamp_min(EPS) for x, norm in zip((a, b), norms, strict=True))
    short = sum((1 - (norm / EPS).clamp_max(1).square()) / 2 for norm in norms)  # 0 where both have length 1
    return short.squeeze(dim) + (a - b).square().sum(dim) / 2
