"""gram's gradient made in the forward for the likely upstream: right for every other, and nobody else's memory."""

import itertools

import pytest
import torch

from cases import gradients, randn, relative_error
from fastkd.functional import gram_correlation_loss as loss
from fastkd.ops import gram as ops
from fastkd.reference import gram as reference

pytestmark = pytest.mark.skipif("cpu" not in ops.KERNELS, reason="the C++ kernels are not built")
FORMS = [(levels, row) for levels in (["token"], ["sequence"], ["official"], ["token", "sequence"], ["token", "official"])
         for row in (False, True) if not (row and "official" in levels)]  # fmt: skip
UPSTREAMS = {
    "as was likely": lambda k, shape: torch.full(shape, (0.5, 2.0)[k] / shape.numel()),
    "likely times a scale": lambda k, shape: torch.full(shape, 1024 * (0.5, 2.0)[k] / shape.numel()),
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
    likely = ([0.5, 2.0][: len(levels)], True)
    options = (mask if masked else None, tuple(levels), row, True, 1e-6)
    values, _ = ops.gram(leaves, teachers, *options, "cpu", likely)
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
    """One value of one level has an upstream of its own, so that no factor is common: all is made again, for what came."""
    students, teachers = layers()
    options = (["token", "sequence"], row, True, 1e-6)
    leaves = [s.clone().requires_grad_() for s in students]
    values, _ = ops.gram(leaves, teachers, None, *options, "cpu", ([0.5, 2.0], True))
    likely = [UPSTREAMS["as was likely"](k % 2, x.shape) for k, x in enumerate(values)]
    ups = [one_differs(up, by) if k % 2 == which else up for k, up in enumerate(likely)]
    found = torch.autograd.grad(values, leaves, ups, retain_graph=True)
    levels = [ops.LEVELS.index(level) for level in options[0]]
    again = torch.ops.fastkd.gram_bwd(ups, students, teachers, None, [], levels, *options[1:])
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))
    exact = by_the_oracle(students, teachers, None, options[0], row, ups)
    assert all(relative_error(x, y) <= 1e-5 for x, y in zip(found, exact, strict=True))
    if by >= 1.001:
        other = by_the_oracle(students, teachers, None, options[0], row, likely)
        assert all(relative_error(x, y) > 2e-5 for x, y in zip(exact, other, strict=True))


@pytest.mark.parametrize("scale", [1 + 3e-6, 1.001, 65536.0])
def test_a_common_factor_is_all_that_is_left_to_do(scale):
    """What does not count has no say in it."""
    students, teachers = layers()
    mask = torch.ones(5, 6, dtype=torch.bool)
    mask[2, 1:] = False
    question = (students, teachers, mask, [0], False, True, 1e-6)
    _, valid, found = torch.ops.fastkd.gram_fwd_grad(*question, [1.0], True)
    assert valid[0].tolist() == [True, True, False, True, True]
    made = [x.clone() for x in found]
    ups = [torch.full((5,), 0.25) for _ in students]
    for up in ups:
        up[2] = 7.0
    factor = torch.tensor(0.25 * scale) / 0.25
    torch.ops.fastkd.gram_settle(
        found, [torch.where(valid[0], up * scale, up) for up in ups], valid, *question, [1.0], True
    )
    assert all(torch.equal(x, y * factor) for x, y in zip(found, made, strict=True))


@pytest.mark.parametrize("scale", [1.0, 65536.0, 1e-3])
@pytest.mark.parametrize("row", [False, True])
def test_a_second_backward_makes_its_own(row, scale):
    students, teachers = layers()
    options = {"level": {"token": 1.0, "sequence": 2.0}, "pearson": "row" if row else "matrix", "backend": "cpu"}
    leaves = [s.clone().requires_grad_() for s in students]
    value = loss(leaves, teachers, **options)
    first = torch.autograd.grad(value, leaves, torch.tensor(scale), retain_graph=True)
    kept = [x.clone() for x in first]
    for x in first:
        x.mul_(3)
    second = torch.autograd.grad(value, leaves, torch.tensor(scale))
    for x, y in zip(second, kept, strict=True):
        assert torch.equal(x, y)
    single = gradients(lambda *s: loss(s, teachers, **options), *students)[1]
    factor = (float(randn(seed=7)) + 1.5) / scale
    assert all(relative_error(x, y / factor) <= 1e-6 for x, y in zip(kept, single, strict=True))


def test_the_likely_upstream_is_what_a_mean_sends():
    """Nothing is left to do in the backward then, so that the gradients of the forward are handed over untouched."""
    students, teachers = layers()
    mask = torch.ones(5, 6)
    mask[0, :4] = 0
    for pearson, reduction, m in itertools.product(("matrix", "row"), ("mean", "sum"), (None, mask)):
        leaves = [s.clone().requires_grad_() for s in students]
        level = {"token": 0.7, "sequence": 0.3}
        value = loss(leaves, teachers, level=level, pearson=pearson, mask=m, reduction=reduction, backend="cpu")
        node = value.grad_fn
        while type(node).__name__ != "GramAtOnceBackward":
            node = node.next_functions[0][0]
        before = [g.clone() for g in node.gradients]
        for found, made in zip(torch.autograd.grad(value, leaves), before, strict=True):
            assert torch.equal(found, made)


def test_float16_and_compiled_graphs_go_the_other_way():
    students, teachers = layers(torch.float16)
    big = 2.0**20  # a scaler's factor: what is made for upstream 1 must not have been rounded to float16 before
    leaves = [(s * 100).requires_grad_() for s in students]
    grads = torch.autograd.grad(loss(leaves, teachers, backend="cpu") * big, leaves)
    exact = [(s * 100).double().requires_grad_() for s in students]
    expected = torch.autograd.grad(loss(exact, [t.double() for t in teachers]) * big, exact)
    assert all(relative_error(x, y) <= 1e-3 for x, y in zip(grads, expected, strict=True))
