"""linear_divergence: equal to divergence of the logits that it never returns, with masks, weights and vocabularies."""

import pytest
import torch
import torch.nn.functional as F

from cases import gradients, randn, relative_error
from fastkd.functional import divergence, linear_divergence
from fastkd.vocab import VocabMap

BACKENDS = ["reference"]  # float64; the kernels: test_linear_divergence_kernels.py
KINDS = ("forward_kl", "reverse_kl", "skew_kl", "jsd", "tvd", "soft_ce", "mse")

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_kind = pytest.mark.parametrize("kind", KINDS)
either_way = pytest.mark.parametrize("recompute", [False, True])


def sides(vocabulary=17, dtype=torch.float64, lead=(3, 4), seed=1):
    """(student hidden, head, bias), (teacher hidden, head, bias); widths 6 and 10."""
    return tuple(
        (
            randn(*lead, width, seed=seed + i, dtype=dtype),
            randn(vocabulary, width, seed=seed + 10 + i, dtype=dtype, scale=0.5),
            randn(vocabulary, seed=seed + 20 + i, dtype=dtype),
        )
        for i, width in ((0, 6), (1, 10))
    )


def call(teacher, backend, **options):
    """linear_divergence as a function of the student's hidden states, head and bias."""
    hidden, head, bias = teacher
    return lambda h, w, b: linear_divergence(
        h, w, hidden, head, student_bias=b, teacher_bias=bias, backend=backend, **options
    )


@every_backend
@every_kind
@either_way
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_is_the_divergence_of_the_logits(kind, recompute, reduction, backend):
    student, teacher = sides()
    options = {"kind": kind, "temperature": 2.5, "beta": 0.3, "alpha": 0.2, "reduction": reduction}
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 1, 1], [1, 1, 1, 1]])
    loss, got = gradients(call(teacher, backend, recompute_logits=recompute, mask=mask, **options), *student)
    t = F.linear(*teacher)
    wanted, wanted_gradients = gradients(lambda *x: divergence(F.linear(*x), t, mask=mask, **options), *student)
    assert relative_error(loss, wanted) < 1e-12
    for x, y in zip(got, wanted_gradients, strict=True):
        assert relative_error(x, y) < 1e-11


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_the_reference(kind):
    (hidden, head, bias), teacher = sides(vocabulary=3, lead=(2,))
    mask = torch.tensor([True, False])
    options = {"kind": kind, "temperature": 1.4, "reduction": "none", "mask": mask}
    student = [x.requires_grad_() for x in (hidden[..., :3], head[:, :3], bias)]
    assert torch.autograd.gradcheck(call(teacher, "reference", **options), student)


@every_backend
def test_biases_are_optional_and_a_frozen_head_gets_no_gradient(backend):
    (hidden, head, _), (teacher_hidden, teacher_head, _) = sides()
    hidden.requires_grad_()
    loss = linear_divergence(hidden, head, teacher_hidden, teacher_head, backend=backend)
    wanted = divergence(F.linear(hidden, head), F.linear(teacher_hidden, teacher_head))
    assert relative_error(loss, wanted) < 1e-13
    loss.backward()
    assert hidden.grad is not None and head.grad is None


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_near_convergence_the_gradient_keeps_its_digits(dtype, backend):
    """Logits are float32 or better before they are compared, whatever the dtype of what makes them."""
    _, (teacher_hidden, head, bias) = sides(vocabulary=512, dtype=dtype, lead=(64,))
    hidden = (teacher_hidden.double() * (1 + 2e-2 * randn(64, 10, seed=5))).to(dtype)
    student = (hidden, head.clone(), bias.clone())
    exact = tuple(x.double() for x in (teacher_hidden, head, bias))
    options = {"reduction": "mean", "temperature": 1.0}
    loss, got = gradients(call((teacher_hidden, head, bias), backend, **options), *student)
    wanted, wanted_gradients = gradients(call(exact, "reference", **options), *(x.double() for x in student))
    assert 0 < float(wanted) < 1e-2
    assert relative_error(loss, wanted) < 2e-5
    allowed = 2e-5 if dtype == torch.float32 else 4e-3  # half an ulp of bfloat16, in which gradients come back
    for x, y in zip(got, wanted_gradients, strict=True):
        assert x.dtype == dtype and relative_error(x, y) < allowed


