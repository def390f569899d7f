"""Forward KL, KL(p‖q), of the next-token distributions of two decoders, p the teacher's and q the student's, on the tokens
that have a label. `hard` adds the language modelling loss with that weight.

Args:
    temperature: T > 0.
    hard: Weight of the language modelling loss.
    beta: The teacher's weight in the mixture m, strictly between 0 and 1 (jsd).
    alpha: The teacher's weight in the mixture, in [0, 1] (skew_kl).
"""

from fastkd.losses.kd import PredictionLoss

from .base import Method


class ForwardKL(Method):
    kind, token_wise = "forward_kl", True

    def __init__(self, setup, temperature: float = 1.0, hard: float = 0.0, **mixture: float):
        super().__init__(setup)
        self.loss = PredictionLoss(hard=hard, kind=self.kind, temperature=temperature, **mixture)

    def forward(self, batch):
        return batch.distil(self.loss, self.kind)
