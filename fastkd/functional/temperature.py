"""Temperatures of `divergence` and `linear_divergence`: numbers or tensors, and the teacher's own."""

import torch
from torch import Tensor

from fastkd import checks


def as_number(name: str, x: float | Tensor) -> float | Tensor:
    """A checked temperature. A tensor becomes a number where reading it does not synchronise."""
    checks.positive(name, x, learnable=True)
    if not isinstance(x, Tensor):
        return float(x)
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires grad, but the losses have no gradient for it; pass {name}.detach()")
    return float(x) if checks.looks_are_free(x) else x.reshape(())


def scaled(student: Tensor, teacher, temperature: float | Tensor, teacher_temperature: float | Tensor | None):
    """(student, teacher, T), T a number, whose softmaxes at T are those of the arguments at their own temperatures. A teacher
    that is no tensor (a TopK) is returned as it came."""
    if teacher_temperature is None:
        teacher_temperature = temperature
    if isinstance(temperature, float) and isinstance(teacher_temperature, float):
        if teacher_temperature != temperature:
            teacher = _wide(teacher) * (temperature / teacher_temperature)
        return student, teacher, temperature
    if isinstance(teacher, Tensor):
        teacher = _wide(teacher) / teacher_temperature
    return _wide(student) / temperature, teacher, 1.0


def _wide(x: Tensor) -> Tensor:
    """Not rounded to half precision a second time."""
    return x if x.dtype == torch.float64 else x.float()
