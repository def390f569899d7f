"""GLMD: the authors' numbers (values and gradients), and every option beside them."""

import pytest
import torch
import torch.nn.functional as F
from fastkd.bench import baselines

import fastkd
from cases import GOLDENS, det, gradients, randn, relative_error
from fastkd.losses.glmd import GLMDLoss, answer_scores, cloze_scores
from fastkd.vocab import VocabMap

GOLD = GOLDENS["glmd"]
B, S, V, K = 3, 6, 50, 24
STUDENT, TEACHER = det((B, S, V), 11), 3 * det((B, S, V), 12)
MASK = (torch.arange(S) < torch.tensor([6, 4, 3])[:, None]).long()  # [B, S]
KEPT = [(7 * i + 3) % V for i in range(K)]
SMALL_STUDENT = det((B, S, K), 13)
TOLERANCE = 1e-12


def unit_gradient(loss_function, student):
    student = student.clone().requires_grad_()
    return torch.autograd.grad(loss_function(student), student)[0]


def test_full_vocabulary():
    loss = GLMDLoss()
    assert abs(loss(STUDENT, TEACHER, MASK).item() - GOLD["full_T15"]) < TOLERANCE
    gradient = unit_gradient(lambda x: loss(x, TEACHER, MASK), STUDENT)
    assert abs(gradient.abs().sum().item() - GOLD["grad_l1"]) < TOLERANCE
    assert abs(gradient[0, 0, 0].item() - GOLD["grad_000"]) < TOLERANCE
    assert (gradient[MASK == 0] == 0).all()


def test_compressed_vocabulary():
    loss = GLMDLoss(vocab=VocabMap(KEPT, V))
    assert abs(loss(SMALL_STUDENT, TEACHER, MASK).item() - GOLD["vc_unmap_T15"]) < TOLERANCE
    gradient = unit_gradient(lambda x: loss(x, TEACHER, MASK), SMALL_STUDENT)
    assert abs(gradient.abs().sum().item() - GOLD["vc_grad_l1"]) < TOLERANCE


def test_top_n():
    assert abs(GLMDLoss(top_n=5)(STUDENT, TEACHER, MASK).item() - GOLD["top5"]) < TOLERANCE


def test_top_fraction_with_teacher_min():
    loss = GLMDLoss(top_n=0.2, teacher_min=True)
    assert abs(loss(STUDENT, TEACHER, MASK).item() - GOLD["top20pct_teacher_min"]) < TOLERANCE


def test_mse():
    assert abs(GLMDLoss(mse=True)(STUDENT, TEACHER, MASK).item() - GOLD["mse"]) < TOLERANCE


def test_soft_labels():
    loss = GLMDLoss()
    student, teacher = det((4, 3), 14), det((4, 3), 15)
    assert abs(loss(student, teacher, stage="soft").item() - GOLD["stage3_softCE"]) < TOLERANCE
    loss.stage = "soft"
    assert abs(loss(student, teacher).item() - GOLD["stage3_softCE"]) < TOLERANCE
    kept = loss(student[:3], teacher[:3])
    assert torch.allclose(loss(student, teacher, torch.tensor([1, 1, 1, 0])), kept)


def test_float32_meets_the_goldens_too():
    loss = GLMDLoss()(STUDENT.float(), TEACHER.float(), MASK)
    assert loss.dtype == torch.float32 and abs(loss.item() / GOLD["full_T15"] - 1) < 1e-6


def test_soft_variants():
    student, teacher = det((4, 3), 14), det((4, 3), 15)
    assert torch.allclose(
        GLMDLoss(stage="soft", soft_kind="mse")(student, teacher), F.mse_loss(student, teacher), rtol=1e-13
    )
    kl = baselines.divergence.eager(student, teacher, "forward_kl", 4.0).mean()
    ours = GLMDLoss(stage="soft", soft_kind="forward_kl", soft_temperature=4.0)(student, teacher)
    assert torch.allclose(ours, kl, rtol=1e-12)


def test_positions_and_tokens_differ_by_their_denominator():
    by_positions, by_tokens = GLMDLoss()(STUDENT, TEACHER, MASK), GLMDLoss(normalize="tokens")(STUDENT, TEACHER, MASK)
    assert torch.allclose(by_positions * B * S, by_tokens * MASK.sum(), rtol=1e-13)
    mse, mse_tokens = (GLMDLoss(mse=True, normalize=n)(STUDENT, TEACHER, MASK) for n in ("positions", "tokens"))
    assert torch.allclose(mse * B * S, mse_tokens * MASK.sum(), rtol=1e-13)
    assert torch.allclose(
        GLMDLoss()(STUDENT, TEACHER), GLMDLoss()(STUDENT, TEACHER, torch.ones(B, S)), rtol=1e-14, atol=0
    )


