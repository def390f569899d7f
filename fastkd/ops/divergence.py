"""Row-wise divergence between logits: which implementation runs."""

from typing import NamedTuple

from torch import Tensor

from fastkd import backends
from fastkd.reference import divergence as reference


class TopK(NamedTuple):
    """A sparse teacher: log-probabilities of k words per row, taken as given (at the caller's temperature).

    tail: None, the rest has no mass; True, the rest is one more word with what the k leave over; a tensor [...], the
    log-mass of the rest.
    """

    indices: Tensor  # [..., k]
    log_probs: Tensor  # [..., k]
    tail: Tensor | bool | None = None

    def flattened(self) -> "TopK":
        k = self.indices.shape[-1]
        tail = self.tail.reshape(-1) if isinstance(self.tail, Tensor) else self.tail
        return TopK(self.indices.reshape(-1, k), self.log_probs.reshape(-1, k), tail)  # [N, k], [N, k], [N]


def divergence(student, teacher, mask, kind, temperature, beta, alpha, backend) -> Tensor:
    """One value per row of student [N, V], without the T² factor; masked rows give 0."""
    backends.choose("divergence", backend, student)
    with backends.full_precision(student):
        if isinstance(teacher, TopK):
            return reference.divergence_topk(student, *teacher, mask, kind, temperature, beta, alpha)
        return reference.divergence(student, teacher, mask, kind, temperature, beta, alpha)
