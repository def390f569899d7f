"""divergence against a sparse teacher: the reference against what it should be, every kernel against the reference."""

import pytest
import subjects
import test_divergence
import torch
from test_divergence import from_probabilities, value_and_gradient

from cases import MUTANTS, gradients, randn, relative_error
from fastkd.functional import TopK
from fastkd.ops.divergence import KERNELS

KINDS = test_divergence.COMPARISONS
NO_TAIL_KINDS = tuple(kind for kind in KINDS if kind != "reverse_kl")  # those that need no teacher mass outside the k
HERE = [
    pytest.param(name, marks=[pytest.mark.gpu] if subjects.device_of(name) == "cuda" else [])
    for name in KERNELS["sparse"]
]
every_kernel = pytest.mark.parametrize("backend", HERE)


def rows_of(kind, temperature=1.0, backend="reference", **options):
    """divergence as a function of the student and the teacher, one number per row."""
    return test_divergence.ours(kind, backend, temperature, **options)


# -- the definition ----------------------------------------------------------------------------------------------------


def top_of(t, k, temperature, tail=None):
    log_p = torch.log_softmax(t / temperature, -1)
    log_probs, indices = log_p.topk(k, -1)
    return TopK(indices, log_probs, tail)


@pytest.mark.parametrize("kind", NO_TAIL_KINDS)
@pytest.mark.parametrize("tail", [None, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_top_v_is_the_full_divergence(kind, tail, dtype):
    s, t = randn(2, 3, 17, seed=1, dtype=dtype), randn(2, 3, 17, seed=2, dtype=dtype, scale=2.0)
    teacher = top_of(t, 17, 1.7, tail)
    loss, (gradient,) = gradients(lambda x: rows_of(kind, 1.7)(x, teacher), s)
    wanted, wanted_gradient = value_and_gradient(rows_of(kind, 1.7), s, t)
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    assert relative_error(loss, wanted) < tolerance and relative_error(gradient, wanted_gradient) < tolerance


@pytest.mark.parametrize("kind", NO_TAIL_KINDS)
def test_without_a_tail_the_rest_of_the_teacher_has_no_mass(kind):
    s, t = randn(5, 19, seed=1), randn(5, 19, seed=2, scale=2.0)
    teacher = top_of(t, 6, 2.0)
    p = torch.zeros(5, 19, dtype=torch.float64).scatter(-1, teacher.indices, teacher.log_probs.exp())
    loss, (gradient,) = gradients(lambda x: rows_of(kind, 2.0)(x, teacher), s)
    wanted, (wanted_gradient,) = gradients(lambda x: from_probabilities(p, torch.softmax(x / 2, -1), kind), s)
    assert relative_error(loss, wanted) < 1e-12 and relative_error(gradient, wanted_gradient) < 1e-11


@pytest.mark.parametrize("kind", KINDS)
def test_the_tail_is_one_more_token(kind):
    s, t = randn(5, 19, seed=1), randn(5, 19, seed=2, scale=2.0)
    whole = torch.softmax(t / 2, -1)
    teacher = top_of(t, 6, 2.0, True)

    def buckets(x):
        top = x.gather(-1, teacher.indices)
        return torch.cat([top, 1 - top.sum(-1, keepdim=True)], -1)  # [N, k + 1]

    wanted, (wanted_gradient,) = gradients(
        lambda x: from_probabilities(buckets(whole), buckets(torch.softmax(x / 2, -1)), kind), s
    )
    tail = (1 - teacher.log_probs.exp().sum(-1)).log()
    for given_tail in (True, tail):
        given_teacher = teacher._replace(tail=given_tail)
        loss, (gradient,) = gradients(lambda x, y=given_teacher: rows_of(kind, 2.0)(x, y), s)
        assert relative_error(loss, wanted) < 1e-11 and relative_error(gradient, wanted_gradient) < 1e-11
    if kind in ("forward_kl", "jsd", "tvd", "reverse_kl"):  # coarser tokens never make two distributions differ more
        assert (rows_of(kind, 2.0)(s, teacher) <= rows_of(kind, 2.0)(s, t) + 1e-12).all()


@pytest.mark.parametrize("tail", [None, True])
def test_gradcheck_masks_and_missing_tokens(tail):
    s, t = randn(3, 8, seed=1), randn(3, 8, seed=2)
    mask = torch.tensor([True, False, True])
    for kind in NO_TAIL_KINDS:
        f = lambda x, kind=kind: rows_of(kind, 1.3)(x, top_of(t[:1, :5], 3, 1.3, tail))  # noqa: E731
        assert torch.autograd.gradcheck(f, s[:1, :5].clone().requires_grad_())
    teacher = top_of(t, 3, 1.3, tail)
    s[1] = torch.nan
    teacher.log_probs[1] = torch.nan
    clean = rows_of("forward_kl", 1.3)(s[[0, 2]], top_of(t[[0, 2]], 3, 1.3, tail))
    loss, (gradient,) = gradients(lambda x: rows_of("forward_kl", 1.3, mask=mask)(x, teacher), s)
    assert loss[1] == 0 and (gradient[1] == 0).all() and torch.allclose(loss[[0, 2]], clean)
    # A student that has nothing but the k tokens has no rest to compare.
    only = torch.full((2, 8), -torch.inf, dtype=torch.float64).scatter(-1, teacher.indices[[0, 2]], 1.0)
    rest = TopK(teacher.indices[[0, 2]], torch.log_softmax(teacher.log_probs[[0, 2]], -1), tail)
    loss, (gradient,) = gradients(lambda x: rows_of("forward_kl")(x, rest), only)
    assert loss.isfinite().all() and gradient.isfinite().all()


def test_undefined_arguments_are_errors():
    s, t = randn(2, 8, seed=1), randn(2, 8, seed=2)
    with pytest.raises(ValueError, match="mse"):
        rows_of("mse")(s, top_of(t, 3, 1.0))
    with pytest.raises(ValueError, match="reverse_kl"):
        rows_of("reverse_kl")(s, top_of(t, 3, 1.0))


# -- the kernels -------------------------------------------------------------------------------------------------------


def logits(rows, width, seed, noise=None, dtype=torch.float32):
    teacher, student = (randn(rows, width, seed=seed + i, scale=3.0) for i in (0, 1))
    if noise is not None:
        student = teacher + noise * student / 3
    return student.to(dtype), teacher.to(dtype)


def sparse(teacher, k, temperature, tail):
    log_probs, indices = torch.log_softmax(teacher.double() / temperature, -1).topk(k, -1)
    log_probs = log_probs.float()
    rest = torch.log(-torch.expm1(log_probs.double().logsumexp(-1).clamp(max=0))).float()
    return TopK(indices, log_probs, rest if tail == "tensor" else tail)


def run(kind, student, teacher, backend, temperature, **options):
    """Loss and gradient of the student [N, V] where `backend` lives, under a random upstream."""
    move = lambda x: x.to(subjects.device_of(backend)) if isinstance(x, torch.Tensor) else x  # noqa: E731
    call = rows_of(kind, temperature, backend, **{name: move(x) for name, x in options.items()})
    teacher = TopK(*map(move, teacher))
    loss, (grad,) = gradients(lambda x: call(move(x), teacher), student)
    return loss.cpu(), grad


def check(kind, student, teacher, backend, allowed=(1e-6, 1e-5), temperature=1.3, wrong=None, **options):
    found = list(run(kind, student, teacher, backend, temperature, **options))
    exact = teacher._replace(log_probs=teacher.log_probs.double())
    true = run(kind, student.double(), exact, "reference", temperature, **options)
    assert found[0].dtype == torch.float32 and found[1].dtype == student.dtype
    if wrong is not None:
        place, how = wrong
        found[place] = how(found[place])
    assert relative_error(found[0], true[0]) <= allowed[0]
    assert relative_error(found[1], true[1]) <= allowed[1]


@every_kernel
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", [None, "tensor", True])
@pytest.mark.parametrize(("width", "k"), [(3, 1), (130, 7), (2500, 150)])
def test_against_float64(kind, tail, width, k, backend):
    if kind == "reverse_kl" and tail is None:
        pytest.skip("refused: infinite")
    student, teacher = logits(3, width, seed=13)
    mask = torch.tensor([True, False, True])
    teacher = sparse(teacher, k, 1.3, tail)
    student[1] = torch.nan
    check(kind, student, teacher, backend, mask=mask)


@every_kernel
@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("tail", [None, "tensor"])
def test_no_mutant_survives(mutant, tail, backend):
    """A loss or a gradient that alone is wrong."""
    student, teacher = logits(3, 130, seed=13)
    for place in (0, 1):
        with pytest.raises(AssertionError):
            check("forward_kl", student, sparse(teacher, 7, 1.3, tail), backend, wrong=(place, MUTANTS[mutant]))


@every_kernel
@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(kind, dtype, backend):
    student, teacher = logits(3, 300, seed=14)
    check(kind, student.to(dtype), sparse(teacher, 20, 2.0, "tensor"), backend, (1e-6, 1e-2), temperature=2.0)


@pytest.mark.parametrize("backend", [*HERE, "reference"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", ["tensor", True])
def test_near_convergence(kind, tail, backend):
    """log q - log p is 1e-3, so the sum over the rest must be known to 1e-8, and the teacher's masses to sum to 1."""
    for seed in (15, 25):
        student, teacher = logits(3, 3000, seed=seed, noise=1e-3)
        check(kind, student, sparse(teacher, 64, 1.3, tail), backend, (1e-6, 1e-6))


@every_kernel
@pytest.mark.parametrize("tail", ["tensor", True])
def test_two_tokens_near_convergence(tail, backend):
    """Where nothing averages out: one word of each side of the k."""
    student, teacher = logits(400, 3, seed=19, noise=1e-3)
    check("forward_kl", student, sparse(teacher, 2, 1.3, tail), backend, (1e-6, 1e-6))


@every_kernel
@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_the_rest_however_small(kind, backend):
    """The rest is summed on its own: 1e-30 of the mass keeps its digits where one minus the k tokens has none."""
    student, teacher = logits(2, 200, seed=16)
    teacher = sparse(teacher, 4, 1.0, "tensor")
    student.scatter_add_(-1, teacher.indices, torch.full((2, 4), 70.0))
    check(kind, student, teacher, backend, temperature=1.0)


@every_kernel
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", [None, "tensor"])
def test_a_student_with_no_mass_on_the_rest(kind, tail, backend):
    """It has nothing but the k tokens: then what the teacher has of the rest is not compared."""
    if kind == "reverse_kl" and tail is None:
        pytest.skip("refused: infinite")
    student, teacher = logits(3, 40, seed=17)
    top = sparse(teacher, 5, 1.0, tail)
    only = torch.full((3, 40), -torch.inf).scatter(-1, top.indices, student)
    check(kind, only, top, backend, temperature=1.0)


@pytest.mark.parametrize("backend", [*HERE, "reference"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("below", [60.0, 89.0, 200.0, 800.0])
def test_a_rest_with_almost_no_student_mass(kind, below, backend):
    """p / q of the rest is more than float32 holds; what the gradient is made of, q - p or q p / m, is not."""
    student, teacher = logits(3, 50, seed=18)
    top = sparse(teacher, 5, 1.0, "tensor")
    student.scatter_add_(-1, top.indices, torch.full((3, 5), below))
    loss, grad = run(kind, student, top, backend, 1.0)
    assert loss.isfinite().all() and grad.isfinite().all()
    check(kind, student, top, backend, temperature=1.0)
    if kind == "forward_kl":  # the rest's q - p, by each word's part of the rest
        outside = torch.ones(3, 50, dtype=torch.bool).scatter(-1, top.indices, False)
        part = torch.softmax(student.double().masked_fill(~outside, -torch.inf), -1)
        lost = part * top.tail.double().exp()[:, None]
        upstream = (randn(3, seed=7) + 1.5)[:, None]
        assert relative_error((grad / upstream)[outside], -lost[outside]) < 1e-5
