"""The C++ kernels of contrast: against the reference in float64, at sizes, dtypes and inputs where kernels go wrong."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from cases import MUTANTS, ROOT, TOLERANCES, randn, relative_error
from fastkd import backends, functional, thresholds

pytestmark = pytest.mark.skipif(backends.UNAVAILABLE["cpu"] is not None, reason="the C++ kernels are not built here")

MODES = ("shared", "gathered", "nce")
FLOAT, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16


def problem(B, K, D, seed=0, query=FLOAT, bank=FLOAT):
    """query and positive [B, D], bank [K, D] on the unit sphere, rounded; index [B, 50]; ids, few enough to meet."""
    q, p, n = (F.normalize(randn(size, D, seed=seed + k), dim=1) for k, size in enumerate((B, B, K)))
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(K, (B, 50), generator=generator)
    ids = torch.randint(5, (B,), generator=generator), torch.randint(9, (K,), generator=generator)
    return q.to(query), p.to(query), n.to(bank), index, ids


def call(mode, query, positive, bank, index, exclude=None, temperature=0.07, backend="cpu", z=1e3):
    options = {"temperature": temperature, "reduction": "none", "backend": backend}
    if mode == "nce":
        return functional.nce_loss(query, bank, index, n_data=2 * len(bank) + 100, z=z, **options)
    return functional.info_nce_loss(
        query, positive, bank, index if mode == "gathered" else None, exclude=exclude, **options
    )


def run(mode, query, positive, bank, index, exclude=None, **options):
    """Loss and the gradients of query and, for InfoNCE, of positive and temperature, under a random upstream one."""
    leaves = [query.detach().clone().requires_grad_()]
    if mode != "nce":
        dtype = torch.float64 if query.dtype == torch.float64 else FLOAT
        leaves += [positive.detach().clone().requires_grad_(), torch.tensor(0.07, dtype=dtype).requires_grad_()]
        options["temperature"], positive = leaves[2], leaves[1]
    loss = call(mode, leaves[0], positive, bank, index, exclude, **options)
    upstream = randn(len(loss), seed=7).to(loss.dtype) + 1.5
    grads = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, upstream)
    assert all(torch.equal(a, b) or not a.isfinite().all() for a, b in zip(grads, again, strict=True))
    return [loss.detach(), *grads]


def oracle(mode, query, positive, bank, index, exclude=None, **options):
    wide = (x.double() for x in (query, positive, bank))
    return run(mode, *wide, index, exclude, backend="reference", **options)


def check(mode, inputs, exclude=None, wrong=None):
    found, true = run(mode, *inputs, exclude), oracle(mode, *inputs, exclude)
    if wrong is not None:
        place, how = wrong
        found[place] = how(found[place])
    dtype = inputs[0].dtype
    assert found[0].dtype == FLOAT and all(g.dtype == dtype for g in found[1:3])
    allowed = [TOLERANCES[FLOAT][0], *[TOLERANCES[dtype][1]] * 2, TOLERANCES[FLOAT if dtype == FLOAT else dtype][1]]
    assert all(x.isfinite().all() for x in found)
    errors = [relative_error(x, y) for x, y in zip(found, true, strict=True)]
    assert all(e <= a for e, a in zip(errors, allowed[: len(errors)], strict=True)), errors


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 3),
        (2, 257, 31),
        (7, 129, 33),
        (31, 513, 127),
        (33, 127, 129),
        (65, 1031, 64),
        (129, 300, 7),
        (3, 90, 800),
    ],
    ids=str,
)
def test_awkward_sizes(mode, sizes):
    check(mode, problem(*sizes)[:4])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("excluded", [False, True])
@pytest.mark.parametrize(
    "dtypes",
    [(FLOAT, FLOAT), (FLOAT, BFLOAT), (BFLOAT, BFLOAT), (BFLOAT, FLOAT), (HALF, HALF), (HALF, BFLOAT), (FLOAT, HALF)],
    ids=str,
)
@pytest.mark.parametrize("width", [64, 45])
def test_dtypes(mode, excluded, dtypes, width):
    *inputs, ids = problem(21, 3001, width, 5, *dtypes)
    check(mode, inputs, ids if excluded and mode != "nce" else None)


@pytest.mark.parametrize("mode", MODES)
def test_several_ranges(mode):
    """Enough blocks for every split of the bank, and more panels than a group holds."""
    check(mode, problem(140, 20011, 128)[:4])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bank", [FLOAT, BFLOAT], ids=str)
def test_extreme_scores(mode, bank):
    """Scores of ±1e4 and more: no overflow, and where the loss is a difference of scores it has its digits."""
    query, positive, rows, index, _ = problem(9, 700, 64)
    inputs = (query * 700).to(bank), positive.to(bank), rows.to(bank), index
    found, true = run(mode, *inputs), oracle(mode, *inputs)
    assert all(x.isfinite().all() for x in found)
    assert relative_error(found[0], true[0]) < 1e-5
    assert relative_error(found[1], true[1]) < (1e-2 if bank == BFLOAT else 2e-3)


@pytest.mark.parametrize("gathered", [False, True])
def test_near_convergence(gathered):
    """A loss of e^-30 keeps its digits."""
    query, bank = torch.tensor([[1.0, 0]]), torch.tensor([[-1.0, 0]])
    index = torch.zeros(1, 1, dtype=torch.long) if gathered else None
    loss = functional.info_nce_loss(query, query, bank, index, temperature=1 / 15, backend="cpu")
    assert loss.item() == pytest.approx(torch.tensor(-30.0, dtype=torch.float64).exp().item(), rel=1e-5)


@pytest.mark.parametrize("mode", ["shared", "gathered"])
def test_no_negative_left(mode):
    query, positive, bank, index, _ = problem(5, 40, 8)
    ids = torch.zeros(5, dtype=torch.int32), torch.zeros(40, dtype=torch.int32)
    assert all((x == 0).all() for x in run(mode, query, positive, bank, index, ids))
    empty = run(mode, query, positive, bank[:0], index[:, :0])
    assert all((x == 0).all() for x in empty)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bank", [FLOAT, BFLOAT], ids=str)
def test_a_nan_row_poisons_only_itself(mode, bank):
    query, positive, rows, index, _ = problem(35, 900, 64, bank=bank)
    clean = run(mode, query, positive, rows, index)
    query[3] = torch.nan
    poisoned = run(mode, query, positive, rows, index)
    others = torch.arange(35) != 3
    for a, b in list(zip(poisoned, clean, strict=True))[:2]:
        assert a[3].isnan().all() and torch.equal(a[others], b[others])


@pytest.mark.parametrize("mode", MODES)
def test_deterministic_and_independent(mode, monkeypatch):
    """Bitwise: a second run, one thread instead of two, and two results held at once."""
    monkeypatch.setitem(thresholds.UP_TO, "bank", thresholds.ALWAYS)
    inputs = problem(40, 9001, 96)[:4]
    torch.set_num_threads(2)
    first = run(mode, *inputs)
    kept = [x.clone() for x in first]
    other = run(mode, *(x.roll(1, 0) for x in inputs[:2]), *inputs[2:])
    torch.set_num_threads(1)
    second = run(mode, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bank", [FLOAT, BFLOAT], ids=str)
def test_strided_inputs_are_read_and_not_written(mode, bank, monkeypatch):
    monkeypatch.setitem(thresholds.UP_TO, "bank", thresholds.ALWAYS)
    *inputs, _ = problem(6, 300, 64, bank=bank)
    expected = run(mode, *inputs)
    spaced = [torch.stack([x, x * 0 + 9], 1).reshape(2 * len(x), -1)[::2] for x in inputs]  # every other row
    turned = [x.T.contiguous().T for x in inputs]
    for strided in (spaced, turned):
        copies = [x.clone() for x in strided]
        assert all(torch.equal(a, b) for a, b in zip(run(mode, *strided), expected, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(strided, copies, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_compiled_is_eager(mode):
    inputs = problem(6, 300, 64)[:4]
    expected = run(mode, *inputs)
    torch._dynamo.reset()
    compiled = torch.compile(lambda q: call(mode, q, *inputs[1:]), fullgraph=True, backend="aot_eager")
    query = inputs[0].clone().requires_grad_()
    loss = compiled(query)
    (grad,) = torch.autograd.grad(loss, query, randn(6, seed=7).to(loss.dtype) + 1.5)
    assert relative_error(loss, expected[0]) < 1e-6 and relative_error(grad, expected[1]) < 1e-6


def test_opcheck():
    query, positive, bank, index, ids = problem(6, 300, 33)
    number = torch.tensor(14.0, dtype=torch.float64)
    for chosen in (None, index):
        for wanted in (True, False):
            arguments = (query, positive, bank, chosen, number, *ids, wanted)
            torch.library.opcheck(torch.ops.fastkd.info_nce_fwd.default, arguments)
    torch.library.opcheck(torch.ops.fastkd.nce_fwd.default, (query, bank, index, number, 0.07, True))


@pytest.mark.parametrize("mode", ["gathered", "nce"])
@pytest.mark.parametrize("bad", [-1, 300])
def test_an_index_out_of_range_is_an_error_not_a_crash(mode, bad):
    """The public functions look first; under torch.compile only the kernel can."""
    query, positive, bank, index, _ = problem(6, 300, 16)
    index[2, 3] = bad
    number = torch.tensor(14.0, dtype=torch.float64)
    if mode == "nce":
        op, arguments = torch.ops.fastkd.nce_fwd, (query, bank, index, number, 0.07, True)
    else:
        op, arguments = torch.ops.fastkd.info_nce_fwd, (query, positive, bank, index, number, None, None, True)
    with pytest.raises(RuntimeError):
        op(*arguments)


def test_z_as_a_tensor():
    *inputs, _ = problem(6, 300, 64)
    number, tensor = (run("nce", *inputs, z=z) for z in (50.0, torch.tensor(50.0)))
    assert all(torch.equal(a, b) for a, b in zip(number, tensor, strict=True))


def test_only_the_positive_or_only_the_temperature_needs_a_gradient():
    query, positive, bank, index, _ = problem(6, 300, 64)
    _, _, to_positive, to_temperature = run("shared", query, positive, bank, index)
    upstream = randn(6, seed=7).float() + 1.5
    p, t = positive.clone().requires_grad_(), torch.tensor(0.07).requires_grad_()
    (alone,) = torch.autograd.grad(call("shared", query, p, bank, index), p, upstream)
    assert relative_error(alone, to_positive) < 1e-6
    (alone,) = torch.autograd.grad(call("shared", query, positive, bank, index, temperature=t), t, upstream)
    assert relative_error(alone, to_temperature) < 1e-6


def test_what_the_kernels_leave_to_the_reference():
    query, positive, bank, index, _ = problem(6, 300, 64)
    trained = bank.clone().requires_grad_()
    cases = [
        ("bank needs a gradient", lambda b: call("gathered", query, positive, trained, index, backend=b)),
        ("bank needs a gradient", lambda b: call("nce", query, positive, trained, index, backend=b)),
        ("bank is float64", lambda b: call("shared", query, positive, bank.double(), index, backend=b)),
        (
            "scale needs a gradient",
            lambda b: functional.info_nce_loss(
                query, positive, bank, scale=torch.ones(300, requires_grad=True), backend=b
            ),
        ),
    ]
    for clause, f in cases:
        assert f("auto").isfinite().all()
        with pytest.raises(RuntimeError, match=clause):
            f("cpu")


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("excluded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, FLOAT, BFLOAT, HALF], ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 3), (7, 129, 33), (40, 3001, 64), (21, 300, 200)], ids=str)
def test_rows_with_a_scale(sizes, dtype, excluded, gathered):
    """Against the same rows multiplied out in float64: what 8 bits hold is exact, so the limits are float32's."""
    query, positive, rows, index, ids = problem(*sizes)
    scale = torch.rand(sizes[1], generator=torch.Generator().manual_seed(3)) + 0.01
    rows = (rows / scale[:, None]).to(dtype)
    keep = {"index": index if gathered else None, "exclude": ids if excluded else None, "reduction": "none"}
    found = []
    for wide, bank, more in (
        (FLOAT, rows, {"scale": scale, "backend": "cpu"}),
        (torch.float64, rows.double() * scale.double()[:, None], {"backend": "reference"}),
    ):
        leaves = [x.to(wide).requires_grad_() for x in (query, positive)]
        loss = functional.info_nce_loss(*leaves, bank, temperature=0.1, **keep, **more)
        found.append((loss, *torch.autograd.grad((loss * torch.arange(1, len(loss) + 1)).sum(), leaves)))
    for x, true, allowed in zip(*found, (TOLERANCES[FLOAT][0], *[TOLERANCES[FLOAT][1]] * 2), strict=True):
        assert relative_error(x, true) <= allowed


