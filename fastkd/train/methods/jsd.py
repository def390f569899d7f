"""JSD, GKD's (Agarwal et al., 2023): beta KL(p‖m) + (1 - beta) KL(q‖m), m = beta p + (1 - beta) q; else as forward_kl."""

from .forward_kl import ForwardKL


class JSD(ForwardKL):
    kind = "jsd"

    def __init__(self, setup, temperature: float = 1.0, hard: float = 0.0, beta: float = 0.5):
        super().__init__(setup, temperature, hard, beta=beta)
