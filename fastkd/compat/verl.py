"""verl's distillation from the teacher's k most likely tokens, under FSDP: `forward_kl_topk`, and the same with the rest.

`register()` replaces the function that verl's logits processor calls, and registers one more loss, `loss_mode:
forward_kl_topk_tail`. "forward_kl_topk" keeps verl's numbers; a kernel computes it where `log_prob_min_clamp` is null, and
verl itself where log-probabilities are clamped or sequences are sharded. As its masses are not those of distributions, it can
be negative, and verl clamps it. The tail makes all other tokens one more, so that the loss is a KL, which is never negative.
"""

import torch
from torch import Tensor
from verl.trainer.distillation import losses
from verl.utils.ulysses import get_ulysses_sequence_parallel_world_size

from fastkd import compat, functional
from fastkd.functional import TopK

TAIL = "forward_kl_topk_tail"
TAIL_SETTINGS = losses.DistillationLossSettings(names=[TAIL], use_topk=True)
forward_kl_topk_tail = losses.compute_forward_kl_topk  # reads what the logits processor computed, and reports masses


def register() -> compat.patch:
    """Registers both losses in verl, until `.undo()` or the end of a `with` block.

    Example:
        >>> registered = fastkd.compat.verl.register()  # doctest: +SKIP
        >>> print(registered)  # doctest: +SKIP
    """
    return compat.patch("verl")


def compute_forward_kl_topk(
    student_logits: Tensor, teacher_topk_log_probs: Tensor, teacher_topk_ids: Tensor, config, data_format: str
) -> dict[str, Tensor]:
    """`verl.trainer.distillation.fsdp.losses.compute_forward_kl_topk`.

    Args:
        student_logits: [1, T, V], the tokens of all sequences.
        teacher_topk_log_probs: Nested [B, T_b, k].
        teacher_topk_ids: Nested [B, T_b, k].
        config: verl's DistillationConfig.
        data_format: "thd" or "bshd"; passed on.

    Returns:
        distillation_losses, student_mass, teacher_mass, overlap_count, overlap_token_advantage, each [1, T].
    """
    tail = config.distillation_loss.loss_mode == TAIL
    sharded = get_ulysses_sequence_parallel_world_size() > 1
    if sharded or (config.distillation_loss.log_prob_min_clamp is not None and not tail):
        if tail:
            raise ValueError(f"loss_mode: {TAIL} takes no sequences sharded over ranks; use forward_kl_topk")
        original = compat.original("verl.trainer.distillation.fsdp.losses", "compute_forward_kl_topk")
        return original(student_logits, teacher_topk_log_probs, teacher_topk_ids, config, data_format)
    log_probs = teacher_topk_log_probs.values()[None].detach().float()  # [1, T, k]
    ids = teacher_topk_ids.values()[None]
    if ids.shape[:2] != student_logits.shape[:2]:
        raise ValueError(
            f"teacher_topk_ids: expected the tokens of student_logits {list(student_logits.shape)}, got {list(ids.shape)}"
        )
    teacher = TopK(ids, log_probs, tail=True if tail else None)
    kl = functional.divergence(student_logits, teacher, reduction="none")  # [1, T]
    return {"distillation_losses": kl, **_overlap(student_logits.detach(), log_probs, ids)}


@torch.no_grad()
def _overlap(student_logits: Tensor, teacher_log_probs: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """The masses of the teacher's tokens, and what verl reports of those that are the student's most likely ones as well."""
    log_z = student_logits.float().logsumexp(-1, keepdim=True)  # [1, T, 1]
    student_log_probs = student_logits.gather(-1, ids).float() - log_z  # [1, T, k]
    student_ids = student_logits.topk(ids.shape[-1], dim=-1).indices
    shared = (ids[..., None] == student_ids[..., None, :]).any(-1)  # [1, T, k]
    count = shared.sum(-1)
    advantage = teacher_log_probs.exp() * (student_log_probs - teacher_log_probs)
    return {
        "student_mass": student_log_probs.exp().sum(-1),
        "teacher_mass": teacher_log_probs.exp().sum(-1),
        "overlap_count": count,
        "overlap_token_advantage": (advantage * shared).sum(-1) / count.clamp_min(1),
    }
