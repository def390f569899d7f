"""Divergences from hidden states and LM heads: eager PyTorch, and GLMKD's way; the logits of both are written down."""

import torch.nn.functional as F
from fastkd.bench.baselines import divergence


def eager(
    student_hidden, student_head, teacher_hidden, teacher_head, *, student_bias=None, teacher_bias=None, **options
):
    """As divergence.eager: [N, D] and heads [V, D] -> [N]."""
    student = F.linear(student_hidden, student_head, student_bias)
    return divergence.eager(student, F.linear(teacher_hidden, teacher_head, teacher_bias), **options)


def authors(student_hidden, student_head, teacher_hidden, teacher_head, *, student_bias=None, teacher_bias=None,
            vocab=None, memory="speed", **options):  # fmt: skip
    """As divergence.authors; the kept columns of the teacher's logits are gathered."""
    student = F.linear(student_hidden, student_head, student_bias)
    teacher = F.linear(teacher_hidden, teacher_head, teacher_bias)
    if vocab is not None:
        teacher = teacher[..., getattr(vocab, "kept_ids", vocab).to(teacher.device)]
    return divergence.authors(student, teacher, **options)


HIDDEN = ("student_hidden", "student_head", "teacher_hidden", "teacher_head")


def eager_case(x: dict, options: dict):
    return eager(*(x[name] for name in HIDDEN), **options).mean()


def authors_case(x: dict, options: dict):
    return authors(
        *(x[name] for name in HIDDEN), mask=x["student_hidden"].new_ones(len(x["student_hidden"])), **options
    )
