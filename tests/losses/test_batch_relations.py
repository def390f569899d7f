"""SP, CC, PKT, RKD and DIST against the released formulas, written out in float64; and torchdistill's, where it is installed."""

import importlib.util
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import fastkd
from cases import gradients, randn, relative_error

LIMITS = {torch.float64: (1e-11, 1e-10), torch.float32: (2e-5, 2e-5)}


def sp(s, t):
    grams = [x @ x.T for x in (s, t)]
    s, t = (g / g.norm(dim=1, keepdim=True) for g in grams)
    return ((s - t) ** 2).sum() / len(s) ** 2


def cc(s, t, gamma=0.4, order=2):
    def kernel(x, y):
        dot = (x @ y) / (x.norm() * y.norm())
        return math.exp(-2 * gamma) * sum((2 * gamma * dot) ** p / math.factorial(p) for p in range(order + 1))

    pairs = itertools.product(range(len(s)), repeat=2)
    return sum((kernel(s[i], s[j]) - kernel(t[i], t[j])) ** 2 for i, j in pairs) / len(s) ** 2


def pkt(s, t, eps=1e-7):
    q, p = ((x @ x.T + 1) / 2 for x in (y / (y.norm(dim=1, keepdim=True) + eps) for y in (s, t)))
    q, p = (x / x.sum(1, keepdim=True) for x in (q, p))
    return (p * torch.log((p + eps) / (q + eps))).mean()


def rkd(s, t, distance=1.0, angle=2.0):
    n = len(s)

    def distances(x):
        d = torch.stack([(x[i] - x[j]).norm() for i in range(n) for j in range(n) if i != j])
        return torch.cat([d / d.mean(), d.new_zeros(n)])  # a vector is at distance 0 from itself

    def angles(x):
        unit = [[F.normalize(x[j] - x[i], dim=0) for j in range(n)] for i in range(n)]
        return torch.stack([unit[i][j] @ unit[i][k] for i, j, k in itertools.product(range(n), repeat=3)])

    return distance * F.smooth_l1_loss(distances(s), distances(t)) + angle * F.smooth_l1_loss(angles(s), angles(t))


def dist(s, t, beta=2.0, gamma=0.5, tau=4.0):
    def one_minus_pearson(a, b):
        return 1 - F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), eps=1e-8).mean()

    s, t = (s / tau).softmax(1), (t / tau).softmax(1)
    return tau**2 * (beta * one_minus_pearson(s, t) + gamma * one_minus_pearson(s.T, t.T))


OF_VECTORS = {"SPLoss": sp, "CCLoss": cc, "PKTLoss": pkt, "RKDLoss": rkd}


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", OF_VECTORS)
def test_is_the_released_loss_of_vectors(name, dtype):
    for seed, (batch, width, teacher_width) in enumerate(((2, 3, 3), (7, 12, 20), (9, 33, 5))):
        student, teacher = (
            randn(batch, width, seed=seed, dtype=dtype),
            3 * randn(batch, teacher_width, seed=9, dtype=dtype),
        )
        value, grads = gradients(lambda x, t=teacher: getattr(fastkd, name)()(x, t), student)
        wanted, wanted_grads = gradients(lambda x, t=teacher: OF_VECTORS[name](x, t.double()), student.double())
        assert value.dtype == dtype
        assert relative_error(value, wanted) < LIMITS[dtype][0]
        assert relative_error(grads[0], wanted_grads[0]) < LIMITS[dtype][1]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_is_the_released_loss_of_predictions(dtype):
    for seed, (batch, classes) in enumerate(((2, 3), (7, 5), (5, 40))):
        student, teacher = (3 * randn(batch, classes, seed=seed + k, dtype=dtype) for k in (0, 9))
        loss = fastkd.DISTLoss(2.0, 0.5, 4.0)
        value, grads = gradients(lambda x, t=teacher, loss=loss: loss(x, t), student)
        wanted, wanted_grads = gradients(lambda x, t=teacher: dist(x, t.double()), student.double())
        assert value.dtype == dtype
        assert relative_error(value, wanted) < LIMITS[dtype][0]
        assert relative_error(grads[0], wanted_grads[0]) < LIMITS[dtype][1]


