"""KL between softmaxed self-relations (MiniLM, MiniLMv2): the autograd Function, and which implementation runs."""

import torch
from torch import Tensor

from fastkd import backends
from fastkd.reference import relation as reference

# What a kernel looks like: fwd(xs, ys, xt, yt, mask, causal, scale_s, scale_t, with_gradient) -> (rows [B, H, L], stats,
# unit_x, unit_y), and bwd(grad, xs, ys, xt, yt, mask, stats, unit_x, unit_y, causal, scale_s, scale_t) -> gradients of xs
# and ys. y None: x itself, whose gradient is then all of it. What lies between the two is the kernel's own business.
KERNELS = backends.kernels("relation", "relation_fwd", "relation_bwd")
WHOLE = 512  # keys, up to which csrc/cpu/relation.cpp makes the gradient for upstream 1 in the forward


def _gradient_fake(xs, wanted):
    dtype = torch.bfloat16 if xs.dtype == torch.bfloat16 else torch.float32
    B, H, L, d = xs.shape
    return xs.new_empty((B, H, L if wanted else 0, d), dtype=dtype)


def _rows_fake(xs, ys, xt, yt, mask, causal, scale_s, scale_t, with_gradient):
    B, H, L, _ = xs.shape
    unit = with_gradient and L <= WHOLE
    rows = xs.new_empty((B, H, L), dtype=torch.float32)
    stats = xs.new_empty((B, H, 4, L if L > WHOLE else 0), dtype=torch.float32)
    return rows, stats, _gradient_fake(xs, unit), _gradient_fake(xs, unit and ys is not None)


def _grads_fake(grad, xs, ys, *_):
    return _gradient_fake(xs, True), _gradient_fake(xs, ys is not None)


backends.fake("relation_fwd", _rows_fake)
backends.fake("relation_bwd", _grads_fake)


class Relation(torch.autograd.Function):
    """Saves the states, and what the kernel leaves for its backward."""

    @staticmethod
    def forward(ctx, backend, xs, ys, xt, yt, mask, with_gradient, *options):
        rows, *kept = KERNELS[backend].fwd(xs, ys, xt, yt, mask, *options, with_gradient)
        ctx.save_for_backward(xs, ys, xt, yt, mask, *kept)
        ctx.backend, ctx.options = backend, options
        return rows

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        xs, ys, *_ = ctx.saved_tensors
        dx, dy = KERNELS[ctx.backend].bwd(grad, *ctx.saved_tensors, *ctx.options)
        dy = None if ys is None else dy.to(ys.dtype)
        return None, dx.to(xs.dtype), dy, None, None, None, None, None, None, None


def resplit(name: str, x: Tensor, heads: int | None) -> Tensor:
    """[B, H, L, d] -> [B, heads, L, H·d / heads]: MiniLMv2's relation heads."""
    if heads is None or heads == x.shape[1]:
        return x
    b, h, length, d = x.shape
    if heads < 1 or (h * d) % heads:
        raise ValueError(f"heads: must divide the width of {name}, {h}·{d} = {h * d}, got {heads}")
    return x.transpose(1, 2).reshape(b, length, heads, h * d // heads).transpose(1, 2)


def relation(xs, ys, xt, yt, mask, causal, scale_s, scale_t, backend) -> Tensor:
    """KL(teacher || student) per query row, [B, H, L]."""
    backend = backends.choose("relation", backend, xs)
    if backend == "reference":
        with backends.full_precision(xs):
            return reference.relation(xs, ys, xt, yt, mask, causal, scale_s, scale_t)
    sides = (*_kernel_form(xs, ys), *_kernel_form(xt, yt))
    with_gradient = (xs.requires_grad or ys.requires_grad) and torch.is_grad_enabled()
    return Relation.apply(backend, *sides, mask, with_gradient, causal, scale_s, scale_t)


def _kernel_form(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
    """No y where it is x; one dtype, which kernels take."""
    if x.dtype == torch.float64 or x.dtype != y.dtype:
        same = y is x
        x = x.float()
        y = x if same else y.float()
    return x, None if y is x else y
