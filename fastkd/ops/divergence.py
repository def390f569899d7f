"""divergence between rows of logits: the autograd Functions, and which implementation runs."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastkd import backends
from fastkd.checks import KINDS
from fastkd.ops.gradient_in_forward import HandedOver, can_hand_over, wants_gradient
from fastkd.reference import divergence as reference
from fastkd.reference.divergence_topk import divergence_topk as topk_reference


class TopK(NamedTuple):
    """A sparse teacher: log-probabilities of k tokens per row, taken as given (at the caller's temperature).

    tail: the mass of all other tokens, which count as one more token. None: they have no mass; True: what the k tokens leave;
    a tensor [...]: its logarithm.
    """

    indices: Tensor  # [..., k]
    log_probs: Tensor  # [..., k]
    tail: Tensor | bool | None = None

    def flattened(self) -> "TopK":
        k = self.indices.shape[-1]
        tail = self.tail.reshape(-1) if isinstance(self.tail, Tensor) else self.tail
        return TopK(self.indices.reshape(-1, k), self.log_probs.reshape(-1, k), tail)  # [N, k], [N, k], [N]


class DivergenceStats(NamedTuple):
    """What a divergence says of each row; 0 for rows that do not count. None of it has a gradient."""

    value: Tensor  # [...], the row as reduction="none" has it
    student_entropy: Tensor  # [...], in nats, of the student's distribution at the temperature
    kept_mass: Tensor | None  # [...], what the k tokens of a TopK teacher have of its mass; None of another teacher


# Kernels: fwd(s, *teacher, mask, kind, temperature, mix) -> (rows [N], stats [N, …]), and
# bwd(grad, s, *teacher, mask, stats, kind, temperature, mix) -> gradient of s. `teacher` is the logits t, or indices,
# log_probs and the tail's log-mass; `kind` its position in KINDS; `mix` the student's weight in skew_kl's or jsd's mixture.
KERNELS = {
    "dense": backends.kernels("divergence", "divergence_fwd", "divergence_bwd"),
    "sparse": backends.kernels("divergence", "divergence_topk_fwd", "divergence_topk_bwd"),
}


def _rows_fake(student, *_):
    return student.new_empty(student.shape[0], dtype=torch.float32)


def _grad_fake(grad, student, *_):
    return torch.empty_like(student, memory_format=torch.contiguous_format)


backends.fake("divergence_fwd", lambda s, *rest: (_rows_fake(s), s.new_empty(s.shape[0], 7, dtype=torch.float32)))
backends.fake("divergence_bwd", _grad_fake)
backends.fake("divergence_fwd_grad", lambda s, *rest: (_rows_fake(s), _grad_fake(None, s)))
backends.fake("divergence_rescale_grad", lambda *_: None)
backends.fake("divergence_topk_fwd", lambda s, *rest: (_rows_fake(s), s.new_empty(s.shape[0], 7, dtype=torch.float32)))
backends.fake("divergence_topk_bwd", _grad_fake)


class Divergence(backends.Function):
    """Saves a few numbers per row. The backward reads the logits again and writes the gradient once."""

    function = "divergence"

    @staticmethod
    def forward(ctx, backend, teacher_form, student, mask, kind, temperature, mix, *teacher):
        rows, stats = KERNELS[teacher_form][backend].fwd(student, *teacher, mask, kind, temperature, mix)
        ctx.save_for_backward(student, mask, stats, *teacher)
        ctx.backend, ctx.teacher_form, ctx.options = backend, teacher_form, (kind, temperature, mix)
        return rows

    @staticmethod
    def backward(ctx, grad):
        student, mask, stats, *teacher = ctx.saved_tensors
        bwd = KERNELS[ctx.teacher_form][ctx.backend].bwd
        return None, None, bwd(grad, student, *teacher, mask, stats, *ctx.options), *[None] * (4 + len(teacher))


class DivergenceGradientInForward(backends.Function):
    """On the CPU, in float32: one pass over the logits computes value and gradient. Until the first backward the graph holds
    the gradient beside the logits."""

    function = "divergence"
    gradient_in_forward = True

    @staticmethod
    def forward(ctx, student, teacher, mask, options, expected_upstream):
        rows, gradient = torch.ops.fastkd.divergence_fwd_grad(student, teacher, mask, *options, *expected_upstream)
        ctx.made = HandedOver(gradient)
        ctx.save_for_backward(student, teacher, mask)
        ctx.options, ctx.expected_upstream = options, expected_upstream
        return rows

    @staticmethod
    def backward(ctx, grad):
        inputs, expected = ctx.saved_tensors, ctx.expected_upstream
        gradient = ctx.made.take(lambda: torch.ops.fastkd.divergence_fwd_grad(*inputs, *ctx.options, *expected)[1])
        torch.ops.fastkd.divergence_rescale_grad(gradient, grad, inputs[2], *expected)
        return gradient, None, None, None, None


def divergence(
    student, teacher, mask, kind, temperature, beta, alpha, backend, expected_upstream=(False, 1.0)
) -> Tensor:
    """One value per row of student [N, V], without the T² factor; masked rows are 0. expected_upstream (mean, factor):
    the caller will take the mean of the rows, or their sum, times factor. Any other upstream gradient is correct, but slower."""
    kind = without_mixture(kind, alpha)
    backend = backends.choose("divergence", backend, student)
    if backend == "reference":
        with backends.full_precision(student):
            if isinstance(teacher, TopK):
                return topk_reference(student, *teacher, mask, kind, temperature, beta, alpha)
            return reference.divergence(student, teacher, mask, kind, temperature, beta, alpha)
    mix = 1.0 - alpha if kind == "skew_kl" else 1.0 - beta
    options = (KINDS.index(kind), temperature, mix)
    if isinstance(teacher, TopK):
        return Divergence.apply(backend, "sparse", student, mask, *options, *kernel_form(teacher))
    teacher = kernel_dtype(teacher)
    float32_on_cpu = backend == "cpu" and student.dtype == torch.float32  # half precision would be rounded twice
    if float32_on_cpu and wants_gradient(student) and can_hand_over():
        return DivergenceGradientInForward.apply(student, teacher, mask, options, expected_upstream)
    return Divergence.apply(backend, "dense", student, mask, *options, teacher)


def without_mixture(kind: str, alpha: float) -> str:
    """skew_kl with alpha 0 is forward_kl, which needs no mixture of probabilities that may both underflow."""
    return "forward_kl" if kind == "skew_kl" and alpha == 0 else kind


def kernel_dtype(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.float64 else x


def kernel_form(teacher: TopK):
    """indices in int64, log_probs and the log-mass of the tail in float64. With a tail, the masses are made to sum to 1 to the
    last digit, since near convergence the loss is nearly as small as a rounding error."""
    indices, log_probs, tail = teacher.indices.long(), teacher.log_probs.double(), teacher.tail
    if tail is None:
        return indices, log_probs, None
    mass = log_probs.logsumexp(-1)  # [N]
    tail = torch.log(-torch.expm1(mass.clamp(max=0))) if tail is True else tail.double()  # no mass is left: -inf
    log_mass = torch.logaddexp(mass, tail)
    return indices, log_probs - log_mass[:, None], tail - log_mass
