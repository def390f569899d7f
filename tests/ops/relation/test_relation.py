"""relation: KL between softmaxed self-relations, held against F.kl_div row by row and its own laws."""

import pytest
import torch
import torch.nn.functional as F
from fastkd.bench import baselines

from cases import gradients, randn, relative_error
from fastkd import functional
from fastkd.reference.relation import relation

# Right padding, left padding, nothing masked, nothing left.
MASK = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
B, H, L = 4, 2, 5


def states(seed, d, dtype=torch.float64):
    return randn(B, H, L, d, seed=seed, dtype=dtype)


def loss(student, teacher, **options):
    return functional.relation_kl_loss(student, teacher, backend="reference", **options)


def brute_force(xs, ys, xt, yt, mask, causal, scale_s, scale_t):
    """One row at a time, over the keys that it may see, by F.kl_div."""
    rows = xs.new_zeros(B, H, L)
    for b in range(B):
        for h in range(H):
            for i in range(L):
                keys = [j for j in range(L) if (mask is None or mask[b, j]) and (j <= i or not causal)]
                if mask is not None and not mask[b, i]:
                    continue
                q = F.log_softmax(torch.stack([xs[b, h, i] @ ys[b, h, j] for j in keys]) * scale_s, 0)
                p = F.softmax(torch.stack([xt[b, h, i] @ yt[b, h, j] for j in keys]) * scale_t, 0)
                rows[b, h, i] = F.kl_div(q, p, reduction="sum")
    return rows


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
def test_against_kl_div_in_loops(mask, causal):
    xt, yt = states(3, 7), states(4, 7)

    def ours(x, y):
        return relation(x, y, xt, yt, mask, causal, 0.7, 0.3)

    def theirs(x, y):
        return brute_force(x, y, xt, yt, mask, causal, 0.7, 0.3)

    value, grads = gradients(ours, states(1, 3), states(2, 3))
    expected, expected_grads = gradients(theirs, states(1, 3), states(2, 3))
    assert relative_error(value, expected) < 1e-12
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert relative_error(grad, expected_grad) < 1e-12


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
def test_gradcheck(mask, causal):
    x, y = (randn(B, H, L, 2, seed=seed).requires_grad_() for seed in (1, 2))
    xt, yt = states(3, 3), states(4, 3)
    assert torch.autograd.gradcheck(lambda x, y: relation(x, y, xt, yt, mask, causal, 0.7, 0.6), (x, y))
    assert torch.autograd.gradcheck(lambda x: relation(x, x, xt, xt, mask, causal, 0.7, 0.6), x)
    if mask is None and causal:
        assert torch.autograd.gradgradcheck(lambda x: relation(x, x, xt, xt, mask, causal, 0.7, 0.6), x)


def test_a_mask_of_ones_changes_no_bit():
    x, t = states(1, 3), states(2, 5)
    value, (grad,) = gradients(lambda s: loss([s], [t]), x)
    masked, (masked_grad,) = gradients(lambda s: loss([s], [t], mask=torch.ones(B, L)), x)
    assert torch.equal(value, masked) and torch.equal(grad, masked_grad)


@pytest.mark.parametrize("garbage", [1e30, float("nan"), float("inf")])
@pytest.mark.parametrize("causal", [False, True])
def test_what_padding_holds_does_not_matter(causal, garbage):
    x, t = states(1, 3), states(2, 5)
    hidden = ~MASK[:, None, :, None]
    value, (grad,) = gradients(lambda s: loss([s], [t], mask=MASK, causal=causal, reduction="none"), x)
    dirty, (dirty_grad,) = gradients(
        lambda s: loss([s], [t.masked_fill(hidden, garbage)], mask=MASK, causal=causal, reduction="none"),
        x.masked_fill(hidden, garbage),
    )
    assert torch.equal(value, dirty) and torch.equal(grad, dirty_grad)
    rows = ~MASK[:, None].expand(B, H, L)
    assert (value[0][rows] == 0).all() and (grad[rows] == 0).all()
    assert (grad[2] != 0).any()


def test_padding_on_either_side_is_the_shorter_sequence():
    x, t = states(1, 3), states(2, 5)
    for causal in (False, True):
        rows = loss([x], [t], mask=MASK, causal=causal, reduction="none")[0]
        right = loss([x[:1, :, :3]], [t[:1, :, :3]], causal=causal, reduction="none")[0]
        left = loss([x[1:2, :, 2:]], [t[1:2, :, 2:]], causal=causal, reduction="none")[0]
        assert relative_error(rows[:1, :, :3], right) < 1e-12
        assert relative_error(rows[1:2, :, 2:], left) < 1e-12


def test_nothing_valid_is_zero_with_a_graph():
    x = torch.full((B, H, L, 3), float("nan"))
    value, (grad,) = gradients(lambda s: loss([s], [x], mask=torch.zeros(B, L)), x)
    assert value == 0 and (grad == 0).all()


