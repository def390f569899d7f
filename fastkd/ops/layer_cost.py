"""layer_cost, the costs between all pairs of layers: the autograd Functions, and which implementation runs."""

import torch
from torch import Tensor

from fastkd import backends
from fastkd.reference import layer_cost as reference

# Kernels: fwd(students, teachers, mask, clamp) -> costs [N, M], and
# bwd(grad [N, M], students, teachers, mask, clamp) -> one gradient per student, in the student's dtype.
KERNELS = backends.kernels("layer_cost", "layer_cost_fwd", "layer_cost_bwd")


def _costs_fake(students, teachers, mask, clamp):
    return students[0].new_empty((len(students), len(teachers)), dtype=torch.float32)


def _grads_fake(grad, students, teachers, mask, clamp):
    return [torch.empty_like(student, memory_format=torch.contiguous_format) for student in students]


backends.fake("layer_cost_fwd", _costs_fake)
backends.fake("layer_cost_bwd", _grads_fake)


class LayerCost(backends.Function):
    """Saves the layers. The backward reads those whose weight is not zero and writes each gradient once."""

    function = "layer_costs or attention_costs"

    @staticmethod
    def forward(ctx, backend, count, mask, clamp, *layers):
        ctx.save_for_backward(mask, *layers)
        ctx.backend, ctx.count, ctx.clamp = backend, count, clamp
        return KERNELS[backend].fwd(layers[:count], layers[count:], mask, clamp)

    @staticmethod
    def backward(ctx, grad):
        mask, *layers = ctx.saved_tensors
        wanted = [i for i in range(ctx.count) if ctx.needs_input_grad[4 + i]]
        students = [layers[i] for i in wanted]
        gradients = KERNELS[ctx.backend].bwd(_rows(grad, wanted), students, layers[ctx.count :], mask, ctx.clamp)
        grads: list = [None] * len(layers)
        for i, x in zip(wanted, gradients, strict=True):
            grads[i] = x
        return None, None, None, None, *grads


def _rows(grad: Tensor, wanted: list[int]) -> Tensor:
    """The rows of grad [N, M] that belong to the wanted students."""
    return grad if len(wanted) == len(grad) else torch.stack([grad[i] for i in wanted])


def layer_cost(students, teachers, mask, clamp, backend) -> Tensor:
    """[N, M] mean squared differences between layers."""
    backend = backends.choose("layer_cost", backend, students[0])
    if backend == "reference":
        with backends.full_precision(students[0]):
            return reference.layer_cost(students, teachers, mask, clamp)
    layers = [x.float() if x.dtype == torch.float64 else x for x in (*students, *teachers)]
    return LayerCost.apply(backend, len(students), mask, None if clamp is None else float(clamp), *layers)


# Kernels for attention scores: fwd(sq, sk, tq, tk, scales, mask, causal) -> costs [N, M], and bwd(grad, the same) -> the
# gradients of all students' queries, then of their keys. One scale per layer, students first.
ATTENTION = backends.kernels("layer_cost", "attention_cost_fwd", "attention_cost_bwd")
backends.fake("attention_cost_fwd", lambda sq, sk, tq, *_: sq[0].new_empty((len(sq), len(tq)), dtype=torch.float32))
backends.fake("attention_cost_bwd", lambda grad, sq, sk, *_: _grads_fake(grad, [*sq, *sk], None, None, None))


class AttentionCost(backends.Function):
    """Saves queries and keys. No matrix of scores is stored, in the forward or the backward."""

    function = "attention_costs"

    @staticmethod
    def forward(ctx, backend, counts, scales, mask, causal, *layers):
        ctx.save_for_backward(mask, *layers)
        ctx.backend, ctx.counts, ctx.scales, ctx.causal = backend, counts, scales, causal
        return ATTENTION[backend].fwd(*_queries_and_keys(counts, layers), scales, mask, causal)

    @staticmethod
    def backward(ctx, grad):
        mask, *layers = ctx.saved_tensors
        n, (sq, sk, tq, tk) = ctx.counts[0], _queries_and_keys(ctx.counts, layers)
        wanted = [i for i in range(n) if ctx.needs_input_grad[5 + i] or ctx.needs_input_grad[5 + n + i]]
        students = [[side[i] for i in wanted] for side in (sq, sk)]
        scales = [*[ctx.scales[i] for i in wanted], *ctx.scales[n:]]
        gradients = ATTENTION[ctx.backend].bwd(_rows(grad, wanted), *students, tq, tk, scales, mask, ctx.causal)
        grads: list = [None] * len(layers)
        for i, x in zip([*wanted, *[n + i for i in wanted]], gradients, strict=True):
            grads[i] = x
        return None, None, None, None, None, *grads


def _queries_and_keys(counts, layers):
    """Queries and keys of the students, queries and keys of the teachers."""
    n, m = counts
    return layers[:n], layers[n : 2 * n], layers[2 * n : 2 * n + m], layers[2 * n + m :]


def attention_cost(students, teachers, mask, causal, scale, heads, backend) -> Tensor:
    """[N, M] mean squared differences between attention scores."""
    pairs = [not isinstance(x, Tensor) for x in (*students, *teachers)]
    first = students[0][0] if pairs[0] else students[0]
    backend = backends.choose("layer_cost", backend, first)
    if backend == "reference" or any(pairs) != all(pairs):
        with backends.full_precision(first):
            return reference.attention_cost(students, teachers, mask, causal, scale, heads)
    if not all(pairs):
        layers = [_without_hidden_scores(x, mask, causal, heads) for x in (*students, *teachers)]
        return layer_cost(layers[: len(students)], layers[len(students) :], None, reference.MASKED_SCORE, backend)
    counts, both = (len(students), len(teachers)), (*students, *teachers)
    scales = [float(q.shape[-1] ** -0.5 if scale is None else scale) for q, _ in both]
    if heads == "mean":
        scales = [x / q.shape[1] for x, (q, _) in zip(scales, both, strict=True)]
    layers = [_head_by_head(x, heads) for x in both]
    sides = layers[: counts[0]], layers[counts[0] :]
    flat = [x[place] for side in sides for place in (0, 1) for x in side]
    return AttentionCost.apply(backend, counts, scales, mask, causal, *flat)


def _without_hidden_scores(scores: Tensor, mask, causal: bool, heads) -> Tensor:
    """Scores as layer_cost compares them with the authors' clamp: 0 where the mask or causality hides one."""
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], 0)
    if causal:
        scores = scores.tril()
    if heads != "mean":
        return scores
    return scores.masked_fill(scores <= reference.MASKED_SCORE, 0).mean(1, keepdim=True)


def _head_by_head(x, heads):
    """(q, k) with equally many heads. heads="mean": one head with the width of all."""
    q, k = (part.float() if part.dtype == torch.float64 else part for part in x)
    k = k.to(q.dtype).repeat_interleave(q.shape[1] // k.shape[1], 1)  # grouped-query heads
    if heads != "mean":
        return q, k
    return tuple(part.transpose(1, 2).flatten(2)[:, None] for part in (q, k))  # [B, 1, S, H d]
