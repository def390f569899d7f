"""Tensors that were made under torch.inference_mode(), as a teacher's outputs often are: autograd refuses to save them."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def takes_inference_tensors(function: Callable[P, R]) -> Callable[P, R]:
    """`function` with each such argument replaced by an ordinary tensor on the same memory; nothing is copied."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        if _any_inference(args) or _any_inference(kwargs.values()):
            args = [_ordinary(x) for x in args]
            kwargs = {name: _ordinary(x) for name, x in kwargs.items()}
        return function(*args, **kwargs)

    return call


def _any_inference(args) -> bool:
    for x in args:
        if isinstance(x, Tensor):
            if x.is_inference():
                return True
        elif isinstance(x, (list, tuple)) and _any_inference(x):
            return True
    return False


def _ordinary(x):
    if isinstance(x, Tensor):
        if not x.is_inference():
            return x
        empty = torch.empty(0, dtype=x.dtype, device=x.device)
        return empty.set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())
    if isinstance(x, (list, tuple)):
        parts = map(_ordinary, x)
        return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
    return x
