"""FCD: Feature Correlation Distillation (Huang, Guo, Wang; NeurIPS 2023).

The similarities between tokens of the student are correlated with those between tokens of the teacher: within a sequence
(token level), across the batch at each position (sequence level), and, with gamma > 0, among K tokens drawn from the whole
batch (random relation). Only similarities are compared, so the widths may differ and the loss has no parameters.
"""

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from fastkd import checks, distributed, functional, reductions
from fastkd.checks import Backend
from fastkd.deprecation import renamed


class FCDLoss(nn.Module):
    """FCD: loss_weight · (alpha · token + beta · sequence + gamma · random).

    Each term is 1 - the Pearson correlation of the two sides' similarity matrices; see `fastkd.gram_correlation_loss`.

    Args:
        alpha: Weight of the token level.
        beta: Weight of the sequence level. It needs at least three sequences; with two it has no gradient.
        gamma: Weight of the random relation.
        K: How many tokens the random relation draws.
        loss_weight: Factor of the whole loss.
        grouping: "position" compares one B x B matrix per position, as the paper describes. "official" repeats the released
            code, which views the [N, B, B] buffer as [B, N·B], so that its groups straddle positions; it leaves the features
            unnormalised when alpha is 0, and takes no mask that hides tokens.
        process_group: The sequence level and the random relation then use the batch of all its ranks.
        backend: "auto" takes the fastest implementation that runs here; `fastkd doctor` lists them.

    Example:
        >>> loss = fastkd.FCDLoss()
        >>> student_hidden = torch.randn(8, 32, 384, requires_grad=True)
        >>> teacher_hidden, mask = torch.randn(8, 32, 768), torch.ones(8, 32)
        >>> loss(student_hidden, teacher_hidden, mask).backward()
    """

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 1.0,
        gamma: float = 0.0,
        K: int = 128,
        loss_weight: float = 1.0,
        grouping: Literal["position", "official"] = "position",
        *,
        process_group=None,
        backend: Backend = "auto",
    ):
        super().__init__()
        checks.one_of("grouping", grouping, ("position", "official"))
        checks.positive("K", K)
        for name, weight in {"alpha": alpha, "beta": beta, "gamma": gamma, "loss_weight": loss_weight}.items():
            checks.number(name, weight)
        if min(alpha, beta, gamma) < 0 or alpha + beta + gamma == 0:
            raise ValueError(f"alpha, beta, gamma: must be >= 0 and not all 0, got {alpha!r}, {beta!r}, {gamma!r}")
        self.alpha, self.beta, self.gamma, self.K = alpha, beta, gamma, K
        self.loss_weight, self.grouping = loss_weight, grouping
        self.process_group, self.backend = process_group, backend

    @renamed(fs="student_hidden", ft="teacher_hidden")
    def forward(
        self, student_hidden: Tensor | list[Tensor], teacher_hidden: Tensor | list[Tensor], mask: Tensor | None = None
    ) -> Tensor:
        """The loss, a scalar; over lists of layers, the mean over the pairs.

        Args:
            student_hidden: [B, N, Ds], or a list of layers.
            teacher_hidden: [B, N, Dt], or a list of as many.
            mask: [B, N], 1 = real token.
        """
        students = [student_hidden] if isinstance(student_hidden, Tensor) else student_hidden
        teachers = [teacher_hidden] if isinstance(teacher_hidden, Tensor) else teacher_hidden
        checks.layers("student_hidden", students)
        checks.layers("teacher_hidden", teachers)
        checks.same_length("student_hidden", students, "teacher_hidden", teachers)
        correlation, w = functional.gram_correlation_loss, self.loss_weight
        normalize = self.alpha > 0 or self.grouping == "position"
        options = {"normalize": normalize, "process_group": self.process_group, "backend": self.backend}
        level = {name: w * x for name, x in (("token", self.alpha), ("sequence", self.beta)) if x > 0}
        loss = (
            correlation(students, teachers, level=level, grouping=self.grouping, mask=mask, **options) if level else 0.0
        )
        if self.gamma > 0:
            # Each pair of layers draws its own tokens. Real ones come first, so that all pairs have the same mask.
            drawn = [self._random_tokens(s, t, mask) for s, t in zip(students, teachers, strict=True)]
            students, teachers, masks = zip(*drawn, strict=True)
            loss = loss + w * self.gamma * correlation(students, teachers, pearson="row", mask=masks[0], **options)
        return loss

    if TYPE_CHECKING:
        __call__ = forward

    def _random_tokens(self, student: Tensor, teacher: Tensor, mask: Tensor | None):
        """K tokens of the batch as one sequence: [1, K, Ds], [1, K, Dt], and which of them are real [1, K]."""
        checks.same_leading("student_hidden", student, "teacher_hidden", teacher, 2)
        checks.mask("mask", mask, student.shape[:2], "[B, N]")
        gathered = [
            distributed.gather_rows(x, self.process_group) for x in (student, teacher, reductions.as_bool(mask))
        ]
        if self.beta > 0:  # the authors draw after the sequence term has put positions first
            gathered = [None if x is None else x.transpose(0, 1) for x in gathered]
        s, t, real = (None if x is None else x.flatten(0, 1) for x in gathered)  # [B·N, ...]
        if real is None:
            drawn = self._alike(torch.randperm(s.shape[0], device=s.device)[: self.K])
            return s[drawn][None], t[drawn][None], None
        # Real tokens first, in random order; the mask marks the others, where fewer than K are real.
        drawn = self._alike(torch.rand(s.shape[0], device=s.device).masked_fill(~real, 2.0).argsort()[: self.K])
        return s[drawn][None], t[drawn][None], real[drawn][None]

    def _alike(self, drawn: Tensor) -> Tensor:
        """Ranks whose generators have parted all use the first one's draw."""
        return distributed.from_first(drawn.contiguous(), self.process_group)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}, gamma={self.gamma}, K={self.K}, grouping={self.grouping!r}"
