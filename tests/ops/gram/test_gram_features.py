"""gram from the side of the features (csrc/cpu/gram/features.h): as accurate where rows outnumber them."""

import pytest
import torch
from test_gram_kernels import anisotropic, on_every_kernel, oracle, run

from cases import gradients, randn, relative_error
from fastkd.functional import gram_correlation_loss

# More rows than both widths together; one more than the blocks of 1024 and the chunks of 64 rows; widths that are no vectors.
SHAPES = [(2, 600, 24, 32), (1, 1025, 33, 70), (2, 2113, 48, 17), (1, 700, 1, 2)]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@on_every_kernel
def test_float32(backend, shape, normalize):
    student, teacher = anisotropic(1, *shape, 0.5)
    for mask in (None, randn(*shape[:2], seed=5) > -0.5):
        value, (grad,) = run(student, teacher, backend, "token", mask=mask, normalize=normalize)
        true_value, (true_grad,) = oracle(student, teacher, "token", mask=mask, normalize=normalize)
        assert (value - true_value).abs().max() <= 1e-6
        assert (grad - true_grad).norm() <= 1e-5 * true_grad.norm() + 1e-6
        assert mask is None or (grad[~mask] == 0).all()


@pytest.mark.parametrize("offset", [10.0, 200.0])
@pytest.mark.parametrize("normalize", [True, False])
@on_every_kernel
def test_outlier_dimensions(backend, normalize, offset):
    """Where the textbook's |xᵀx|² - mean² loses 5e-3 of rho."""
    student, teacher = anisotropic(3, 2, 1100, 64, 96, offset, outliers=3)
    value, (grad,) = run(student, teacher, backend, "token", normalize=normalize)
    _, (eager_grad,) = run(student, teacher, "eager", "token", normalize=normalize)
    true_value, (true_grad,) = oracle(student, teacher, "token", normalize=normalize)
    assert relative_error(value, true_value) <= 1e-6
    assert relative_error(grad, true_grad) <= min(1e-5, relative_error(eager_grad, true_grad))


@on_every_kernel
def test_near_convergence(backend):
    teacher = anisotropic(2, 2, 700, 48, 48, 2.0)[0]
    student = (teacher + 1e-3 * randn(2, 700, 48, seed=5)).float()
    value, (grad,) = run(student, teacher, backend, "token")
    _, (eager_grad,) = run(student, teacher, "eager", "token")
    true_value, (true_grad,) = oracle(student, teacher, "token")
    assert (value - true_value).abs().max() <= 1e-6
    assert relative_error(grad, true_grad) <= relative_error(eager_grad, true_grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@on_every_kernel
def test_half_precision(backend, dtype):
    student, teacher = anisotropic(4, 2, 1100, 24, 33, 3.0, dtype=dtype)
    value, (grad,) = run(student, teacher, backend, "token")
    true_value, (true_grad,) = oracle(student, teacher, "token")
    assert relative_error(value, true_value) <= 1e-6 and relative_error(grad, true_grad) <= 4e-3


@on_every_kernel
def test_rows_of_zeros(backend):
    student, teacher = anisotropic(5, 2, 700, 24, 33, 0.5)
    student[:, 7], teacher[0, 250] = 0, 0
    value, (grad,) = run(student, teacher, backend, "token")
    true_value, (true_grad,) = oracle(student, teacher, "token")
    assert relative_error(value, true_value) <= 1e-6
    alive = torch.arange(700) != 7  # the gradient of a row of length 0 is huge, and belongs to the clamp
    assert relative_error(grad[:, alive], true_grad[:, alive]) <= 1e-5


@on_every_kernel
def test_any_number_of_threads_gives_the_same_bits(backend):
    student, teacher = anisotropic(6, 2, 2200, 40, 56, 1.0)
    found = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        found.append(run(student, teacher, backend, "token"))
    for value, (grad,) in found[1:]:
        assert torch.equal(value, found[0][0]) and torch.equal(grad, found[0][1][0])


@on_every_kernel
def test_both_levels_and_nan_rows(backend):
    """The sequence level adds to what the features have left; a NaN row poisons its sequence only."""
    student, teacher = anisotropic(7, 4, 700, 24, 33, 0.5)
    level = {"token": 1.0, "sequence": 0.5}
    value, (grad,) = gradients(lambda s: gram_correlation_loss(s, teacher, level=level, backend=backend), student)
    exact = gradients(lambda s: gram_correlation_loss(s, teacher.double(), level=level), student.double())
    assert relative_error(value, exact[0]) <= 1e-6 and relative_error(grad, exact[1][0]) <= 1e-5
    clean, (clean_grad,) = run(student, teacher, backend, "token")
    student[2, 5] = float("nan")
    values, (grad,) = run(student, teacher, backend, "token")
    others = torch.tensor([0, 1, 3])
    assert values[2].isnan() and grad[2].isnan().any()
    assert torch.equal(values[others], clean[others]) and torch.equal(grad[others], clean_grad[others])
