"""linear_divergence with heads whose vocabulary is sharded over ranks: every rank has all rows, and a shard of the vocabulary.
A sparse teacher, which has no head, is whole on every rank.

Sums over the vocabulary are also summed over the ranks. Rows are computed in chunks, and again for their gradient, so that a
rank holds the logits of few rows and of its shard only. This is PyTorch, on every device: GEMMs are the library's.

Two all-reduced sums differ in their gradient. `_replicated_sum` is a loss, the same number on every rank, and each rank's term
has the gradient of that number. `_partial_sum` is used on in what differs from rank to rank, so the gradients of all ranks are
summed.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastkd import backends
from fastkd.ops.divergence import TopK
from fastkd.reference import divergence as reference
from fastkd.reference.digits import log_ratio, total
from fastkd.reference.divergence_topk import compared
from fastkd.reference.linear_divergence import _logits

ROWS = 256  # at a time


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, differs):
        ctx.group, ctx.differs = group, differs
        return _reduced(x, group, dist.ReduceOp.SUM)

    @staticmethod
    def backward(ctx, grad):
        return _partial_sum(grad, ctx.group) if ctx.differs else _Copy.apply(grad, ctx.group), None, None


class _Copy(torch.autograd.Function):
    """Every rank uses x with its own shard of the vocabulary, so the gradient is the sum over ranks."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return _replicated_sum(grad, ctx.group), None


def _reduced(x: Tensor, group, how) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, how, group=group)
    return x


def _replicated_sum(x, group):
    return _Sum.apply(x, group, False)


def _partial_sum(x, group):
    return _Sum.apply(x, group, True)


def _softmax(x, group) -> tuple[Tensor, Tensor]:
    """(probabilities, their logarithms) [N, V / ranks] over the vocabulary of all ranks."""
    top = _reduced(x.detach().amax(-1, keepdim=True), group, dist.ReduceOp.MAX)
    x = x - top.clamp_min(torch.finfo(x.dtype).min)
    log_p = x - _partial_sum(x.exp().sum(-1, keepdim=True), group).log()
    return log_p.exp(), log_p


def _divergence(s, t, options, group) -> Tensor:
    """This rank's part of the divergence [N], as the reference computes it: see there why d is not log q - log p."""
    missing = (s == -torch.inf) & (t == -torch.inf)
    if options.kind == "mse":
        return (s.masked_fill(missing, 0) - t.masked_fill(missing, 0)).square().sum(-1)
    (p, log_p), (q, log_q) = _softmax(t / options.temperature, group), _softmax(s / options.temperature, group)
    d, near = log_ratio(
        (s - t) / options.temperature, p, log_p, q, log_q,
        lambda x: _partial_sum(total(x), group),
        lambda x: _reduced(x.amax(-1, keepdim=True), group, dist.ReduceOp.MAX),
    )  # fmt: skip
    return reference.compare(p, q, d, log_p, options.kind, options.beta, options.alpha, ~near)


def _topk(s, teacher, mask, first, options, group) -> Tensor:
    """The divergence [N] from a sparse teacher, the same on every rank: each knows the student's logits at the k tokens, and
    the log-sum-exp of the others, once they are summed over the ranks."""
    indices, log_probs, tail = teacher
    masked = torch.zeros_like(indices[:, :1], dtype=torch.bool) if mask is None else ~mask[:, None]
    s, t = (x.double().masked_fill(masked, 0) for x in (s, log_probs))
    s, place = s / options.temperature, indices.long() - first
    here = (place >= 0) & (place < s.shape[1])  # [N, k]
    size = s.shape[1]
    named = torch.zeros(
        s.shape[0], size + 1, dtype=torch.bool, device=s.device
    )  # those elsewhere go to the last column
    named = named.scatter(-1, torch.where(here, place, size), True)[:, :size]
    outside = ~named & (s != -torch.inf)
    top = s.detach().masked_fill(~outside, -torch.inf).amax(-1, keepdim=True)
    top = _reduced(top, group, dist.ReduceOp.MAX)
    has_rest = top > -torch.inf  # [N, 1]
    top = top.masked_fill(~has_rest, 0)
    others = torch.where(outside, (s - top).masked_fill(~outside, 0).exp(), 0).sum(-1, keepdim=True)
    others = _replicated_sum(others, group)
    rest = torch.where(has_rest, top + others.masked_fill(~has_rest, 1).log(), 0)
    at_k = _replicated_sum(torch.where(here, s.gather(-1, place.clamp(0, size - 1)), 0), group)
    return compared(at_k, rest, has_rest, t, tail, masked, options.kind, options.beta, options.alpha)


def _chunk(student, teacher, mask, labels, first, options, group) -> Tensor:
    hidden, head, bias = student
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    hidden = _Copy.apply(hidden, group)
    s = _logits(hidden, head, bias, mask, dtype, options.scales[0], options.caps[0])  # [N, V / ranks]
    sparse = isinstance(teacher, TopK)
    if sparse:
        rows, whole = s.new_zeros(s.shape[0]), options.factor * _topk(s, teacher, mask, first, options, group).to(dtype)
    else:
        with torch.no_grad():
            t = _logits(*teacher, mask, dtype, options.scales[1], options.caps[1])
        rows = options.factor * _divergence(s, t, options, group)
    if options.hard:
        place = labels.long() - first
        in_shard = (place >= 0) & (place < s.shape[1])
        log_q = _softmax(s, group)[1].gather(1, place.clamp(0, s.shape[1] - 1)[:, None])[:, 0]
        rows = rows - options.hard * torch.where(in_shard, log_q, 0.0)
    if options.hard or not sparse:
        rows = _replicated_sum(rows, group)
    rows = rows + whole if sparse else rows
    return rows if mask is None else rows.masked_fill(~mask, 0)


def sizes(head: Tensor, group) -> Tensor:
    """The vocabulary size of each rank's shard, [ranks] on the device."""
    sizes = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=head.device)
    sizes[dist.get_rank(group)] = head.shape[0]
    return _reduced(sizes, group, dist.ReduceOp.SUM)


def first_token(shard_sizes: Tensor | None, group) -> Tensor | int:
    """The id of this rank's first token; 0 where nobody asks for ids."""
    return 0 if shard_sizes is None else shard_sizes[: dist.get_rank(group)].sum()


def rows(student, teacher, mask, labels, group, shard_sizes, options) -> Tensor:
    """student, teacher: (hidden [N, D], head [V / ranks, D], bias or None), with shards in rank order; the teacher may be a TopK
    over the whole vocabulary. shard_sizes: of `sizes`, needed with labels or a TopK. Rows [N], the same on every rank; the
    gradient of hidden is that of the full vocabulary, a head's that of its shard."""
    first = first_token(shard_sizes, group)
    chunks = []
    with backends.full_precision(student[0]):
        for start in range(0, student[0].shape[0], ROWS):
            part = slice(start, start + ROWS)
            own = (student[0][part], *student[1:])
            some = [None if x is None else x[part] for x in (mask, labels)]
            if isinstance(teacher, TopK):
                given = TopK(*(x[part] if isinstance(x, Tensor) else x for x in teacher))
            else:
                given = (teacher[0][part], *teacher[1:])
            chunks.append(checkpoint(_chunk, own, given, *some, first, options, group, use_reentrant=False))
    return torch.cat(chunks) if chunks else student[0].new_zeros(0, dtype=torch.float32) * student[0].sum()
