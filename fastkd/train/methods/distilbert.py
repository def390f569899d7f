"""DistilBERT, DistilGPT2 (Sanh et al., 2019): 5 · T² KL + 2 · language modelling + 1 · (1 - cos of the last layers), T = 2.

The KL and the cosine are means over the real tokens, the language modelling over the tokens that have a label.
"""

from fastkd.losses.distilbert import cosine_distance
from fastkd.losses.kd import PredictionLoss

from .base import Method, Term, same_width


class DistilBERT(Method):
    hidden = True

    def __init__(self, setup, alpha_kl=5.0, alpha_mlm=2.0, alpha_cosine=1.0, temperature=2.0):
        super().__init__(setup)
        same_width(setup, "distilbert")
        self.loss, self.alpha_cosine = PredictionLoss(alpha_kl, alpha_mlm, temperature=temperature), alpha_cosine

    def forward(self, batch):
        cosine = cosine_distance(batch.student.hidden[-1], batch.teacher.hidden[-1], batch.mask)
        return {**batch.distil(self.loss, every_token=True), "cosine": Term(cosine, self.alpha_cosine, "tokens")}
