"""Checks of arguments. Each message names the argument, says what was passed, and says what to do.

Shapes, dtypes, devices and Python numbers are always checked. The values of tensors are checked on the CPU; on other
devices reading them would synchronise, so they are checked there only under FASTKD_CHECK=1.
"""

import os
from collections.abc import Sequence
from numbers import Real
from typing import Literal, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "cuda", "triton", "cpu", "reference"]
Reduction = Literal["mean", "sum", "none"]
DivergenceReduction = Literal["mean", "batchmean", "sum", "none"]
Kind = Literal["forward_kl", "reverse_kl", "skew_kl", "jsd", "tvd", "soft_ce", "mse"]
LogitsKind = Literal["forward_kl", "reverse_kl", "skew_kl", "skew_reverse_kl", "jsd", "tvd", "soft_ce", "mse"]
KINDS = get_args(Kind)  # in the kernels' order
LARGEST = torch.finfo(torch.float32).max  # kernels take their numbers in float32
CHECK_VALUES_EVERYWHERE = os.environ.get("FASTKD_CHECK", "0") == "1"


def describe(x) -> str:
    """A short description of a value: dtype, shape and device of a tensor, length of a sequence, else the value itself."""
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)} on {x.device}"
    if isinstance(x, (list, tuple)):
        return f"a {type(x).__name__} of {len(x)}"
    return f"{x!r}"


def tensor(name: str, x, layout: str, *, floating: bool = True, eight_bits: bool = False) -> None:
    """`layout` is written as in the documentation: "[B, N, D]", or "[..., V]" for any leading shape."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: expected a tensor {layout}, got {type(x).__name__}")
    extents = layout.strip("[]").split(", ")
    open_ended = extents[0] == "..."
    wanted = len(extents) - open_ended
    if x.dim() < wanted or (x.dim() > wanted and not open_ended):
        raise ValueError(f"{name}: expected shape {layout}, got {describe(x)}; reshape it first")
    if floating and not x.is_floating_point():
        raise ValueError(f"{name}: expected a floating dtype, got {describe(x)}; cast it, for example with .float()")
    if floating and x.dtype.itemsize == 1 and not eight_bits:
        raise ValueError(f"{name}: 8-bit floats have no scale here, got {describe(x)}; cast it with .float()")
    if floating and x.dim() and x.shape[-1] == 0:
        raise ValueError(f"{name}: the last axis of {layout} is empty, got {describe(x)}")


def shaped(name: str, x, shape: Sequence[int], layout: str) -> None:
    """A floating tensor of exactly this shape."""
    tensor(name, x, layout)
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {layout} = {list(shape)}, got {describe(x)}")


def one_number(name: str, x) -> None:
    """A floating tensor with one element, whose value is not read."""
    if not isinstance(x, Tensor) or x.numel() != 1 or not x.is_floating_point():
        raise ValueError(f"{name}: expected a floating tensor of one number, got {describe(x)}")


def integers(name: str, x, layout: str) -> None:
    tensor(name, x, layout, floating=False)
    if x.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name}: expected int64 or int32 indices {layout}, got {describe(x)}; cast it with .long()")


def frozen(name: str, *xs: Tensor | None) -> None:
    """No loss has a gradient for the teacher, so a teacher that requires grad is an error."""
    for x in xs:
        if x is not None and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires grad, but no gradient flows to the teacher; "
                f"run it under torch.no_grad(), or pass {name}.detach()"
            )


def same_leading(name: str, x: Tensor, other_name: str, other: Tensor, axes: int) -> None:
    """The first `axes` axes of two tensors agree."""
    if x.shape[:axes] != other.shape[:axes]:
        raise ValueError(
            f"{name} and {other_name} must agree in their first {axes} axes, "
            f"got {list(x.shape)} and {list(other.shape)}"
        )


def same_shape(name: str, x: Tensor, other_name: str, other: Tensor, hint: str = "") -> None:
    if x.shape != other.shape:
        raise ValueError(
            f"{name} and {other_name} must have the same shape, got {list(x.shape)} and {list(other.shape)}"
            + (f"; {hint}" if hint else "")
        )


def same_device(**tensors: Tensor | None) -> None:
    given = {name: x for name, x in tensors.items() if x is not None}
    first = next(iter(given))
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{name}: expected a tensor, got {describe(x)}")
        if x.device != given[first].device:
            raise ValueError(
                f"{name} is on {x.device}, but {first} is on {given[first].device}; "
                f"move it with {name}.to({first}.device)"
            )


def mask(name: str, x: Tensor | None, shape: Sequence[int], layout: str) -> None:
    if x is None:
        return
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: expected a tensor {layout} where 1 counts, got {type(x).__name__}")
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {layout} = {list(shape)}, got {describe(x)}")
    if x.is_complex():
        raise ValueError(f"{name}: expected real numbers, got {describe(x)}")


def layers(name: str, xs) -> None:
    if not isinstance(xs, (list, tuple)):
        raise ValueError(f"{name}: expected a list with one entry per layer, got {describe(xs)}; wrap it in a list")
    if not xs:
        raise ValueError(f"{name}: the list of layers is empty; pass at least one layer")


def layer_count(name: str, xs, count: int, constructor: str) -> None:
    if len(xs) != count:
        raise ValueError(f"{name}: expected {count} layers, as {constructor} was built for, got {len(xs)}")


def same_length(name: str, xs, other_name: str, others) -> None:
    if len(xs) != len(others):
        raise ValueError(f"{name} and {other_name} must pair up one to one, got {len(xs)} and {len(others)} entries")


def positive(name: str, x, *, learnable: bool = False) -> None:
    """A Python number, or with `learnable` a floating tensor with one element."""
    if learnable and isinstance(x, Tensor):
        one_number(name, x)
        values(name, x, lambda: (x > 0).all(), "must be > 0")
    elif not isinstance(x, Real) or not 0 < x <= LARGEST:
        raise ValueError(f"{name}: must be a finite number > 0, got {x!r}")


def count(name: str, x) -> None:
    if not isinstance(x, int) or not 0 < x < 2**62:
        raise ValueError(f"{name}: expected a whole number > 0, got {x!r}")


def number(name: str, x) -> None:
    if not isinstance(x, Real) or not abs(x) < float("inf"):
        raise ValueError(f"{name}: expected a finite number, got {x!r}")


def flag(name: str, x) -> None:
    if not isinstance(x, bool):
        raise ValueError(f"{name}: expected True or False, got {describe(x)}")


def pair(name: str, x, meaning: str) -> None:
    if not isinstance(x, (tuple, list)) or len(x) != 2:
        raise ValueError(f"{name}: expected a pair {meaning}, got {describe(x)}")


def between(name: str, x: float, low: float, high: float, hint: str = "") -> None:
    if not low < x < high:
        raise ValueError(
            f"{name}: must lie strictly between {low} and {high}, got {x!r}" + (f"; {hint}" if hint else "")
        )


def one_of(name: str, x, options: Sequence[str]) -> None:
    if x not in options:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, options))}, got {x!r}")


def device(name: str, kinds: Sequence[str] = (), *, here: bool = True) -> torch.device:
    """The device of that name, one of `kinds` where they are given; `here`: it must be usable, not only a name."""
    try:
        found = torch.device(name)
        if here:
            torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # each build of torch has its own way
        why = str(error).strip().splitlines()[0]
        raise ValueError(f"device: {name!r} cannot be used here: {why}; name cpu, cuda or cuda:N") from error
    if kinds and found.type not in kinds:
        raise ValueError(f"device: expected {' or '.join(kinds)}, got {name!r}")
    return found


def looks_are_free(x: Tensor) -> bool:
    """Whether the values of `x` may be read: on the CPU, or anywhere under FASTKD_CHECK=1."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return x.device.type == "cpu" or CHECK_VALUES_EVERYWHERE


