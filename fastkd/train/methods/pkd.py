"""PKD (Sun et al., 2019): (1 - alpha) CE + alpha T² KL + beta · the sentence vectors of inner layers, on the unit sphere.

"skip" maps student layer l to teacher layer l·M/N, "last" to M - N + l. A decoder's sentence vector is its last token's.

Args:
    beta: Weight of the sentence vectors.
    strategy: "skip" or "last".
"""

from fastkd.losses.kd import HintonKDLoss
from fastkd.losses.pkd import PKDLoss

from .base import Method, Setup, Term, inner_layers, same_width, uniform_map


class PKD(Method):
    hidden = True

    def __init__(self, setup: Setup, alpha=0.5, beta=100.0, temperature=10.0, strategy="skip"):
        super().__init__(setup)
        same_width(setup, "pkd")
        inner_layers(setup, "pkd")
        top = uniform_map(setup, "pkd")[-2][1] if strategy == "skip" else setup.teacher.layers - 1
        self.read = {"student": range(setup.student.layers), "teacher": range(top + 1)}
        self.beta, self.prediction = beta, HintonKDLoss(alpha, temperature)
        self.loss = PKDLoss(strategy, token="last" if setup.student.causal else "first")

    def predicts(self, side, progress):
        return side == "student" or self.prediction.soft > 0

    def forward(self, batch):
        patient = self.loss(list(batch.student.hidden[1:]), list(batch.teacher.hidden[1:]), batch.mask)
        return {**batch.distil(self.prediction), "patient": Term(patient, self.beta, "examples")}
