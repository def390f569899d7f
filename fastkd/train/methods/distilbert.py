"""DistilBERT, DistilGPT2 (Sanh et al., 2019): 5 · T² KL + 2 · language modelling + 1 · (1 - cos of the last layers), T = 2.

The KL and the cosine are means over the real tokens, the language modelling over the tokens that have a label.

Args:
    alpha_kl: Weight of the KL term.
    alpha_mlm: Weight of the language modelling.
    alpha_cosine: Weight of the cosine of the last layers.
    temperature: T > 0, of the KL term.
"""

from fastkd.losses.distilbert import cosine_distance
from fastkd.losses.kd import PredictionLoss

from .base import Method, Term, same_width


class DistilBERT(Method):
    token_wise, every_position = True, True

    def __init__(self, setup, alpha_kl=5.0, alpha_mlm=2.0, alpha_cosine=1.0, temperature=2.0):
        super().__init__(setup)
        same_width(setup, "distilbert")
        self.read = {"student": [setup.student.layers], "teacher": [setup.teacher.layers]}
        self.alpha_kl, self.alpha_mlm, self.alpha_cosine = alpha_kl, alpha_mlm, alpha_cosine
        self.loss = PredictionLoss(temperature=temperature)

    def forward(self, batch):
        cosine = cosine_distance(batch.student.hidden[-1], batch.teacher.hidden[-1], batch.mask)
        soft = Term(batch.on_tokens(self.loss), self.alpha_kl, "tokens")
        return {"soft": soft, **batch.fine_tune(self.alpha_mlm), "cosine": Term(cosine, self.alpha_cosine, "tokens")}
