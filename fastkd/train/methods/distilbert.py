"""DistilBERT, DistilGPT2 (Sanh et al., 2019): 5 · T² KL + 2 · language modelling + 1 · (1 - cos of the last layers), T = 2.

The KL and the cosine are means over the real tokens, the language modelling over the tokens that have a label.
"""

import torch.nn.functional as F

from fastkd import functional, reductions

from .base import Method, Setup, Term, same_width


class DistilBERT(Method):
    hidden = True

    def __init__(
        self,
        setup: Setup,
        alpha_kl: float = 5.0,
        alpha_lm: float = 2.0,
        alpha_cosine: float = 1.0,
        temperature: float = 2.0,
    ):
        super().__init__(setup)
        same_width(setup, "distilbert")
        self.alpha_kl, self.alpha_lm, self.alpha_cosine, self.temperature = (
            alpha_kl,
            alpha_lm,
            alpha_cosine,
            temperature,
        )

    def forward(self, batch):
        words = functional.divergence(
            batch.student.logits, batch.teacher.logits, temperature=self.temperature, mask=batch.mask
        )
        student, teacher = batch.student.hidden[-1].float(), batch.teacher.hidden[-1].float()  # [B, S, D]
        cosine = reductions.reduce(
            1 - F.cosine_similarity(student, teacher, dim=-1), reductions.as_bool(batch.mask), "mean"
        )
        return {
            "soft": Term(words, self.alpha_kl),
            "hard": Term(batch.hard(), self.alpha_lm),
            "cosine": Term(cosine, self.alpha_cosine),
        }
