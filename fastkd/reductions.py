"""Masks, reductions and token counts: the only place that knows them.

Kernels and references return one value per row or group; everything here happens on the device, and no value is read on the host.
"""

from typing import get_args

import torch
from torch import Tensor

from fastkd import checks

REDUCTIONS = get_args(checks.Reduction)


def as_bool(mask: Tensor | None) -> Tensor | None:
    """1 counts. Any dtype a tokenizer may give: bool, integers, floats."""
    if mask is not None and not isinstance(mask, Tensor):
        raise ValueError(f"mask: expected a tensor where 1 counts, got {checks.describe(mask)}")
    if mask is not None:
        checks.zero_or_one("mask", mask)
    return mask if mask is None or mask.dtype == torch.bool else mask != 0


def counted_rows(mask: Tensor | None, labels: Tensor | None, ignore_index: int, shape) -> Tensor | None:
    """Which rows count: those with mask 1 whose label is not `ignore_index`; None if all do."""
    checks.mask("mask", mask, shape, "[...]")
    checks.mask("labels", labels, shape, "[...]")
    if labels is not None and not (isinstance(ignore_index, int) and abs(ignore_index) < 2**63):
        raise ValueError(f"ignore_index: expected a whole number, got {checks.describe(ignore_index)}")
    counted = as_bool(mask)
    if labels is None:
        return counted
    labelled = labels != ignore_index
    return labelled if counted is None else counted & labelled


def denominator(reduction: str, num_items_in_batch: float | Tensor | None, shape) -> tuple[str, float | Tensor]:
    """(reduction, d): what `reduce` is asked for, and by what the caller divides it; shape is that of the rows."""
    if num_items_in_batch is None:
        return ("sum", float(shape[0]) if shape and shape[0] else 1.0) if reduction == "batchmean" else (reduction, 1.0)
    if reduction != "mean":
        raise ValueError(f"num_items_in_batch: is what a mean divides by, so pass reduction='mean', got {reduction!r}")
    if isinstance(num_items_in_batch, Tensor):
        if num_items_in_batch.numel() != 1 or num_items_in_batch.is_complex():
            raise ValueError(f"num_items_in_batch: expected one number, got {checks.describe(num_items_in_batch)}")
        if not checks.looks_are_free(num_items_in_batch):
            return "sum", num_items_in_batch.reshape(())
        num_items_in_batch = float(num_items_in_batch)
    checks.positive("num_items_in_batch", num_items_in_batch)
    return "sum", float(num_items_in_batch)


def reduce(rows: Tensor, counted: Tensor | None, reduction: str, weights: Tensor | None = None) -> Tensor:
    """Mean over the rows that count (weighted: sum(w row) / sum(w)), their sum, or the rows with 0 where nothing counts.

    No row counts: 0, with a graph behind it, never NaN.
    """
    if counted is not None:
        rows = torch.where(counted, rows, 0.0)
    if weights is not None:
        weights = weights.to(rows.dtype)
        rows = rows * weights
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    if weights is not None:
        mass = weights if counted is None else torch.where(counted, weights, 0.0)
        total = mass.sum()
        return rows.sum() / torch.where(total == 0, 1.0, total)
    if counted is None:
        return rows.mean() if rows.numel() else rows.sum()
    return rows.sum() / counted.sum().clamp_min(1)


def row_weights(
    counted: Tensor | None, reduction: str, weights: Tensor | None, like: Tensor, divisor: float | Tensor = 1.0
) -> Tensor | None:
    """w [N] with sum w row = what `reduce` returns, by `divisor`, where that is one number; None for "none"."""
    if reduction == "none":
        return None
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    w = torch.ones(like.shape[:-1], dtype=dtype, device=like.device) if weights is None else weights.to(dtype)
    if counted is not None:
        w = torch.where(counted, w, 0.0)
    if reduction == "mean":
        total = w.sum()
        w = w / torch.where(total == 0, 1.0, total)
    if isinstance(divisor, Tensor) or divisor != 1.0:
        w = w / divisor
    return w.reshape(-1)


def end_token(x: Tensor, mask: Tensor | None, end: str) -> Tensor:
    """[B, D] of x [B, S, D]: its "first" or "last" token that counts, whichever side the padding is on; 0 where none does."""
    if mask is None:
        return x[:, 0 if end == "first" else -1]
    keep, order = as_bool(mask), torch.arange(x.shape[1], device=x.device)
    rank = torch.where(keep, -order if end == "first" else order, -x.shape[1])
    token = x.take_along_dim(rank.argmax(1)[:, None, None], 1).squeeze(1)
    return token.masked_fill(~keep.any(1, keepdim=True), 0)


def masked_mean(x: Tensor, mask: Tensor | None, dim: int) -> Tensor:
    """Mean of x [B, S, ...] over the tokens of axis `dim` that count; 0 where none does."""
    if mask is None:
        return x.mean(dim)
    keep = as_bool(mask).reshape(*mask.shape, *[1] * (x.dim() - mask.dim()))  # [B, S, 1]
    return torch.where(keep, x, 0.0).sum(dim) / keep.sum(dim).clamp_min(1)
