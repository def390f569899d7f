"""EmbeddingLoss against its formula in float64, and its mistakes."""

import pytest
import torch

import fastkd
from cases import gradients, randn, relative_error


def by_hand(student, teacher, cosine, mse, contrast, temperature):
    loss, cosines = 0.0, torch.stack([torch.stack([s @ t / (s.norm() * t.norm()) for t in teacher]) for s in student])
    for i in range(len(student)):
        loss = loss + cosine * (1 - cosines[i, i]) + mse * ((student[i] - teacher[i]) ** 2).mean()
        loss = loss - contrast * (cosines[i, i] / temperature - torch.logsumexp(cosines[i] / temperature, 0))
    return loss / len(student)


@pytest.mark.parametrize("weights", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.5, 2, 0.1)])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_formula(weights, dtype, allowed):
    student, teacher = randn(5, 7, seed=1, dtype=dtype), randn(5, 7, seed=2, dtype=dtype)
    loss = fastkd.EmbeddingLoss(*weights, temperature=0.3)
    value, (gradient,) = gradients(lambda s: loss(s, teacher), student)
    wanted, (wanted_gradient,) = gradients(lambda s: by_hand(s, teacher.double(), *weights, 0.3), student.double())
    assert relative_error(value, wanted) < allowed and relative_error(gradient, wanted_gradient) < allowed


def test_a_teacher_in_half_precision_and_from_inference_mode():
    student = randn(5, 7, seed=1, dtype=torch.float32).requires_grad_()
    with torch.inference_mode():
        teacher = randn(5, 7, seed=2, dtype=torch.bfloat16)
    loss = fastkd.EmbeddingLoss(1, 1, 1)(student, teacher)
    loss.backward()
    assert loss.dtype == torch.float32 and relative_error(loss, by_hand(student, teacher.float(), 1, 1, 1, 0.05)) < 1e-5


@pytest.mark.parametrize(
    ("options", "student", "teacher", "message"),
    [
        ({}, (4, 7), (4, 8), "project the student to the teacher's width first, for example with fastkd.Projection"),
        ({}, (4, 3, 7), (4, 3, 7), r"student_embedding: expected shape \[B, D\]"),
        ({"cosine": 0.0}, (4, 7), (4, 7), "cosine, mse, contrast: all have the weight 0"),
        ({"mse": "1"}, (4, 7), (4, 7), "mse: expected a finite number, got '1'"),
        ({"temperature": 0}, (4, 7), (4, 7), "temperature: must be a finite number > 0"),
    ],
)
def test_mistakes(options, student, teacher, message):
    with pytest.raises(ValueError, match=message):
        fastkd.EmbeddingLoss(**options)(torch.randn(student), torch.randn(teacher))


def test_the_teacher_gets_no_gradient():
    with pytest.raises(ValueError, match="teacher_embedding requires grad"):
        fastkd.EmbeddingLoss()(torch.randn(4, 7), torch.randn(4, 7, requires_grad=True))
