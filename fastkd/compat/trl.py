"""The losses of TRL 1.16.0's distillation trainers, with its signatures, defaults and results.

They differ from the originals in three points: losses are float32 for half-precision logits, too; a loss of which nothing
counts is 0, never NaN; and no gradient flows to the teacher. `fastkd.patch("trl")` puts them in the trainers.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastkd import compat, functional

_GKD = "trl.experimental.gkd.gkd_trainer", "GKDTrainer.generalized_jsd_loss"
_GOLD = "trl.experimental.gold.gold_trainer", "GOLDTrainer.generalized_jsd_loss"
_IW_OPD = "trl.experimental.iw_opd.iw_opd_trainer", "IWOPDTrainer.generalized_jsd_loss"


def chunked_divergence_loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`trl.trainer.distillation_trainer._chunked_divergence_loss`: forward KL (beta 0), reverse KL (1) or generalized JSD.

    Heads that DeepSpeed ZeRO-3 has partitioned go to the original, which gathers them.

    Args:
        student_hidden_states: [B, K, Ds].
        teacher_hidden_states: [B, K, Dt].
        student_lm_head_weight, teacher_lm_head_weight: [V, Ds] and [V, Dt]; a DTensor is gathered once.
        completion_mask: [B, K], 1 where a position counts.
        beta: The teacher's weight in the mixture, in [0, 1].
        num_items_in_batch: What the sum is divided by; None: the number of positions that count.
        student_lm_head_bias, teacher_lm_head_bias: [V].
        student_logit_scale, teacher_logit_scale, student_final_logit_softcapping, teacher_final_logit_softcapping: The logits
            are softcap · tanh(scale · x / softcap).
        temperature: T > 0; the loss is not multiplied by T².

    Returns:
        The loss, the sum of the student's entropies, and the number of positions that count.
    """
    if any(hasattr(x, "ds_status") for x in (student_lm_head_weight, teacher_lm_head_weight)):
        return compat.original("trl.trainer.distillation_trainer", "_chunked_divergence_loss")(
            student_hidden_states, teacher_hidden_states, student_lm_head_weight, teacher_lm_head_weight, completion_mask,
            beta, num_items_in_batch, student_lm_head_bias, teacher_lm_head_bias, student_logit_scale,
            teacher_logit_scale, student_final_logit_softcapping, teacher_final_logit_softcapping, temperature,
        )  # fmt: skip
    valid = completion_mask != 0
    hidden, head, bias = _side(student_hidden_states, student_lm_head_weight, student_lm_head_bias, valid)
    with torch.no_grad():
        teacher = _side(teacher_hidden_states, teacher_lm_head_weight, teacher_lm_head_bias, valid)
    teacher = [None if x is None else x.detach() for x in teacher]
    scale, softcap = student_logit_scale, student_final_logit_softcapping
    # _side has cast what autocast would, and biases stay float32.
    with torch.autocast(hidden.device.type, enabled=False):
        loss, stats = functional.linear_divergence(
            hidden, head, *teacher[:2], student_bias=bias, teacher_bias=teacher[2], kind="jsd", beta=beta,
            temperature=temperature, t_squared=False, logit_scale=(scale, teacher_logit_scale),
            logit_softcap=(softcap, teacher_final_logit_softcapping), num_items_in_batch=num_items_in_batch,
            return_stats=True,
        )  # fmt: skip
    return loss, stats.student_entropy.sum(), valid.sum()


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """`trl.experimental.gkd.GKDTrainer.generalized_jsd_loss`. A reduction that keeps single elements goes to the original.

    Args:
        student_logits: [B, S, V].
        teacher_logits: [B, S, V].
        labels: [B, S]; positions labelled -100 do not count.
        beta: The teacher's weight in the mixture, in [0, 1]; 0 is forward KL and 1 reverse KL.
        temperature: T > 0; the loss is not multiplied by T².
        reduction: "batchmean" over the positions that count (without labels: over B), "sum", "mean" over the elements, or
            "none", the elements that count.
        num_items_in_batch: Where given, the sum is divided by it whatever `reduction` is.
    """
    if _keeps_elements(reduction, num_items_in_batch):
        return compat.original(*_GKD)(student_logits, teacher_logits, labels, beta, temperature, reduction)
    return _jsd_loss(student_logits, teacher_logits, labels, beta, temperature, reduction, num_items_in_batch)


def gold_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    logits_are_probs: bool = False,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """`trl.experimental.gold.GOLDTrainer.generalized_jsd_loss`: `generalized_jsd_loss`; probabilities go to the original.

    Args:
        student_logits, teacher_logits, labels, beta, temperature, reduction, num_items_in_batch: As for
            `generalized_jsd_loss`.
        logits_are_probs: The arguments are probabilities, not logits.
    """
    if logits_are_probs or _keeps_elements(reduction, num_items_in_batch):
        return compat.original(*_GOLD)(
            student_logits, teacher_logits, labels, beta, temperature, reduction, logits_are_probs, num_items_in_batch
        )
    return _jsd_loss(student_logits, teacher_logits, labels, beta, temperature, reduction, num_items_in_batch)


def iw_opd_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    top_k: int = 0,
    add_tail: bool = True,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """`trl.experimental.iw_opd.IWOPDTrainer.generalized_jsd_loss`: `generalized_jsd_loss`; top_k > 0 goes to the original.

    Args:
        student_logits, teacher_logits, labels, beta, temperature, reduction, num_items_in_batch: As for
            `generalized_jsd_loss`.
        top_k: Compare the top_k likeliest tokens only; 0: all tokens.
        add_tail: With top_k, all other tokens are one more.
    """
    some_tokens = 0 < top_k < student_logits.shape[-1]
    if some_tokens or _keeps_elements(reduction, num_items_in_batch):
        return compat.original(*_IW_OPD)(
            student_logits, teacher_logits, labels, beta, temperature, reduction, top_k, add_tail, num_items_in_batch
        )
    return _jsd_loss(student_logits, teacher_logits, labels, beta, temperature, reduction, num_items_in_batch)


def _keeps_elements(reduction: str, num_items_in_batch: Tensor | int | None) -> bool:
    """Whether single elements are asked for, which no kernel gives."""
    return num_items_in_batch is None and reduction not in ("batchmean", "sum", "mean")


def _jsd_loss(student_logits, teacher_logits, labels, beta, temperature, reduction, num_items_in_batch) -> Tensor:
    if num_items_in_batch is not None:
        ours = "mean"
    elif reduction == "batchmean" and labels is not None:
        ours = "mean"  # over the rows that count
    else:
        ours = reduction
    loss = functional.divergence(
        student_logits, teacher_logits.detach(), kind="jsd", beta=beta, temperature=temperature, t_squared=False,
        labels=labels, reduction=ours, num_items_in_batch=num_items_in_batch,
    )  # fmt: skip
    per_element = num_items_in_batch is None and reduction == "mean"
    return loss / student_logits.shape[-1] if per_element else loss


def _side(hidden: Tensor, head: Tensor, bias: Tensor | None, valid: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The valid rows [N, D], and the head in their dtype: that of autocast, or their own."""
    if isinstance(head, DTensor):
        head = head.full_tensor()
        bias = None if bias is None else bias.full_tensor()
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return hidden[valid].to(dtype), head.to(dtype), bias
