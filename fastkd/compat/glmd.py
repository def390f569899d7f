"""GLMD as its authors' code calls it: `CustomLoss` of distill/custom_loss.py, and the loss of `LogitsDistil`.

For one model-parallel rank. `fastkd.GLMDLoss` is the same with named options.
"""

import torch
from torch import Tensor

from fastkd import functional
from fastkd.losses.glmd import GLMDLoss


class CustomLoss:
    """The released divergences. Divide logits by T before, and multiply by T² afterwards, as the released callers do.

    All take `input` (student) and `target` (teacher) [..., V], and:

    - input_mask: [...] or [..., 1], 0 or 1. Released, it multiplies the logits, so that a masked row compares two uniform
      distributions: its KL and MSE are 0, its cross entropy log V, and it stays in the denominator.
    - mask: [...] or [..., 1], multiplies each row's loss; the denominator stays.
    - keep_batch: Return one loss per example, the mean over the other axes.
    - parallel: "gather" is for several model-parallel ranks, which are not supported; one rank's result does not depend on it.

    Example:
        >>> student, teacher = torch.randn(2, 6, 50, requires_grad=True), torch.randn(2, 6, 50)
        >>> loss = fastkd.compat.glmd.CustomLoss.kl_div(student / 15, teacher / 15) * 15**2
        >>> loss.backward()
    """

    @classmethod
    def kl_div(cls, input: Tensor, target: Tensor, parallel: str = "", **kwargs) -> Tensor:
        """KL(softmax(target) ‖ softmax(input)), summed over V."""
        return _mean_of_rows("forward_kl", input, target, **kwargs)

    @classmethod
    def cross_entropy(cls, input: Tensor, target: Tensor, parallel: str = "", **kwargs) -> Tensor:
        """-Σ softmax(target) log_softmax(input)."""
        return _mean_of_rows("soft_ce", input, target, **kwargs)

    @classmethod
    def mse_loss(cls, input: Tensor, target: Tensor, **kwargs) -> Tensor:
        """The mean squared difference, over V as well."""
        return _mean_of_rows("mse", input, target, **kwargs) / input.shape[-1]


def logits_distil_loss(
    s_logits: Tensor, t_logits: Tensor, args, *, position_ids: Tensor | None = None, vocab=None
) -> Tensor:
    """The token-prediction loss of the released `LogitsDistil`, from its command-line arguments.

    Args:
        s_logits: [B, S, V], or with `vocab` [B, S, K] in the order of its kept ids.
        t_logits: [B, S, V].
        args: distill_temperature (1 if it is missing), logitsdistil_mask_pad, logitsdistil_mse, logitsdistil_top_n (a number
            of tokens, or a fraction below 1) and logitsdistil_teacher_min; those that are missing are off.
        position_ids: [B, 2, S], GLM's; padding has position 0, and the first token is never padding. Needed for
            logitsdistil_mask_pad.
        vocab: A `fastkd.VocabMap`, for a student with a smaller vocabulary (distill_logit_mask_map, unmap_vocab_output).

    Returns:
        A scalar.

    Example:
        >>> from types import SimpleNamespace
        >>> args = SimpleNamespace(distill_temperature=15.0, logitsdistil_top_n=5)
        >>> s_logits, t_logits = torch.randn(2, 6, 50, requires_grad=True), torch.randn(2, 6, 50)
        >>> fastkd.compat.glmd.logits_distil_loss(s_logits, t_logits, args).backward()
    """
    mask = None
    if getattr(args, "logitsdistil_mask_pad", False):
        if position_ids is None:
            raise ValueError("position_ids: args.logitsdistil_mask_pad needs GLM's position ids [B, 2, S]; pass them")
        mask = position_ids[:, 0] > 0  # [B, S]
        mask[:, 0] = True
    top_n = getattr(args, "logitsdistil_top_n", None) or None
    loss = GLMDLoss(
        getattr(args, "distill_temperature", 1.0),
        vocab=vocab,
        top_n=top_n if top_n is None or 0 < top_n < 1 else int(top_n),
        teacher_min=top_n is not None and getattr(args, "logitsdistil_teacher_min", False),
        mse=getattr(args, "logitsdistil_mse", False),
    )
    return loss(s_logits, t_logits, mask)


def _mean_of_rows(kind: str, student: Tensor, teacher: Tensor, input_mask=None, mask=None, keep_batch=False, **kwargs):
    """The mean over all rows, masked ones included, of the divergence of each; or one mean per example."""
    shape = student.shape[:-1]
    input_mask, mask = (_per_row(x, shape) for x in (input_mask, mask))
    options = {"kind": kind, "t_squared": False}
    if mask is None and not keep_batch and not (kind == "soft_ce" and input_mask is not None):
        total = functional.divergence(student, teacher, mask=input_mask, reduction="sum", **options)
        return total / shape.numel()
    rows = functional.divergence(student, teacher, mask=input_mask, reduction="none", **options)  # [...]
    if kind == "soft_ce" and input_mask is not None:
        uniform = torch.tensor(float(student.shape[-1]), device=rows.device).log().to(rows.dtype)
        rows = torch.where(input_mask != 0, rows, uniform)
    rows = rows if mask is None else rows * mask
    return rows.flatten(1).mean(1) if keep_batch and rows.dim() > 1 else rows if keep_batch else rows.mean()


def _per_row(mask, shape) -> Tensor | None:
    if mask is None or isinstance(mask, (int, float)):
        if mask not in (None, 1):
            raise ValueError(f"mask: expected a tensor, 1 or None, got {mask!r}")
        return None
    return mask[..., 0] if mask.dim() == len(shape) + 1 else mask
