"""DecoupledKDLoss against the released code, and against the identity that it is named after."""

import pytest
import torch
import torch.nn.functional as F

import fastkd
from cases import gradients, randn, relative_error

LABELS = torch.tensor([0, 8, 3, 3, 5])


def released(student, teacher, labels, alpha, beta, temperature):
    """mdistiller's dkd_loss, whose mask of the label is -1000."""
    label = torch.zeros_like(student).scatter(1, labels[:, None], 1)
    p, q = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
    p, q = (torch.stack([(x * label).sum(1), (x * (1 - label)).sum(1)], 1) for x in (p, q))
    tckd = F.kl_div(q.log(), p, reduction="sum") * temperature**2 / len(labels)
    p, q = ((x / temperature - 1000 * label) for x in (teacher, student))
    nckd = F.kl_div(q.log_softmax(1), p.softmax(1), reduction="sum") * temperature**2 / len(labels)
    return alpha * tckd + beta * nckd


@pytest.mark.parametrize(("dtype", "limits"), [(torch.float64, (1e-12, 1e-12)), (torch.float32, (1e-6, 1e-5))])
@pytest.mark.parametrize("options", [(1.0, 8.0, 4.0), (1.0, 0.0, 1.0), (0.0, 1.0, 2.0), (0.5, 2.0, 0.7)])
def test_is_the_released_loss(options, dtype, limits):
    student, teacher = randn(5, 9, seed=1, scale=2.0).to(dtype), randn(5, 9, seed=2, scale=3.0).to(dtype)
    loss, grads = gradients(lambda s: fastkd.DecoupledKDLoss(*options)(s, teacher, LABELS), student)
    wanted, wanted_grads = gradients(lambda s: released(s, teacher.double(), LABELS, *options), student.double())
    assert relative_error(loss, wanted) < limits[0] and relative_error(grads[0], wanted_grads[0]) < limits[1]


def test_the_parts_with_their_own_weights_are_hintons():
    """One row: KL = TCKD + (1 - p_y) NCKD."""
    student, teacher = randn(1, 9, seed=1), randn(1, 9, seed=2)
    rest = 1 - float((teacher / 2).softmax(-1)[0, 4])
    loss = fastkd.DecoupledKDLoss(1.0, rest, 2.0)(student, teacher, torch.tensor([4]))
    assert relative_error(loss, fastkd.divergence(student, teacher, temperature=2.0)) < 1e-13


def test_gradcheck_and_what_does_not_count():
    loss = fastkd.DecoupledKDLoss(temperature=2.0)
    student, teacher = randn(2, 3, 4, seed=1).requires_grad_(), randn(2, 3, 4, seed=2)
    labels, mask = torch.tensor([[0, 3, -100], [1, 1, 2]]), torch.tensor([[1, 1, 1], [0, 1, 1]])
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, labels, mask), student)
    count = (labels != -100) & (mask == 1)
    with torch.no_grad():
        spoilt = torch.where(count[..., None], student, torch.nan).requires_grad_()
    few = loss(student[count], teacher[count], labels[count])
    assert relative_error(loss(spoilt, teacher, labels, mask), few) < 1e-13
    (grad,) = torch.autograd.grad(loss(spoilt, teacher, labels, mask), spoilt)
    assert (grad[~count] == 0).all() and grad.isfinite().all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"labels": torch.full((5,), 9)}, r"labels: indices must lie in \[0, 9\)"),
        ({"labels": torch.zeros(5)}, "labels: expected int64"),
        ({"teacher_logits": torch.zeros(5, 8)}, "teacher_logits and student_logits must have the same shape"),
        ({"teacher_logits": torch.zeros(5, 9, requires_grad=True)}, "teacher_logits requires grad"),
        ({"student_logits": torch.zeros(5, 1), "teacher_logits": torch.zeros(5, 1)}, "at least two classes"),
    ],
)
def test_errors_name_the_argument(change, said):
    arguments = {"student_logits": torch.zeros(5, 9), "teacher_logits": torch.zeros(5, 9), "labels": LABELS} | change
    with pytest.raises(ValueError, match=said):
        fastkd.DecoupledKDLoss()(**arguments)