def test_a_student_equal_to_its_teacher():
    for dtype in (torch.float32, torch.float64):
        x = states(1, 3, dtype)
        value, (grad,) = gradients(lambda s, t=x: loss([s, (s, 2 * s)], [t, (t, 2 * t)]), x)
        assert value == 0 and (grad == 0).all()


def test_order_of_tokens_and_rotation_do_not_matter():
    x, t, order = states(1, 3), states(2, 5), torch.tensor([3, 0, 4, 1, 2])
    rotation = torch.linalg.qr(randn(3, 3, seed=5))[0]
    expected = loss([x], [t], reduction="none")
    shuffled = loss([(x @ rotation)[:, :, order]], [t[:, :, order]], reduction="none")
    assert relative_error(shuffled, expected[..., order]) < 1e-12
    assert (expected > 0).all()


def test_float32_keeps_its_digits_near_convergence():
    """student = teacher + 1e-3: the textbook sum p (log p - log q) has none left there."""
    teacher = randn(2, 2, 33, 16, seed=1)
    student = (teacher + 1e-3 * randn(2, 2, 33, 16, seed=2)).float()
    oracle = loss([student.double()], [teacher.float().double()])
    value = loss([student], [teacher.float()])
    assert oracle < 1e-6
    assert relative_error(value, oracle) < 5e-5
    assert relative_error(baselines.relation.eager(student, teacher.float()).mean(), oracle) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_scores(dtype):
    x, t = 1e2 * states(1, 3, dtype), 1e2 * states(2, 5, dtype)
    value, (grad,) = gradients(lambda s: loss([s], [t], mask=MASK, reduction="none"), x)
    assert value.isfinite().all() and grad.isfinite().all() and (value >= 0).all()
    expected = brute_force(x, x, t, t, MASK, False, 3**-0.5, 5**-0.5)
    assert relative_error(value[0], expected) < {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]


def test_reductions_sum_over_the_relations():
    students, teachers = [states(1, 3), (states(2, 3), states(3, 3))], [states(4, 5), (states(5, 5), states(6, 5))]
    rows = loss(students, teachers, mask=MASK, reduction="none")
    assert rows.shape == (2, B, H, L)
    counted = MASK[:, None].expand(B, H, L)
    expected = sum(r[counted].mean() for r in rows)
    assert relative_error(loss(students, teachers, mask=MASK), expected) < 1e-13
    assert relative_error(loss(students, teachers, mask=MASK, reduction="sum"), rows.sum()) < 1e-13


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_relations_with_different_head_counts_have_their_own_means(reduction, mask):
    """Alike ones share a mean, which must change nothing."""
    xs = [states(1, 3), states(2, 3), torch.cat([states(3, 4), states(4, 4)], 1), states(5, 2)]
    xt = [states(6, 5), states(7, 2), torch.cat([states(8, 4), states(9, 4)], 1), states(10, 3)]
    for some in ((0, 1), (0, 1, 2), (2, 3)):
        value, grads = gradients(
            lambda *x, some=some: loss(list(x), [xt[k] for k in some], mask=mask, reduction=reduction),
            *(xs[k] for k in some),
        )
        singly, true = gradients(
            lambda *x, some=some: sum(
                loss([a], [xt[k]], mask=mask, reduction=reduction) for a, k in zip(x, some, strict=True)
            ),
            *(xs[k] for k in some),
        )
        assert relative_error(value, singly) < 1e-13
        assert all(relative_error(a, b) < 1e-13 for a, b in zip(grads, true, strict=True))


def test_heads_are_split_again_from_the_full_width():
    student, teacher = randn(2, 4, 5, 6, seed=1), randn(2, 3, 5, 16, seed=2)  # widths 24 and 48

    def split(x, heads):
        flat = torch.cat(list(x.unbind(1)), -1)  # [B, L, H·d]
        return torch.stack(flat.chunk(heads, -1), 1)

    expected = loss([split(student, 8)], [split(teacher, 8)])
    assert relative_error(loss([student], [teacher], heads=8), expected) < 1e-13


def test_dtypes():
    x, t = states(1, 4, torch.bfloat16), states(2, 8, torch.float16)
    value, (grad,) = gradients(lambda s: loss([s], [t]), x)
    assert value.dtype == torch.float32 and grad.dtype == torch.bfloat16
    assert relative_error(value, loss([x.double()], [t.double()])) < 1e-6


def test_invalid_arguments_are_errors():
    x = states(1, 3)
    with pytest.raises(ValueError, match="pair up one to one"):
        loss([x], [x, x])
    with pytest.raises(ValueError, match="empty"):
        loss([], [])
    with pytest.raises(ValueError, match="heads"):
        loss([x], [states(2, 3)[:, :1]])
    with pytest.raises(ValueError, match="temperature"):
        loss([x], [x], temperature=0)
    with pytest.raises(ValueError, match="requires grad"):
        loss([x], [x.clone().requires_grad_()])
    with pytest.raises(ValueError, match="must divide the width"):
        loss([x], [x], heads=7)
