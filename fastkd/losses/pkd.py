"""PKD: Patient Knowledge Distillation (Sun et al., 2019): the sentence vector of inner layers, on the unit sphere.

sum over student layers l = 1 … N - 1 of |ĥ_s,l - ĥ_t,map(l)|², averaged over the batch; ĥ is the L2-normalised hidden
state of the sentence token. The last layer is left to the logits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd import checks, functional, reductions


class PKDLoss(nn.Module):
    """strategy="skip" maps student layer l to teacher layer l·M/N: 2 4 6 8 10 for 6 of 12; "last" to M - N + l: 7 … 11.

    token="first" is [CLS]; "last" is for decoders, whose last token has seen the sentence. With a mask, the first or
    last real token counts, so padding may be on either side.
    """

    def __init__(self, strategy: str = "skip", *, token: str = "first", normalize: bool = True, backend: str = "auto"):
        super().__init__()
        checks.one_of("strategy", strategy, ("skip", "last"))
        checks.one_of("token", token, ("first", "last"))
        self.strategy, self.token, self.normalize, self.backend = strategy, token, normalize, backend

    def forward(self, student_hidden: list[Tensor], teacher_hidden: list[Tensor], mask: Tensor | None = None) -> Tensor:
        """Lists of N and M layer outputs [B, S, D], embeddings not among them; mask [B, S], 1 = real token."""
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
        x = hidden[:, 0 if self.token == "first" else -1]  # [B, D]
        if mask is not None:
            order = torch.arange(hidden.shape[1], device=hidden.device)
            rank = -order if self.token == "first" else order
            position = torch.where(mask, rank, -hidden.shape[1]).argmax(1)  # [B]
            x = hidden.take_along_dim(position[:, None, None], 1).squeeze(1)
            x = x.masked_fill(~mask.any(1, keepdim=True), 0)  # a row of nothing but padding
        return F.normalize(x, dim=-1, eps=1e-12) if self.normalize else x