@pytest.mark.parametrize("options", [{}, {"top_n": 5}, {"top_n": 0.2, "teacher_min": True}, {"mse": True}], ids=str)
def test_padding_may_hold_anything(options):
    loss = GLMDLoss(**options)
    wanted, (wanted_gradient,) = gradients(lambda x: loss(x, TEACHER, MASK), STUDENT)
    student, teacher = STUDENT.clone(), TEACHER.clone()
    student[MASK == 0], teacher[MASK == 0] = torch.nan, torch.inf
    value, (gradient,) = gradients(lambda x: loss(x, teacher, MASK), student)
    assert torch.allclose(value, wanted, rtol=1e-14) and torch.allclose(gradient, wanted_gradient, rtol=1e-13)
    value, (gradient,) = gradients(lambda x: loss(x, teacher, torch.zeros(B, S)), student)
    assert value == 0 and (gradient == 0).all()


def test_the_penalty_without_any_excess_is_zero():
    """The released code divides 0 by 0 when no other logit exceeds the chosen ones."""
    t = torch.arange(8.0, dtype=torch.float64).expand(1, 2, 8)
    value, (gradient,) = gradients(lambda x: GLMDLoss(top_n=3)(x, t), t.clone())
    assert value == 0 and gradient.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"top_n": 4}, {"mse": True}], ids=str)
def test_gradcheck(options):
    vocab = VocabMap([4, 1, 6, 0, 2], 8)
    student, teacher = randn(2, 2, 5, seed=1).requires_grad_(), randn(2, 2, 8, seed=2)
    loss = GLMDLoss(2.0, vocab=vocab, **options)
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher, torch.tensor([[1, 1], [1, 0]])), student)


@pytest.mark.parametrize("vocab", [None, VocabMap(KEPT, V)], ids=["whole", "kept"])
@pytest.mark.parametrize("options", [{}, {"normalize": "tokens"}, {"mse": True}], ids=str)
def test_from_hidden_is_the_loss_of_the_logits(vocab, options):
    tokens = V if vocab is None else K
    student = (randn(B, S, 7, seed=1), randn(tokens, 7, seed=2), randn(tokens, seed=3))
    hidden, head, bias = randn(B, S, 11, seed=4), randn(V, 11, seed=5), randn(V, seed=6)
    loss = GLMDLoss(vocab=vocab, **options)
    wanted, wanted_gradients = gradients(lambda *x: loss(F.linear(*x), F.linear(hidden, head, bias), MASK), *student)
    for recompute in (False, True):
        value, got = gradients(
            lambda h, w, b, recompute=recompute: loss.from_hidden(
                h, w, hidden, head, student_bias=b, teacher_bias=bias, mask=MASK, recompute_logits=recompute
            ),
            *student,
        )
        assert relative_error(value, wanted) < 1e-12
        assert all(relative_error(x, y) < 1e-11 for x, y in zip(got, wanted_gradients, strict=True))


def test_a_padded_teacher_vocabulary_is_left_out():
    """151936 against 152064: columns beyond the map's vocabulary do not exist, whatever they hold."""
    padded = torch.cat([TEACHER, torch.full((B, S, 14), 1e4, dtype=torch.float64)], -1)
    loss = GLMDLoss(vocab=VocabMap(KEPT, V))
    assert torch.equal(loss(SMALL_STUDENT, padded, MASK), loss(SMALL_STUDENT, TEACHER, MASK))


def test_the_state_carries_the_vocabulary():
    loss = GLMDLoss(vocab=VocabMap(KEPT, V, replacement=KEPT[0]))
    other = GLMDLoss(vocab=VocabMap(range(K), V))
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other(SMALL_STUDENT, TEACHER, MASK), loss(SMALL_STUDENT, TEACHER, MASK))
    assert other.vocab.encode([V - 1]) == loss.vocab.encode([V - 1])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"normalize": "batch"}, "normalize"),
        ({"stage": "labels"}, "stage"),
        ({"soft_kind": "jsd"}, "soft_kind"),
        ({"top_n": 0}, "top_n"),
        ({"teacher_min": True}, "top_n"),
        ({"mse": True, "top_n": 3}, "top_n"),
    ],
)
def test_mistakes_in_the_constructor(options, named):
    with pytest.raises(ValueError, match=named):
        GLMDLoss(**options)


def test_mistakes_in_the_call():
    with pytest.raises(ValueError, match="pass GLMDLoss a vocab"):
        GLMDLoss()(SMALL_STUDENT, TEACHER, MASK)
    with pytest.raises(ValueError, match="shrink"):
        GLMDLoss(vocab=VocabMap(KEPT, V))(STUDENT, TEACHER, MASK)
    with pytest.raises(ValueError, match="original vocabulary"):
        GLMDLoss(vocab=VocabMap(KEPT, V))(SMALL_STUDENT, TEACHER[..., :40], MASK)
    with pytest.raises(ValueError, match="mask"):
        GLMDLoss()(STUDENT, TEACHER, MASK[:2])
    with pytest.raises(ValueError, match="teacher"):
        GLMDLoss()(STUDENT, TEACHER.clone().requires_grad_(), MASK)
    with pytest.raises(ValueError, match="stage"):
        GLMDLoss()(STUDENT, TEACHER, MASK, stage="word")
    with pytest.raises(ValueError, match="from_hidden"):
        GLMDLoss(top_n=3).from_hidden(randn(2, 3), randn(5, 3), randn(2, 3), randn(5, 3))


