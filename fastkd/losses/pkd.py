"""PKD: Patient Knowledge Distillation (Sun et al., 2019): the sentence vector of inner layers, on the unit sphere.

sum over student layers l = 1 … N - 1 of |ĥ_s,l - ĥ_t,map(l)|², averaged over the batch; ĥ is the L2-normalised hidden
state of the sentence token. The last layer is left to the logits.
"""

from typing import TYPE_CHECKING, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from fastkd import checks, functional, reductions
from fastkd.checks import Backend


class PKDLoss(nn.Module):
    """PKD: squared distance of the sentence vectors of N - 1 student layers to those of chosen teacher layers.

    Σ_l ‖ĥ_student,l - ĥ_teacher,map(l)‖² for l = 1 … N - 1, the mean over the batch.

    Args:
        strategy: "skip" maps student layer l to teacher layer l·M/N (2 4 6 8 10 for 6 of 12), "last" to M - N + l (7 … 11).
        token: The token whose hidden state is the sentence vector: "first" ([CLS]), or "last" for decoders. With a mask,
            the first or last real token.
        normalize: Scale the vectors to length 1 first.
        backend: "auto" takes the fastest implementation that runs here; `fastkd doctor` lists them.

    Example:
        >>> loss = fastkd.PKDLoss()
        >>> student_hidden = [torch.randn(2, 8, 16, requires_grad=True) for _ in range(3)]
        >>> teacher_hidden = [torch.randn(2, 8, 16) for _ in range(6)]
        >>> loss(student_hidden, teacher_hidden, torch.ones(2, 8)).backward()
    """

    def __init__(
        self,
        strategy: Literal["skip", "last"] = "skip",
        *,
        token: Literal["first", "last"] = "first",
        normalize: bool = True,
        backend: Backend = "auto",
    ):
        super().__init__()
        checks.one_of("strategy", strategy, ("skip", "last"))
        checks.one_of("token", token, ("first", "last"))
        self.strategy, self.token, self.normalize, self.backend = strategy, token, normalize, backend

    def forward(self, student_hidden: list[Tensor], teacher_hidden: list[Tensor], mask: Tensor | None = None) -> Tensor:
        """The loss, a scalar.

        Args:
            student_hidden: N layers [B, S, D], embeddings not among them, already projected to the teacher's width.
            teacher_hidden: M layers [B, S, D].
            mask: [B, S], 1 = real token.
        """
        checks.layers("student_hidden", student_hidden)
        checks.layers("teacher_hidden", teacher_hidden)
        if mask is not None:
            checks.tensor("mask", mask, "[B, S]", floating=False)
        mask = reductions.as_bool(mask)
        counts = None if mask is None else mask.any(1, keepdim=True)  # [B, 1]
        loss = 0.0
        for i, j in self._map(len(student_hidden), len(teacher_hidden)):
            s = self._sentence("student_hidden", student_hidden[i - 1], mask)
            t = self._sentence("teacher_hidden", teacher_hidden[j - 1], mask)
            mean = functional.layer_costs([s[:, None]], [t[:, None]], mask=counts, backend=self.backend)
            loss = loss + mean.squeeze() * s.shape[-1]  # a sum over the width, a mean over the batch
        return loss

    if TYPE_CHECKING:
        __call__ = forward

    def _map(self, n: int, m: int) -> list[tuple[int, int]]:
        if n < 2 or m < n or (self.strategy == "skip" and m % n):
            raise ValueError(
                f"teacher_hidden: strategy={self.strategy!r} cannot map {n} student layers to {m} of the teacher; it "
                "needs two student layers and, for 'skip', a multiple of them in the teacher (embeddings not counted)"
            )
        return [(i, i * (m // n) if self.strategy == "skip" else m - n + i) for i in range(1, n)]

    def _sentence(self, name: str, hidden: Tensor, mask: Tensor | None) -> Tensor:
        checks.tensor(name, hidden, "[B, S, D]")
        checks.mask("mask", mask, hidden.shape[:2], "[B, S]")
        x = reductions.end_token(hidden, mask, self.token)  # [B, D]
        return F.normalize(x, dim=-1, eps=1e-12) if self.normalize else x
