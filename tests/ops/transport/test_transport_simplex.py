"""The compiled transport solver: every answer carries its certificate, and the tests believe nothing else.

Flows of an optimum are not unique, so they are never compared; the certificate (primal feasible, dual feasible, no gap)
proves an objective optimal, and the exact integer reference and POT confirm it.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastkd
from fastkd import backends, emd_numpy
from fastkd.emd_numpy import emd, emd_with_flow
from fastkd.functional import transport
from fastkd.ops.transport import LARGEST

pytestmark = pytest.mark.skipif(backends.UNAVAILABLE["cpu"] is not None, reason=f"C++: {backends.UNAVAILABLE['cpu']}")

SOLVERS = ("transport", "transport_emulated")  # the CPU's vectors, and the 32 lanes of the CUDA kernel
SIZES = ((1, 1), (1, 7), (7, 1), (2, 2), (4, 12), (6, 12), (13, 7), (12, 24), (31, 33), (64, 64))
LARGE = ((1, 65), (65, 1), (65, 64), (3, 129), (97, 5), (128, 100), (150, 211))  # for the CPU alone
KINDS = ("random", "uniform", "line", "monge", "near_monge", "equal", "ties", "rank_one", "zero_masses", "tiny_masses")
KINDS += ("forbidden", "wide", "cumulative", "reversed")


def uniform(problems, size):
    return torch.full((problems, size), 1.0 / size, dtype=torch.float64)


def problems_of(kind, problems, n, m, seed=0):
    """cost [P, N, M] and masses a [P, N], b [P, M] of equal total, in float64."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.rand(*shape, generator=g, dtype=torch.float64)  # noqa: E731 (bound to the generator)
    cost, a, b = rand(problems, n, m), rand(problems, n) ** 2 + 1e-3, rand(problems, m) ** 2 + 1e-3
    x, y = torch.arange(n)[None, :, None] / n, torch.arange(m)[None, None, :] / m
    if kind in ("uniform", "line", "monge", "near_monge", "ties", "reversed"):
        a, b = uniform(problems, n), uniform(problems, m)
    if kind == "line":
        cost = (rand(problems, n, 1) - rand(problems, 1, m)).abs()
    if kind in ("monge", "near_monge", "reversed"):
        cost = ((x - (1 - y if kind == "reversed" else y)) ** 2).double() + cost * (1e-2 if kind == "near_monge" else 0)
    if kind == "equal":
        cost = rand(problems, 1, 1).expand(problems, n, m).contiguous()
    if kind == "ties":
        cost = (cost * 4).floor()
    if kind == "rank_one":
        cost = rand(problems, n, 1) * rand(problems, 1, m)
    if kind == "zero_masses":
        a, b = a * (rand(problems, n) > 0.5), b * (rand(problems, m) > 0.5)
        a[:, 0] += 0.1
        b[:, -1] += 0.1
    if kind == "tiny_masses":
        a, b = 10 ** (-20 * rand(problems, n)), 10 ** (-20 * rand(problems, m))
    if kind == "forbidden":
        cost = torch.where(rand(problems, n, m) < 0.5, 1e6, cost)
    if kind == "wide":
        cost = torch.exp(16 * cost - 8)
    if kind == "cumulative":
        cost = cost.cumsum(1) + rand(problems, n, m).cumsum(2)
    return cost, a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)


def broken(cost, a, b, flow, u, v, gap=1e-9, mass=1e-13):
    """The first condition of the certificate that does not hold, as a sentence; None for an optimal plan."""
    cost, a, b, flow, u, v = (x.double() for x in (cost, a, b, flow, u, v))
    b = b * (a.sum(-1) / b.sum(-1))[:, None]  # the solver's rule for totals that differ by rounding
    scale = cost.abs().amax((-2, -1))  # [P]
    value = (flow * cost).sum((-2, -1))
    if not (flow >= 0).all():
        return "a flow is negative or NaN"
    if (flow.sum(-1) - a).abs().max() > mass or (flow.sum(-2) - b).abs().max() > mass:
        return "a marginal is not met"
    if ((u[:, :, None] + v[:, None, :] - cost).amax((-2, -1)) > 1e-12 * scale).any():
        return "a dual constraint is broken"
    dual = (u * a).sum(-1) + (v * b).sum(-1)
    # Of the value; where that is (nearly) 0, the rounding of the largest cost decides.
    if ((value - dual).abs() > gap * value.abs() + 1e-14 * scale).any():
        return "the duality gap is open"
    return None


