"""TinyBERT (Jiao et al., 2020): student layer l learns attention scores and hidden states of teacher layer l·M/N.

First attention + hidden (embeddings among them, through one trained projection), then soft cross-entropy at T = 1.

Args:
    temperature: T of the prediction.
"""

from fastkd.losses.kd import PredictionLoss
from fastkd.losses.projection import Projection
from fastkd.losses.tinybert import TinyBERTLoss

from .base import Method, Setup, Term, advise_layers, same_heads, uniform_map


class TinyBERT(Method):
    hidden, every_layer, features_only, one_shape = True, True, True, True
    reads_padding, stages = True, ("intermediate", "prediction")

    def __init__(self, setup: Setup, temperature: float = 1.0, heads: str | None = None, share: float = 0.5):
        super().__init__(setup, share)
        same_heads(setup, "tinybert", heads)
        advise_layers(setup, "tinybert", uniform_map(setup, "tinybert"))
        self.prediction = PredictionLoss(kind="soft_ce", temperature=temperature)
        self.projection = Projection(setup.student.width, setup.teacher.width)
        self.loss = TinyBERTLoss(causal=setup.student.causal, heads=heads)

    def forward(self, batch):
        if self.stage(batch.progress) == "prediction":
            return batch.distil(self.prediction, "prediction")
        student, teacher = self.projection(list(batch.student.hidden)), list(batch.teacher.hidden)
        attention, hidden = self.loss(*self.scores(batch), student, teacher, batch.mask)
        return {"attention": Term(attention, 1.0, "pairs"), "hidden": Term(hidden, 1.0, "tokens")}
