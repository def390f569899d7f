"""TinyBERT's uniform map and PKD's skip map, against sums over pairs written out by hand."""

import pytest
import torch
import torch.nn.functional as F

from cases import gradients, randn, relative_error
from fastkd.losses.pkd import PKDLoss
from fastkd.losses.tinybert import TinyBERTLoss

MASK = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0]])


def scores(count, seed):
    x = [randn(3, 2, 4, 4, seed=seed + i) for i in range(count)]
    for layer in x:
        layer[0, ..., -1] -= 10000
    return x


def hidden(count, seed):
    return [randn(3, 4, 6, seed=seed + i) for i in range(count)]


def test_tinybert_maps_4_layers_to_12_as_released():
    student_attn, teacher_attn = scores(4, 1), scores(12, 11)
    student_hidden, teacher_hidden = hidden(5, 31), hidden(13, 51)
    attention_pairs, hidden_pairs = [(0, 2), (1, 5), (2, 8), (3, 11)], [(0, 0), (1, 3), (2, 6), (3, 9), (4, 12)]

    def expected(attn, states):
        visible = [[torch.where(x <= -100, 0.0, x) for x in xs] for xs in (attn, teacher_attn)]
        return torch.stack(
            [
                sum(F.mse_loss(visible[0][i], visible[1][j]) for i, j in attention_pairs),
                sum(F.mse_loss(states[i], teacher_hidden[j]) for i, j in hidden_pairs),
            ]
        )

    criterion = TinyBERTLoss(backend="reference")
    inputs = *student_attn, *student_hidden
    value, grads = gradients(lambda *x: torch.stack(criterion(x[:4], teacher_attn, x[4:], teacher_hidden)), *inputs)
    wanted, wanted_grads = gradients(lambda *x: expected(x[:4], x[4:]), *inputs)
    assert relative_error(value, wanted) < 1e-13
    for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        assert relative_error(grad, wanted_grad) < 1e-13


def test_tinybert_with_one_kind_and_with_a_mask():
    student, teacher = hidden(3, 1), hidden(5, 11)
    criterion = TinyBERTLoss(backend="reference")
    zero, value = criterion(None, None, student, teacher, MASK)
    pairs = [(0, 0), (1, 2), (2, 4)]
    expected = sum(F.mse_loss(student[i][MASK.bool()], teacher[j][MASK.bool()]) for i, j in pairs)
    assert zero == 0 and relative_error(value, expected) < 1e-13
    value, zero = criterion(scores(2, 1), scores(4, 11), None, None)
    assert zero == 0 and value > 0 and value.shape == ()


@pytest.mark.parametrize(
    ("strategy", "pairs"),
    [("skip", [(1, 2), (2, 4), (3, 6), (4, 8), (5, 10)]), ("last", [(1, 7), (2, 8), (3, 9), (4, 10), (5, 11)])],
)
@pytest.mark.parametrize("token", ["first", "last"])
def test_pkd_maps_6_layers_to_12(strategy, pairs, token):
    student, teacher = hidden(6, 1), hidden(12, 21)
    column = 0 if token == "first" else -1

    def expected(states):
        total = 0.0
        for i, j in pairs:
            for b in range(3):
                s, t = states[i - 1][b, column], teacher[j - 1][b, column]
                total = total + ((s / s.norm() - t / t.norm()) ** 2).sum() / 3
        return total

    criterion = PKDLoss(strategy, token=token, backend="reference")
    value, grads = gradients(lambda *x: criterion(x, teacher) + 0 * x[5].sum(), *student)
    wanted, wanted_grads = gradients(lambda *x: expected(x) + 0 * x[5].sum(), *student)
    assert relative_error(value, wanted) < 1e-13
    for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        assert relative_error(grad, wanted_grad) < 1e-12


def test_pkd_finds_the_sentence_token_behind_the_padding():
    student, teacher = hidden(2, 1), hidden(4, 11)
    for token, columns in {"first": (0, 2), "last": (2, 3)}.items():
        criterion = PKDLoss(token=token, normalize=False, backend="reference")
        value, grads = gradients(lambda x, c=criterion: c([x, student[1]], teacher, MASK), student[0])
        expected = sum(((student[0][b, n] - teacher[1][b, n]) ** 2).sum() for b, n in enumerate(columns)) / 2
        assert relative_error(value, expected) < 1e-13
        assert [(b, n) for b, n in grads[0].any(-1).nonzero().tolist()] == list(enumerate(columns))
        dirty = [x.masked_fill(MASK[..., None] == 0, float("nan")) for x in student]
        _, dirty_grads = gradients(lambda x, c=criterion, d=dirty: c([x, d[1]], teacher, MASK), dirty[0])
        assert torch.equal(dirty_grads[0], grads[0])
        criterion = PKDLoss(token=token, backend="reference")
        _, (unit_grad,) = gradients(lambda x, c=criterion, d=dirty: c([x, d[1]], teacher, MASK), dirty[0])
        assert unit_grad.isfinite().all() and unit_grad[0].any() and not unit_grad[2].any()


def test_mistakes():
    with pytest.raises(ValueError, match="multiple of the student's layers"):
        TinyBERTLoss()(scores(2, 1), scores(5, 1), None, None)
    with pytest.raises(ValueError, match="multiple of the student's layers"):
        TinyBERTLoss()(None, None, hidden(2, 1), hidden(1, 1))
    with pytest.raises(ValueError, match="both are None"):
        TinyBERTLoss()(None, None, None, None)
    with pytest.raises(ValueError, match="cannot map 4 student layers to 6"):
        PKDLoss()(hidden(4, 1), hidden(6, 1))
    with pytest.raises(ValueError, match="cannot map 1"):
        PKDLoss("last")(hidden(1, 1), hidden(6, 1))
    with pytest.raises(ValueError, match="strategy"):
        PKDLoss("first")
    with pytest.raises(ValueError, match="expected a list"):
        PKDLoss()(hidden(4, 1)[0], hidden(4, 1))
