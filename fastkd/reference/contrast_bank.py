"""contrast, after the loss: what the bank keeps of the queries."""

import torch
import torch.nn.functional as F


@torch.no_grad()
def update_bank(bank, index, rows, momentum):
    """bank[index] = normalise(momentum · bank[index] + (1 - momentum) · rows), in place, no gradient.

    Of equal ids in a batch the last one counts, whatever the device: every copy writes that one's row. A row that came
    out not finite is not written: one overflow in half precision would otherwise stay in the bank for good.
    """
    dtype = torch.float64 if bank.dtype == torch.float64 else torch.float32
    ordered, order = index.sort(stable=True)
    last = order[torch.searchsorted(ordered, index, right=True) - 1]  # [B]
    old = bank[index].to(dtype)
    new = F.normalize(momentum * old + (1 - momentum) * rows.to(dtype)[last], dim=-1)
    new = torch.where(new.isfinite().all(-1, keepdim=True), new, old)
    bank.index_copy_(0, index, new.to(bank.dtype))
