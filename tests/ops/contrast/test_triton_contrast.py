"""contrast in Triton against float64: on a GPU where there is one, else in the interpreter (test_triton_interpreted.py starts it)."""

import pytest
import torch
import torch.nn.functional as F

from cases import MUTANTS, TOLERANCES, randn, relative_error
from fastkd import backends, functional
from fastkd.reference.contrast_bank import eight_bits

INTERPRETED = backends.INTERPRETED
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else pytest.mark.gpu
MODES = ("shared", "gathered", "nce", "batch")
FLOAT, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16


def problem(B, K, D, seed=0, query=FLOAT, bank=FLOAT, count=21):
    q, p, n = (F.normalize(randn(size, D, seed=seed + k), dim=1) for k, size in enumerate((B, B, K)))
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(K, (B, count), generator=generator)
    ids = torch.randint(5, (B,), generator=generator), torch.randint(9, (K,), generator=generator)
    moved = (x.to(DEVICE) for x in (q.to(query), p.to(query), n.to(bank), index))
    return *moved, tuple(x.to(DEVICE) for x in ids)


def run(mode, query, positive, bank, index, exclude=None, backend="triton", train_bank=False, scale=None):
    """Loss, and the gradients of query, positive, temperature and (train_bank) the bank, under a random upstream one."""
    leaves = [query.detach().requires_grad_()]
    wide = torch.float64 if query.dtype == torch.float64 else FLOAT
    options = {"reduction": "none", "backend": backend}
    if mode == "nce":
        loss = functional.nce_loss(
            leaves[0], bank, index, n_data=300, temperature=0.07, z=900.0, scale=scale, **options
        )
    else:
        temperature = torch.tensor(0.07, dtype=FLOAT, device=DEVICE).to(wide).requires_grad_()
        leaves += [positive.detach().requires_grad_(), temperature]
        if train_bank:
            bank = bank.detach().requires_grad_()
            leaves.append(bank)
        if mode == "batch":
            bank, exclude = None, exclude and (exclude[0], exclude[0])
        index = index if mode == "gathered" else None
        options |= {"temperature": temperature, "exclude": exclude, "scale": scale}
        loss = functional.info_nce_loss(*leaves[:2], bank, index, **options)
    upstream = (randn(len(loss), seed=7) + 1.5).to(loss)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream)]


def check(mode, inputs, exclude=None, wrong=None, **options):
    found = run(mode, *inputs, exclude, **options)
    if wrong is not None:
        place, how = wrong
        found[place] = how(found[place])
    true = run(mode, *(x.double() for x in inputs[:3]), inputs[3], exclude, backend="reference", **options)
    assert found[0].dtype == FLOAT and found[1].dtype == inputs[0].dtype
    assert all(x.isfinite().all() for x in found)
    dtype = inputs[0].dtype
    allowed = [TOLERANCES[FLOAT][0], *[TOLERANCES[dtype][1]] * 4]
    errors = [relative_error(x, y) for x, y in zip(found, true, strict=True)]
    assert all(e <= a for e, a in zip(errors, allowed, strict=False)), errors


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "sizes", [(1, 1, 3), (2, 257, 31), (7, 129, 33), (33, 127, 17), (65, 40, 64), (3, 90, 300)], ids=str
)
def test_awkward_sizes(mode, sizes):
    if mode == "batch" and sizes[0] == 1:
        pytest.skip("a batch of one has no other example")
    check(mode, problem(*sizes)[:4])


@pytest.mark.parametrize("mode", MODES)
def test_several_blocks_of_one_program(mode, monkeypatch):
    """More blocks of keys than there are programs: what a program has is rescaled from block to block."""
    monkeypatch.setattr("fastkd.kernels.contrast.loss.PROGRAMS", 2)
    check(mode, problem(7, 257, 33, count=150)[:4])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "dtypes", [(FLOAT, FLOAT), (FLOAT, BFLOAT), (BFLOAT, BFLOAT), (BFLOAT, FLOAT), (HALF, HALF), (FLOAT, HALF)], ids=str
)
@pytest.mark.parametrize("excluded", [False, True])
def test_dtypes(mode, dtypes, excluded):
    *inputs, ids = problem(9, 301, 45, 5, *dtypes)
    if (
        INTERPRETED
    ):  # it truncates where it stores bfloat16, and torch rounds what autograd returns: both are right here
        inputs = [*inputs]
    check(mode, inputs, ids if excluded and mode != "nce" else None)


@pytest.mark.parametrize("excluded", [False, True])
@pytest.mark.parametrize("sizes", [(2, 1, 3), (33, 257, 31), (5, 90, 300)], ids=str)
def test_a_trained_bank(sizes, excluded):
    *inputs, ids = problem(*sizes)
    if excluded and sizes[1] == 1:
        ids = ids[0] * 0, ids[1] * 0 + 1
    check("shared", inputs, ids if excluded else None, train_bank=True)


