"""MiniLM and MiniLMv2 against their formula, written with softmax and F.kl_div on whole matrices."""

import pytest
import torch
from fastkd.bench.baselines import relation

from cases import gradients, randn, relative_error
from fastkd.losses.minilm import MiniLMLoss, MiniLMv2Loss

MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]])


def qkv(seed, heads, d, groups=None):
    return tuple(randn(2, n, 6, d, seed=seed + i) for i, n in enumerate((heads, groups or heads, groups or heads)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
def test_minilm(mask, causal):
    (q, k, v), (tq, tk, tv) = qkv(1, 4, 3), qkv(11, 4, 8)
    criterion = MiniLMLoss(causal=causal, backend="reference")
    value, grads = gradients(lambda *s: criterion(s, (tq, tk, tv), mask), q, k, v)

    def expected_loss(q, k, v):
        return relation.authors([(q, k), (v, v)], [(tq, tk), (tv, tv)], mask=mask, causal=causal)

    expected, expected_grads = gradients(expected_loss, q, k, v)
    assert relative_error(value, expected) < 1e-12
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert relative_error(grad, expected_grad) < 1e-12


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
def test_minilmv2_with_48_heads_of_both_widths(mask, causal):
    student, teacher = qkv(1, 2, 48), qkv(11, 12, 16)  # 96 and 192 wide, 2 and 12 heads
    criterion = MiniLMv2Loss(causal=causal, backend="reference")
    assert criterion.relation_heads == 48

    def expected_loss(*parts):
        return relation.authors(parts, teacher, heads=48, mask=mask, causal=causal)

    value, grads = gradients(lambda *s: criterion(s, teacher, mask), *student)
    expected, expected_grads = gradients(expected_loss, *student)
    assert relative_error(value, expected) < 1e-12
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert relative_error(grad, expected_grad) < 1e-12


def test_grouped_query_heads():
    student, teacher = qkv(1, 4, 3, groups=2), qkv(11, 4, 8, groups=1)
    full = [tuple(x.repeat_interleave(4 // x.shape[1], 1) for x in side) for side in (student, teacher)]
    criterion = MiniLMLoss(backend="reference")
    assert relative_error(criterion(student, teacher, MASK), criterion(*full, MASK)) < 1e-13
    wide = MiniLMv2Loss(2, backend="reference")
    assert wide(student, teacher) > 0  # relations are split by width, so groups need no repeating


@pytest.mark.parametrize("criterion", [MiniLMLoss(backend="reference"), MiniLMv2Loss(3, backend="reference")])
def test_laws_of_both(criterion):
    student, teacher = qkv(1, 4, 3), qkv(11, 4, 6)
    assert criterion(student, student) == 0 < criterion(student, teacher)
    hidden = MASK[:, None, :, None] == 0
    value, grads = gradients(lambda *s: criterion(s, teacher, MASK), *student)
    bad_teacher = tuple(x.masked_fill(hidden, float("nan")) for x in teacher)
    bad_student = (x.masked_fill(hidden, float("nan")) for x in student)
    dirty, dirty_grads = gradients(lambda *s: criterion(s, bad_teacher, MASK), *bad_student)
    assert torch.equal(value, dirty) and all(map(torch.equal, grads, dirty_grads))
    assert torch.equal(criterion(student, teacher, torch.ones(2, 6)), criterion(student, teacher))
    nothing, grads = gradients(lambda *s: criterion(s, teacher, torch.zeros(2, 6)), *student)
    assert nothing == 0 and all((g == 0).all() for g in grads)


def test_mistakes():
    student, teacher = qkv(1, 4, 3), qkv(11, 2, 8)
    with pytest.raises(ValueError, match="expected \\(q, k, v\\)"):
        MiniLMLoss()(student[:2], teacher)
    with pytest.raises(ValueError, match="heads"):
        MiniLMLoss()(student, teacher)
    with pytest.raises(ValueError, match="multiple"):
        MiniLMLoss()((student[0], *qkv(1, 3, 3)[1:]), teacher)
    with pytest.raises(ValueError, match="must divide the width"):
        MiniLMv2Loss(48)(student, teacher)
    with pytest.raises(ValueError, match="relation_heads"):
        MiniLMv2Loss(0)
