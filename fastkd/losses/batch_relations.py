"""Losses of how the examples of a batch relate: SP, CC, PKT and RKD. Only the examples' vectors are compared with each other, so
student and teacher may have different widths.

The matrices are [B, B] of the examples of a batch (RKD's angles [B, B, B]), which no kernel of fastkd has; they are plain
PyTorch, in float32 or wider.
"""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd import checks


class _BatchRelations(nn.Module):
    def forward(self, student_hidden: Tensor, teacher_hidden: Tensor) -> Tensor:
        """The loss, a scalar.

        Args:
            student_hidden: [B, Ds], one vector per example, B ≥ 2.
            teacher_hidden: [B, Dt].
        """
        for name, x in (("student_hidden", student_hidden), ("teacher_hidden", teacher_hidden)):
            checks.tensor(name, x, "[B, D]")
        checks.same_leading("student_hidden", student_hidden, "teacher_hidden", teacher_hidden, 1)
        checks.same_device(student_hidden=student_hidden, teacher_hidden=teacher_hidden)
        checks.frozen("teacher_hidden", teacher_hidden)
        if len(student_hidden) < 2:
            raise ValueError(f"student_hidden: expected at least two examples, got {checks.describe(student_hidden)}")
        return self._loss(
            *(x.to(torch.promote_types(x.dtype, torch.float32)) for x in (student_hidden, teacher_hidden))
        )

    if TYPE_CHECKING:
        __call__ = forward


class SPLoss(_BatchRelations):
    """Similarity-preserving distillation (Tung, Mori; ICCV 2019): ‖N(S Sᵀ) - N(T Tᵀ)‖²_F / B².

    N scales each row of a matrix to length 1.

    Example:
        >>> loss = fastkd.SPLoss()
        >>> loss(torch.randn(8, 16, requires_grad=True), torch.randn(8, 32)).backward()
    """

    def _loss(self, s: Tensor, t: Tensor) -> Tensor:
        difference = F.normalize(s @ s.mT, dim=1) - F.normalize(t @ t.mT, dim=1)  # [B, B]
        return difference.square().mean()


class CCLoss(_BatchRelations):
    """Correlation congruence (Peng et al.; ICCV 2019): ‖C_s - C_t‖²_F / B², without the paper's other terms.

    C is a Taylor series of the Gaussian kernel of vectors of length 1, exp(-2 gamma) Σ_p (2 gamma ⟨x, y⟩)^p / p!, p = 0 … order.

    Args:
        gamma: The kernel's width, > 0.
        order: The last power of the series, ≥ 1.
        normalize: Scale the vectors to length 1 first.

    Example:
        >>> loss = fastkd.CCLoss()
        >>> loss(torch.randn(8, 16, requires_grad=True), torch.randn(8, 32)).backward()
    """

    def __init__(self, gamma: float = 0.4, order: int = 2, *, normalize: bool = True):
        super().__init__()
        checks.positive("gamma", gamma)
        checks.count("order", order)
        checks.flag("normalize", normalize)
        self.gamma, self.order, self.normalize = float(gamma), order, normalize

    def _loss(self, s: Tensor, t: Tensor) -> Tensor:
        return (self._kernel(s) - self._kernel(t)).square().mean()

    def _kernel(self, x: Tensor) -> Tensor:
        x = F.normalize(x, dim=1) if self.normalize else x
        exponent = 2 * self.gamma * (x @ x.mT)  # [B, B]
        return math.exp(-2 * self.gamma) * sum(exponent**p / math.factorial(p) for p in range(self.order + 1))


class PKTLoss(_BatchRelations):
    """Probabilistic knowledge transfer (Passalis, Tefas; ECCV 2018): Σ p log((p + eps) / (q + eps)) / B².

    A row of q has the student's similarities (1 + cos) / 2 of one example to all of the batch, divided by their sum; p is the
    teacher's.

    Args:
        eps: Added to both probabilities and to the lengths of the vectors, as in the released code.

    Example:
        >>> loss = fastkd.PKTLoss()
        >>> loss(torch.randn(8, 16, requires_grad=True), torch.randn(8, 32)).backward()
    """

    def __init__(self, eps: float = 1e-7):
        super().__init__()
        checks.positive("eps", eps)
        self.eps = float(eps)

    def _loss(self, s: Tensor, t: Tensor) -> Tensor:
        q, p = (self._probabilities(x) for x in (s, t))  # [B, B]
        # Both sum to 1 in each row, so q - p adds nothing, and keeps the digits of a small loss.
        return ((q - p) - p * torch.log1p((q - p) / (p + self.eps))).mean()

    def _probabilities(self, x: Tensor) -> Tensor:
        x = x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + self.eps)
        similarity = (x @ x.mT + 1) / 2
        return similarity / similarity.sum(1, keepdim=True)


class RKDLoss(_BatchRelations):
    """Relational knowledge distillation (Park et al.; CVPR 2019): distances of pairs and angles of triplets.

    distance · Huber(d_s, d_t) + angle · Huber(a_s, a_t), means over all pairs and triplets of the batch: d are the distances
    divided by their mean, a the cosines of the angles at each example between each two others. Angles take B³ numbers.

    Args:
        distance: Weight of the distances.
        angle: Weight of the angles.

    Example:
        >>> loss = fastkd.RKDLoss()
        >>> loss(torch.randn(8, 16, requires_grad=True), torch.randn(8, 32)).backward()
    """

    def __init__(self, distance: float = 1.0, angle: float = 2.0):
        super().__init__()
        for name, weight in (("distance", distance), ("angle", angle)):
            checks.number(name, weight)
        self.distance, self.angle = float(distance), float(angle)

    def _loss(self, s: Tensor, t: Tensor) -> Tensor:
        loss = s.new_zeros(())
        if self.distance:
            loss = loss + self.distance * F.smooth_l1_loss(_distances(s), _distances(t).to(s.dtype))
        if self.angle:
            loss = loss + self.angle * F.smooth_l1_loss(_angles(s), _angles(t).to(s.dtype))
        return loss


def _distances(x: Tensor) -> Tensor:
    d = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")  # [B, B]; a product would cancel for close pairs
    return d / (d.sum() / (d > 0).sum().clamp_min(1)).clamp_min(torch.finfo(d.dtype).tiny)


def _angles(x: Tensor) -> Tensor:
    unit = F.normalize(x[None] - x[:, None], dim=2)  # [B, B, D]
    return unit @ unit.mT  # [B, B, B]
