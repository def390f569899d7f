"""contrast: moves rows of the bank towards new ones."""

import torch
import torch.nn.functional as F

LARGEST = 448.0  # of float8_e4m3fn


def eight_bits(rows):
    """Rows in 8 bits and a scale for each, so that its largest element is the type's largest: rows ≈ scale · eight bits."""
    scale = rows.abs().amax(1).clamp_min(1e-12) / LARGEST  # [N]
    return (rows / scale[:, None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


@torch.no_grad()
def update_bank(bank, index, rows, momentum, scale=None):
    """bank[index] = normalise(momentum · bank[index] + (1 - momentum) · rows), in place, no gradient.

    If an id occurs more than once, its last row is written, on every device. A row that is not finite is not written: one
    overflow in half precision would otherwise stay in the bank. Rows in 8 bits have a scale [K]: rows are moved in float32,
    then rounded with a new scale, which replaces the old one.
    """
    dtype = torch.float64 if bank.dtype == torch.float64 else torch.float32
    ordered, order = index.sort(stable=True)
    last = order[torch.searchsorted(ordered, index, right=True) - 1]  # [B]
    old = bank[index].to(dtype) if scale is None else bank[index].to(dtype) * scale[index][:, None]
    new = F.normalize(momentum * old + (1 - momentum) * rows.to(dtype)[last], dim=-1)
    finite = new.isfinite().all(-1, keepdim=True)
    if scale is None:
        bank.index_copy_(0, index, torch.where(finite, new, old).to(bank.dtype))
        return
    (new, new_scale), bits = (
        eight_bits(new),
        bank.view(torch.uint8),
    )  # torch.where and index_copy_ take bytes everywhere
    bits.index_copy_(0, index, torch.where(finite, new.view(torch.uint8), bits[index]))
    scale.index_copy_(0, index, torch.where(finite[:, 0], new_scale, scale[index]))
