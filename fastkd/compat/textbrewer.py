"""TextBrewer's losses that fastkd's kernels carry, with its names, arguments and results.

`register()` puts them into `KD_LOSS_MAP` and `MATCH_LOSS_MAP`, so that a `DistillationConfig` stays as it is. What a kernel
does not cover (fractional masks, masked attention, a teacher that learns) is computed by the original. Where a mask hides
everything, the loss is 0 here and NaN there.
"""

import torch
from textbrewer import losses as originals
from torch import Tensor

from fastkd import checks, compat, functional
from fastkd.compat import soft_labels


def register() -> compat.patch:
    """Puts these functions into TextBrewer's maps in place of its own, until `.undo()` or the end of a `with` block.

    Example:
        >>> with fastkd.compat.textbrewer.register() as registered:  # doctest: +SKIP
        ...     print(registered)
    """
    return compat.patch("textbrewer")


def kd_ce_loss(logits_S: Tensor, logits_T: Tensor, temperature=1) -> Tensor:
    """Cross entropy between softened labels, without T²; the mean over rows.

    Args:
        logits_S: [B, C] or [B, L, C].
        logits_T: [B, C] or [B, L, C].
        temperature: A number, or a tensor with one temperature per row, as TextBrewer's schedulers return.
    """
    if not soft_labels.takes(logits_S, logits_T):
        return originals.kd_ce_loss(logits_S, logits_T, temperature)
    student, teacher, T = _softened(logits_S, logits_T, temperature)
    loss = functional.divergence(student, teacher, kind="soft_ce", temperature=T, t_squared=False)
    return soft_labels.like_softmax(loss, logits_S, logits_T)


def kd_mse_loss(logits_S: Tensor, logits_T: Tensor, temperature=1) -> Tensor:
    """Mean squared difference of the softened logits.

    Args:
        logits_S: [B, C] or [B, L, C].
        logits_T: [B, C] or [B, L, C].
        temperature: A number, or a tensor with one temperature per row.
    """
    if not soft_labels.takes(logits_S, logits_T):
        return originals.kd_mse_loss(logits_S, logits_T, temperature)
    student, teacher, T = _softened(logits_S, logits_T, temperature)
    loss = functional.divergence(student, teacher, kind="mse") / (student.shape[-1] * T**2)
    return loss.to(torch.promote_types(logits_S.dtype, logits_T.dtype))


def hid_mse_loss(state_S: Tensor, state_T: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference of hidden states over the real tokens.

    Args:
        state_S: [B, L, D].
        state_T: [B, L, D].
        mask: [B, L], 1 = real token.
    """
    if not _comparable(state_S, state_T) or not (mask is None or _is_zero_one(mask, state_S)):
        return originals.hid_mse_loss(state_S, state_T, mask)
    return _mean_squares(state_S, state_T, mask=mask)


def att_mse_loss(attention_S: Tensor, attention_T: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference of attention scores; without a mask, values <= -0.001 count as 0 on either side.

    Args:
        attention_S: [B, H, L, L].
        attention_T: [B, H, L, L].
        mask: [B, L], 1 = real token. The original computes the masked loss.
    """
    if mask is not None or not _comparable(attention_S, attention_T):
        return originals.att_mse_loss(attention_S, attention_T, mask)
    return _mean_squares(attention_S, attention_T, clamp=-1e-3)


def att_mse_sum_loss(attention_S: Tensor, attention_T: Tensor, mask: Tensor | None = None) -> Tensor:
    """`att_mse_loss` of the sums over the heads, whose number may differ between the sides.

    Args:
        attention_S: [B, H, L, L] or [B, L, L].
        attention_T: [B, H, L, L] or [B, L, L].
        mask: [B, L], 1 = real token. The original computes the masked loss.
    """
    if mask is not None:
        return originals.att_mse_sum_loss(attention_S, attention_T, mask)
    if attention_S.dim() == 4:
        attention_S, attention_T = attention_S.sum(1), attention_T.sum(1)
    if not _comparable(attention_S, attention_T):
        return originals.att_mse_sum_loss(attention_S, attention_T)
    return _mean_squares(attention_S, attention_T, clamp=-1e-3)


def _softened(logits_S: Tensor, logits_T: Tensor, temperature) -> tuple[Tensor, Tensor, float]:
    """Logits and the number that still divides them: a temperature of its own for each row divides them here."""
    if not isinstance(temperature, Tensor):
        return logits_S, logits_T, float(temperature)
    temperature = temperature[..., None] if temperature.dim() else temperature
    return logits_S / temperature, logits_T / temperature, 1.0


def _comparable(student: Tensor, teacher: Tensor) -> bool:
    return soft_labels.takes(student, teacher) and student.dim() >= 2


def _is_zero_one(mask: Tensor, state: Tensor) -> bool:
    """A mask [B, L] that selects tokens, as TextBrewer documents it; a fractional one weighs them."""
    if mask.shape != state.shape[:2]:
        return False
    if mask.dtype == torch.bool or not checks.looks_are_free(mask):
        return not mask.is_floating_point()
    return bool(((mask == 0) | (mask == 1)).all())


def _mean_squares(student: Tensor, teacher: Tensor, **options) -> Tensor:
    cost = functional.layer_costs([student], [teacher], **options).squeeze()
    return cost.to(torch.promote_types(student.dtype, teacher.dtype))
