"""Negatives from earlier batches: a bank with a row per example, and a queue of the last keys.

Both hold unit rows without a gradient, on the device, in their state_dict. Compute the loss first and write the new rows
after it. No call waits for the device.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastkd import checks, distributed, functional
from fastkd.checks import Backend, Reduction

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)


class _Rows(nn.Module):
    def __init__(self, count: int, dim: int, dtype: torch.dtype, backend: Backend, process_group):
        super().__init__()
        checks.positive("dim", dim)
        if dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(map(str, DTYPES))}, got {dtype}")
        self.backend, self.process_group = backend, process_group
        rows, eight_bits = nn.functional.normalize(torch.randn(count, dim), dim=1), dtype == torch.float8_e4m3fn
        self.register_buffer("rows", torch.zeros_like(rows, dtype=dtype) if eight_bits else rows.to(dtype))
        self.register_buffer("scale", torch.zeros(count) if eight_bits else None)
        if eight_bits:
            everywhere = torch.arange(count, device=rows.device)
            functional.update_bank(self.rows, everywhere, rows, momentum=0.0, scale=self.scale)

    def _gather(self, *tensors: Tensor | None) -> list:
        return [None if x is None else distributed.gather_rows(x.detach(), self.process_group) for x in tensors]


class MemoryBank(_Rows):
    """A row for each of n_data examples; `update` moves rows towards new vectors and scales them to unit length.

    row = normalize(momentum · row + (1 - momentum) · x)

    Args:
        n_data: The number of examples.
        dim: Width of the rows.
        momentum: In [0, 1).
        dtype: torch.float8_e4m3fn stores rows in a quarter of float32's memory, with a factor for each in the buffer `scale`,
            which `info_nce_loss` and `nce_loss` take beside `rows`. Rows are rounded to 8 bits at each update, so a momentum
            near 1 is rounded away. Do not cast such a module (.half()).
        backend: "auto" takes the fastest implementation that runs here; `fastkd doctor` lists them.
        process_group: Every rank passes its own examples, and all ranks write all of them, in rank order.

    Example:
        >>> bank = fastkd.MemoryBank(n_data=50, dim=16)
        >>> query, ids = torch.randn(4, 16, requires_grad=True), torch.tensor([0, 7, 9, 30])
        >>> fastkd.info_nce_loss(query, bank(ids), bank.rows, exclude=(ids, torch.arange(50))).backward()
        >>> bank.update(ids, query)
    """

    def __init__(
        self,
        n_data: int,
        dim: int,
        *,
        momentum: float = 0.5,
        dtype: torch.dtype = torch.float32,
        backend: Backend = "auto",
        process_group=None,
    ):
        checks.positive("n_data", n_data)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum: must lie in [0, 1), got {momentum!r}; 0 replaces the bank's rows")
        super().__init__(n_data, dim, dtype, backend, process_group)
        self.momentum = momentum

    def forward(self, ids: Tensor) -> Tensor:
        """The rows of the examples ids [...]: [..., dim], of an 8-bit bank in float32."""
        return self.rows[ids] if self.scale is None else self.rows[ids].float() * self.scale[ids].unsqueeze(-1)

    if TYPE_CHECKING:
        __call__ = forward

    @torch.no_grad()
    def update(self, ids: Tensor, x: Tensor) -> None:
        """Move the rows ids [B] towards x [B, dim]. Of equal ids the last counts; a row that is not finite is not written."""
        ids, x = self._gather(ids, x)
        options = {"momentum": self.momentum, "scale": self.scale, "backend": self.backend}
        functional.update_bank(self.rows, ids, x, **options)


class NegativeQueue(_Rows):
    """The last `size` keys, as in MoCo: `queue(query, key)` is InfoNCE against them, `queue.push(key)` replaces the oldest.

    The queue begins with random unit rows.

    Args:
        size: The number of keys.
        dim: Their width.
        temperature: The temperature of InfoNCE.
        learnable: Learn the temperature (its logarithm is the parameter).
        dtype: torch.float8_e4m3fn stores keys in a quarter of float32's memory, with a factor for each in the buffer `scale`.
        backend: "auto" takes the fastest implementation that runs here; `fastkd doctor` lists them.
        process_group: The keys of all ranks are pushed on every rank, in rank order.

    Example:
        >>> queue = fastkd.NegativeQueue(size=100, dim=16)
        >>> query, key = (torch.nn.functional.normalize(torch.randn(4, 16, requires_grad=True), dim=1) for _ in range(2))
        >>> loss = queue(query, key)
        >>> loss.backward()
        >>> queue.push(key)
    """

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        temperature: float = 0.07,
        learnable: bool = False,
        dtype: torch.dtype = torch.float32,
        backend: Backend = "auto",
        process_group=None,
    ):
        checks.positive("size", size)
        checks.positive("temperature", temperature)
        super().__init__(size, dim, dtype, backend, process_group)
        self.register_buffer("ids", torch.full((size,), -1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))  # where the next key goes
        log = torch.tensor(float(temperature)).log()
        self.log_temperature = nn.Parameter(log) if learnable else None
        self.temperature = float(temperature)

    def forward(
        self, query: Tensor, key: Tensor, ids: Tensor | None = None, *, reduction: Reduction = "mean"
    ) -> Tensor:
        """InfoNCE of each query with its key against the queue.

        Args:
            query: [B, dim], unit vectors.
            key: [B, dim], unit vectors.
            ids: [B], integers >= 0. Keys pushed with the query's id are not among its negatives.
            reduction: "mean", "sum" or "none".
        """
        temperature = self.temperature if self.log_temperature is None else self.log_temperature.exp()
        return functional.info_nce_loss(
            query,
            key,
            self.rows,
            temperature=temperature,
            exclude=None if ids is None else (ids, self.ids),
            scale=self.scale,
            reduction=reduction,
            backend=self.backend,
        )

    if TYPE_CHECKING:
        __call__ = forward

    @torch.no_grad()
    def push(self, key: Tensor, ids: Tensor | None = None) -> None:
        """Replace the oldest keys by key [B, dim], scaled to unit length; one that is not finite is not written.

        Args:
            key: [B, dim]; B may exceed the queue's size.
            ids: [B], the ids of their examples.
        """
        checks.tensor("key", key, "[B, dim]")
        if ids is not None:
            checks.integers("ids", ids, "[B]")
            checks.same_leading("ids", ids, "key", key, 1)
        key, ids = self._gather(key, ids)
        size, count = self.rows.shape[0], key.shape[0]
        newest = torch.arange(max(0, count - size), count, device=key.device)  # earlier ones would be overwritten
        place = (self.pointer + newest) % size
        written = key[newest].isfinite().all(1)
        options = {"momentum": 0.0, "scale": self.scale, "backend": self.backend}
        functional.update_bank(self.rows, place, key[newest], **options)
        new = torch.full_like(newest, -1) if ids is None else ids[newest].to(self.ids.dtype)
        self.ids[place] = torch.where(written, new, self.ids[place])
        self.pointer.copy_((self.pointer + count) % size)