def values(name: str, x: Tensor, condition, wrong: str) -> None:
    """Raise if `condition()` is false, where values may be read; elsewhere the kernels return NaN or a status."""
    if looks_are_free(x) and not bool(condition()):
        raise ValueError(f"{name}: {wrong}, got {describe(x)}")


def zero_or_one(name: str, x: Tensor) -> None:
    """A mask in a floating dtype, which may be an additive one; others cannot be."""
    if x.is_floating_point():
        hint = "must be 1 where something counts and 0 elsewhere; an additive mask (0 and -1e4) says the opposite: pass mask == 0"
        values(name, x, lambda: ((x == 0) | (x == 1)).all(), hint)


def unit_length(name: str, x: Tensor) -> None:
    """Only under FASTKD_CHECK=1: vectors of other lengths have a loss, too."""
    if CHECK_VALUES_EVERYWHERE:
        hint = "rows must have unit length under FASTKD_CHECK=1; torch.nn.functional.normalize gives it"
        values(name, x, lambda: ((x.detach().float().norm(dim=-1) - 1).abs() < 1e-2).all(), hint)


def not_probabilities(name: str, x: Tensor) -> None:
    """Scores [B, H, S, S], of which one row is looked at first, and all of them where it might be a softmax."""

    def a_softmax(rows: Tensor) -> bool:
        rows = rows.detach().float()
        return bool(((rows >= 0) & (rows <= 1)).all() & ((rows.sum(-1) - 1).abs() < 1e-2).all())

    if x.numel() and x.shape[-1] > 1:
        hint = "expected scores, and these are probabilities (rows in [0, 1] that sum to 1), as transformers returns them; pass "
        hint += "what the softmax was taken of, or a pair (q, k)"
        values(name, x, lambda: not (a_softmax(x[0, 0, 0]) and a_softmax(x)), hint)


def indices_in_range(name: str, x: Tensor, size: int | Tensor, what: str) -> None:
    def inside():
        low, high = x.aminmax()  # one pass
        return (low >= 0) & (high < size)

    known = f"lie in [0, {size})" if isinstance(size, int) else "be a token of one of the shards"
    values(name, x, lambda: x.numel() == 0 or inside(), f"indices must {known}, the {what}")


