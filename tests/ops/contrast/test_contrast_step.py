"""What a step does around its scores: the projection to the sphere, both anchors at once, and new rows in the bank."""

import pytest
import torch
import torch.nn.functional as F

from cases import MUTANTS, TOLERANCES, randn, relative_error
from fastkd import backends, functional, thresholds
from fastkd.losses.bank import MemoryBank, NegativeQueue
from fastkd.ops import contrast

FLOAT, BFLOAT = torch.float32, torch.bfloat16
compiled_only = pytest.mark.skipif(backends.UNAVAILABLE["cpu"] is not None, reason="the C++ kernels are not built here")
BACKENDS = ["reference", pytest.param("cpu", marks=compiled_only), *(["triton"] if backends.INTERPRETED else [])]
KERNELS = BACKENDS[1:]


# ---- the projection


def project(backend, B, S, D, dtype=FLOAT, wrong=lambda g: g, strided=False):
    """The unit vectors and the gradients of features, map and bias, under a random upstream one."""
    inputs = [randn(B, S, seed=1), randn(D, S, seed=2, scale=S**-0.5), randn(D, seed=3, scale=0.1)]
    leaves = [x.to(FLOAT).to(dtype) for x in inputs]
    if strided:
        leaves[:2] = [torch.stack([x, x * 0 + 9], -1).flatten(1)[:, ::2] for x in leaves[:2]]
    leaves = [x.requires_grad_() for x in leaves]
    unit = functional.unit_linear(*leaves, backend=backend)
    upstream = randn(B, D, seed=4).to(unit) + 0.5
    again = torch.autograd.grad(unit, leaves, upstream, retain_graph=True)
    grads = torch.autograd.grad(unit, leaves, upstream)
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))
    return [unit.detach(), *map(wrong, grads)]


def check_projection(*sizes, **options):
    found, true = project("cpu", *sizes, **options), project("reference", *sizes, dtype=torch.float64)
    for x, y, allowed in zip(found, true, (TOLERANCES[FLOAT][0], *[TOLERANCES[FLOAT][1]] * 3), strict=True):
        assert x.dtype == FLOAT and relative_error(x, y) <= allowed


SIZES = [(1, 1, 1), (2, 31, 7), (5, 33, 129), (32, 128, 128), (33, 4608, 130), (7, 129, 3), (1, 257, 64), (256, 65, 17)]


@compiled_only
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_projection_at_awkward_sizes(sizes, strided):
    check_projection(*sizes, strided=strided)


@compiled_only
@pytest.mark.parametrize("mutant", MUTANTS)
def test_no_mutant_of_the_projection_survives(mutant):
    with pytest.raises(AssertionError):
        check_projection(7, 33, 20, wrong=MUTANTS[mutant])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_zero_vector_stays_zero_and_a_nan_stays_in_its_row(backend):
    x = randn(4, 6, dtype=FLOAT)
    x[1], x[2, 3] = 0, torch.nan
    leaves = x.requires_grad_(), randn(5, 6, seed=1, dtype=FLOAT).requires_grad_(), torch.zeros(5, requires_grad=True)
    unit = functional.unit_linear(*leaves, backend=backend)
    assert torch.equal(unit[1], torch.zeros(5)) and unit[2].isnan().all() and unit[[0, 1, 3]].isfinite().all()
    to_x = torch.autograd.grad(unit[[0, 1, 3]].sum(), leaves)[0]
    assert to_x[[0, 1, 3]].isfinite().all() and (to_x[0] != 0).any()


