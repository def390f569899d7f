"""The gradient made in the forward, while the kernel has in cache what the gradient needs. All stems share this mechanism.

The forward computes the gradient for an upstream gradient: the one that the caller announces (`expected_upstream`), or 1
(`unit_grad`). The backward rescales it to the upstream gradient that came. Any upstream gradient is correct; one that was not
expected is slower.

- Large gradients are handed over (`HandedOver`): the first backward rescales the forward's tensor in place and returns it, so
  that there are never two of them. A second backward calls the forward's kernel again.
- Small gradients, and those of a compiled graph, which cannot hand over a tensor from its forward, are saved like any other
  tensor and multiplied in the backward.

Inputs that a second backward would read are saved with `ctx.save_for_backward`, so that autograd notices a change in place.
"""

from collections.abc import Callable

import torch
from torch import Tensor


class HandedOver:
    """Gradients that a forward made, until the first backward takes them."""

    def __init__(self, gradients):
        self.gradients = gradients

    def take(self, compute: Callable):
        """The forward's gradients the first time; afterwards those of compute()."""
        gradients, self.gradients = self.gradients, None  # a reference kept here would make autograd copy them
        return compute() if gradients is None else gradients


def wants_gradient(*students: Tensor | None) -> bool:
    """Whether a gradient of any of them may be needed."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in students)


def can_hand_over() -> bool:
    return not torch.compiler.is_compiling()