class NotFiniteError(ValueError):
    """Costs with NaN or infinite entries, for which there is no plan; found where values may be read."""


def solved(status: Tensor, cost: Tensor, a: Tensor, b: Tensor) -> None:
    """Turn the solver's `status` into an error that says which input was wrong."""
    if not looks_are_free(cost) or not bool(status.any()):
        return
    if not bool(cost.isfinite().all()):
        raise NotFiniteError(f"cost: costs must be finite, got {describe(cost)}")
    for name, x in (("a", a), ("b", b)):
        values(name, x, lambda x=x: (x.isfinite() & (x >= 0)).all(), "masses must be finite and >= 0")
    total_a, total_b = a.double().sum(-1), b.double().sum(-1)
    alike = (total_a - total_b).abs() <= 1e-5 * total_a.abs().clamp_min(1e-30)
    values("a", a, alike.all, "a and b must have the same total mass; divide each by its sum")
    raise RuntimeError(f"transport: no optimum found, status {status.flatten().tolist()[:8]}; please report it")


def scores(name: str, x, key_mask: Tensor | None) -> Tensor:
    """A layer of attention_costs, as scores or as (q, k); returns the scores or q, whose axis 1 is the heads."""
    if isinstance(x, Tensor):
        tensor(name, x, "[B, H, S, S]")
        if x.shape[-1] != x.shape[-2]:
            raise ValueError(f"{name}: expected square scores [B, H, S, S], got {describe(x)}")
        if x.shape[1] == 0:
            raise ValueError(f"{name}: expected at least one head, got {describe(x)}")
        mask("mask", key_mask, (x.shape[0], x.shape[-1]), "[B, S]")
        not_probabilities(name, x)
        return x
    if not isinstance(x, (tuple, list)) or len(x) != 2:
        raise ValueError(f"{name}: expected scores [B, H, S, S] or a pair (q, k), got {describe(x)}")
    q, k = x
    tensor(f"{name} q", q, "[B, H, S, d]")
    tensor(f"{name} k", k, "[B, H, S, d]")
    mask("mask", key_mask, (k.shape[0], k.shape[2]), "[B, S]")
    if 0 in (q.shape[1], k.shape[1]) or q.shape[1] % k.shape[1] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"{name}: q's heads must be a multiple of k's and their widths equal, got q {list(q.shape)}, k {list(k.shape)}"
        )
    if (q.shape[0], q.shape[2]) != (k.shape[0], k.shape[2]):
        raise ValueError(
            f"{name}: q and k must be of the same sequences [B, H, S, d], got q {list(q.shape)}, k {list(k.shape)}"
        )
    return q


def divergence_options(kind: str, beta: float, alpha: float, kinds: Sequence[str] = KINDS) -> None:
    one_of("kind", kind, kinds)
    number("beta", beta)
    number("alpha", alpha)
    if kind == "jsd" and not 0 <= beta <= 1:
        raise ValueError(f"beta: must lie in [0, 1], got {beta!r}; 0 is forward_kl and 1 is reverse_kl")
    if kind.startswith("skew_") and not 0 <= alpha < 1:
        raise ValueError(f"alpha: must lie in [0, 1), got {alpha!r}; 0 is the divergence without a mixture")


def topk(name: str, teacher, student_name: str, student: Tensor, kind: str, size: int | Tensor) -> None:
    """A sparse teacher, passed as the argument `name`, over the student's vocabulary of `size` tokens."""
    indices, log_probs, tail = teacher
    integers(f"{name}.indices", indices, "[..., k]")
    tensor(f"{name}.log_probs", log_probs, "[..., k]")
    same_shape(f"{name}.log_probs", log_probs, f"{name}.indices", indices)
    same_leading(f"{name}.indices", indices, student_name, student, student.dim() - 1)
    same_device(**{student_name: student, f"{name}.indices": indices, f"{name}.log_probs": log_probs})
    frozen(f"{name}.log_probs", log_probs)
    indices_in_range(f"{name}.indices", indices, size, "student's vocabulary")
    if kind == "mse":
        raise ValueError("kind='mse' compares logits, and TopK has none; use soft_ce or forward_kl")
    if kind == "reverse_kl" and tail is None:
        raise ValueError("kind='reverse_kl' is infinite where the teacher has no mass; pass TopK(..., tail=True)")
    if isinstance(tail, Tensor):
        mask(f"{name}.tail", tail, student.shape[:-1], "[...]")
        if not tail.is_floating_point():
            raise ValueError(
                f"{name}.tail: expected the log-mass of the remaining tokens in a floating dtype, got {describe(tail)}"
            )
        same_device(**{student_name: student, f"{name}.tail": tail})
        frozen(f"{name}.tail", tail)
    elif tail is not None and tail is not True:
        raise ValueError(
            f"{name}.tail: expected None, True or the log-mass of the remaining tokens [...], got {describe(tail)}"
        )
