"""Series for arguments near 0, where the plain expression would cancel: shared by the kernels that compare softmaxes."""

import triton
import triton.language as tl


@triton.jit
def phi(x):
    """expm1(x) - x for |x| < 1/2, to 4e-8 of itself."""
    y = tl.fma(x, 1 / 40320, 1 / 5040)
    y = tl.fma(y, x, 1 / 720)
    y = tl.fma(y, x, 1 / 120)
    y = tl.fma(y, x, 1 / 24)
    y = tl.fma(y, x, 1 / 6)
    return x * x * tl.fma(y, x, 1 / 2)


@triton.jit
def logarithms(y, one_and_y):
    """log1p(y), and y - log1p(y) with all its digits and never negative; 1 + y may be known better than y."""
    near = tl.abs(y) < 0.4
    z = tl.where(near, y, 0.0)
    z = z / (2.0 + z)  # log(1 + y) = 2 z + 2 z³ / 3 + 2 z⁵ / 5 + ...
    w = z * z
    rest = z * w * (2 / 3 + w * (2 / 5 + w * (2 / 7 + w * (2 / 9 + w * (2 / 11)))))
    log1p = tl.where(near, 2.0 * z + rest, tl.log(one_and_y))
    return log1p, tl.where(near, y * z - rest, y - log1p)