@compiled_only
def test_which_implementation_the_projection_uses(monkeypatch):
    seen = []
    original = contrast.UnitLinear.apply
    monkeypatch.setattr(contrast.UnitLinear, "apply", lambda *args: seen.append(1) or original(*args))
    weight, bias = randn(4, 6, dtype=FLOAT), torch.zeros(4)

    def goes(x, weight, bias, **options):
        seen.clear()
        assert torch.isfinite(functional.unit_linear(x, weight, bias, **options)).all()
        return bool(seen)

    monkeypatch.setitem(thresholds.UP_TO, "unit_linear", 9)
    x, longer = randn(5, 6, dtype=FLOAT), randn(10, 6, dtype=FLOAT)
    assert goes(x, weight, bias) and goes(longer, weight, bias, backend="cpu")
    assert not goes(x, weight, bias, backend="reference")
    assert not goes(x.double(), weight.double(), bias.double()) and not goes(x.bfloat16(), weight, bias)
    assert not goes(longer, weight, bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert not goes(x, weight, bias)
    with pytest.raises(ValueError, match="x: expected the width of weight, 6"):
        functional.unit_linear(randn(5, 7, dtype=FLOAT), weight, bias)


# ---- both anchors


def pair(B, K, D, rows, bank=FLOAT, query=FLOAT, set_already=True):
    unit = lambda n, seed: F.normalize(randn(n, D, seed=seed), dim=1)  # noqa: E731
    queries = tuple(unit(B, seed).to(query) for seed in (1, 2))
    banks = tuple(unit(rows, seed).to(bank) for seed in (3, 4))
    index = torch.randint(rows, (B, K + 1), generator=torch.Generator().manual_seed(5))
    z = (torch.tensor(700.0), torch.tensor(900.0)) if set_already else (torch.zeros(()), torch.zeros(()))
    return queries, banks, index, z


def together(queries, banks, index, z, backend="cpu", wrong=lambda g: g):
    leaves = [x.detach().requires_grad_() for x in queries]
    options = {"n_data": 500, "temperature": 0.07, "reduction": "none", "backend": backend}
    rows, z = functional.nce_pair_loss(tuple(leaves), banks, index, z=z, **options)
    upstream = randn(len(rows), seed=7).to(rows) + 1.5
    return [rows.detach(), *map(wrong, torch.autograd.grad(rows, leaves, upstream))], z


def one_by_one(queries, banks, index, z):
    """nce_partition and nce_loss, in float64."""
    leaves = [x.double().requires_grad_() for x in queries]
    options, rows, now = {"n_data": 500, "temperature": 0.07, "backend": "reference"}, 0, []
    for leaf, bank, frozen in zip(leaves, banks, z, strict=True):
        own = functional.nce_partition(leaf.detach(), bank.double(), index, z=frozen.double(), **options)
        rows = rows + functional.nce_loss(leaf, bank.double(), index, z=own, **options, reduction="none") / 2
        now.append(own)
    upstream = randn(len(rows), seed=7) + 1.5
    return [rows.detach(), *torch.autograd.grad(rows, leaves, upstream)], now


def check_pair(*args, backend="cpu", wrong=lambda g: g, **options):
    inputs = pair(*args, **options)
    (found, z), (true, true_z) = together(*inputs, backend, wrong), one_by_one(*inputs)
    dtype = inputs[0][0].dtype
    for x, y, allowed in zip(found, true, (TOLERANCES[FLOAT][0], *[TOLERANCES[dtype][1]] * 2), strict=True):
        assert relative_error(x, y) <= allowed
    assert all(relative_error(x, y) < 1e-6 for x, y in zip(z, true_z, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("set_already", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1, 3, 9), (7, 20, 33, 60), (33, 100, 128, 200)], ids=str)
def test_both_anchors_are_the_mean_of_two(sizes, set_already, backend):
    check_pair(*sizes, set_already=set_already, backend=backend)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(("query", "bank"), [(FLOAT, BFLOAT), (BFLOAT, BFLOAT), (torch.float16, FLOAT)], ids=str)
def test_both_anchors_in_half_precision(query, bank, backend):
    check_pair(9, 30, 45, 80, query=query, bank=bank, backend=backend)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("mutant", MUTANTS)
def test_no_mutant_of_the_pair_survives(mutant, backend):
    with pytest.raises(AssertionError):
        check_pair(7, 20, 33, 60, wrong=MUTANTS[mutant], backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_z_stays_unset_without_a_finite_score(backend):
    """No finite score: z stays 0 and nothing is finite; the next batch sets it."""
    queries, banks, index, z = pair(3, 5, 4, 20, set_already=False)
    poisoned = tuple(x * torch.nan for x in queries)
    (loss, *_), z = together(poisoned, banks, index, z, backend)
    assert loss.isnan().all() and all(x == 0 for x in z)
    (loss, *_), z = together(queries, banks, index, z, backend)
    assert loss.isfinite().all() and all(x > 0 for x in z)


@compiled_only
def test_opcheck_and_compile():
    x, weight, bias = randn(3, 5, dtype=FLOAT), randn(4, 5, seed=1, dtype=FLOAT), torch.zeros(4)
    torch.library.opcheck(torch.ops.fastkd.unit_linear_fwd.default, (x, weight, bias))
    unit, length = torch.ops.fastkd.unit_linear_fwd(x, weight, bias)
    for with_x in (False, True):
        torch.library.opcheck(
            torch.ops.fastkd.unit_linear_bwd.default, (torch.ones_like(unit), unit, length, x, weight, with_x)
        )
    queries, banks, index, z = pair(3, 5, 4, 20)
    torch.library.opcheck(torch.ops.fastkd.nce_pair.default, (*queries, *banks, index, *z, 0.01, 0.07, 500))

    def step(x, weight, bias):
        v = functional.unit_linear(x, weight, bias)
        return functional.nce_pair_loss((v, v.flip(0)), banks, index, n_data=500, temperature=0.07, z=z)[0]

    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    plain, whole = (torch.autograd.grad(f(*leaves), leaves)
                    for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")))  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(plain, whole, strict=True))


def test_errors_of_the_pair_name_the_argument():
    queries, banks, index, z = pair(3, 5, 4, 20)
    options = {"n_data": 500, "temperature": 0.07, "z": z}
    for call, words in (
        (lambda: functional.nce_pair_loss(queries, banks, index[:, :1], **options), "at least one negative"),
        (lambda: functional.nce_pair_loss(queries, banks, index + 16, **options), r"indices must lie in \[0, 20\)"),
        (lambda: functional.nce_pair_loss(queries, (banks[0], banks[1][:, :3]), index, **options), r"banks\[1\]"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def _unit(seed):
    return F.normalize(randn(3, 4, seed=seed), dim=-1).to(FLOAT)


@pytest.mark.parametrize("ids", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, FLOAT, torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("backend", ["auto", "reference", pytest.param("cpu", marks=compiled_only)])
def test_new_rows_before_the_backward_change_no_gradient(backend, dtype, ids):
    """Each way to use a bank or a queue; ids in either integer dtype."""
    if backend == "cpu" and dtype == torch.float64:
        pytest.skip("the kernels take no float64")
    wide = torch.float64 if dtype == torch.float64 else FLOAT
    query, key, own = _unit(0).to(wide).requires_grad_(), _unit(1).to(wide), torch.arange(3, dtype=ids)
    queue = NegativeQueue(12, 4, dtype=dtype, backend=backend, learnable=True)
    bank = MemoryBank(9, 4, dtype=dtype, backend=backend)
    index, of_bank = (own[:, None] * 4 + torch.arange(5, dtype=ids)) % 9, {"scale": bank.scale, "backend": backend}
    queue.push(key.flip(0), own)
    losses = [
        lambda: queue(query, key),
        lambda: queue(query, key, own),
        lambda: functional.info_nce_loss(query, key, bank.rows, **of_bank),
        lambda: functional.info_nce_loss(query, bank(own), bank.rows, index, **of_bank),
        lambda: functional.nce_loss(query, bank.rows, index, n_data=9, temperature=0.5, z=9.0, **of_bank),
    ]
    for step, loss in enumerate(losses):
        (expected,) = torch.autograd.grad(loss(), query)
        value, rows = loss(), (queue.rows.clone(), bank.rows.clone())
        new = _unit(10 + step)
        queue.push(new, own)
        bank.update(own.flip(0), new)
        assert not torch.equal(queue.rows, rows[0]) and not torch.equal(bank.rows, rows[1])
        (found,) = torch.autograd.grad(value, query)
        assert torch.equal(found, expected) and found.norm() > 0
