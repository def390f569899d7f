"""Hinton, Vinyals, Dean (2015): (1 - alpha) CE(labels, student) + alpha T² KL(softmax(z_t / T) ‖ softmax(z_s / T)).

In regression both are mean squared errors. For word tasks a row is a token that has a label.
"""

from .base import Method, Setup, Term


class KD(Method):
    def __init__(self, setup: Setup, alpha: float = 0.5, temperature: float = 2.0):
        super().__init__(setup)
        if not 0 <= alpha <= 1:
            raise ValueError(f"kd: alpha is the share of the teacher's term and must lie in [0, 1], got {alpha!r}")
        self.alpha, self.temperature = alpha, temperature

    def forward(self, batch):
        terms = {"soft": Term(batch.soft(self.temperature), self.alpha)}
        if self.alpha < 1:
            terms["hard"] = Term(batch.hard(), 1 - self.alpha)
        return terms