def solve(solver, cost, a, b, start_flow=None, start_v=None):
    return getattr(torch.ops.fastkd, solver)(cost, a, b, start_flow, start_v)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", KINDS)
def test_certificate(solver, kind):
    for seed, (n, m) in enumerate(SIZES + LARGE * (solver == "transport")):
        problem = problems_of(kind, 6 if max(n, m) <= LARGEST else 2, n, m, seed)
        flow, u, v, status = solve(solver, *problem)
        assert (status == 0).all(), (n, m)
        assert broken(*problem, flow, u, v) is None, (n, m)
        assert ((flow > 0).sum((-2, -1)) <= n + m - 1).all(), "a vertex has at most N + M - 1 flows"


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", KINDS)
def test_float32_problems(solver, kind):
    """Inputs in float32 whose totals differ by rounding: solved in float64, certified to 1e-6."""
    for n, m in ((4, 12), (13, 7), (48, 48)):
        problem = tuple(x.float() for x in problems_of(kind, 6, n, m))
        flow, u, v, status = solve(solver, *problem)
        assert (status == 0).all()
        assert broken(*problem, flow, u, v, gap=1e-6, mass=1e-12) is None


@pytest.mark.parametrize("sabotage", ["scale", "negative", "move", "dual", "swap"])
def test_the_certificate_notices(sabotage):
    cost, a, b = problems_of("random", 1, 6, 12)
    flow, u, v, _ = solve("transport", cost, a, b)
    if sabotage == "scale":
        flow = flow * 1.01
    elif sabotage == "negative":
        flow[0, 0, 0] -= 1.0
    elif sabotage == "move":  # feasible, not optimal: mass goes round a cycle
        i, j = divmod(int(flow[0].argmax()), 12)
        k = next(k for k in range(6) if k != i)
        j2 = int((flow[0, k] * (torch.arange(12) != j)).argmax())
        theta = min(flow[0, i, j], flow[0, k, j2]) / 2
        for r, c, sign in ((i, j, -1), (k, j2, -1), (i, j2, 1), (k, j, 1)):
            flow[0, r, c] += sign * theta
    elif sabotage == "dual":
        u = u + 1e-6
    elif sabotage == "swap":
        u, v = u * 1.01, v
    assert broken(cost, a, b, flow, u, v) is not None


@pytest.mark.parametrize("solver", SOLVERS)
def test_agrees_with_the_exact_reference(solver):
    for kind in KINDS:
        cost, a, b = problems_of(kind, 2, 5, 8)
        oracle = (transport(cost, a, b, backend="reference").flow * cost).sum((-2, -1))
        value = (solve(solver, cost, a, b)[0] * cost).sum((-2, -1))
        torch.testing.assert_close(value, oracle, rtol=1e-9, atol=1e-14 * float(cost.max()), msg=kind)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("exponent", [-300, -30, 30, 300])
def test_scales(solver, exponent):
    """A cost times a power of two is the same problem, to the last bit."""
    cost, a, b = problems_of("random", 4, 6, 12)
    by = 2.0 ** round(exponent * 3.3219)
    flow, u, v, status = solve(solver, cost, a, b)
    scaled = solve(solver, cost * by, a, b)
    assert torch.equal(scaled[0], flow) and torch.equal(scaled[1], u * by) and torch.equal(scaled[2], v * by)
    assert torch.equal(scaled[3], status)
    masses = solve(solver, cost, a * by, b * by)
    assert torch.equal(masses[0], flow * by)


@pytest.mark.parametrize("solver", SOLVERS)
def test_closed_forms(solver):
    cost, a, b = problems_of("random", 3, 1, 9)
    assert torch.allclose(solve(solver, cost, a, b)[0], b[:, None], atol=1e-15)
    flow = solve(solver, *problems_of("monge", 1, 6, 12))[0]
    assert torch.allclose(flow, torch.eye(6, dtype=torch.float64).repeat_interleave(2, 1)[None] / 12, atol=1e-15)
    nothing = torch.zeros(1, 3, 4, dtype=torch.float64)
    flow, u, v, status = solve(solver, nothing + 2, nothing[:, :, 0], nothing[:, 0])
    assert status.item() == 0 and not flow.any() and (u[:, :, None] + v[:, None] <= 2).all()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("wrong", "code"), [
    ("nan_cost", 1), ("inf_cost", 1), ("negative", 2), ("nan_mass", 2), ("inf_mass", 2), ("unequal", 3), ("empty", 3)])  # fmt: skip
