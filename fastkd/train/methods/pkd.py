"""PKD (Sun et al., 2019): (1 - alpha) CE + alpha T² KL + beta · the sentence vectors of inner layers, on the unit sphere.

"skip" maps student layer l to teacher layer l·M/N, "last" to M - N + l. A decoder's sentence vector is its last token's.
"""

from fastkd.losses.pkd import PKDLoss

from .base import Method, Setup, Term, same_width, uniform_map


class PKD(Method):
    hidden = True

    def __init__(
        self,
        setup: Setup,
        alpha: float = 0.5,
        beta: float = 100.0,
        temperature: float = 10.0,
        strategy: str = "skip",
    ):
        super().__init__(setup)
        same_width(setup, "pkd")
        if setup.student.layers < 2:
            raise ValueError(
                f"pkd: compares inner layers, so the student needs two at least, got {setup.student.layers}"
            )
        if strategy == "skip":
            uniform_map(setup, "pkd")
        self.alpha, self.beta, self.temperature = alpha, beta, temperature
        self.loss = PKDLoss(strategy, token="last" if setup.student.causal else "first")

    def forward(self, batch):
        patient = self.loss(list(batch.student.hidden[1:]), list(batch.teacher.hidden[1:]), batch.mask)
        return {
            "hard": Term(batch.hard(), 1 - self.alpha),
            "soft": Term(batch.soft(self.temperature), self.alpha),
            "patient": Term(patient, self.beta),
        }