def test_every_byte_of_eight_bits():
    """Each of the 256 as a bank of one row, zeros beside it; the two that are no number poison the loss."""
    bank = torch.zeros(256, 19, dtype=torch.uint8)
    bank[:, 3] = bank[:, 17] = torch.arange(256)  # in a whole vector and in the rest of one
    bank = bank.view(torch.float8_e4m3fn)
    query = torch.zeros(1, 19)
    query[0, 3], query[0, 17] = 0.5, 0.25
    for byte in range(256):
        row, scale = bank[byte : byte + 1], torch.tensor([0.01])
        found, expected = (
            functional.info_nce_loss(query, query, row, scale=scale, temperature=1.0, backend=b)
            for b in ("cpu", "reference")
        )
        assert torch.allclose(found, expected, rtol=1e-6, equal_nan=True), byte
    assert bank[:, 3].float().isnan().sum() == 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mutant", MUTANTS)
def test_no_mutant_survives(mode, mutant):
    """A loss, or a gradient of one of the inputs, that alone is wrong."""
    inputs = problem(7, 129, 33)[:4]
    for place in range(len(run(mode, *inputs))):
        with pytest.raises(AssertionError):
            check(mode, inputs, wrong=(place, MUTANTS[mutant]))


MEMORY = """
import resource, sys, torch
torch.set_num_threads(2)
import fastkd
rows = int(sys.argv[1])
query = torch.nn.functional.normalize(torch.randn(32, 64), dim=1)
bank = torch.full((rows, 64), 0.1, dtype=torch.{dtype})
def step(bank):
    leaf = query.clone().requires_grad_()
    torch.autograd.grad(fastkd.info_nce_loss(leaf, query, bank), leaf)
step(bank[:4096])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(bank)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_does_not_grow_with_the_bank(dtype):
    """A million rows against 32 queries: the scores alone would be 128 MiB. Peak resident size, in a fresh process."""
    for rows in (1 << 17, 1 << 20):
        command = [sys.executable, "-c", MEMORY.format(dtype=dtype), str(rows)]
        out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert int(out.stdout) < 4096, f"{out.stdout} KiB at K = {rows}"


@pytest.mark.parametrize("size", [0, 1, 5, 600])
def test_a_temperature_of_another_dtype_does_not_change_the_losss(size):
    query, positive = (F.normalize(randn(size, 8, seed=n, dtype=FLOAT), dim=1) for n in (1, 2))
    expected = functional.info_nce_loss(query, positive, None, temperature=0.2, reduction="none")
    for temperature in (torch.tensor([0.2], dtype=torch.float64), torch.tensor(0.2, dtype=torch.bfloat16)):
        found = functional.info_nce_loss(query, positive, None, temperature=temperature, reduction="none")
        assert found.dtype == FLOAT and found.shape == (size,)
        torch.testing.assert_close(found, expected, rtol=4e-3, atol=4e-3)


def test_trained_negatives_compile():
    leaves = [F.normalize(randn(n, 32, seed=n, dtype=FLOAT), dim=1).requires_grad_() for n in (600, 601, 700)]

    def both(query, positive, bank):
        given = functional.info_nce_loss(query, positive[:600], bank)
        return given + functional.info_nce_loss(query, positive[:600], None, backend="cpu")

    found = torch.autograd.grad(torch.compile(both, fullgraph=True)(*leaves), leaves)
    assert max(map(relative_error, found, torch.autograd.grad(both(*leaves), leaves))) < 1e-6


@pytest.mark.parametrize("excluded", [False, True])
def test_products_by_the_library_give_what_our_tile_gives(excluded, monkeypatch):
    """Over more than one chunk of queries."""
    monkeypatch.setattr("fastkd.ops.contrast_library.SCORES", 300 * 7)
    query, positive, bank = (
        F.normalize(randn(n, 45, seed=n, dtype=FLOAT), dim=1).requires_grad_(n < 300) for n in (20, 21, 300)
    )
    ids = (torch.arange(20) % 4, torch.arange(300) % 5) if excluded else None
    found = []
    for up_to in (thresholds.ALWAYS, thresholds.NEVER):
        monkeypatch.setitem(thresholds.UP_TO, "bank", up_to)
        loss = functional.info_nce_loss(query, positive[:20], bank, exclude=ids, backend="cpu")
        found.append([loss, *torch.autograd.grad(loss, (query, positive))])
    assert max(map(relative_error, *found)) < 1e-6
