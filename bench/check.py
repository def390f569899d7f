"""Right before fast: every provider against the float64 reference, loss and gradients, before it is timed."""

import dataclasses
import math

import torch
from fastkd.bench.cases.case import Case, Inputs

UPSTREAM = 0.37  # not 1, so that a gradient that forgets its upstream is noticed
LIMITS = {torch.float64: (1e-9, 1e-9), torch.float32: (1e-6, 1e-5)}
HALF_LIMIT = 1e-2
HALF_LUCK = (1e-3, 2.0**-8)  # one seed: eager's bf16 loss can be right by chance; one ulp of a bf16 gradient
SAME_JOB = (1e-3, 1e-2)  # another provider that is further off than this in float32 computes something else


@dataclasses.dataclass(frozen=True)
class Errors:
    """Relative errors ‖x - o‖/‖o‖; the gradient's is the worst over the inputs that have one."""

    loss: float
    gradient: float


@dataclasses.dataclass(frozen=True)
class Oracle:
    loss: torch.Tensor
    gradients: list


def relative(x: torch.Tensor, oracle: torch.Tensor) -> float:
    """Absolute where the oracle is zero; infinite where x is not a number or has another shape."""
    if x.shape != oracle.shape:
        return math.inf
    difference = (x.detach().double() - oracle).norm().item()
    size = oracle.norm().item()
    error = difference / size if size > 0 else difference
    return error if math.isfinite(error) else math.inf


def loss_and_gradients(call, inputs: Inputs) -> tuple[torch.Tensor, list]:
    loss = call(inputs)
    return loss.detach(), list(torch.autograd.grad(loss * UPSTREAM, inputs.leaves))


def make_oracle(case: Case, inputs: Inputs) -> Oracle:
    """The reference in float64 on the same, already quantised, inputs."""
    call = case.oracle or (lambda x: case.ours(x, "reference"))
    loss, gradients = loss_and_gradients(call, inputs.to(torch.float64))
    return Oracle(loss.double(), gradients)


def errors_of(call, inputs: Inputs, oracle: Oracle) -> Errors:
    loss, gradients = loss_and_gradients(call, inputs)
    pairs = zip(gradients, oracle.gradients, strict=True)
    return Errors(relative(loss, oracle.loss), max(relative(x, o) for x, o in pairs))


def limits(dtype: torch.dtype, eager: Errors | None) -> tuple[float, float]:
    """What ours may be off by: DESIGN's tolerance, or eager's error where the numbers themselves are worse."""
    if dtype in LIMITS:
        loss, gradient = LIMITS[dtype]
        return (loss, gradient) if eager is None else (max(loss, eager.loss), max(gradient, eager.gradient))
    if eager is None:
        return HALF_LIMIT, HALF_LIMIT
    return min(HALF_LIMIT, max(HALF_LUCK[0], eager.loss)), min(HALF_LIMIT, max(HALF_LUCK[1], 1.25 * eager.gradient))


def verdict(errors: Errors, allowed: tuple[float, float]) -> str:
    """Empty where the numbers are right, else the sentence that stands where the speed would have."""
    problems = [
        f"{what} is off by {error:.1e}, allowed {limit:.1e}"
        for what, error, limit in zip(("the loss", "a gradient"), (errors.loss, errors.gradient), allowed, strict=True)
        if not error <= limit
    ]
    return " and ".join(problems)


def verdict_on_other(provider, case: Case, inputs: Inputs, oracle: Oracle, errors: Errors) -> str:
    """A baseline or a peer may be imprecise in its own dtype (that is a column), but in float32 it must do the same job."""
    half = case.dtype not in LIMITS
    if half and provider.name == "compile":  # the same function as eager: a second compilation proves nothing new
        return ""
    return verdict(errors_of(provider.call, inputs.to(torch.float32), oracle) if half else errors, SAME_JOB)