def test_predictions_of_one_class_or_example_are_correlated_with_nothing():
    """The released code's 1 - 0, where a centred vector is 0."""
    student, teacher = randn(1, 6, seed=1), randn(1, 6, seed=2)
    assert relative_error(fastkd.DISTLoss(2.0, 0.5, 4.0)(student, teacher), dist(student, teacher)) < 1e-12
    uniform = torch.zeros(4, 6, dtype=torch.float64)
    teacher = randn(4, 6, seed=2)
    assert relative_error(fastkd.DISTLoss(2.0, 0.5, 4.0)(uniform, teacher), dist(uniform, teacher)) < 1e-12


def test_near_convergence_dist_keeps_its_digits():
    """In float32 the released 1 - cos has an error of about 1e-7, which is more than this loss."""
    teacher = randn(8, 20, dtype=torch.float32)
    student = teacher + 1e-4 * randn(8, 20, seed=1, dtype=torch.float32)
    wanted = dist(student.double(), teacher.double())
    assert relative_error(fastkd.DISTLoss(2.0, 0.5, 4.0)(student, teacher), wanted) < 1e-3
    assert relative_error(dist(student, teacher), wanted) > 1e-1


def test_rows_that_do_not_count_change_nothing():
    student, teacher = randn(2, 4, 6, seed=1), randn(2, 4, 6, seed=2)
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0]])
    loss, keep = fastkd.DISTLoss(), mask.bool()
    spoilt = torch.where(keep[..., None], student, torch.nan).requires_grad_()
    value = loss(spoilt, teacher, mask)
    assert relative_error(value.detach(), loss(student[keep], teacher[keep])) < 1e-12
    (grad,) = torch.autograd.grad(value, spoilt)
    assert grad.isfinite().all() and not grad[~keep].any() and grad[keep].any()
    assert loss(student, teacher, torch.zeros(2, 4)) == 0


@pytest.mark.parametrize("name", [*OF_VECTORS, "DISTLoss"])
def test_gradcheck_equal_examples_and_what_agrees(name):
    loss, student = getattr(fastkd, name)(), randn(4, 5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, randn(4, 5, seed=2)), student)
    assert loss(student, student.detach()).abs() < 1e-12
    same = student.detach()[:1].expand(4, 5).clone().requires_grad_()  # distances of 0, a Gram matrix of one number
    value = loss(same, randn(4, 5, seed=2))
    assert value.isfinite() and torch.autograd.grad(value, same)[0].isfinite().all()
    assert loss(student.detach().bfloat16(), randn(4, 5, seed=2).half()).dtype == torch.float32


@pytest.mark.skipif(not importlib.util.find_spec("torchdistill"), reason="pip install torchdistill==1.1.5")
def test_is_torchdistills_loss():
    """But for SP, whose rows torchdistill divides by their sum of absolute values: its normalize(x, 1) is the norm 1."""
    from torchdistill.losses import mid_level

    student, teacher = F.normalize(randn(6, 8, seed=1), dim=1), F.normalize(randn(6, 8, seed=2), dim=1)
    sides = [{"f": {"output": x.clone()}} for x in (student, teacher)]
    kernel = {"type": "gaussian", "gamma": 0.4, "max_p": 2}
    pairs = (
        (fastkd.CCLoss(), mid_level.CCKDLoss("f", "f", kernel, "sum")(*sides) ** 2 / 36),  # its norm is not squared
        (fastkd.RKDLoss(), mid_level.RKDLoss("f", "f", 1.0, 2.0, "mean")(*sides)),
        (fastkd.PKTLoss(), mid_level.PKTLoss("f", "output", "f", "output")(*sides)),
        (fastkd.DISTLoss(2.0, 0.5, 4.0), mid_level.DISTLoss("f", "output", "f", "output", 2.0, 0.5, 4.0)(*sides)),
    )
    for ours, theirs in pairs:
        assert relative_error(ours(student, teacher), theirs) < 1e-6, ours  # RKD there is less accurate than float64


@pytest.mark.parametrize("name", OF_VECTORS)
def test_errors_name_the_argument(name):
    loss, x = getattr(fastkd, name)(), torch.zeros(4, 5)
    for arguments, said in (
        ((x, torch.zeros(3, 5)), "must agree in their first"),
        ((x[None], x), r"student_hidden: expected shape \[B, D\]"),
        ((x, x.clone().requires_grad_()), "teacher_hidden requires grad"),
        ((x[:1], x[:1]), "student_hidden: expected at least two examples"),
    ):
        with pytest.raises(ValueError, match=said):
            loss(*arguments)
    with pytest.raises(ValueError, match="gamma: "):
        fastkd.CCLoss(gamma=0)
    with pytest.raises(ValueError, match="temperature: "):
        fastkd.DISTLoss(temperature=0)
