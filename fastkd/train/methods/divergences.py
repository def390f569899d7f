"""For decoders: one divergence between the next-word distributions, on the tokens that have a label.

forward_kl KL(p‖q) · reverse_kl KL(q‖p), MiniLLM's · jsd, GKD's, m = beta p + (1 - beta) q · skew_kl KL(p ‖ alpha p +
(1 - alpha) q), DistiLLM's; p the teacher, q the student. `hard` adds the language modelling loss with that weight.
"""

from .base import Method, Setup, Term


class _Divergence(Method):
    kind = ""

    def __init__(self, setup: Setup, temperature: float = 1.0, hard: float = 0.0):
        super().__init__(setup)
        self.temperature, self.hard, self.extra = temperature, hard, {}

    def forward(self, batch):
        terms = {self.kind: Term(batch.soft(self.temperature, self.kind, **self.extra), 1.0)}
        if self.hard:
            terms["hard"] = Term(batch.hard(), self.hard)
        return terms


class ForwardKL(_Divergence):
    kind = "forward_kl"


class ReverseKL(_Divergence):
    kind = "reverse_kl"


class JSD(_Divergence):
    kind = "jsd"

    def __init__(self, setup: Setup, temperature: float = 1.0, hard: float = 0.0, beta: float = 0.5):
        super().__init__(setup, temperature, hard)
        self.extra = {"beta": beta}


class SkewKL(_Divergence):
    kind = "skew_kl"

    def __init__(self, setup: Setup, temperature: float = 1.0, hard: float = 0.0, alpha: float = 0.1):
        super().__init__(setup, temperature, hard)
        self.extra = {"alpha": alpha}
