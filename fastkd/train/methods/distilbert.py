"""DistilBERT, DistilGPT2 (Sanh et al., 2019): 5 · T² KL + 2 · language modelling + 1 · (1 - cos of the last layers), T = 2.

The KL and the cosine are means over the real tokens, the language modelling over the tokens that have a label.
"""

from fastkd import functional
from fastkd.losses import distilbert

from .base import Method, Setup, Term, same_width


class DistilBERT(Method):
    hidden = True

    def __init__(
        self,
        setup: Setup,
        alpha_kl: float = 5.0,
        alpha_mlm: float = 2.0,
        alpha_cosine: float = 1.0,
        temperature: float = 2.0,
    ):
        super().__init__(setup)
        same_width(setup, "distilbert")
        self.alpha_kl, self.alpha_mlm, self.alpha_cosine = alpha_kl, alpha_mlm, alpha_cosine
        self.temperature = temperature

    def forward(self, batch):
        words = functional.divergence(
            batch.student.logits, batch.teacher.logits, temperature=self.temperature, mask=batch.mask
        )
        cosine = distilbert.cosine_distance(batch.student.hidden[-1], batch.teacher.hidden[-1], batch.mask)
        return {
            "soft": Term(words, self.alpha_kl),
            "hard": Term(batch.hard(), self.alpha_mlm),
            "cosine": Term(cosine, self.alpha_cosine),
        }