@pytest.mark.parametrize("normalize", ["positions", "tokens"])
def test_a_sparse_teacher_of_all_tokens_is_the_whole_one(normalize):
    loss = GLMDLoss(3.0, normalize=normalize)
    log_probs, ids = (TEACHER / 3.0).log_softmax(-1).sort(-1, descending=True)
    found, (grad,) = gradients(lambda x: loss(x, fastkd.TopK(ids, log_probs), MASK), STUDENT)
    wanted, (wanted_grad,) = gradients(lambda x: loss(x, TEACHER, MASK), STUDENT)
    assert relative_error(found, wanted) < 1e-12 and relative_error(grad, wanted_grad) < 1e-11


@pytest.mark.parametrize("options", [{"top_n": 3}, {"mse": True}, {"vocab": VocabMap([6, 1, 4], 8)}])
def test_what_needs_all_logits_of_the_teacher_says_so_of_a_sparse_one(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: needs all logits of the teacher"):
        GLMDLoss(**options)(STUDENT, fastkd.TopK(torch.zeros(1, dtype=torch.int64), torch.zeros(1)))


@pytest.mark.parametrize("options", [{}, {"normalize": "tokens"}, {"mse": True}])
def test_a_teacher_over_all_tokens_meets_the_students_stand_ins(options):
    """The released code's other form: the student's logits over all tokens through tied duplicate rows."""
    hidden, head, bias = (randn(*shape, seed=i) for i, shape in enumerate(((2, 5, 4), (3, 4), (3,))))
    teacher_hidden, teacher_head = randn(2, 5, 6, seed=4), randn(9, 6, seed=5)  # padded: 8 tokens
    vocab = VocabMap([6, 1, 4], 8, replacement=4)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    loss = GLMDLoss(vocab=vocab, teacher_tokens="all", **options)
    student, teacher = torch.nn.functional.linear(hidden, head, bias), teacher_hidden @ teacher_head.T
    place = [{6: 0, 1: 1, 4: 2}.get(i, 2) for i in range(8)]
    found, (grad,) = gradients(lambda x: loss(x, teacher, mask), student)
    wanted, (wanted_grad,) = gradients(lambda x: GLMDLoss(**options)(x[..., place], teacher[..., :8], mask), student)
    assert relative_error(found, wanted) < 1e-12 and relative_error(grad, wanted_grad) < 1e-11
    assert relative_error(GLMDLoss(vocab=vocab, **options)(student, teacher, mask), wanted) > 1e-3
    again, grads = gradients(
        lambda h, w, b: loss.from_hidden(h, w, teacher_hidden, teacher_head, student_bias=b, mask=mask),
        hidden,
        head,
        bias,
    )
    wanted, wanted_grads = gradients(
        lambda h, w, b: loss(torch.nn.functional.linear(h, w, b), teacher, mask), hidden, head, bias
    )
    assert relative_error(again, wanted) < 1e-12
    assert all(relative_error(x, y) < 1e-11 for x, y in zip(grads, wanted_grads, strict=True))


def test_cloze_scores_are_the_logits_at_the_blank():
    logits, tokens = randn(2, 4, 7), torch.tensor([5, 0, 3])
    scores = cloze_scores(logits, torch.tensor([3, 1]), tokens)
    assert torch.equal(scores, torch.stack([logits[0, 3, [5, 0, 3]], logits[1, 1, [5, 0, 3]]]))
    with pytest.raises(ValueError, match="positions"):
        cloze_scores(logits, torch.tensor([3, 4]), tokens)


@pytest.mark.parametrize("penalty", [0.0, 0.5])
def test_answer_scores_sum_the_log_probabilities_of_their_tokens(penalty):
    logits, targets = randn(2, 2, 3, 6), torch.tensor([[[1, 5, -100], [0, 2, 4]], [[3, -100, -100], [-100] * 3]])
    mask = targets >= 0
    logits[1, 0, 1] = torch.nan  # padding
    found = answer_scores(logits, targets, mask, penalty)
    for b in range(2):
        for c in range(2):
            tokens = [float(logits[b, c, i].log_softmax(-1)[targets[b, c, i]]) for i in range(3) if mask[b, c, i]]
            assert float(found[b, c]) == pytest.approx(sum(tokens) / max(len(tokens), 1) ** penalty)
    leaf = logits.requires_grad_()
    (grad,) = torch.autograd.grad(GLMDLoss(stage="soft")(answer_scores(leaf, targets, mask), randn(2, 2)), leaf)
    assert grad.isfinite().all() and (grad[1, 0, 1:] == 0).all()
