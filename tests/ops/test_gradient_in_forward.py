"""Every hazard of a gradient that was made in the forward (fastkd/ops/gradient_in_forward.py), for every loss that makes one."""

import pytest
import torch

from cases import randn, relative_error
from fastkd import backends, functional

pytestmark = pytest.mark.skipif(backends.UNAVAILABLE["cpu"] is not None, reason="the C++ kernels are not built")


def float32(*shape, seed):
    return randn(*shape, seed=seed).float()


def unit_rows(x):
    return torch.nn.functional.normalize(x, dim=-1)


TEACHER, HIDDEN, HEAD = float32(6, 300, seed=1), float32(6, 24, seed=2), float32(300, 24, seed=3)
STATES = [float32(4, 7, 24, seed=4), float32(4, 7, 8, seed=5)]
QUERIES, KEYS = float32(2, 2, 9, 16, seed=6), float32(2, 2, 9, 16, seed=7)
BANK, INDEX = unit_rows(float32(40, 16, seed=8)), torch.arange(30).reshape(5, 6)
NCE = {"n_data": 40, "temperature": 0.1}

# Inputs that want a gradient, and their loss; constants are float64 where the inputs are.
LOSSES = {
    "divergence": (
        [TEACHER + float32(6, 300, seed=11)],
        lambda s, like, **o: functional.divergence(s, like(TEACHER), temperature=2.0, **o),
    ),
    "gram_correlation_loss": (
        [float32(4, 7, 12, seed=12), float32(4, 7, 5, seed=13)],
        lambda a, b, like, **o: functional.gram_correlation_loss(
            [a, b], [like(x) for x in STATES], level={"token": 0.5, "sequence": 2.0}, **o
        ),
    ),
    "linear_divergence": (
        [float32(6, 16, seed=14), float32(300, 16, seed=15) / 4, float32(300, seed=16)],
        lambda x, head, bias, like, **o: functional.linear_divergence(
            x, head, like(HIDDEN), like(HEAD) / 5, student_bias=bias, **o
        ),
    ),
    "relation_kl_loss": (
        [float32(2, 2, 9, 8, seed=17), float32(2, 2, 9, 8, seed=18)],
        lambda q, k, like, **o: functional.relation_kl_loss([(q, k)], [(like(QUERIES), like(KEYS))], **o),
    ),
    "info_nce_loss": (
        [unit_rows(float32(5, 16, seed=19)), unit_rows(float32(5, 16, seed=20))],
        lambda q, p, like, **o: functional.info_nce_loss(q, p, like(BANK), temperature=0.5, **o),
    ),
    "nce_loss": (
        [unit_rows(float32(5, 16, seed=21))],
        lambda q, like, **o: functional.nce_loss(q, like(BANK), INDEX, z=30.0, **NCE, **o),
    ),
    "nce_pair_loss": (
        [unit_rows(float32(5, 16, seed=22)), unit_rows(float32(5, 16, seed=23))],
        lambda a, b, like, **o: functional.nce_pair_loss(
            (a, b), (like(BANK), like(BANK.flip(0))), INDEX, z=(torch.tensor(30.0), torch.tensor(20.0)), **NCE, **o
        )[0],
    ),
}  # fmt: skip
every_loss = pytest.mark.parametrize("name", LOSSES)


def leaves_and_value(name, dtype=torch.float32):
    inputs, loss = LOSSES[name]
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
    backend = "cpu" if dtype == torch.float32 else "reference"
    return leaves, loss(*leaves, like=lambda x: x.to(dtype), backend=backend)


def true_gradients(name):
    leaves, value = leaves_and_value(name, torch.float64)
    return torch.autograd.grad(value, leaves)


def assert_close(found, true, factor=1.0):
    for x, y in zip(found, true, strict=True):
        assert relative_error(x, y * factor) <= 1e-5 if factor else not x.any()


@pytest.mark.parametrize("upstream", [1.0, 0.3, -7.0, 65536.0, 1e-20, 0.0])
@every_loss
def test_another_upstream(name, upstream):
    leaves, value = leaves_and_value(name)
    found = torch.autograd.grad(value, leaves, torch.tensor(upstream))
    assert_close(found, true_gradients(name), upstream)


@pytest.mark.parametrize("upstreams", [(1.0, 1.0), (3.0, 1.0), (1.0, -0.5)])
@every_loss
def test_a_second_backward(name, upstreams):
    """Whatever was done to the result of the first."""
    leaves, value = leaves_and_value(name)
    for upstream in upstreams:
        found = torch.autograd.grad(value, leaves, torch.tensor(upstream), retain_graph=True)
        assert_close(found, true_gradients(name), upstream)
        for x in found:
            x.fill_(torch.nan)


@every_loss
def test_a_partial_backward(name):
    """To the first input alone, then to all of them; and a graph in which the others want none."""
    leaves, value = leaves_and_value(name)
    true = true_gradients(name)
    assert_close(torch.autograd.grad(value, leaves[:1], retain_graph=True), true[:1])
    assert_close(torch.autograd.grad(value, leaves), true)
    inputs, loss = LOSSES[name]
    for i in range(len(inputs)):
        leaves = [x.clone().requires_grad_(k == i) for k, x in enumerate(inputs)]
        value = loss(*leaves, like=lambda x: x, backend="cpu")
        assert_close(torch.autograd.grad(value, leaves[i]), true[i : i + 1])


@every_loss
def test_an_input_changed_in_place(name):
    """An error, or the gradient at the input as it was; never one of the two inputs mixed."""
    for i in range(len(LOSSES[name][0])):
        leaves, value = leaves_and_value(name)
        with torch.no_grad():
            leaves[i].mul_(-2)
        error, found = "", None
        try:
            found = torch.autograd.grad(value, leaves)
        except RuntimeError as raised:
            error = str(raised)
        if found is None:
            assert "modified by an inplace operation" in error
        else:
            assert_close(found, true_gradients(name))


@every_loss
def test_two_results_at_the_same_time(name):
    first, second = leaves_and_value(name), leaves_and_value(name)
    found = [torch.autograd.grad(value, leaves) for leaves, value in (second, first)]
    assert all(torch.equal(x, y) and x.data_ptr() != y.data_ptr() for x, y in zip(*found, strict=True))
    assert_close(found[0], true_gradients(name))
