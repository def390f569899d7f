"""Divergences from hidden states and LM heads: eager PyTorch, and GLMKD's way; the logits of both are written down."""

import torch.nn.functional as F
from fastkd.bench.baselines import divergence


def eager(
    student_hidden, student_head, teacher_hidden, teacher_head, *, student_bias=None, teacher_bias=None, **options
):
    """As divergence.eager: [N, D] and heads [V, D] -> [N]."""
    student = F.linear(student_hidden, student_head, student_bias)
    return divergence.eager(student, F.linear(teacher_hidden, teacher_head, teacher_bias), **options)


HIDDEN = ("student_hidden", "student_head", "teacher_hidden", "teacher_head")


def eager_case(x: dict, options: dict):
    return eager(*(x[name] for name in HIDDEN), **options).mean()


def authors_case(x: dict, options: dict):
    logits = {side: F.linear(x[f"{side}_hidden"], x[f"{side}_head"]) for side in ("student", "teacher")}
    return divergence.authors_case(logits, options)
