"""gram's gradient in the forward: correct for every upstream gradient, by value (its other hazards: test_gradient_in_forward.py)."""

import itertools

import pytest
import torch

from cases import randn, relative_error
from fastkd.functional import gram_correlation_loss as loss
from fastkd.ops import gram as ops
from fastkd.reference import gram as reference

pytestmark = pytest.mark.skipif("cpu" not in ops.KERNELS, reason="the C++ kernels are not built")
FORMS = [(levels, row) for levels in (["token"], ["sequence"], ["official"], ["token", "sequence"], ["token", "official"])
         for row in (False, True) if not (row and "official" in levels)]  # fmt: skip
UPSTREAMS = {
    "expected": lambda k, shape: torch.full(shape, (0.5, 2.0)[k] / shape.numel()),
    "expected, scaled": lambda k, shape: torch.full(shape, 1024 * (0.5, 2.0)[k] / shape.numel()),
    "levels in another ratio": lambda k, shape: torch.full(shape, (0.5, 3.0)[k] / shape.numel()),
    "every value its own": lambda k, shape: randn(*shape, seed=3 + k).float() + 1.5,
    "one level only": lambda k, shape: torch.full(shape, 1.0 - k),
    "nothing": lambda k, shape: torch.zeros(shape),
}


def layers(dtype=torch.float32):
    students = [(randn(5, 6, d, seed=d) + randn(d, seed=50 + d)).to(dtype) for d in (16, 7)]
    return students, [randn(5, 6, d, seed=20 + d).to(dtype) for d in (3, 32)]


def by_the_oracle(students, teachers, mask, levels, row, ups):
    """Gradients of sum(up * value), term by term, in float64."""
    leaves = [s.double().requires_grad_() for s in students]
    total, pearson = 0.0, "row" if row else "matrix"
    for (i, (s, t)), (k, name) in itertools.product(enumerate(zip(leaves, teachers, strict=True)), enumerate(levels)):
        level, grouping = ("sequence", "official") if name == "official" else (name, "position")
        values, _ = reference.gram(s, t.double(), mask, level, grouping, pearson, True, 1e-6)
        total = total + (values * ups[i * len(levels) + k].double()).sum()
    return torch.autograd.grad(total, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("upstream", UPSTREAMS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("levels", "row"), FORMS)
def test_any_upstream(levels, row, masked, upstream, dtype):
    if masked and "official" in levels:
        pytest.skip("the official grouping knows no mask")
    students, teachers = layers(dtype)
    mask = torch.ones(5, 6, dtype=torch.bool)
    mask[0, :2] = mask[1, 3] = mask[3, 5] = False
    leaves = [s.clone().requires_grad_() for s in students]
    expected = ([0.5, 2.0][: len(levels)], True)
    options = (mask if masked else None, tuple(levels), row, True, 1e-6)
    values, _ = ops.gram(leaves, teachers, *options, "cpu", expected)
    ups = [UPSTREAMS[upstream](k % len(levels), x.shape) for k, x in enumerate(values)]
    found = torch.autograd.grad(values, leaves, ups)
    expected = by_the_oracle(students, teachers, options[0], levels, row, ups)
    for x, y in zip(found, expected, strict=True):
        assert relative_error(x, y) <= (1e-5 if dtype == torch.float32 else 1e-2)


def one_differs(up, by):
    """The first and the last as they were, one between them not."""
    up = up.clone()
    up.view(-1)[up.numel() // 2] *= by
    return up


@pytest.mark.parametrize("by", [1 + 3e-6, 1.001, 2.0])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("row", [False, True])
def test_upstreams_that_nearly_agree(row, which, by):
    """One value of one level has an upstream gradient of its own, so that no factor is common: all gradients are recomputed."""
    students, teachers = layers()
    options = (["token", "sequence"], row, True, 1e-6)
    leaves = [s.clone().requires_grad_() for s in students]
    values, _ = ops.gram(leaves, teachers, None, *options, "cpu", ([0.5, 2.0], True))
    expected = [UPSTREAMS["expected"](k % 2, x.shape) for k, x in enumerate(values)]
    ups = [one_differs(up, by) if k % 2 == which else up for k, up in enumerate(expected)]
    found = torch.autograd.grad(values, leaves, ups, retain_graph=True)
    levels = [ops.LEVELS.index(level) for level in options[0]]
    again = torch.ops.fastkd.gram_bwd(ups, students, teachers, None, [], levels, *options[1:])
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))
    exact = by_the_oracle(students, teachers, None, options[0], row, ups)
    assert all(relative_error(x, y) <= 1e-5 for x, y in zip(found, exact, strict=True))
    if by >= 1.001:
        other = by_the_oracle(students, teachers, None, options[0], row, expected)
        assert all(relative_error(x, y) > 2e-5 for x, y in zip(exact, other, strict=True))


@pytest.mark.parametrize("scale", [1 + 3e-6, 1.001, 65536.0])
def test_gradients_are_rescaled_by_a_common_factor(scale):
    """Values that do not count do not matter to it."""
    students, teachers = layers()
    mask = torch.ones(5, 6, dtype=torch.bool)
    mask[2, 1:] = False
    args = (students, teachers, mask, [0], False, True, 1e-6)
    _, valid, found = torch.ops.fastkd.gram_fwd_grad(*args, [1.0], True)
    assert valid[0].tolist() == [True, True, False, True, True]
    made = [x.clone() for x in found]
    ups = [torch.full((5,), 0.25) for _ in students]
    for up in ups:
        up[2] = 7.0
    factor = torch.tensor(0.25 * scale) / 0.25
    torch.ops.fastkd.gram_rescale_grads(
        found, [torch.where(valid[0], up * scale, up) for up in ups], valid, *args, [1.0], True
    )
    assert all(torch.equal(x, y * factor) for x, y in zip(found, made, strict=True))


def test_the_expected_upstream_gradient_is_what_a_mean_sends():
    """The gradients of the forward are then handed over as they are."""
    students, teachers = layers()
    mask = torch.ones(5, 6)
    mask[0, :4] = 0
    for pearson, reduction, m in itertools.product(("matrix", "row"), ("mean", "sum"), (None, mask)):
        leaves = [s.clone().requires_grad_() for s in students]
        level = {"token": 0.7, "sequence": 0.3}
        value = loss(leaves, teachers, level=level, pearson=pearson, mask=m, reduction=reduction, backend="cpu")
        node = value.grad_fn
        while type(node).__name__ != "GramGradientInForwardBackward":
            node = node.next_functions[0][0]
        before = [g.clone() for g in node.made.gradients]
        for found, made in zip(torch.autograd.grad(value, leaves), before, strict=True):
            assert torch.equal(found, made)


def test_float16_and_compiled_graphs_make_the_gradient_in_the_backward():
    students, teachers = layers(torch.float16)
    big = 2.0**20  # a scaler's factor: what is made for upstream 1 must not have been rounded to float16 before
    leaves = [(s * 100).requires_grad_() for s in students]
    grads = torch.autograd.grad(loss(leaves, teachers, backend="cpu") * big, leaves)
    exact = [(s * 100).double().requires_grad_() for s in students]
    expected = torch.autograd.grad(loss(exact, [t.double() for t in teachers]) * big, exact)
    assert all(relative_error(x, y) <= 1e-3 for x, y in zip(grads, expected, strict=True))
