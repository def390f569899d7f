"""Skew KL, DistiLLM's (Ko et al., 2024): KL(p ‖ alpha p + (1 - alpha) q); else as forward_kl."""

from .forward_kl import ForwardKL


class SkewKL(ForwardKL):
    kind = "skew_kl"

    def __init__(self, setup, temperature: float = 1.0, hard: float = 0.0, alpha: float = 0.1):
        super().__init__(setup, temperature, hard, alpha=alpha)
