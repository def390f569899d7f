"""transport: the exact solution with its certificate, against POT, SciPy's LP and brute force."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import randn
from fastkd.reference.transport import transport


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def masses(P, K, seed, kind="random"):
    m = torch.ones(P, K, dtype=torch.float64) if kind == "equal" else uniform(P, K, seed=seed) + 1e-3
    if kind == "zeros":
        m = m * (uniform(P, K, seed=seed + 1) < 0.5)
        m[:, K // 2] += 1
    if kind == "tiny":  # as softmaxed layer weights come out, 1e-21 beside 1
        m = m**40
    return m / m.sum(1, keepdim=True)


def costs(P, N, M, seed, kind="random"):
    if kind == "equal":
        return torch.full((P, N, M), 0.7, dtype=torch.float64)
    if kind == "ties":
        return torch.randint(-2, 3, (P, N, M), generator=torch.Generator().manual_seed(seed)).double()
    if kind == "monge":
        x, y = uniform(P, N, seed=seed).sort(1).values, uniform(P, M, seed=seed + 1).sort(1).values
        return (x[:, :, None] - y[:, None, :]).square()
    return uniform(P, N, M, seed=seed)


def certify(cost, a, b, tolerance=1e-9):
    """Feasible, basic, dual feasible, complementary, without gap: then it is optimal, whoever says otherwise."""
    flow, u, v = transport(cost, a, b)
    assert all(x.dtype == torch.float64 and not x.requires_grad for x in (flow, u, v))
    cost, a, b = cost.detach().double(), a.double(), b.double()
    size, mass = cost.abs().amax((1, 2)).clamp_min(1e-300), a.sum(1).clamp_min(1e-300)
    assert (flow >= 0).all()
    assert ((flow.sum(2) - a).abs().amax(1) <= tolerance * mass).all()
    assert ((flow.sum(1) - b).abs().amax(1) <= tolerance * mass).all()
    assert ((flow > 0).sum((1, 2)) <= cost.shape[1] + cost.shape[2] - 1).all()
    slack = cost - u[:, :, None] - v[:, None, :]
    assert (slack.amin((1, 2)) >= -tolerance * size).all()
    assert ((slack.abs() * (flow > 0)).amax((1, 2)) <= tolerance * size).all()
    value = (flow * cost).sum((1, 2))
    assert ((value - (u * a).sum(1) - (v * b).sum(1)).abs() <= tolerance * size * mass).all()
    return value


@settings(max_examples=60, deadline=None)
@given(
    N=st.integers(1, 13),
    M=st.integers(1, 13),
    seed=st.integers(0, 10**6),
    cost_kind=st.sampled_from(["random", "equal", "ties", "monge"]),
    mass_kind=st.sampled_from(["random", "equal", "zeros", "tiny"]),
    scale=st.sampled_from([1.0, 1e-30, 1e30]),
)
def test_certificate(N, M, seed, cost_kind, mass_kind, scale):
    cost = costs(2, N, M, seed, cost_kind) * scale
    certify(cost, masses(2, N, seed + 7, mass_kind), masses(2, M, seed + 8, mass_kind))


@pytest.mark.parametrize("mass_kind", ["random", "equal", "zeros"])
@pytest.mark.parametrize("cost_kind", ["random", "ties", "monge"])
@pytest.mark.parametrize(("N", "M"), [(1, 1), (4, 12), (12, 4), (12, 24), (31, 17)])
def test_against_pot(N, M, cost_kind, mass_kind):
    ot = pytest.importorskip("ot")
    cost, a, b = costs(2, N, M, 3, cost_kind), masses(2, N, 4, mass_kind), masses(2, M, 5, mass_kind)
    value = certify(cost, a, b)
    for k in range(2):
        assert value[k].item() == pytest.approx(ot.emd2(*(x[k].numpy() for x in (a, b, cost))), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("N", "M"), [(2, 3), (4, 12), (9, 9)])
def test_against_a_linear_programme(N, M):
    optimize = pytest.importorskip("scipy.optimize")
    cost, a, b = costs(3, N, M, 11), masses(3, N, 12), masses(3, M, 13)
    rows, columns = torch.eye(N).repeat_interleave(M, 1), torch.eye(M).repeat(1, N)
    for k, value in enumerate(certify(cost, a, b)):
        constraints, sums = torch.cat([rows, columns]).double(), torch.cat([a[k], b[k]])
        best = optimize.linprog(cost[k].flatten().numpy(), A_eq=constraints.numpy(), b_eq=sums.numpy(), method="highs")
        assert value.item() == pytest.approx(best.fun, rel=1e-9)


def test_assignment_by_brute_force():
    cost = costs(4, 5, 5, 21)
    value = certify(cost, *[torch.ones(4, 5, dtype=torch.float64)] * 2)
    for k in range(4):
        best = min(sum(cost[k, i, p[i]] for i in range(5)) for p in itertools.permutations(range(5)))
        assert value[k].item() == pytest.approx(best.item(), rel=1e-12)


def test_the_largest_size():
    certify(costs(1, 64, 64, 31), masses(1, 64, 32), masses(1, 64, 33))
    certify(costs(1, 64, 64, 34, "ties"), masses(1, 64, 0, "equal"), masses(1, 64, 0, "equal"))


def test_costs_from_1e_300_to_1e300_in_one_problem():
    cost = 10.0 ** (600 * costs(3, 4, 6, 41) - 300)
    flow, u, v = transport(cost, masses(3, 4, 42), masses(3, 6, 43))
    assert all(x.isfinite().all() for x in (flow, u, v))
    certify(cost, masses(3, 4, 42), masses(3, 6, 43))


def test_the_flow_is_equivariant_to_the_order_of_rows_and_columns():
    """Where the optimum is unique, permuting a problem permutes its flow, to the last bit but rounding of the sums."""
    cost, a, b = costs(1, 5, 8, 51), masses(1, 5, 52), masses(1, 8, 53)
    rows, columns = torch.randperm(5), torch.randperm(8)
    flow = transport(cost, a, b)[0]
    permuted = transport(cost[:, rows][:, :, columns], a[:, rows], b[:, columns])[0]
    assert torch.allclose(permuted, flow[:, rows][:, :, columns], rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_and_strides_are_accepted(dtype):
    cost = randn(2, 6, 4, seed=61).to(dtype).transpose(1, 2).requires_grad_()
    a, b = (
        torch.full((2, 4), 0.25, dtype=dtype),
        torch.tensor([0.5, 0.25, 0, 0, 0.125, 0.125], dtype=dtype).expand(2, 6),
    )
    certify(cost, a, b)


def test_sums_that_differ_by_rounding_are_accepted():
    """Single-precision weights sum to 1 up to 1e-7; every row then gets its mass, every column its share."""
    a, b = (torch.softmax(randn(1, k, seed=k).float(), 1) for k in (4, 12))
    b = b * (1 + 3e-7)
    flow, _, _ = transport(costs(1, 4, 12, 71), a, b)
    assert torch.allclose(flow.sum(2), a.double(), rtol=1e-15, atol=0)
    assert torch.allclose(flow.sum(1), b.double(), rtol=1e-6, atol=0)
    assert ((flow > 0).sum() <= 15).all()


def test_zero_mass_and_an_empty_batch():
    flow, u, v = transport(costs(1, 2, 3, 81), torch.zeros(1, 2), torch.zeros(1, 3))
    assert (flow == 0).all() and u.isfinite().all() and v.isfinite().all()
    assert [x.shape for x in transport(torch.ones(0, 2, 3), torch.ones(0, 2), torch.ones(0, 3))] == [
        (0, 2, 3),
        (0, 2),
        (0, 3),
    ]


@pytest.mark.parametrize(
    ("argument", "value"),
    [(0, math.nan), (0, math.inf), (0, -math.inf), (1, math.nan), (1, -0.1), (1, 0.9), (2, math.nan), (2, math.inf)],
)
def test_an_invalid_problem_is_nan_and_others_are_solved(argument, value):
    problem = [costs(3, 3, 4, 91), masses(3, 3, 92), masses(3, 4, 93)]
    clean = transport(*problem)
    problem[argument] = problem[argument].clone()
    problem[argument][1].flatten()[2] = value
    for x, good in zip(transport(*problem), clean, strict=True):
        assert x[1].isnan().all()
        assert torch.equal(x[::2], good[::2])


def test_certificate_notices_a_worse_plan(monkeypatch):
    """The independent plan a bᵀ is feasible and not optimal; a certificate that accepted it would prove nothing."""
    import test_transport

    def independent(cost, a, b):
        return a[:, :, None] * b[:, None, :], torch.zeros_like(a), cost.amin(1)

    monkeypatch.setattr(test_transport, "transport", independent)
    with pytest.raises(AssertionError):
        test_transport.certify(costs(1, 4, 12, 3), masses(1, 4, 4), masses(1, 12, 5))
