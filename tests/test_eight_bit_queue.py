"""NegativeQueue in 8 bits: float8 e4m3fn rows with a scale for each."""

import pytest
import torch
import torch.nn.functional as F

from cases import randn
from fastkd import functional
from fastkd.losses.bank import MemoryBank, NegativeQueue

EIGHT = torch.float8_e4m3fn


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


def test_eight_bits_without_a_scale_is_named():
    query, bank = unit(2, 5), unit(9, 5).to(EIGHT)
    with pytest.raises(ValueError, match=r"scale: rows in torch\.float8_e4m3fn need one each"):
        functional.info_nce_loss(query, query, bank)
    with pytest.raises(ValueError, match="dtype: expected one of"):
        MemoryBank(9, 5, dtype=EIGHT)
