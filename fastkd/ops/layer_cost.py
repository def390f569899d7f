"""All-pairs layer costs (BERT-EMD, TinyBERT, PKD): the autograd Function, and which implementation runs."""

import torch
from torch import Tensor

from fastkd import backends
from fastkd.reference import layer_cost as reference

# What a kernel looks like: fwd(students, teachers, mask, clamp) -> costs [N, M], and
# bwd(grad [N, M], students, teachers, mask, clamp) -> one gradient per student, in the student's dtype.
KERNELS = backends.kernels("layer_cost", "layer_cost_fwd", "layer_cost_bwd")


def _costs_fake(students, teachers, mask, clamp):
    return students[0].new_empty((len(students), len(teachers)), dtype=torch.float32)


def _grads_fake(grad, students, teachers, mask, clamp):
    return [torch.empty_like(student, memory_format=torch.contiguous_format) for student in students]


backends.fake("layer_cost_fwd", _costs_fake)
backends.fake("layer_cost_bwd", _grads_fake)


class LayerCost(torch.autograd.Function):
    """Saves the layers themselves; the backward reads those whose weight is not zero and writes each gradient once."""

    @staticmethod
    def forward(ctx, backend, count, mask, clamp, *layers):
        ctx.save_for_backward(mask, *layers)
        ctx.backend, ctx.count, ctx.clamp = backend, count, clamp
        return KERNELS[backend].fwd(layers[:count], layers[count:], mask, clamp)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        mask, *layers = ctx.saved_tensors
        wanted = [i for i in range(ctx.count) if ctx.needs_input_grad[4 + i]]
        if len(wanted) < ctx.count:
            grad = torch.stack([grad[i] for i in wanted])  # [wanted, M]
        students = [layers[i] for i in wanted]
        found = KERNELS[ctx.backend].bwd(grad, students, layers[ctx.count :], mask, ctx.clamp)
        grads: list = [None] * len(layers)
        for i, x in zip(wanted, found, strict=True):
            grads[i] = x
        return None, None, None, None, *grads


def layer_cost(students, teachers, mask, clamp, backend) -> Tensor:
    """[N, M] mean squared differences between layers."""
    backend = backends.choose("layer_cost", backend, students[0])
    if backend == "reference":
        with backends.full_precision(students[0]):
            return reference.layer_cost(students, teachers, mask, clamp)
    layers = [x.float() if x.dtype == torch.float64 else x for x in (*students, *teachers)]
    return LayerCost.apply(backend, len(students), mask, None if clamp is None else float(clamp), *layers)


def _first_tensor(layers) -> Tensor:
    return layers[0] if isinstance(layers[0], Tensor) else layers[0][0]


def attention_cost(students, teachers, mask, causal, scale, heads, backend) -> Tensor:
    """[N, M] mean squared differences between attention scores."""
    x = _first_tensor(students)
    if backend != "auto" and backends.choose("layer_cost", backend, x) != "reference":
        raise RuntimeError(
            f"layer_cost: backend='{backend}' cannot run here: attention_costs has no {backend} kernel yet"
        )
    with backends.full_precision(x):
        return reference.attention_cost(students, teachers, mask, causal, scale, heads)
