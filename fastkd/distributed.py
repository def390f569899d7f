"""What is shared between ranks: rows that all of them see, and a mean over all of them, and what one rank does for all."""

import datetime
import os

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = datetime.timedelta(seconds=5)  # of waiting for the first rank's message: it may not fail at all


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


def from_first(x: Tensor, process_group) -> Tensor:
    """The first rank's x, on every rank, in place."""
    if process_group is not None:
        dist.broadcast(x, dist.get_global_rank(process_group, 0), group=process_group)
    return x


def mean_over_ranks(x: Tensor, weight: Tensor | None, process_group) -> Tensor:
    """A mean that every rank made over its own `weight` (a count, [] or like x) samples, made global."""
    if process_group is None:
        return x
    weight = x.new_ones(()) if weight is None else weight.to(x.dtype)
    return _MeanOverRanks.apply(x, weight, process_group)


def on_first_rank(function, *args):
    """function(*args), called by rank 0 alone: every rank returns its result or raises its error. It must be picklable."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return function(*args)
    outcome = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function(*args)
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    result, error = outcome
    if error is not None:
        raise error
    return result


def is_said_by_first_rank(sentence: str) -> bool:
    """Whether rank 0 ends with the same sentence as this process, one of several that torchrun started. Rank 0 leaves its own in
    torchrun's store, where the others look for it."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False
    key = f"fastkd/error/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    try:
        where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*where, is_master=False, timeout=TIMEOUT, wait_for_workers=False)
        if os.environ["RANK"] == "0":
            store.set(key, sentence)
            return False
        store.wait([key], TIMEOUT)
        return store.get(key).decode() == sentence
    except RuntimeError:  # no message in time, or no store
        return False
