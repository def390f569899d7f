"""The CPU's float32 path of divergence: value and gradient from one pass (its hazards: test_gradient_in_forward.py)."""

import weakref

import pytest
import torch

from fastkd import backends
from fastkd.checks import KINDS
from fastkd.functional import divergence

pytestmark = pytest.mark.skipif(backends.UNAVAILABLE["cpu"] is not None, reason="the C++ kernels are not built")
ROWS, VOCABULARY = 6, 5000


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def logits(distance=3.0):
    teacher = 3 * randn(ROWS, VOCABULARY, seed=1)
    return teacher + distance * randn(ROWS, VOCABULARY, seed=2), teacher


def gradient(student, teacher, upstream=1.0, backend="cpu", **options):
    leaf = student.detach().requires_grad_()
    loss = divergence(leaf, teacher, backend=backend, **options)
    (grad,) = torch.autograd.grad(loss, leaf, torch.as_tensor(upstream, dtype=loss.dtype).expand_as(loss))
    return loss.detach(), grad


@pytest.fixture
def made(monkeypatch):
    """Weak references to the gradients that forwards make."""
    found, fwd = [], torch.ops.fastkd.divergence_fwd_grad

    def watched(*args):
        rows, gradient = fwd(*args)
        found.append(weakref.ref(gradient))
        return rows, gradient

    monkeypatch.setattr(torch.ops.fastkd, "divergence_fwd_grad", watched)
    return found


def error(x, truth):
    return ((x - truth).norm() / truth.norm()).item()


# A student far from its teacher (fast path), near to it (accurate path), and one or the other by row.
DISTANCES = {"far": 3.0, "near": 1e-3, "mixed": torch.tensor([3.0, 1e-4, 0.3, 0.6, 10.0, 0.0])[:, None]}


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("kind", KINDS)
def test_against_float64(kind, distance):
    student, teacher = logits(DISTANCES[distance])
    options = {"kind": kind, "temperature": 1.5}
    loss, grad = gradient(student, teacher, **options)
    true_loss, true_grad = gradient(student.double(), teacher.double(), backend="reference", **options)
    assert error(loss, true_loss) <= 2e-6
    assert error(grad, true_grad) <= 2e-6


@pytest.mark.parametrize("upstream", [1.0, 0.3, -7.0, 0.0, 1e-30])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_any_upstream(reduction, upstream):
    student, teacher = logits()
    mask = torch.tensor([1, 0, 1, 1, 0, 1])
    _, unit = gradient(student, teacher, reduction=reduction, mask=mask)
    _, grad = gradient(student, teacher, upstream, reduction=reduction, mask=mask)
    torch.testing.assert_close(grad, unit * upstream, rtol=3e-7, atol=0)
    assert (grad[mask == 0] == 0).all()


def test_a_different_upstream_for_every_row():
    student, teacher = logits()
    upstream = torch.tensor([1.0, 2.0, 0.0, -1.0, 0.5, 1.0])
    _, unit = gradient(student, teacher, reduction="none")
    _, grad = gradient(student, teacher, upstream, reduction="none")
    torch.testing.assert_close(grad, unit * upstream[:, None], rtol=3e-7, atol=0)


@pytest.mark.parametrize("mask", [None, torch.tensor([1, 0, 1, 1, 0, 1])])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_functions_announce_the_upstream_gradient_that_comes(reduction, mask, monkeypatch):
    """To the last bit; else every backward would rescale the gradient."""
    student, teacher = logits()
    came = []
    rescale = torch.ops.fastkd.divergence_rescale_grad
    monkeypatch.setattr(
        torch.ops.fastkd,
        "divergence_rescale_grad",
        lambda grad, up, *rest: (came.append(grad.clone()), rescale(grad, up, *rest)),
    )
    for temperature in (1.0, 3.3):
        _, grad = gradient(student, teacher, reduction=reduction, mask=mask, temperature=temperature)
        assert torch.equal(came[-1], grad)


def test_the_first_backward_hands_its_gradient_over_without_a_copy():
    student, teacher = logits()
    student.requires_grad_()
    loss = divergence(student, teacher)
    address = loss.grad_fn.next_functions[0][
        0
    ].made.gradients.data_ptr()  # autograd copies a tensor that is referred to
    loss.backward()
    assert student.grad.data_ptr() == address


@pytest.mark.parametrize("nobody", ["no_grad", "inference_mode", "frozen"])
def test_an_unneeded_gradient_is_not_computed(nobody, made):
    student, teacher = logits()
    leaf = student.requires_grad_(nobody != "frozen")
    with {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(nobody, torch.enable_grad)():
        value = divergence(leaf, teacher, backend="cpu")
    assert not made
    assert torch.allclose(divergence(leaf.detach().requires_grad_(), teacher, backend="cpu"), value, rtol=1e-6)
    assert len(made) == 1


@pytest.mark.parametrize("differentiated", [False, True])
def test_the_gradient_is_gone_with_the_graph_or_its_first_backward(differentiated, made):
    student, teacher = logits()
    leaf = student.requires_grad_()
    loss = divergence(leaf, teacher, backend="cpu")
    assert made[0]() is not None
    if differentiated:
        torch.autograd.grad(loss, leaf, retain_graph=True)
    else:
        del loss
    assert made[0]() is None


@pytest.mark.parametrize("temperature", [1.0, 0.05])
def test_tokens_that_one_side_excludes(temperature):
    student, teacher = logits(3.0)
    student, teacher = student[:4], teacher[:4]
    teacher[0, :2500] = -torch.inf  # a whole chunk without a teacher
    teacher[1, ::2], student[1, ::2] = -torch.inf, -torch.inf
    student[2, 7] -= 400.0  # all but excluded: its logarithm still counts
    student[3, teacher[3].argmax()] = -torch.inf
    loss, grad = gradient(student, teacher, reduction="none", temperature=temperature)
    true_loss, true_grad = gradient(
        student.double(), teacher.double(), reduction="none", temperature=temperature, backend="reference"
    )
    assert loss[3] == torch.inf and true_loss[3] == torch.inf
    torch.testing.assert_close(loss[:3].double(), true_loss[:3], rtol=2e-6, atol=0)
    assert error(grad[:3], true_grad[:3]) <= 2e-6


def test_ops_match_their_schemas():
    student, teacher = logits()
    mask = torch.tensor([True, False, True, True, True, True])
    torch.library.opcheck(torch.ops.fastkd.divergence_fwd_grad, (student, teacher, mask, 0, 1.0, 1.0, True, 4.0))
    torch.library.opcheck(
        torch.ops.fastkd.divergence_rescale_grad, (student.clone(), torch.ones(ROWS), mask, True, 1.0)
    )
