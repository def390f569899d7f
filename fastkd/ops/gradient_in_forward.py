"""The gradient made in the forward, while the kernel has in cache what the gradient needs. All stems do it in this way.

A forward that may expect a gradient makes it for an upstream gradient: the one that the caller says it will send
(`expected_upstream`), or 1 (`unit_grad`). The backward rescales it to the upstream gradient that came, any of which is
correct; another one than expected is slower.

- Large gradients are handed over (`HandedOver`): the tensor that the forward wrote is what the first backward returns,
  rescaled in place, so that there never are two of them. A further backward calls the forward's kernel again.
- Small ones, and those of a compiled graph, which cannot hand over a tensor that its forward left, are saved like any
  other tensor and multiplied in the backward.

Inputs that a further backward would read are saved with `ctx.save_for_backward`, so that autograd notices a change in place.
"""

from collections.abc import Callable

import torch
from torch import Tensor


class HandedOver:
    """Gradients that a forward made, until the first backward takes them."""

    def __init__(self, gradients):
        self.gradients = gradients

    def take(self, compute: Callable):
        """What the forward made, once; afterwards what compute() makes."""
        gradients, self.gradients = self.gradients, None  # a reference kept here would make autograd copy them
        return compute() if gradients is None else gradients


def wants_gradient(*students: Tensor | None) -> bool:
    """Whether a gradient of any of them can be asked for."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in students)


def can_hand_over() -> bool:
    return not torch.compiler.is_compiling()
