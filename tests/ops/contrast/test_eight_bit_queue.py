"""NegativeQueue and MemoryBank in 8 bits: float8 e4m3fn rows with a scale for each."""

import copy

import pytest
import torch
import torch.nn.functional as F

from cases import MUTANTS, randn, relative_error
from fastkd import backends, functional
from fastkd.losses.bank import MemoryBank, NegativeQueue
from fastkd.reference.contrast_bank import eight_bits

EIGHT = torch.float8_e4m3fn
compiled_only = pytest.mark.skipif(backends.UNAVAILABLE["cpu"] is not None, reason="the C++ kernels are not built here")
BACKENDS = ["reference", pytest.param("cpu", marks=compiled_only)]


def unit(*shape, seed=0):
    return F.normalize(randn(*shape, seed=seed), dim=-1).float()


def test_eight_bit_queue_is_near_the_float32_one():
    """Unit rows to 2^-4 per element; loss and gradient as the reference has them of the very same rows."""
    torch.manual_seed(2)
    queue = NegativeQueue(500, 40, dtype=EIGHT)
    assert queue.rows.dtype == EIGHT and queue.scale.shape == (500,)
    key, query = unit(32, 40, seed=1), unit(32, 40, seed=2).requires_grad_()
    queue.push(3 * key)
    kept = queue.rows.float() * queue.scale[:, None]
    assert ((kept[:32] - key).norm(dim=1) < 2**-4).all() and (kept.norm(dim=1) - 1).abs().max() < 2**-4
    loss = queue(query, key)
    expected = functional.info_nce_loss(query, key, kept, temperature=0.07, backend="reference")
    assert torch.allclose(loss, expected, rtol=1e-5)
    found, true = (torch.autograd.grad(x, query)[0] for x in (loss, expected))
    assert torch.allclose(found, true, rtol=1e-4, atol=1e-6) and found.abs().max() > 0


def test_eight_bit_queue_is_saved_wraps_and_leaves_what_is_not_finite():
    queue, other = (NegativeQueue(7, 5, dtype=EIGHT) for _ in range(2))
    for seed in range(3):
        queue.push(unit(4, 5, seed=seed))
    assert queue.pointer == 5
    before = queue.rows.float() * queue.scale[:, None]
    queue.push(torch.full((1, 5), torch.nan))
    assert torch.equal(queue.rows.float() * queue.scale[:, None], before) and queue.pointer == 6
    other.load_state_dict(queue.state_dict())
    assert torch.equal(other.rows.view(torch.uint8), queue.rows.view(torch.uint8))
    assert torch.equal(other.scale, queue.scale)
    newest = queue.rows.float() * queue.scale[:, None]
    assert torch.allclose(newest[[1, 2, 3, 4]], unit(4, 5, seed=2), atol=2**-4)


def test_eight_bits_without_a_scale_is_an_error():
    query, bank = unit(2, 5), unit(9, 5).to(EIGHT)
    with pytest.raises(ValueError, match=r"scale: rows in torch\.float8_e4m3fn need one each"):
        functional.info_nce_loss(query, query, bank)
    with pytest.raises(ValueError, match="dtype: expected one of"):
        MemoryBank(9, 5, dtype=torch.float8_e5m2)
    index = torch.zeros(2, 3, dtype=torch.long)
    options = {"n_data": 9, "temperature": 0.07}
    one = torch.ones(())
    for call, words in (
        (lambda: functional.nce_loss(query, bank, index, z=1.0, **options), "scale: rows in .* need one each"),
        (lambda: functional.nce_partition(query, bank, index, z=one, **options), "scale: rows in .* need one each"),
        (lambda: functional.update_bank(bank, index[:, 0], query, momentum=0.5), "scale: rows in .* need one each"),
        (
            lambda: functional.nce_pair_loss((query, query), (bank, bank), index, z=(one, one), **options),
            r"banks\[0\]: .* nce_loss takes",
        ),
        (
            lambda: functional.update_bank(bank.float(), index[:, 0], query, momentum=0.5, scale=torch.ones(9)),
            "not cast by .half",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def dequantised(rows, scale):
    return rows.double() * scale.double()[:, None]


def assert_near_in_eight_bits(rows, scale, true):
    """Half a step from the true rows: 2^-4 of an element, or 2^-10 of the scale where elements are tiny."""
    allowed = true.abs() * 2**-4 + scale.double()[:, None] * 2**-10
    assert ((dequantised(rows, scale) - true).abs() <= allowed * (1 + 1e-5)).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 5, 33, 128])
@pytest.mark.parametrize("momentum", [0.0, 0.3])
def test_eight_bit_rows_move_in_float32(width, dtype, momentum, backend):
    """Towards the last of equal ids, to unit length; not where that is not finite; a bank that is part of a wider one."""
    whole, scale = eight_bits(unit(50, 2 * width))
    bank = whole[:, :width]
    before, rows = dequantised(bank, scale), randn(20, width, seed=1).to(dtype)
    index = torch.randint(12, (20,), generator=torch.Generator().manual_seed(3))
    rows[3], rows[5, 0], index[3], index[5] = torch.nan, torch.inf, 40, 41
    rows[7], index[7] = 0, 42
    old_bits, old_scale = whole.clone().view(torch.uint8), scale.clone()
    functional.update_bank(bank, index, rows, momentum=momentum, scale=scale, backend=backend)
    last = {i: b for b, i in enumerate(index.tolist()) if i not in (40, 41)}
    ids, at = torch.tensor(list(last)), torch.tensor(list(last.values()))
    true = F.normalize(momentum * before[ids] + (1 - momentum) * rows[at].double(), dim=1)
    assert_near_in_eight_bits(bank[ids], scale[ids], true)
    largest = true.abs().amax(1).clamp_min(1e-12) / 448
    assert torch.allclose(scale[ids].double(), largest, rtol=1e-6)
    others = torch.tensor([i for i in range(50) if i not in last])
    assert torch.equal(whole.view(torch.uint8)[others], old_bits[others]) and torch.equal(
        scale[others], old_scale[others]
    )
    assert torch.equal(whole.view(torch.uint8)[:, width:], old_bits[:, width:])