def test_status_codes(solver, wrong, code):
    """A bad problem says what is wrong, gives NaN, and leaves its neighbours alone."""
    cost, a, b = problems_of("random", 3, 5, 8)
    oracle = solve(solver, cost, a, b)
    if wrong.endswith("cost"):
        cost[1, 4, 7] = float(wrong[:3])
    elif wrong == "unequal":
        b[1] *= 1.001
    elif wrong == "empty":
        b[1] = 0
    else:
        a[1, 4] = {"negative": -0.1, "nan_mass": float("nan"), "inf_mass": float("inf")}[wrong]
    found = solve(solver, cost, a, b)
    assert found[3].tolist() == [0, code, 0]
    for x, y in zip(found[:3], oracle[:3], strict=True):
        assert x[1].isnan().all() and torch.equal(x[0], y[0]) and torch.equal(x[2], y[2])


@pytest.mark.parametrize("solver", SOLVERS)
def test_warm_start_is_only_a_hint(solver):
    for seed, (n, m) in enumerate(SIZES):
        problem, other = problems_of("random", 8, n, m, seed), problems_of("zero_masses", 8, n, m, seed + 1)
        flow, _, v, _ = solve(solver, *problem)
        nan, full = torch.full_like(v, float("nan")), torch.ones_like(flow)
        far = (v + 1e3, -v, v * 1e300, nan, torch.full_like(v, float("-inf")))
        hints = [(None, hint) for hint in (v, *far)] + [(flow, hint) for hint in (None, v, nan)]
        hints += [(hint, v) for hint in (solve(solver, *other)[0], full, full * float("nan"), flow.flip(1), 0 * flow)]
        for hint in hints:
            for posed in (problem, other):
                flow_found, u, w, status = solve(solver, *posed, *hint)
                assert (status == 0).all() and broken(*posed, flow_found, u, w) is None


def test_threads_and_runs_agree_bitwise():
    problem = problems_of("random", 200, 12, 24)
    torch.set_num_threads(2)
    first = solve("transport", *problem)
    torch.set_num_threads(1)
    second = solve("transport", *problem)
    assert all(map(torch.equal, first, second))


def test_gradients():
    """The flow for the cost, the centred duals for the masses: against differences of the value itself."""
    cost, a, b = (x.requires_grad_() for x in problems_of("random", 3, 4, 6))
    upstream = torch.tensor([0.7, -1.3, 2.1], dtype=torch.float64)
    plan = transport(cost, a, b)
    to_cost, to_a, to_b = torch.autograd.grad(plan.value, (cost, a, b), upstream, retain_graph=True)
    again = torch.autograd.grad(plan.value, (cost, a, b), upstream)
    assert all(map(torch.equal, again, (to_cost, to_a, to_b)))
    assert not (plan.flow.requires_grad or plan.u.requires_grad or plan.v.requires_grad)
    with torch.no_grad():
        g = torch.Generator().manual_seed(3)
        for grad, which in ((to_cost, 0), (to_a, 1), (to_b, 2)):
            step = torch.randn(grad.shape, generator=g, dtype=torch.float64) * 1e-7
            if which:
                step -= step.mean(-1, keepdim=True)  # the total stays
            moved = [[y + s * step if i == which else y for i, y in enumerate((cost, a, b))] for s in (1, -1)]
            difference = (transport(*moved[0]).value - transport(*moved[1]).value) / 2 * upstream
            predicted = (grad * step).flatten(1).sum(1)
            torch.testing.assert_close(predicted, difference, rtol=1e-6, atol=1e-15)
        torch.testing.assert_close(to_a.sum(-1), torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)