@pytest.mark.parametrize("mode", ["shared", "batch"])
@pytest.mark.parametrize("dtypes", [(FLOAT, FLOAT), (FLOAT, BFLOAT), (HALF, HALF)], ids=str)
def test_several_tiles(mode, dtypes, monkeypatch):
    """Of scores, in both directions: a query's sums are rescaled from tile to tile, a bank row's gradient added up."""
    for name, value in (("FEW", 0), ("tiles.SCORES", 150), ("tiles.MOST_QUERIES", 5)):
        monkeypatch.setattr(f"fastkd.kernels.contrast.loss.{name}", value)
    *inputs, ids = problem(13, 71, 17, 0, *dtypes)
    check(mode, inputs, ids, train_bank=mode == "shared" and dtypes[0] == dtypes[1])


def in_eight_bits(bank):
    """float8 rows and their scales; the first row is all of the type's smallest numbers, another has its largest."""
    rows, scale = eight_bits(bank.float())
    rows.view(torch.uint8)[0] = torch.arange(bank.shape[1]) % 8
    return rows, scale


@pytest.fixture(params=["converted", "bytes"])
def reading(request, monkeypatch):
    """Chips read float8 themselves from sm_89 on; the interpreter can do both."""
    from fastkd.kernels.blocks import contiguous_rows
    from fastkd.kernels.contrast import loss as kernels

    if request.param == "bytes":
        monkeypatch.setattr(kernels, "_readable", lambda bank: contiguous_rows(bank).view(torch.uint8))
    elif DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this chip cannot convert float8")
    else:
        monkeypatch.setattr(kernels, "_readable", contiguous_rows)
    return request.param


@pytest.mark.parametrize("mode", MODES[:3])
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT, HALF], ids=str)
@pytest.mark.parametrize("sizes", [(2, 1, 3), (33, 257, 31), (5, 90, 300)], ids=str)
def test_eight_bit_rows(mode, dtype, sizes, reading):
    query, positive, bank, index, ids = problem(*sizes, query=dtype)
    rows, scale = in_eight_bits(bank)
    check(mode, (query, positive, rows, index), ids if sizes[1] > 1 and mode != "nce" else None, scale=scale)
    if sizes[1] == 1:
        return
    spread = scale * torch.logspace(-24, 3, len(scale), base=2, device=DEVICE).flip(0)
    check(mode, (query, positive, rows, index), scale=spread)


def test_every_eight_bit_number_is_read(reading):
    """Each of the 256 as the only element of its row; NaN is NaN (the interpreter converts it to 480)."""
    number = torch.arange(256, device=DEVICE).to(torch.uint8).view(torch.float8_e4m3fn)
    query, scale, index = torch.ones(1, 1, device=DEVICE), torch.full((256,), 0.01, device=DEVICE), None
    whole = torch.arange(256, device=DEVICE).remainder(128) != 127
    for index in (None, whole.nonzero().T):
        rows, of_rows = (number[:, None], scale) if index is not None else (number[whole][:, None], scale[whole])
        found, true = (
            functional.info_nce_loss(q, q, rows, index, temperature=1.0, scale=of_rows.to(q), backend=b)
            for q, b in ((query, "triton"), (query.double(), "reference"))
        )
        assert relative_error(found, true) < 1e-6
    if reading == "bytes" or not INTERPRETED:
        for place in (127, 255):
            loss = functional.info_nce_loss(
                query, query, number[place : place + 1, None], scale=scale[:1], backend="triton"
            )
            assert loss.isnan()


def test_a_scale_with_rows_of_other_dtypes():
    query, positive, bank, index, ids = problem(9, 60, 33)
    scale = torch.linspace(0.1, 3, 60, device=DEVICE)
    for mode in ("shared", "gathered"):
        check(mode, (query, positive, bank, index), ids, scale=scale)
        check(mode, (query, positive, bank.half(), index), ids, scale=scale)


@pytest.mark.parametrize("mode", MODES[:3])
def test_extreme_scores(mode):
    query, positive, bank, index, _ = problem(5, 100, 32)
    inputs = query * 700, positive, bank, index
    found = run(mode, *inputs)
    true = run(mode, *(x.double() for x in inputs[:3]), index, backend="reference")
    assert all(x.isfinite().all() for x in found)
    assert relative_error(found[0], true[0]) < 1e-5 and relative_error(found[1], true[1]) < 2e-3


@pytest.mark.parametrize("gathered", [False, True])
def test_near_convergence(gathered):
    """A loss of e^-30 keeps its digits."""
    query, bank = torch.tensor([[1.0, 0]], device=DEVICE), torch.tensor([[-1.0, 0]], device=DEVICE)
    index = torch.zeros(1, 1, dtype=torch.long, device=DEVICE) if gathered else None
    loss = functional.info_nce_loss(query, query, bank, index, temperature=1 / 15, backend="triton")
    assert loss.item() == pytest.approx(torch.tensor(-30.0, dtype=torch.float64).exp().item(), rel=1e-5)