@compiled_only
def test_the_kernel_rounds_as_torch_does():
    """Every float16 from 0 to 448 and what lies between two numbers of the type, each in a row whose largest is 448."""
    numbers = torch.arange(2**15).to(torch.int16).view(torch.float16).float()
    numbers = numbers[numbers <= 448]
    numbers = torch.cat([numbers, -numbers])
    numbers = F.pad(numbers, (0, -len(numbers) % 63)).reshape(-1, 63)
    rows = F.pad(numbers, (1, 0), value=448.0)
    bank, scale = torch.zeros(rows.shape, dtype=EIGHT), torch.zeros(len(rows))
    others, of_others = bank.clone(), scale.clone()
    for holder, factor, backend in ((bank, scale, "cpu"), (others, of_others, "reference")):
        functional.update_bank(holder, torch.arange(len(rows)), rows, momentum=0.0, scale=factor, backend=backend)
    assert torch.allclose(scale, of_others, rtol=1e-6)
    same = bank.view(torch.uint8) == others.view(torch.uint8)
    assert same.double().mean() > 0.99  # unit length is rounded before, by the two in different ways
    assert_near_in_eight_bits(bank, scale, F.normalize(rows.double(), dim=1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "mutant"), [(torch.bfloat16, None), *((torch.float32, mutant) for mutant in (None, *MUTANTS))], ids=str
)
def test_nce_over_an_eight_bit_bank(dtype, mutant, backend):
    """Loss, gradient and normaliser, against float64 on the very same rows."""
    query, (bank, scale) = unit(7, 45).to(dtype), eight_bits(unit(60, 45, seed=1))
    index = torch.randint(60, (7, 31), generator=torch.Generator().manual_seed(5))
    options = {"n_data": 500, "temperature": 0.07}
    results = []
    for wide in (False, True):
        leaf = (query.double() if wide else query).clone().requires_grad_()
        rows, factor, where = (dequantised(bank, scale), None, "reference") if wide else (bank, scale, backend)
        z = torch.zeros((), dtype=torch.float64 if wide else torch.float32)
        z = functional.nce_partition(leaf, rows, index, z=z, scale=factor, backend=where, **options)
        loss = functional.nce_loss(leaf, rows, index, z=z, scale=factor, backend=where, reduction="none", **options)
        results.append([z, loss.detach(), torch.autograd.grad(loss, leaf, (randn(7, seed=7) + 1.5).to(loss))[0]])
    allowed = (1e-6, 1e-6, 1e-5 if dtype == torch.float32 else 1e-2)
    if mutant is not None:
        results[0][2] = MUTANTS[mutant](results[0][2])
    errors = [relative_error(*pair) for pair in zip(*results, strict=True)]
    assert all(e <= a for e, a in zip(errors, allowed, strict=True)) == (mutant is None), errors


def test_eight_bit_memory_bank():
    """Its rows are unit rows; it follows the float32 bank, is a quarter of its memory, and is saved exactly."""
    torch.manual_seed(0)
    bank, wide = MemoryBank(200, 33, dtype=EIGHT), MemoryBank(200, 33)
    wide.rows.copy_(bank(torch.arange(200)))
    assert bank.rows.dtype == EIGHT and bank.rows.element_size() == 1 and not bank.rows.requires_grad
    assert (wide.rows.norm(dim=1) - 1).abs().max() < 2**-4
    other = MemoryBank(200, 33, dtype=EIGHT)
    for step in range(4):
        ids = torch.randint(200, (64,), generator=torch.Generator().manual_seed(step))
        if step == 2:
            other.load_state_dict(copy.deepcopy(bank.state_dict()))
        for each in (bank, wide, *([other] if step >= 2 else [])):
            each.update(ids, 3 * unit(64, 33, seed=step))
    assert (bank(ids) - wide(ids)).norm(dim=1).max() < 2**-4
    assert torch.equal(bank.rows.view(torch.uint8), other.rows.view(torch.uint8))
    assert torch.equal(bank.scale, other.scale)
    query, index = unit(6, 33, seed=9), torch.arange(30).reshape(6, 5)
    found = functional.info_nce_loss(query, query, bank.rows, index, scale=bank.scale)
    assert torch.allclose(found, functional.info_nce_loss(query, query, bank(torch.arange(200)), index), rtol=1e-5)
    assert bank(index).shape == (6, 5, 33)


@compiled_only
def test_opcheck_with_a_scale():
    """Rows in float32: opcheck cannot compare 8-bit ones."""
    query, bank, scale, index = unit(3, 5), unit(9, 5), unit(1, 9)[0], torch.tensor([[0, 3], [1, 2], [8, 8]])
    number = torch.tensor(1.0, dtype=torch.float64)
    torch.library.opcheck(torch.ops.fastkd.nce_fwd.default, (query, bank, index, number, 0.07, True, scale))
    z = torch.zeros(())
    torch.library.opcheck(torch.ops.fastkd.nce_partition.default, (query, bank, index, z, 0.07, 9, scale))
