"""FCD: Feature Correlation Distillation (Huang, Guo, Wang; NeurIPS 2023).

The student's tokens shall resemble each other as the teacher's do: within a sequence (token level), across the batch at
each position (sequence level), and, when gamma > 0, among K tokens drawn from the whole batch (random relation).
Relations have no width, so nothing is projected and there is nothing to train here.
"""

import torch
from torch import Tensor, nn

from fastkd import checks, distributed, functional, reductions


class FCDLoss(nn.Module):
    """loss_weight · (alpha · token + beta · sequence + gamma · random); over lists of layers, the mean of the pairs.

    grouping="position" correlates one batch-by-batch matrix per position, as the paper means it (three sequences at
    least; with two it has no gradient). "official" repeats the released code: it cuts the buffer of these matrices into
    B rows that straddle positions, leaves features unnormalised when alpha is 0, and knows no mask.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 1.0,
        gamma: float = 0.0,
        K: int = 128,
        loss_weight: float = 1.0,
        grouping: str = "position",
        *,
        process_group=None,
        backend: str = "auto",
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

    def forward(self, fs: Tensor | list[Tensor], ft: Tensor | list[Tensor], mask: Tensor | None = None) -> Tensor:
        """fs [B, N, Ds] and ft [B, N, Dt], or lists of as many; mask [B, N], 1 = real token."""
        fs, ft = ([x] if isinstance(x, Tensor) else x for x in (fs, ft))
        checks.layers("fs", fs)
        checks.layers("ft", ft)
        checks.same_length("fs", fs, "ft", ft)
        correlation, w = functional.gram_correlation_loss, self.loss_weight
        normalize = self.alpha > 0 or self.grouping == "position"
        options = {"normalize": normalize, "process_group": self.process_group, "backend": self.backend}
        level = {name: w * x for name, x in (("token", self.alpha), ("sequence", self.beta)) if x > 0}
        loss = correlation(fs, ft, level=level, grouping=self.grouping, mask=mask, **options) if level else 0.0
        if self.gamma > 0:
            # Every pair draws its own tokens. Real ones come first, so that all pairs have the same mask.
            drawn = [self._random_tokens(s, t, mask) for s, t in zip(fs, ft, strict=True)]
            students, teachers, masks = zip(*drawn, strict=True)
            loss = loss + w * self.gamma * correlation(students, teachers, pearson="row", mask=masks[0], **options)
        return loss

    def _random_tokens(self, student: Tensor, teacher: Tensor, mask: Tensor | None):
        """K tokens of the batch as one sequence: [1, K, Ds], [1, K, Dt], and which of them are real [1, K]."""
        checks.same_leading("student", student, "teacher", teacher, 2)
        checks.mask("mask", mask, student.shape[:2], "[B, N]")
        gathered = [
            distributed.gather_rows(x, self.process_group) for x in (student, teacher, reductions.as_bool(mask))
        ]
        if self.beta > 0:  # the authors draw after the sequence term has put positions first
            gathered = [None if x is None else x.transpose(0, 1) for x in gathered]
        s, t, real = (None if x is None else x.flatten(0, 1) for x in gathered)  # [B·N, ...]
        if real is None:
            drawn = torch.randperm(s.shape[0], device=s.device)[: self.K]
            return s[drawn][None], t[drawn][None], None
        # Real tokens first, in random order; should there be fewer than K, the mask says which rows are not.
        drawn = torch.rand(s.shape[0], device=s.device).masked_fill(~real, 2.0).argsort()[: self.K]
        return s[drawn][None], t[drawn][None], real[drawn][None]

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}, gamma={self.gamma}, K={self.K}, grouping={self.grouping!r}"
