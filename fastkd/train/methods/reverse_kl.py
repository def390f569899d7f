"""Reverse KL, KL(q‖p), MiniLLM's (Gu et al., 2023): forward_kl the other way round."""

from .forward_kl import ForwardKL


class ReverseKL(ForwardKL):
    kind = "reverse_kl"
