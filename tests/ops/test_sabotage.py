"""The tests of precision notice sabotage, for every stem and backend: each mutant must fail each of the checks.

A test with an absolute tolerance may accept a gradient of zeros, since a mean-reduced loss has tiny gradients.
"""

from dataclasses import replace

import pytest
import test_kernels
import torch
from subjects import the_reference_in_long

import cases


class Corrupt(torch.autograd.Function):
    """The identity, with a wrong gradient."""

    @staticmethod
    def forward(ctx, x, how):
        ctx.how = how
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.how(grad.clone()), None


def one_tile_dropped(grad):
    grad[-1, grad.shape[1] // 2 : grad.shape[1] // 2 + max(grad.shape[1] // 8, 1)] = 0
    return grad


MUTANTS = {**cases.MUTANTS, "one tile dropped": one_tile_dropped}
CHECKS = [test_kernels.test_float32_in_the_ordinary_range, test_kernels.test_near_convergence]


def mutated(subject, where, how):
    """`subject` with a wrong loss or gradient; the float64 oracle stays itself."""

    def call(student, teacher, backend):
        if student.dtype == torch.float64:
            return subject.call(student, teacher, backend)
        if where == "gradient":
            return subject.call(Corrupt.apply(student, how), teacher, backend)
        rows = subject.call(student, teacher, backend)
        return rows + (how(rows.detach()[:, None].expand(-1, 8).clone())[:, 0] - rows.detach())

    return replace(subject, call=call)


@the_reference_in_long
@pytest.mark.parametrize("where", ["gradient", "loss"])
@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_no_mutant_survives(subject, backend, where, mutant, check):
    near = check is test_kernels.test_near_convergence
    if where == "loss" and mutant == "one tile dropped":
        pytest.skip("a row of the loss is one number, so a dropped tile of it is a dropped row")
    if subject.variant == "tvd" and near and mutant == "scaled by 1 %":
        pytest.skip("tvd's gradient near convergence is known to 1 % only (signs change); the ordinary range kills it")
    if subject.stem == "gram" and near and where == "loss":
        pytest.skip("1 - rho itself is about 1e-6 there, its tolerance; the ordinary range kills it")
    with pytest.raises(AssertionError):
        check(mutated(subject, where, MUTANTS[mutant]), backend)
