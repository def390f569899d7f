"""Which tokens of the teacher a student with a smaller vocabulary is compared with."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import checks

# Kinds whose value over the kept tokens follows from the divergence over them and the teacher's mass on them.
PARTIAL_KINDS = ("forward_kl", "reverse_kl", "soft_ce")


class Heads(NamedTuple):
    """Rows for the same tokens on both sides, and the kept and dropped ids where the teacher has other tokens too."""

    student: tuple[Tensor, Tensor | None]  # head [V, D], bias [V]
    teacher: tuple[Tensor, Tensor | None]
    parts: tuple[Tensor, Tensor] | None = None  # kept and dropped ids


def aligned(vocab, teacher_tokens: str, kind: str, student: tuple, teacher: tuple) -> Heads:
    """student, teacher: (head [V, D], bias [V] or None), over the student's and over the teacher's vocabulary."""
    checks.one_of("teacher_tokens", teacher_tokens, ("kept", "all"))
    if vocab is None:
        heads = Heads(student, teacher)
    elif teacher_tokens == "kept":
        heads = Heads(student, _kept_rows(vocab, *teacher))
    elif getattr(vocab, "has_stand_ins", False):
        heads = _with_stand_ins(vocab, student, teacher)
    else:
        heads = _partial(vocab, kind, student, teacher)
    _check_sizes(heads.student[0].shape[0], heads.teacher[0].shape[0])
    return heads


def _with_stand_ins(vocab, student: tuple, teacher: tuple) -> Heads:
    size, ours, theirs = vocab.original_size, student[0].shape[0], teacher[0].shape[0]
    if ours != len(vocab):
        raise ValueError(f"student_head: expected the {len(vocab)} tokens that vocab keeps, got {ours}")
    if theirs < size:
        raise ValueError(f"teacher_head: expected the {size} tokens that vocab was made for, got {theirs}")
    teacher = tuple(None if x is None else x[:size] for x in teacher)
    return Heads(tuple(_expanded(x, vocab.position_of) for x in student), teacher)


def _partial(vocab, kind: str, student: tuple, teacher: tuple) -> Heads:
    if kind not in PARTIAL_KINDS:
        raise ValueError(
            f"kind={kind!r} needs both distributions over the whole vocabulary, which teacher_tokens='all' has only with "
            "stand-ins; pass a VocabMap with a replacement, or teacher_tokens='kept'"
        )
    rows = _kept_rows(vocab, *teacher)
    ids = vocab if isinstance(vocab, Tensor) else vocab.kept_ids
    size = teacher[0].shape[0] if isinstance(vocab, Tensor) else vocab.original_size
    once = lambda: ids.unique().numel() == ids.numel()  # noqa: E731 (called only where values may be read)
    checks.values("vocab", ids, once, "with teacher_tokens='all', an id may be kept only once")
    kept = torch.zeros(size, dtype=torch.bool, device=ids.device).index_fill(0, ids.long(), True)
    dropped = torch.nonzero_static(~kept, size=max(size - ids.shape[0], 0), fill_value=0)[:, 0]
    return Heads(student, rows, (ids, dropped) if len(dropped) else None)


def weighting(kind: str, log_mass: Tensor, factor: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(a, b) [N]: with p the teacher's probabilities, of which the compared tokens have e^log_mass, and p' = p / e^log_mass,
    factor · sum p (log p - log q), sum -p log q or sum q (log q - log p) is a · (the same of p') + b."""
    mass = log_mass.exp()
    if kind == "reverse_kl":
        a, b = torch.ones_like(mass), -log_mass
    elif kind == "soft_ce":
        a, b = mass, torch.zeros_like(mass)
    else:
        a, b = mass, torch.where(mass > 0, mass * log_mass, 0)
    return a.to(dtype), (factor * b).to(dtype)


def _expanded(x: Tensor | None, position_of: Tensor) -> Tensor | None:
    """Rows of the whole vocabulary, where a dropped token has its stand-in's. A stand-in's gradient is a sum over many tokens:
    in float32, and by an operation that is deterministic everywhere."""
    if x is None:
        return None
    wide = x if x.dtype == torch.float64 else x.float()
    return F.embedding(position_of.to(x.device), wide.reshape(len(x), -1)).reshape(-1, *x.shape[1:]).to(x.dtype)


def _kept_rows(vocab, head: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if hasattr(vocab, "slice_head"):
        return vocab.slice_head(head, bias)
    checks.integers("vocab", vocab, "[K]")
    checks.indices_in_range("vocab", vocab, head.shape[0], "rows of teacher_head")
    return head[vocab], None if bias is None else bias[vocab]


def _check_sizes(ours: int, theirs: int) -> None:
    if ours != theirs:
        low, high = sorted((ours, theirs))
        raise ValueError(
            f"student_head has {ours} tokens and teacher_head {theirs}: ids {low} to {high - 1} are on one side only; if "
            f"the student's vocabulary is a subset, pass vocab=; if they are padding, slice both heads to [:{low}]"
        )
