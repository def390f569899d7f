"""Cost attention in the launch that solves: its lanes against the plain formula, on vectors and as a warp."""

import itertools

import pytest
import torch

from fastkd import backends
from fastkd.functional import CostAttention, transport_with_cost_attention
from fastkd.reference.cost_attention import SMALLEST_WEIGHT, cost_attention

pytestmark = pytest.mark.skipif(backends.UNAVAILABLE["cpu"] is not None, reason="the C++ kernels are not built")
RULES = [CostAttention(*flags[:1], 0.7, *flags[1:]) for flags in itertools.product([True, False], repeat=4)]


def problem(kinds=2, n=4, m=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(kinds, n, m, generator=generator, dtype=torch.float64)
    a, b = (torch.rand(kinds, size, generator=generator, dtype=torch.float64) + 0.1 for size in (n, m))
    return cost, a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)


def by(name, cost, a, b, rule):
    return getattr(torch.ops.fastkd, name)(cost, a, b, *rule)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("name", ["cost_attention", "cost_attention_emulated"])
def test_against_the_formula(name, rule):
    for kinds, n, m in ((2, 4, 12), (1, 6, 24), (3, 1, 5), (2, 64, 64), (2, 33, 2)):
        cost, a, b = problem(kinds, n, m, seed=n)
        flow, u, v, status, new_a, new_b = by(name, cost, a, b, rule)
        assert (status == 0).all()
        plain = getattr(torch.ops.fastkd, name.replace("cost_attention", "transport"))(cost, a, b, None, None)
        assert torch.equal(flow, plain[0]) and torch.equal(u, plain[1]) and torch.equal(v, plain[2])
        wanted_a, wanted_b = cost_attention(flow, cost, a, b, *rule)
        torch.testing.assert_close(new_a, wanted_a, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(new_b, wanted_b, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["cost_attention", "cost_attention_emulated"])
def test_float32_costs(name):
    cost, a, b = (x.float() for x in problem())
    flow, *_, new_a, new_b = by(name, cost, a, b, CostAttention())
    wanted_a, wanted_b = cost_attention(flow, cost, a, b, *CostAttention())
    torch.testing.assert_close(new_a, wanted_a, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(new_b, wanted_b, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["cost_attention", "cost_attention_emulated"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_free_layers_huge_costs_and_steps_that_overflowed(name, rule):
    cost, a, b = problem()
    cost[:, :, 0] = 0  # a layer that costs nothing: 0/0 stays out
    cost[:, 1] *= 1e200
    _, _, _, _, new_a, new_b = by(name, cost, a, b, rule)
    for weights in (new_a, new_b):
        assert weights.isfinite().all() and (weights > 0.9 * SMALLEST_WEIGHT).all()
        torch.testing.assert_close(weights.sum(1), torch.ones(2, dtype=torch.float64))
    cost[0, 2, 3] = torch.nan
    *_, status, kept_a, kept_b = by(name, cost, a, b, rule)
    assert status[0] != 0 and status[1] == 0
    torch.testing.assert_close(kept_a[0], a[0])
    torch.testing.assert_close(kept_b[0], b[0])


def test_gradient_is_the_flow_and_every_backend_agrees():
    cost, a, b = problem()
    results = []
    for backend in ("cpu", "reference"):
        leaf = cost.clone().requires_grad_()
        plan, new_a, new_b = transport_with_cost_attention(leaf, a, b, CostAttention(joint=False), backend=backend)
        (grad,) = torch.autograd.grad(plan.value.sum(), leaf)
        assert torch.equal(grad, plan.flow) and not new_a.requires_grad
        results.append((plan.value.detach(), new_a, new_b))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_opcheck_and_invalid_arguments():
    cost, a, b = problem()
    torch.library.opcheck(torch.ops.fastkd.cost_attention, (cost, a, b, *CostAttention()))
    with pytest.raises(ValueError, match=r"b: expected one weight per layer, \[2, 12\], got \[2, 11\]"):
        transport_with_cost_attention(cost, a, b[:, :11])
    with pytest.raises(ValueError, match="cost: costs must be finite"):
        transport_with_cost_attention(cost / 0, a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES[::3], ids=str)
def test_on_a_gpu(rule):
    for kinds, n, m in ((2, 4, 12), (2, 64, 64)):
        cost, a, b = (x.cuda() for x in problem(kinds, n, m))
        flow, _, _, status, new_a, new_b = by("cost_attention", cost, a, b, rule)
        assert (status == 0).all()
        wanted_a, wanted_b = cost_attention(flow, cost, a, b, *rule)
        torch.testing.assert_close(new_a, wanted_a, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(new_b, wanted_b, rtol=1e-12, atol=1e-15)