def test_layouts_dtypes_and_defaults():
    cost, _, _ = problems_of("random", 6, 5, 8)
    plan = transport(cost.reshape(2, 3, 5, 8))
    assert [tuple(x.shape) for x in plan] == [(2, 3), (2, 3, 5, 8), (2, 3, 5), (2, 3, 8), (2, 3)]
    strided = cost.transpose(-2, -1).contiguous().transpose(-2, -1)
    torch.testing.assert_close(transport(strided).value, plan.value.flatten(), rtol=0, atol=0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        low = cost.to(dtype)
        value = transport(low).value
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, transport(low.double()).value.float(), rtol=1e-6, atol=0)
    assert transport(cost[:0]).value.shape == (0,)
    warm = transport(cost, warm_start=transport(cost))
    torch.testing.assert_close(warm.value, plan.value.flatten(), rtol=1e-12, atol=0)
    with pytest.raises(RuntimeError, match="1 to 64 rows and columns, got 2 x 65"):
        solve("transport_emulated", torch.rand(1, 2, LARGEST + 1), torch.ones(1, 2) / 2, torch.ones(1, 65) / 65)


def test_large_problems():
    """Beyond the CUDA kernel's sizes: POT's objective, any warm start, bad neighbours, threads and scales."""
    ot = pytest.importorskip("ot", reason="POT confirms the objective: pip install POT")
    for kind in ("random", "uniform", "ties", "zero_masses", "forbidden", "near_monge"):
        problem = cost, a, b = problems_of(kind, 3, 130, 97)
        flow, u, v, _ = plan = solve("transport", *problem)
        assert broken(*problem, flow, u, v) is None, kind
        torch.set_num_threads(1)
        assert all(map(torch.equal, plan, solve("transport", *problem))), kind
        scaled = solve("transport", cost * 2.0**-300, a * 8, b * 8)
        assert torch.equal(scaled[0], flow * 8) and torch.equal(scaled[1], u * 2.0**-300), kind
        oracle = ot.emd2(a[0].numpy(), b[0].numpy(), cost[0].numpy(), numItermax=10**7)
        assert float((flow[0] * cost[0]).sum()) == pytest.approx(oracle, rel=1e-9, abs=1e-14), kind
        for hint in (v, -v, v * float("nan")):
            again = solve("transport", *problem, flow, hint)
            assert broken(*problem, *again[:3]) is None, kind
        a[1, 4] = -0.1
        bad = solve("transport", cost, a, b)
        assert bad[3].tolist() == [0, 2, 0] and bad[0][1].isnan().all() and torch.equal(bad[0][2], flow[2]), kind


def test_opcheck_and_compile():
    problem = problems_of("random", 3, 5, 8)
    for name in SOLVERS:
        torch.library.opcheck(getattr(torch.ops.fastkd, name).default, (*problem, None, None))
    cost = problem[0].requires_grad_()
    compiled = torch.compile(lambda c: transport(c).value.sum(), fullgraph=True)
    (grad,) = torch.autograd.grad(compiled(cost), cost)
    assert torch.equal(grad, transport(cost).flow)


@pytest.mark.parametrize("instruction_set", ["plain", "avx2"])
def test_instruction_sets(instruction_set, tmp_path):
    """The narrower units, in a process that is told to use them."""
    problem = problems_of("random", 40, 12, 24)
    torch.save(problem, tmp_path / "problem.pt")
    code = "import sys, torch, fastkd.functional; problem = torch.load(sys.argv[1]); "
    code += "torch.save(torch.ops.fastkd.transport(*problem, None, None), sys.argv[2])"
    paths = str(tmp_path / "problem.pt"), str(tmp_path / "plan.pt")
    environment = {
        **os.environ,
        "FASTKD_MAX_ISA": instruction_set,
        "PYTHONPATH": str(Path(fastkd.__file__).parent.parent),
    }
    subprocess.run([sys.executable, "-c", code, *paths], check=True, env=environment)
    flow, u, v, status = torch.load(paths[1])
    assert (status == 0).all() and broken(*problem, flow, u, v) is None


