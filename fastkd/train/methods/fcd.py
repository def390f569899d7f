"""FCD (Huang, Guo, Wang; NeurIPS 2023): the student's tokens shall resemble each other as the teacher's do.

alpha · token + beta · sequence + gamma · random, on the last layers ("last") or on all of the student's ("uniform").
The released loss has no task term: relations first, then plain fine-tuning, `share` of training for the former.
"""

from fastkd.losses.fcd import FCDLoss

from .base import Method, Setup, Term, uniform_map


class FCD(Method):
    hidden = True
    stages = ("relations", "task")

    def __init__(
        self,
        setup: Setup,
        alpha: float = 1.0,
        beta: float = 1.0,
        gamma: float = 0.0,
        K: int = 128,
        layers: str = "last",
        share: float = 0.5,
    ):
        super().__init__(setup, share)
        if layers not in ("last", "uniform"):
            raise ValueError(f"fcd: layers must be 'last' or 'uniform', got {layers!r}")
        self.pairs = uniform_map(setup, "fcd") if layers == "uniform" else [(-1, -1)]
        weights = {"token": (1, 0, 0), "sequence": (0, 1, 0), "random": (0, 0, 1)}
        self.weights = {"token": alpha, "sequence": beta, "random": gamma}
        self.losses = {name: FCDLoss(*weights[name], K=K) for name, weight in self.weights.items() if weight > 0}

    def forward(self, batch):
        if self.stage(batch.progress) == "task":
            return {"hard": Term(batch.hard(), 1.0)}
        student = [batch.student.hidden[i] for i, _ in self.pairs]
        teacher = [batch.teacher.hidden[j] for _, j in self.pairs]
        return {
            name: Term(loss(student, teacher, batch.mask), self.weights[name]) for name, loss in self.losses.items()
        }
