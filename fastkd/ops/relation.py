"""relation, the KL between softmaxed self-relations (MiniLM, MiniLMv2): the autograd Function, and which implementation runs."""

import torch
from torch import Tensor

from fastkd import backends
from fastkd.ops.gradient_in_forward import wants_gradient
from fastkd.reference import relation as reference

# Kernels: fwd(xs, ys, xt, yt, mask, causal, scale_s, scale_t, gradient_in_forward) -> (rows [B, H, L],
# stats [B, H, 4, L], unit_grad_x, unit_grad_y), and bwd(grad, xs, ys, xt, yt, mask, stats, unit_grad_x, unit_grad_y, causal,
# scale_s, scale_t) -> gradients of xs and ys. y None: x itself, whose gradient then holds both parts. Without
# gradient_in_forward, unit_grad_x and unit_grad_y have no rows.
KERNELS = backends.kernels("relation", "relation_fwd", "relation_bwd")
MOST_KEYS = 512  # for which csrc/cpu/relation/op.cpp makes the gradient in the forward
WIDEST = 128  # head dimension that kernels/relation.py takes


def _gradient_fake(xs, wanted):
    dtype = torch.bfloat16 if xs.dtype == torch.bfloat16 else torch.float32
    B, H, L, d = xs.shape
    return xs.new_empty((B, H, L if wanted else 0, d), dtype=dtype)


def _rows_fake(xs, ys, xt, yt, mask, causal, scale_s, scale_t, gradient_in_forward):
    B, H, L, _ = xs.shape
    rows = xs.new_empty((B, H, L), dtype=torch.float32)
    stats = xs.new_empty((B, H, 4, L), dtype=torch.float32)
    return (
        rows,
        stats,
        _gradient_fake(xs, gradient_in_forward),
        _gradient_fake(xs, gradient_in_forward and ys is not None),
    )


def _grads_fake(grad, xs, ys, *_):
    return _gradient_fake(xs, True), _gradient_fake(xs, ys is not None)


backends.fake("relation_fwd", _rows_fake)
backends.fake("relation_bwd", _grads_fake)


class Relation(backends.Function):
    """Saves the states, and what the kernel's backward reads."""

    function = "relation_kl_loss"

    @staticmethod
    def forward(ctx, backend, xs, ys, xt, yt, mask, gradient_in_forward, *options):
        rows, *saved = KERNELS[backend].fwd(xs, ys, xt, yt, mask, *options, gradient_in_forward)
        ctx.save_for_backward(xs, ys, xt, yt, mask, *saved)
        ctx.backend, ctx.options, ctx.gradient_in_forward = backend, options, gradient_in_forward
        return rows

    @staticmethod
    def backward(ctx, grad):
        xs, ys, *others = ctx.saved_tensors  # once: checkpoint(use_reentrant=False) refuses a second unpacking
        dx, dy = KERNELS[ctx.backend].bwd(grad, xs, ys, *others, *ctx.options)
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
    backend = _chosen(backend, xs, max(xs.shape[3], xt.shape[3]))
    if backend == "reference":
        with backends.full_precision(xs):
            return reference.relation(xs, ys, xt, yt, mask, causal, scale_s, scale_t)
    sides = (*_kernel_form(xs, ys), *_kernel_form(xt, yt))
    gradient_in_forward = wants_gradient(xs, ys) and backend == "cpu" and xs.shape[2] <= MOST_KEYS
    return Relation.apply(backend, *sides, mask, gradient_in_forward, causal, scale_s, scale_t)


def _chosen(wanted: str, x: Tensor, width: int) -> str:
    backend = backends.choose("relation", wanted, x)
    if backend != "triton" or width <= WIDEST:
        return backend
    if wanted == "auto":
        return "reference"
    raise RuntimeError(
        f"relation: backend='triton' cannot run here: heads are {width} wide, and the kernel takes up to {WIDEST}; "
        "pass heads= to split them"
    )


def _kernel_form(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
    """x and y in one dtype that kernels take; None for y if it is x."""
    if x.dtype == torch.float64 or x.dtype != y.dtype:
        same = y is x
        x = x.float()
        y = x if same else y.float()
    return x, None if y is x else y
