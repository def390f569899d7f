"""Sampling and the bank's update in Triton against their reference: on a GPU where there is one, else in the interpreter
(test_triton_interpreted.py starts it)."""

import pytest
import torch
import torch.nn.functional as F

from cases import TOLERANCES, randn, relative_error
from fastkd import backends, functional
from fastkd.reference.contrast_bank import eight_bits

INTERPRETED = backends.INTERPRETED
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else pytest.mark.gpu
FLOAT, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16


def both(call):
    return call("triton"), call("reference")


def table(n_data, classes=3):
    labels = torch.randint(classes, (n_data,), generator=torch.Generator().manual_seed(1))
    bounds = F.pad(torch.bincount(labels, minlength=classes).cumsum(0), (1, 0))
    return tuple(x.to(DEVICE) for x in (labels, labels.argsort(stable=True), bounds))


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("how", ["labels", "all others", 1, 20, 5000])
@pytest.mark.parametrize("count", [1, 7, 100, 190, 299])
def test_draws_what_the_reference_draws(how, count, replacement):
    """Bitwise, also where the pool is hardly larger than the draw (long chains of swaps), or smaller (repeats)."""
    index = torch.randint(300, (5,), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    options = {"n_data": 300, "replacement": replacement}
    options |= {"labels": table(300)} if how == "labels" else {"window": how} if isinstance(how, int) else {}
    state = torch.tensor([2**61 + 5, 3], device=DEVICE)
    found, expected = both(lambda b: functional.sample_negatives(index, count, state, backend=b, **options))
    assert torch.equal(found, expected)


def test_more_draws_than_the_scan_takes_use_the_reference():
    index, state = torch.tensor([3], device=DEVICE), torch.tensor([1, 2], device=DEVICE)
    found, expected = both(lambda b: functional.sample_negatives(index, 8200, state, n_data=10**6, backend=b))
    assert torch.equal(found, expected)


def test_an_id_out_of_range_reads_within_bounds():
    from fastkd.kernels.contrast import bank as kernels

    index, state = torch.tensor([-5, 0, 300, 2**40], device=DEVICE), torch.tensor([1, 2], device=DEVICE)
    for labels in (table(300), (None, None, None)):
        for replacement in (False, True):
            found = kernels.sample_negatives(index, 20, 300, *labels, state, replacement, 0)
            assert ((found >= 0) & (found < 300)).all()
    bank = F.normalize(randn(6, 5, dtype=FLOAT), dim=1).to(DEVICE)
    before = bank.clone()
    kernels.update_bank(bank, torch.tensor([6, -1], device=DEVICE), before[:2], 0.5)
    assert torch.equal(bank, before)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize(
    ("bank_dtype", "row_dtype"), [(FLOAT, FLOAT), (HALF, FLOAT), (FLOAT, HALF), (HALF, HALF)], ids=str
)
@pytest.mark.parametrize("width", [1, 5, 128, 300])
def test_writes_what_the_reference_writes(bank_dtype, row_dtype, momentum, width):
    """Duplicates, a row of infinities, one of zeros, rows that nobody names; a bank that is part of a wider one."""
    wide = randn(9, 2 * width, seed=1).to(bank_dtype).to(DEVICE)
    index = torch.tensor([4, 0, 4, 7, 0, 4, 2], device=DEVICE)
    rows = randn(7, width, seed=2).to(row_dtype).to(DEVICE)
    rows[3], rows[6] = torch.inf, 0
    banks = []
    for backend in ("triton", "reference"):
        bank = wide.clone()
        functional.update_bank(bank[:, :width], index, rows, momentum=momentum, backend=backend)
        banks.append(bank)
    found, expected = banks
    others = torch.tensor([1, 3, 5, 6, 7, 8], device=DEVICE)
    assert torch.equal(found[others], wide[others]) and torch.equal(found[:, width:], wide[:, width:])
    assert relative_error(found, expected) <= (1e-7 if bank_dtype == FLOAT else TOLERANCES[HALF][0] / 10)
    lengths = found[torch.tensor([0, 4], device=DEVICE), :width].double().norm(dim=1)
    assert torch.allclose(lengths, torch.ones_like(lengths), atol=1e-6 if bank_dtype == FLOAT else 1e-3)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("row_dtype", [FLOAT, HALF], ids=str)
@pytest.mark.parametrize("width", [1, 5, 128, 300])
def test_eight_bit_rows(row_dtype, momentum, width):
    """As the reference rounds them, but for elements that lie between two numbers to the last digits of float32."""
    whole, scale = eight_bits(randn(9, 2 * width, seed=1, dtype=FLOAT).to(DEVICE))
    index = torch.tensor([4, 0, 4, 7, 0, 4, 2, 3], device=DEVICE)
    rows = randn(8, width, seed=2).to(row_dtype).to(DEVICE)
    rows[3], rows[6] = torch.inf, 0
    rows[7] = torch.logspace(0, -14, width, base=2, device=DEVICE)  # down to the type's smallest numbers
    found = []
    for backend in ("triton", "reference"):
        bank, factor = whole.clone(), scale.clone()
        functional.update_bank(bank[:, :width], index, rows, momentum=momentum, scale=factor, backend=backend)
        found.append((bank.view(torch.uint8).int(), factor))
    (bits, factor), (true_bits, true_factor) = found
    assert torch.allclose(factor, true_factor, rtol=1e-6)
    assert (bits - true_bits).abs().max() <= 1 and (bits == true_bits).double().mean() > 0.999
    others = torch.tensor([1, 5, 6, 7, 8], device=DEVICE)
    assert torch.equal(bits[others], whole.view(torch.uint8).int()[others]) and torch.equal(
        factor[others], scale[others]
    )
    assert torch.equal(bits[:, width:], whole.view(torch.uint8).int()[:, width:])
    assert momentum or (bits[2, :width] % 128 == 0).all()


def test_launches(monkeypatch):
    """One with replacement, two without, one for the update."""
    from fastkd.kernels.contrast import bank as kernels

    seen = []
    for name in ("draw_kernel", "shuffle_kernel", "update_kernel"):
        kernel = getattr(kernels, name)

        class Counted:
            def __init__(self, kernel, name):
                self.kernel, self.name = kernel, name

            def __getitem__(self, grid):
                seen.append(self.name)
                return self.kernel[grid]

        monkeypatch.setattr(kernels, name, Counted(kernel, name))
    index, state = torch.tensor([3, 5], device=DEVICE), torch.tensor([1, 2], device=DEVICE)
    for replacement in (True, False):
        functional.sample_negatives(index, 9, state, n_data=40, replacement=replacement, backend="triton")
    bank = F.normalize(randn(6, 5, dtype=FLOAT), dim=1).to(DEVICE)
    functional.update_bank(bank, index, bank[:2].clone(), momentum=0.5, backend="triton")
    assert seen == ["draw_kernel", "draw_kernel", "shuffle_kernel", "update_kernel"]
