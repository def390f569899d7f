"""Negatives that outlive their batch: a bank with a row per example, and a queue of the last keys.

Both hold unit rows without a gradient, on the device, in their state_dict. Take the loss first and the new rows after:
nothing of the loss's backward needs what they overwrite. No call waits for the device.
"""

import torch
from torch import Tensor, nn

from fastkd import checks, distributed, functional

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)


class _Rows(nn.Module):
    def __init__(self, count: int, dim: int, dtype: torch.dtype, backend: str, process_group):
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
    """A row for each of n_data examples; update(ids, x) moves rows towards x by 1 - momentum, and to unit length.

    process_group: every rank hands in its examples and all write all of them, in rank order, so that the banks stay the
    same. Of equal ids the last counts; a row that is not finite is left out.

    dtype float8_e4m3fn keeps rows in a quarter of float32's memory, with one scale for each in the buffer `scale`, which
    info_nce_loss and nce_loss take beside `rows`. Rows move in float32 and are rounded again: to a sixteenth of an element
    at most, so that a momentum near 1 would be rounded away. Such a module must not be cast (.half()).
    """

    def __init__(
        self,
        n_data: int,
        dim: int,
        *,
        momentum: float = 0.5,
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
        process_group=None,
    ):
        checks.positive("n_data", n_data)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum: must lie in [0, 1), got {momentum!r}; 0 replaces the bank's rows")
        super().__init__(n_data, dim, dtype, backend, process_group)
        self.momentum = momentum

    def forward(self, ids: Tensor) -> Tensor:
        """The rows of the examples ids [...], [..., dim]; of an 8-bit bank in float32."""
        return self.rows[ids] if self.scale is None else self.rows[ids].float() * self.scale[ids].unsqueeze(-1)

    @torch.no_grad()
    def update(self, ids: Tensor, x: Tensor) -> None:
        """Move the rows ids [B] towards x [B, dim]."""
        ids, x = self._gather(ids, x)
        options = {"momentum": self.momentum, "scale": self.scale, "backend": self.backend}
        functional.update_bank(self.rows, ids, x, **options)


class NegativeQueue(_Rows):
    """The last `size` keys, as in MoCo: queue(query, key) is InfoNCE against them, queue.push(key) replaces the oldest.

    It begins full of random unit rows. With ids, keys of the query's own example are not among its negatives (ids are
    any whole numbers >= 0). process_group: the keys of all ranks are pushed, in rank order, on every rank.

    dtype float8_e4m3fn keeps rows in a quarter of float32's memory, with one scale for each in the buffer `scale`.
    """

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        temperature: float = 0.07,
        learnable: bool = False,
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
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

    def forward(self, query: Tensor, key: Tensor, ids: Tensor | None = None, *, reduction: str = "mean") -> Tensor:
        """InfoNCE of query [B, dim] with its key [B, dim] against the queue, both taken as they are."""
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

    @torch.no_grad()
    def push(self, key: Tensor, ids: Tensor | None = None) -> None:
        """The keys [B, dim], to unit length, in the place of the oldest. B need not divide the size, nor be below it.

        A key that is not finite leaves the row that it would have replaced.
        """
        checks.tensor("key", key, "[B, dim]")
        if ids is not None:
            checks.integers("ids", ids, "[B]")
            checks.same_leading("ids", ids, "key", key, 1)
        key, ids = self._gather(key, ids)
        size, count = self.rows.shape[0], key.shape[0]
        newest = torch.arange(max(0, count - size), count, device=key.device)  # the others would be overwritten at once
        place = (self.pointer + newest) % size
        written = key[newest].isfinite().all(1)
        options = {"momentum": 0.0, "scale": self.scale, "backend": self.backend}
        functional.update_bank(self.rows, place, key[newest], **options)
        new = torch.full_like(newest, -1) if ids is None else ids[newest].to(self.ids.dtype)
        self.ids[place] = torch.where(written, new, self.ids[place])
        self.pointer.copy_((self.pointer + count) % size)