@every_backend
@either_way
def test_weights_make_a_weighted_mean(recompute, backend):
    student, teacher = sides()
    weights, mask = randn(3, 4, seed=9).abs(), torch.tensor([[1, 1, 0, 1]] * 3)
    rows = call(teacher, backend, reduction="none", mask=mask)(*student)
    loss, got = gradients(call(teacher, backend, weights=weights, mask=mask, recompute_logits=recompute), *student)
    wanted, wanted_gradients = gradients(
        lambda *x: (call(teacher, backend, reduction="none", mask=mask)(*x) * weights).sum() / (weights * mask).sum(),
        *student,
    )
    assert relative_error(loss, wanted) < 1e-13 and not torch.allclose(loss, rows.sum() / mask.sum())
    for x, y in zip(got, wanted_gradients, strict=True):
        assert relative_error(x, y) < 1e-12


@every_backend
@either_way
def test_masked_rows_that_hold_nan_change_nothing(recompute, backend):
    student, teacher = sides()
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 1, 1], [1, 1, 1, 1]])
    wanted, wanted_gradients = gradients(call(teacher, backend, mask=mask, recompute_logits=recompute), *student)
    student[0][0, 2], teacher[0][1, 0] = torch.nan, torch.inf
    loss, got = gradients(call(teacher, backend, mask=mask, recompute_logits=recompute), *student)
    assert torch.equal(loss, wanted)
    for x, y in zip(got, wanted_gradients, strict=True):
        assert torch.equal(x, y)
    assert (got[0][mask == 0] == 0).all()
    loss, got = gradients(call(teacher, backend, mask=torch.zeros(3, 4), recompute_logits=recompute), *student)
    assert loss == 0 and all((x == 0).all() for x in got)


@every_backend
def test_mixed_dtypes_and_autocast(backend):
    """A bfloat16 teacher beside a float32 student; autocast casts what nn.Linear would cast, and rounds no logits."""
    student, teacher = sides(dtype=torch.float32)
    teacher = tuple(x.bfloat16() for x in teacher)
    loss, got = gradients(call(teacher, backend), *student)
    assert loss.dtype == torch.float32 and all(x.dtype == torch.float32 for x in got)
    wanted = call([x.double() for x in teacher], "reference")(*(x.double() for x in student))
    assert relative_error(loss, wanted) < 1e-6

    def under_autocast(*student):
        with torch.autocast("cpu", torch.bfloat16):
            return call(teacher, backend)(*student)

    loss, got = gradients(under_autocast, *student)
    rounded, wanted = gradients(call(teacher, backend), *(x.bfloat16() for x in student))
    assert torch.equal(loss, rounded)
    assert all(x.dtype == torch.float32 and torch.equal(x, y.float()) for x, y in zip(got, wanted, strict=True))


@every_backend
def test_a_subset_vocabulary_slices_the_teachers_head(backend):
    (hidden, _, _), teacher = sides(vocabulary=20)
    kept = torch.tensor([7, 3, 19, 0, 11])
    student = (hidden, randn(5, 6, seed=31), randn(5, seed=32))
    wanted, wanted_gradients = gradients(call((teacher[0], teacher[1][kept], teacher[2][kept]), backend), *student)
    for vocab in (VocabMap(kept, 20), kept):
        loss, got = gradients(call(teacher, backend, vocab=vocab), *student)
        assert torch.equal(loss, wanted)
        assert all(torch.equal(x, y) for x, y in zip(got, wanted_gradients, strict=True))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"student_head": torch.zeros(7, 5)}, "student_hidden"),
        ({"teacher_head": torch.zeros(8, 3)}, "vocab="),
        ({"teacher_hidden": torch.zeros(4, 3)}, "teacher_hidden"),
        ({"teacher_head": torch.zeros(7, 3, requires_grad=True)}, "teacher_head"),
        ({"student_bias": torch.zeros(6)}, "student_bias"),
        ({"weights": torch.zeros(3)}, "weights"),
        ({"recompute_logits": "fast"}, "recompute_logits"),
        ({"temperature": 0}, "temperature"),
        ({"vocab": torch.tensor([0, 9])}, "vocab"),
    ],
)
def test_errors_name_the_argument(change, named):
    arguments = {
        "student_hidden": torch.zeros(2, 4), "student_head": torch.zeros(7, 4),
        "teacher_hidden": torch.zeros(2, 3), "teacher_head": torch.zeros(7, 3),
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=named):
        linear_divergence(**arguments)
