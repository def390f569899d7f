"""CKALoss against the definition by centring matrices, in float64."""

import pytest
import torch

import fastkd
from cases import gradients, randn, relative_error


def oracle(student, teacher, level, mask):
    """1 - HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with K = X Xᵀ and H = I - 1/n, group by group; the mean."""
    keep = torch.ones(student.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    if level == "all":
        groups = [(student[keep], teacher[keep])]
    else:
        sides = (student, teacher, keep) if level == "token" else (x.transpose(0, 1) for x in (student, teacher, keep))
        groups = [(s[k], t[k]) for s, t, k in zip(*sides, strict=True) if k.sum() >= (2 if level == "token" else 3)]
    values = []
    for x, y in groups:
        n = len(x)
        H = torch.eye(n, dtype=x.dtype) - 1 / n
        K, L = H @ x @ x.T @ H, H @ y @ y.T @ H
        values.append(1 - (K * L).sum() / ((K * K).sum() * (L * L).sum()).sqrt())
    return torch.stack(values).mean()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence", "all"])
def test_against_the_definition(level, masked, dtype):
    loss = fastkd.CKALoss(level)
    mask = (
        torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1, 0], [1] * 7]) if masked else None
    )
    for seed, (Ds, Dt) in enumerate(((12, 20), (5, 3), (33, 33))):
        student, teacher = randn(4, 7, Ds, seed=seed, dtype=dtype) + 2, 5 * randn(4, 7, Dt, seed=9, dtype=dtype) - 1
        value, grads = gradients(lambda x, t=teacher: loss(x, t, mask), student)
        expected, expected_grads = gradients(lambda x, t=teacher: oracle(x, t.double(), level, mask), student.double())
        tolerance = 1e-10 if dtype == torch.float64 else 1e-5
        assert relative_error(value, expected) < tolerance
        assert relative_error(grads[0], expected_grads[0]) < 10 * tolerance
        if masked:
            assert not grads[0][mask == 0].any()


def test_shift_scale_and_rotation_do_not_count():
    student, teacher = randn(3, 9, 8), randn(3, 9, 8, seed=1)
    rotation = torch.linalg.qr(randn(8, 8, seed=2))[0]
    loss = fastkd.CKALoss("all")
    moved = loss(4 * student @ rotation + 3, teacher)
    assert relative_error(moved, loss(student, teacher)) < 1e-10
    assert abs(loss(student, 2 * student @ rotation - 1)) < 1e-12


def test_mistakes():
    with pytest.raises(ValueError, match="level: expected one of"):
        fastkd.CKALoss("layer")
    with pytest.raises(ValueError, match="must agree in their first 2 axes"):
        fastkd.CKALoss()(randn(3, 9, 8), randn(3, 8, 8))
