"""Masks, reductions, token counts, and what is shared between ranks: the only place that knows them.

Kernels and references return one value per row or group; everything here happens on the device, without a look at it.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from fastkd import checks

REDUCTIONS = ("mean", "sum", "none")


def as_bool(mask: Tensor | None) -> Tensor | None:
    """1 counts. Any dtype a tokenizer may give: bool, integers, floats."""
    if mask is not None and not isinstance(mask, Tensor):
        raise ValueError(f"mask: expected a tensor where 1 counts, got {checks.describe(mask)}")
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


def row_weights(counted: Tensor | None, reduction: str, weights: Tensor | None, like: Tensor) -> Tensor | None:
    """w [N] with sum w row = what `reduce` returns, where that is one number; None for "none"."""
    if reduction == "none":
        return None
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    w = torch.ones(like.shape[:-1], dtype=dtype, device=like.device) if weights is None else weights.to(dtype)
    if counted is not None:
        w = torch.where(counted, w, 0.0)
    if reduction == "mean":
        total = w.sum()
        w = w / torch.where(total == 0, 1.0, total)
    return w.reshape(-1)


def masked_mean(x: Tensor, mask: Tensor | None, dim: int) -> Tensor:
    """Mean of x [B, S, ...] over the tokens of axis `dim` that count; 0 where none does."""
    if mask is None:
        return x.mean(dim)
    keep = as_bool(mask).reshape(*mask.shape, *[1] * (x.dim() - mask.dim()))  # [B, S, 1]
    return torch.where(keep, x, 0.0).sum(dim) / keep.sum(dim).clamp_min(1)


class _GatherRows(torch.autograd.Function):
    """Every rank's rows, in rank order. Gradients of all ranks' losses come back summed, so that the average which DDP
    takes afterwards is the gradient of the one loss on the global batch."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group, ctx.rows = group, x.shape[0]
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        return _OwnRows.apply(grad, ctx.rows, ctx.group), None


class _OwnRows(torch.autograd.Function):
    """This rank's rows of the sum over all ranks: the gradient of _GatherRows, which is the gradient of this."""

    @staticmethod
    def forward(ctx, x, rows, group):
        ctx.group, rank = group, dist.get_rank(group)
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=group)
        return x[rank * rows : (rank + 1) * rows]

    @staticmethod
    def backward(ctx, grad):
        return _GatherRows.apply(grad, ctx.group), None, None


def gather_rows(x: Tensor | None, process_group) -> Tensor | None:
    """[B, ...] on every rank -> [world * B, ...], differentiable; every rank must hold the same B."""
    if x is None or process_group is None:
        return x
    if x.dtype == torch.bool:
        return _GatherRows.apply(x.to(torch.uint8), process_group) != 0
    return _GatherRows.apply(x, process_group)


class _MeanOverRanks(torch.autograd.Function):
    """sum(w x) / sum(w) over the ranks; DDP's later average supplies the 1 / world that the backward leaves out."""

    @staticmethod
    def forward(ctx, x, weight, group):
        total = torch.stack([(x * weight).flatten(), weight.expand_as(x).flatten()])
        dist.all_reduce(total, group=group)
        mass = total[1].clamp_min(torch.finfo(x.dtype).tiny).reshape(x.shape)
        ctx.save_for_backward(weight * dist.get_world_size(group) / mass)
        return total[0].reshape(x.shape) / mass

    @staticmethod
    def backward(ctx, grad):
        (share,) = ctx.saved_tensors
        return grad * share, None, None


def mean_over_ranks(x: Tensor, weight: Tensor | None, process_group) -> Tensor:
    """A mean that every rank made over its own `weight` (a count, [] or like x) samples, made global."""
    if process_group is None:
        return x
    weight = x.new_ones(()) if weight is None else weight.to(x.dtype)
    return _MeanOverRanks.apply(x, weight, process_group)
