"""Divergences from hidden states and LM heads: eager PyTorch, and GLMKD's way; the logits of both are written down."""

import torch.nn.functional as F
from fastkd.bench.baselines import divergence


def eager(
    student_hidden, student_head, teacher_hidden, teacher_head, *, student_bias=None, teacher_bias=None, **options
):
    """As divergence.eager: [N, D] and heads [V, D] -> [N]."""
    student = F.linear(student_hidden, student_head, student_bias)
    return divergence.eager(student, F.linear(teacher_hidden, teacher_head, teacher_bias), **options)


def authors(student_hidden, student_head, teacher_hidden, teacher_head, *, student_bias=None, teacher_bias=None, vocab=None,
            kind="forward_kl", temperature=1.0, t_squared=True, beta=0.5, alpha=0.1, mask=None, labels=None,
            hard_weight=0.0, ignore_index=-100, reduction="mean", recompute_logits=False, num_valid=None):  # fmt: skip
    """The logits of both sides in full, the teacher's kept columns gathered, and the cross-entropy as a loss of its own."""
    student = F.linear(student_hidden, student_head, student_bias)
    teacher = F.linear(teacher_hidden, teacher_head, teacher_bias)
    if vocab is not None:
        teacher = teacher[..., getattr(vocab, "kept_ids", vocab).to(teacher.device)]
    loss = divergence.authors(
        student, teacher, kind=kind, temperature=temperature, t_squared=t_squared, beta=beta, alpha=alpha, mask=mask,
        labels=labels, ignore_index=ignore_index, reduction=reduction,
    )  # fmt: skip
    if hard_weight:
        counted = labels if mask is None else labels.masked_fill(mask == 0, ignore_index)
        logits = student.float().flatten(0, -2)
        hard = F.cross_entropy(logits, counted.flatten(), ignore_index=ignore_index, reduction=reduction)
        loss = loss + hard_weight * (hard.reshape(loss.shape) if reduction == "none" else hard)
    return loss


HIDDEN = ("student_hidden", "student_head", "teacher_hidden", "teacher_head")


def eager_case(x: dict, options: dict):
    return eager(*(x[name] for name in HIDDEN), **options).mean()


def authors_case(x: dict, options: dict):
    logits = {side: F.linear(x[f"{side}_hidden"], x[f"{side}_head"]) for side in ("student", "teacher")}
    return divergence.authors_case(logits, options)
