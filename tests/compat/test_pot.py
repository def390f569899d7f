"""POT's exact solvers here and there: plans, costs, duals and gradients over seeded problems of many sizes."""

import numpy as np
import pytest
import torch

import fastkd
from cases import relative_error

ot = pytest.importorskip("ot", reason="compares with the package: pip install POT==0.9.7.post1")

from fastkd.compat import pot  # noqa: E402

SIZES = ((1, 1), (3, 7), (12, 5), (40, 40), (65, 30), (90, 120))


def problem(n, m, seed, total=1.0, zeros=False):
    rng = np.random.default_rng(seed)
    a, b = rng.random(n) + 0.01, rng.random(m) + 0.01
    if zeros:
        a[: n // 3], b[: m // 3] = 0, 0
    return a / a.sum() * total, b / b.sum() * total, rng.random((n, m))


def assert_duals(theirs, ours, a, b, exact=True):
    """Equal up to the constant that may move between the sides: feasible and of one objective where they are not unique."""
    if exact:
        for side in "uv":
            np.testing.assert_allclose(ours[side], theirs[side], rtol=0, atol=1e-9)
    assert (ours["u"] * a).sum() + (ours["v"] * b).sum() == pytest.approx(float(theirs["cost"]), rel=1e-9)


@pytest.mark.parametrize("zeros", [False, True], ids=["positive", "zeros"])
def test_plans_of_numpy_arrays(zeros):
    for seed, (n, m) in enumerate(SIZES):
        a, b, M = problem(n, m, seed, total=1.0 + seed, zeros=zeros)
        theirs, their_log = ot.emd(a, b, M, log=True)
        ours, log = pot.emd(a, b, M, log=True)
        assert type(ours) is type(theirs) and ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)
        assert log.keys() == their_log.keys() and log["warning"] is None and log["result_code"] == 1
        assert log["cost"] == pytest.approx(their_log["cost"], rel=1e-12)
        assert (log["u"][:, None] + log["v"] <= M + 1e-12).all()
        assert_duals(their_log, log, a, b, exact=not zeros)
        assert pot.emd2(a, b, M) == pytest.approx(ot.emd2(a, b, M), rel=1e-12)
        np.testing.assert_array_equal(pot.emd(a, b, M), ours)


def test_keywords_and_defaults():
    a, b, M = problem(9, 14, 0)
    for masses in ((a.tolist(), b.tolist()), ([], []), (None, b), (a, [])):
        np.testing.assert_allclose(pot.emd(*masses, M), ot.emd(*masses, M), rtol=0, atol=1e-12)
        assert pot.emd2(*masses, M) == pytest.approx(ot.emd2(*masses, M), rel=1e-12)
    ours, theirs = (f(a, b, M, log=True, center_dual=False)[1] for f in (pot.emd, ot.emd))
    np.testing.assert_allclose(ours["u"] - ours["u"][0], theirs["u"] - theirs["u"][0], rtol=0, atol=1e-9)
    float32 = [x.astype(np.float32) for x in (a, b, M)]
    ours, theirs = (f(*float32) for f in (pot.emd, ot.emd))
    assert ours.dtype == theirs.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-7)
    for f in (pot.emd, pot.emd2, ot.emd):
        with pytest.raises(AssertionError, match="must have the same sum"):
            f(a, 2 * b, M)
        with pytest.raises(AssertionError, match="Dimension mismatch"):
            f(a, b, M.T)
    np.testing.assert_allclose(
        pot.emd(a, 2 * b, M, check_marginals=False), ot.emd(a, 2 * b, M, check_marginals=False), rtol=0, atol=1e-12
    )


def test_many_columns_of_masses():
    """emd2 with b [M, K]: a list of K costs, solved as one batch, with POT's forms of log and return_matrix."""
    for n, m in ((9, 14), (70, 80)):
        a, _, M = problem(n, m, 0)
        b = np.stack([problem(n, m, seed)[1] for seed in range(4)], 1)
        for options in ({}, {"log": True}, {"return_matrix": True}):
            for ours, theirs in zip(pot.emd2(a, b, M, **options), ot.emd2(a, b, M, **options), strict=True):
                if options:
                    assert isinstance(ours, list) and ours[1].keys() == theirs[1].keys()
                    if "G" in ours[1]:
                        np.testing.assert_allclose(ours[1]["G"], theirs[1]["G"], rtol=0, atol=1e-12)
                    ours, theirs = ours[0], theirs[0]
                assert ours == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_torch_tensors_and_their_gradients(dtype):
    for seed, (n, m) in enumerate(SIZES):
        inputs = [torch.from_numpy(x).to(dtype) for x in problem(n, m, seed)]
        results = []
        for module in (pot, ot):
            a, b, M = leaves = [x.clone().requires_grad_() for x in inputs]
            cost = module.emd2(a, b, M)
            results.append((cost, *torch.autograd.grad(cost, leaves, torch.tensor(1.7, dtype=dtype))))
            plan, log = module.emd(a, b, M, log=True)
            results[-1] += (plan, log["u"], log["v"])
        for ours, theirs in zip(*results, strict=True):
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
            close = relative_error(ours, theirs) < (1e-9 if dtype == torch.float64 else 1e-5)
            assert close or (ours - theirs).abs().max() < 1e-9
        assert not plan.requires_grad


def test_what_pot_solves(monkeypatch):
    """Few iterations, a warm start and problems without a solution are POT's; sparse costs and integer masses as ever."""
    a, b, M = problem(6, 6, 0)
    expected = ot.emd(a, b, M)
    asked = []
    monkeypatch.setattr(pot, "pot_emd_c", lambda *args: asked.append(1) or ot.lp.emd_wrap.emd_c(*args))
    with pytest.warns(UserWarning, match="numItermax"):
        pot.emd(a, b, M, numItermax=1)
    with pytest.warns(UserWarning, match="infeasible"):
        pot.emd(np.array([1.5, -0.5]), np.array([0.5, 0.5]), np.ones((2, 2)), check_marginals=False)
    start = (np.zeros(6), np.zeros(6))
    np.testing.assert_allclose(pot.emd(a, b, M, potentials_init=start), expected, rtol=0, atol=1e-12)
    assert len(asked) == 3
    sparse = pot.emd(a, b, pytest.importorskip("scipy.sparse").coo_matrix(M))
    np.testing.assert_allclose(sparse.toarray(), expected, rtol=0, atol=1e-12)
    with pytest.warns(UserWarning, match="consists of integer"):
        assert pot.emd(np.ones(6, dtype=np.int64), np.ones(6, dtype=np.int64), M).dtype == np.int64
    assert len(asked) == 3


def test_patched_until_undo():
    """POT's own names, also those imported before, use the other solver."""
    a, b, M = problem(70, 70, 0)
    before, inside = ot.emd, ot.lp._network_simplex
    expected, original = before(a, b, M), inside.emd_c
    with fastkd.patch("pot") as patched:
        assert inside.emd_c is pot.emd_c
        np.testing.assert_allclose(before(a, b, M), expected, rtol=0, atol=1e-12)
        assert "ot.lp._network_simplex.emd_c → fastkd.compat.pot.emd_c" in repr(patched)
    assert inside.emd_c is original
