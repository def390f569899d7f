"""The suite notices sabotage: every mutant of every stem × backend is killed by the tests that guard precision.

Peers' suites accept a gradient of all zeros (a mean-reduced loss has tiny gradients, and absolute tolerances hide them).
Here each mutant must fail each of the checks; a mutant that survives fails this test.
"""

from dataclasses import replace

import pytest
import test_kernels
import torch

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


@test_kernels.the_reference_in_long
@pytest.mark.parametrize("where", ["gradient", "loss"])
@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_no_mutant_survives(subject, backend, where, mutant, check):
    if where == "loss" and mutant == "one tile dropped":
        pytest.skip(
            "a loss row is one number: dropping a tile of it is dropping the row, which has a mutant of its own"
        )
    if subject.variant == "tvd" and check is test_kernels.test_near_convergence and mutant == "scaled by 1 %":
        pytest.skip(
            "tvd's gradient near convergence is known to 1 % only (signs turn); the ordinary range kills this one"
        )
    with pytest.raises(AssertionError):
        check(mutated(subject, where, MUTANTS[mutant]), backend)
