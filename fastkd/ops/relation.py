"""KL between softmaxed self-relations (MiniLM, MiniLMv2): which implementation runs."""

from torch import Tensor

from fastkd import backends
from fastkd.reference import relation as reference


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
    backends.choose("relation", backend, xs)
    with backends.full_precision(xs):
        return reference.relation(xs, ys, xt, yt, mask, causal, scale_s, scale_t)
