"""NCE, its normaliser Z, and both anchors of CoDIR. kernels/contrast/loss.py has the maths and the kernel that reads the bank.

Z is set once: n_data times the mean of e^n over the finite scores of a batch. Later calls read z, and neither index nor bank. For
both anchors, what is subtracted from their scores (`shift`) is made on the device, where their z is.
"""

import ctypes
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..blocks import contiguous_rows
from . import loss
from .loss import gathered

SPILL_LIMIT = {"normaliser_kernel": 0}
LARGEST = tl.constexpr(3.4028234663852886e38)  # of float32
EPS = 1e-7  # of fastkd/reference/contrast.py


@triton.jit
def normaliser_kernel(
    z_ptr, number_ptr, mass_ptr, now_ptr, shift_ptr, parts, n_data, noise, noise_low, BLOCK: tl.constexpr
):
    """z if it is set, else n_data times the mean of all parts; and the shift, log z + log noise."""
    z = tl.load(z_ptr)
    if z > 0:
        now = z
    else:
        masses, numbers = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
        for start in range(0, parts, BLOCK):
            o_p = start + tl.arange(0, BLOCK)
            masses += tl.load(mass_ptr + o_p, mask=o_p < parts, other=0.0).to(tl.float64)
            numbers += tl.load(number_ptr + o_p, mask=o_p < parts, other=0.0).to(tl.float64)
        mean = tl.sum(masses, 0) / tl.maximum(tl.sum(numbers, 0), 1.0)
        now = tl.minimum(mean * n_data, LARGEST).to(tl.float32)
    tl.store(now_ptr, now)
    if shift_ptr is not None:
        known = tl.where(now > 0, now, 1.0).to(tl.float64)
        tl.store(shift_ptr, tl.log(known) + tl.log(tl.full([], 0, tl.float64) + noise + noise_low))


def _normaliser(query, bank, row_scale, index, z, inverse, n_data, shift=None, noise=1.0) -> Tensor:
    """z as it is now, []; and log z + log noise into `shift`."""
    parts = gathered(query, bank, row_scale, index, inverse, False, z=z)
    now, high = torch.empty_like(z), ctypes.c_float(noise).value
    normaliser_kernel[(1,)](
        z,
        parts.largest,
        parts.mass,
        now,
        shift,
        parts.mass.numel(),
        n_data,
        high,
        noise - high,
        BLOCK=1024,
        num_warps=4,
    )
    return now


def _inverse(temperature: float, query: Tensor) -> Tensor:
    return torch.full((), 1 / temperature, dtype=torch.float64, device=query.device)


def nce_partition(
    query: Tensor, bank: Tensor, index: Tensor, z: Tensor, temperature: float, n_data: int, scale: Tensor | None = None
) -> Tensor:
    if query.shape[0] == 0:
        return z.clamp_min(0)
    query, bank, scale = contiguous_rows(query), loss._readable(bank), contiguous_rows(scale)
    return _normaliser(query, bank, scale, index, z, _inverse(temperature, query), n_data)


def nce_fwd(
    query: Tensor, bank: Tensor, index: Tensor, shift: Tensor, temperature: float, gradient_in_forward: bool,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    query, bank, scale = contiguous_rows(query), loss._readable(bank), contiguous_rows(scale)
    if query.shape[0] == 0:
        empty = query.new_empty(query.shape, dtype=torch.float32)
        return empty.sum(1), empty
    parts = gathered(query, bank, scale, index, _inverse(temperature, query), gradient_in_forward, shift)
    unit_grad = parts.sums.sum(0) if gradient_in_forward else query.new_empty((0, query.shape[1]), dtype=torch.float32)
    return parts.mass.sum(0), unit_grad


def nce_pair(
    query_a: Tensor, query_b: Tensor, bank_a: Tensor, bank_b: Tensor, index: Tensor, z_a: Tensor, z_b: Tensor,
    noise: float, temperature: float, n_data: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Half the sum of both sides' NCE [B], its gradients by the queries [B, D] for an upstream gradient of 1, and both z."""
    if query_a.shape[0] == 0:
        empty = [query.new_empty(query.shape, dtype=torch.float32) for query in (query_a, query_b)]
        return empty[0].sum(1), *empty, z_a.clamp_min(0), z_b.clamp_min(0)
    index, inverse, shift = index.contiguous(), _inverse(temperature, query_a), z_a.new_empty(2, dtype=torch.float64)
    made = []
    for side, (query, bank, z) in enumerate(((query_a, bank_a, z_a), (query_b, bank_b, z_b))):
        query, bank, own = contiguous_rows(query), contiguous_rows(bank), shift[side]
        z = _normaliser(query, bank, None, index, z, inverse, n_data, own, noise)
        parts = gathered(query, bank, None, index, inverse, True, own, share=0.5)
        made.append((parts.mass.sum(0), parts.sums.sum(0), z))
    (rows_a, to_a, z_a), (rows_b, to_b, z_b) = made
    constant = (index.shape[1] - 1) * (math.log(noise - EPS) - math.log(noise))  # as in the reference
    return (rows_a + rows_b) - constant, to_a, to_b, z_a, z_b
