"""Products whose sums are float32 whatever the operands, and the shared CPU GEMM tile by itself, for tests and the bench. C++
calls csrc/cpu/gemm/gemm.h."""

import torch
from torch import Tensor

from fastkd import backends

# Bits of `how`, the same as in csrc/cpu/gemm/op.cpp.
DIRECT = 1  # read `a` in place instead of packing it
FLOAT32_ONLY = 2  # widen bfloat16 even if the machine multiplies it
ROUND = 4  # round float32 to bfloat16 if the machine multiplies that
SPLIT = 8  # with ROUND: `a` as a high and a low bfloat16 part

if backends.UNAVAILABLE["cpu"] is None:

    @torch.library.register_fake("fastkd::gemm_nt")
    def _(a, b, start=None, alpha=1.0, how=0):
        return a.new_empty((a.shape[0], b.shape[0]), dtype=torch.float32)


def gemm_nt(a: Tensor, b: Tensor, start: Tensor | None = None, alpha: float = 1.0, how: int = 0) -> Tensor:
    """alpha * a @ b.T + start in float32, from a [M, K] and b [N, K] in float32, bfloat16 or float16, any strides."""
    return torch.ops.fastkd.gemm_nt(a, b, start, alpha, how)  # [M, N]


def product(a: Tensor, b: Tensor, onto: Tensor | None = None) -> Tensor:
    """a @ b.T in float32, from a [M, K] and b [N, K] of any dtype of kernels; with `onto`, added to it in place."""
    if a.dtype != b.dtype:
        a, b = a.float(), b.float()
    with backends.full_precision(a):
        if a.dtype == torch.float32:
            return a @ b.t() if onto is None else onto.addmm_(a, b.t())
        x = torch.mm(a, b.t(), out_dtype=torch.float32) if a.is_cuda else gemm_nt(a, b)
        return x if onto is None else onto.add_(x)
