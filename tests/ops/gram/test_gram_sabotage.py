"""gram's own tests of precision notice sabotage: each mutant must fail each check. test_sabotage.py has the checks that all
stems share."""

import pytest
import test_gram_features
import test_gram_gradient_in_forward
import test_gram_kernels
import torch
from test_gram_kernels import on_every_kernel
from test_sabotage import Corrupt

from fastkd.ops import gram as ops


def one_tile_dropped(x):
    middle = x.shape[1] // 2
    x[-1, middle : middle + max(x.shape[1] // 8, 1)] = 0
    return x


def one_group_dropped(x):
    x[0] = 0
    return x


MUTANTS = {
    "zeroed": lambda x: x * 0,
    "sign flipped": lambda x: -x,
    "scaled by 1 %": lambda x: x * 1.01,
    "one tile dropped": one_tile_dropped,
    "one group dropped": one_group_dropped,
}
BOTH, OFFICIAL = ["token", "sequence"], ["token", "official"]
UNEVEN = "every value its own"
GRADIENT = {
    "outlier dimensions": lambda b: test_gram_kernels.test_outlier_dimensions(b, "token", 200.0),
    "tiled groups": lambda b: test_gram_kernels.test_tiled_groups(b, 513, (650, 700), False, torch.float32),
    "features": lambda b: test_gram_features.test_float32(b, (2, 200, 24, 32), True),
    "features, outlier dimensions": lambda b: test_gram_features.test_outlier_dimensions(b, True, 200.0),
}
IN_FORWARD = {
    "both levels": (BOTH, False, True, "expected"),
    "both levels, scaled": (BOTH, False, True, "expected, scaled"),
    "both levels, made again": (BOTH, False, True, UNEVEN),
    "per row": (BOTH, True, True, "expected"),
    "per row, made again": (BOTH, True, True, UNEVEN),
    "official": (OFFICIAL, False, False, "expected"),
    "official, made again": (OFFICIAL, False, False, UNEVEN),
}


@pytest.fixture
def sabotage(monkeypatch):
    """sabotage(where, how): makes float32 losses or gradients wrong; the float64 oracle stays correct."""
    original = ops.gram

    def install(where, how):
        def gram(students, *rest):
            if students[0].dtype == torch.float64:
                return original(students, *rest)
            if where == "gradient":
                return original([Corrupt.apply(s, how) for s in students], *rest)
            values, valid = original(students, *rest)
            return [x + (how(x.detach().clone()) - x.detach()) for x in values], valid

        monkeypatch.setattr(ops, "gram", gram)

    return install


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("check", GRADIENT)
@on_every_kernel
def test_no_wrong_gradient_survives(backend, check, mutant, sabotage):
    GRADIENT[check](backend)
    sabotage("gradient", MUTANTS[mutant])
    with pytest.raises(AssertionError):
        GRADIENT[check](backend)


@pytest.mark.skipif("cpu" not in ops.KERNELS, reason="the C++ kernels are not built")
@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("check", IN_FORWARD)
def test_no_wrong_gradient_in_the_forward_survives(check, mutant, sabotage):
    test_gram_gradient_in_forward.test_any_upstream(*IN_FORWARD[check], torch.float32)
    sabotage("gradient", MUTANTS[mutant])
    with pytest.raises(AssertionError):
        test_gram_gradient_in_forward.test_any_upstream(*IN_FORWARD[check], torch.float32)


@pytest.mark.parametrize("mutant", [name for name in MUTANTS if name != "one tile dropped"])
@pytest.mark.parametrize("check", GRADIENT)
@on_every_kernel
def test_no_wrong_loss_survives(backend, check, mutant, sabotage):
    sabotage("loss", MUTANTS[mutant])
    with pytest.raises(AssertionError):
        GRADIENT[check](backend)