def test_numpy_entry():
    """The names and shapes of ot.emd and pyemd.emd_with_flow."""
    np = pytest.importorskip("numpy")
    cost, a, b = (x[0] for x in problems_of("random", 1, 6, 12))
    flow, log = emd(a.numpy(), b.numpy(), cost.numpy(), log=True)
    certificate = (cost, a, b, *(torch.from_numpy(x) for x in (flow, log["u"], log["v"])))
    assert broken(*(x[None] for x in certificate)) is None
    assert log["cost"] == pytest.approx(float(transport(cost, a, b).value), rel=1e-12)
    strided, sixths = cost.float().numpy()[:, ::2].T, np.full(6, 1 / 6)
    assert np.array_equal(emd([], None, strided), emd(sixths, sixths, strided))
    # The authors' way: one square matrix over both sides, masses padded with zeros.
    square = np.zeros((18, 18))
    square[:6, 6:] = cost.numpy()
    square[6:, :6] = cost.numpy().T
    first, second = np.concatenate([a.numpy(), np.zeros(12)]), np.concatenate([np.zeros(6), b.numpy()])
    value, nested = emd_with_flow(first, second, square)
    assert isinstance(nested, list) and value == pytest.approx(log["cost"], rel=1e-12)
    mistakes = ((a, b, cost * float("nan")), "finite"), ((-a, b, cost), ">= 0"), ((a, b * 2, cost), "same total")
    for wrong, sentence in mistakes:
        with pytest.raises(ValueError, match=sentence):
            emd(*wrong)
    with pytest.raises(ValueError, match="1 to 32768"):
        emd(None, None, np.ones((1, 32769)))
    with pytest.raises(ValueError, match="one row per mass"):
        emd(a[:3], b, cost)


def test_numpy_entry_without_the_module(monkeypatch):
    """In a Python that the wheel's module was not built for, torch's operation gives the same."""
    cost, a, b = (x[0].numpy() for x in problems_of("random", 1, 6, 12))
    wanted, log = emd(a, b, cost, log=True)
    monkeypatch.setattr(emd_numpy, "_C", None)
    flow, found = emd(a, b, cost, log=True)
    assert abs(flow - wanted).max() < 1e-12 and found["cost"] == pytest.approx(log["cost"], rel=1e-12)
    with pytest.raises(ValueError, match="same total"):
        emd(a, b * 2, cost)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_the_gpu(kind):
    """The kernel and its emulation are the same code: same status, same objective, on random sizes."""
    for n, m in SIZES:
        problem = problems_of(kind, 6, n, m)
        flow, u, v, status = (x.cpu() for x in solve("transport", *(x.cuda() for x in problem)))
        assert (status == 0).all() and broken(*problem, flow, u, v) is None
    cost, a, b = (x.cuda() for x in problems_of(kind, 3, 5, 8))
    cost[1, 0, 0] = float("nan")
    assert torch.ops.fastkd.transport(cost, a, b, None, None)[3].tolist() == [0, 1, 0]


@pytest.mark.long
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_hundred_thousand_problems(solver):
    """Random, degenerate and near-Monge, of random sizes and scales: every certificate to 1e-9, and POT agrees."""
    ot = pytest.importorskip("ot", reason="POT confirms the objective: pip install POT")
    g = torch.Generator().manual_seed(11)
    solved = compared = 0
    while solved < 100_000:
        high = 65 if solved % 3 == 0 else 17
        n, m = (int(torch.randint(1, high, (1,), generator=g)) for _ in range(2))
        for kind in KINDS:
            cost, a, b = problems_of(kind, 64, n, m, seed=solved)
            cost = cost * 10.0 ** int(torch.randint(-30, 31, (1,), generator=g))
            flow, u, v, status = solve(solver, cost, a, b)
            assert (status == 0).all(), (kind, n, m)
            assert broken(cost, a, b, flow, u, v) is None, (kind, n, m)
            solved += len(cost)
            if kind == "wide":  # POT's own tolerance gives a wrong optimum there; the certificate stands
                continue
            scale = float(cost[0].abs().max()) or 1.0
            keep_a, keep_b = a[0] > 0, b[0] > 0
            inner = (cost[0] / scale)[keep_a][:, keep_b]
            oracle = ot.emd2(a[0][keep_a].numpy(), b[0][keep_b].numpy(), inner.numpy(), numItermax=10**7) * scale
            value = float((flow[0] * cost[0]).sum())
            assert abs(value - oracle) <= 1e-9 * abs(oracle) + 1e-14 * scale, (kind, n, m)
            compared += 1
    assert compared > 1000


@pytest.mark.long
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("chip", [80, 90])
def test_cuda_compiles_without_spills(chip, tmp_path):
    root, include = Path(fastkd.__file__).parent.parent, Path(torch.__file__).parent / "include"
    command = ["nvcc", "-O3", "-std=c++17", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-Xptxas", "-v"]
    command += [f"-I{root / 'csrc'}", "-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include")]
    command += [f"-arch=sm_{chip}", "-c", str(root / "csrc/cuda/transport.cu"), "-o", str(tmp_path / "transport.o")]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    clean = report.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads")
    assert clean == report.count("Compiling entry") == 4, report