@pytest.mark.parametrize("mode", ["shared", "gathered"])
def test_no_negative_left(mode):
    query, positive, bank, index, _ = problem(5, 40, 8)
    ids = torch.zeros(5, dtype=torch.long, device=DEVICE), torch.zeros(40, dtype=torch.long, device=DEVICE)
    assert all((x == 0).all() for x in run(mode, query, positive, bank, index, ids))
    assert all((x == 0).all() for x in run(mode, query, positive, bank[:0], index[:, :0]))


@pytest.mark.parametrize("mode", MODES[:3])
def test_a_nan_row_poisons_only_itself(mode):
    query, positive, bank, index, _ = problem(20, 90, 32)
    clean = run(mode, query, positive, bank, index)
    query[3] = torch.nan
    poisoned = run(mode, query, positive, bank, index)
    others = torch.arange(20, device=DEVICE) != 3
    for a, b in list(zip(poisoned, clean, strict=True))[:2]:
        assert a[3].isnan().all() and torch.equal(a[others], b[others])


@pytest.mark.parametrize("mode", MODES)
def test_deterministic_strided_and_unwritten(mode):
    *inputs, _ = problem(6, 100, 32)
    expected = run(mode, *inputs)
    spaced = [torch.stack([x, x * 0 + 9], 1).reshape(2 * len(x), -1)[::2] for x in inputs]  # every other row
    turned = [x.T.contiguous().T for x in inputs]
    for strided in (inputs, spaced, turned):
        copies = [x.clone() for x in strided]
        assert all(torch.equal(a, b) for a, b in zip(run(mode, *strided), expected, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(strided, copies, strict=True))


def test_an_index_out_of_range_is_nan_and_no_fault():
    query, positive, bank, index, _ = problem(6, 30, 16)
    from fastkd.kernels import contrast as kernels

    index[2, 3], index[4, 0] = 30, -1
    number = torch.tensor(14.0, dtype=torch.float64, device=DEVICE)
    loss, *_ = kernels.info_nce_fwd(query, positive, bank, index, number, None, None, True)
    for found in (loss, kernels.nce_fwd(query, bank, index, number, 0.07, True)[0]):
        assert found.isnan().tolist() == [False, False, True, False, True, False]


@pytest.mark.parametrize("programs", [1, 528])
@pytest.mark.parametrize("dtypes", [(FLOAT, FLOAT), (BFLOAT, BFLOAT), (FLOAT, HALF), "eight bits"], ids=str)
def test_the_normaliser(dtypes, programs, monkeypatch):
    """Set by the finite scores of a batch; one that is set is kept, and nothing else is read."""
    monkeypatch.setattr("fastkd.kernels.contrast.loss.PROGRAMS", programs * 7)
    eight = dtypes == "eight bits"
    query, _, bank, index, _ = problem(7, 60, 33, 0, *((FLOAT, FLOAT) if eight else dtypes), count=150)
    bank, scale = in_eight_bits(bank) if eight else (bank, None)

    def normaliser(query, z=0.0, backend="triton", wide=lambda x: x, index=index):
        z = torch.tensor(z, device=DEVICE)
        options = {"n_data": 300, "temperature": 0.07, "z": z, "scale": scale, "backend": backend}
        return functional.nce_partition(wide(query), bank if eight else wide(bank), index, **options)

    query[2] = torch.nan
    found, true = normaliser(query), normaliser(query, backend="reference", wide=torch.Tensor.double)
    assert found.dtype == FLOAT and found.dim() == 0 and relative_error(found, true) < 1e-6
    assert normaliser(query * torch.nan) == 0
    assert normaliser(query[:0], index=index[:0]) == 0
    assert normaliser(query * 100) == torch.finfo(FLOAT).max
    assert normaliser(query * torch.nan, 3.5) == 3.5


@pytest.mark.parametrize("mode", [*MODES, "eight bits"])
@pytest.mark.parametrize("mutant", MUTANTS)
def test_no_mutant_survives(mode, mutant):
    """A loss, or a gradient of one of the inputs, that alone is wrong."""
    inputs, options = problem(7, 60, 33)[:4], {"train_bank": mode == "shared"}
    if mode == "eight bits":
        (rows, options["scale"]), mode = in_eight_bits(inputs[2]), "shared"
        inputs = *inputs[:2], rows, inputs[3]
    for place in range(len(run(mode, *inputs, **options))):
        with pytest.raises(AssertionError):
            check(mode, inputs, wrong=(place, MUTANTS[mutant]), **options)
