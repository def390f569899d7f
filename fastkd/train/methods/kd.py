"""Hinton, Vinyals, Dean (2015): (1 - alpha) CE(labels, student) + alpha T² KL(softmax(z_t / T) ‖ softmax(z_s / T)).

In regression both are mean squared errors. In a language model a row is a token that has a label.
"""

from fastkd.losses.kd import HintonKDLoss

from .base import Method, Setup


class KD(Method):
    token_wise = True

    def __init__(self, setup: Setup, alpha: float = 0.5, temperature: float = 2.0):
        super().__init__(setup)
        self.loss = HintonKDLoss(alpha, temperature)

    def forward(self, batch):
        return batch.distil(self.loss)
