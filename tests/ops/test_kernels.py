"""Precision, determinism, aliasing, strides, NaN, mixed dtypes and torch.compile, for every stem and backend with a kernel.

Each stem has `Subject`s (subjects.py): inputs, a call, and idiomatic eager PyTorch, whose error is the limit. The tests are the
same for all of them.
"""

import math

import numpy as np
import pytest
import torch
from subjects import errors, inputs, on_every_backend, oracle, run, the_reference_in_long

from cases import AWKWARD_SIZES, TOLERANCES, gradients, randn, relative_error
from fastkd import backends


@on_every_backend
@pytest.mark.parametrize("width", AWKWARD_SIZES)
@pytest.mark.parametrize("rows", [1, 5])
def test_awkward_shapes(subject, backend, rows, width):
    student, teacher = inputs(subject, backend, width, torch.float32, rows, width)
    loss, (grad,) = run(subject, backend, student, teacher)
    true_loss, (true_grad,) = oracle(subject, student, teacher)
    # Of one class or two, a loss or gradient may be exactly 0 in float64: the error is relative to the size of the inputs.
    floor = 1e-6 * student.double().norm()
    assert (loss.double() - true_loss).norm() <= 2e-6 * true_loss.norm() + 1e-6
    assert (grad.double() - true_grad).norm() <= 1e-5 * true_grad.norm() + (floor if width <= 2 else 1e-7)


@on_every_backend
def test_float32_in_the_ordinary_range(subject, backend):
    student, teacher = inputs(subject, backend, 3, torch.float32, 16, 4099)
    loss_error, grad_error = errors(subject, backend, student, teacher)
    allowed_loss, allowed_grad = TOLERANCES[torch.float32]
    assert loss_error <= allowed_loss
    assert grad_error <= allowed_grad


@on_every_backend
def test_near_convergence(subject, backend):
    """student = teacher + 1e-3, as at the end of a distillation."""
    student, teacher = inputs(subject, backend, 4, torch.float32, 16, 32000, noise=1e-3)
    if subject.stem == "gram":  # 1 - rho is about 1e-6 here
        return near_convergence_of_gram(subject, backend, student, teacher)
    loss_error, grad_error = errors(subject, backend, student, teacher)
    assert loss_error <= 1e-5
    assert grad_error <= 1e-5


def near_convergence_of_gram(subject, backend, student, teacher):
    """1 - rho to an absolute 1e-6, and a gradient no less accurate than that of eager float32."""
    loss, (grad,) = run(subject, backend, student, teacher)
    _, (eager_grad,) = gradients(lambda s: subject.eager(s, teacher), student)
    true_loss, (true_grad,) = oracle(subject, student, teacher)
    assert (loss - true_loss).abs().max() <= 1e-6
    assert relative_error(grad, true_grad) <= relative_error(eager_grad, true_grad)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_worse_than_eager(subject, backend, dtype):
    """RMS over seeds: 1.0x eager's error for the loss, 1.25x for the gradient plus one rounding of the output."""
    if backend == "triton" and backends.INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter truncates where it stores bfloat16")
    ours, eagers = [], []
    for seed in range(8):
        student, teacher = inputs(subject, backend, seed, dtype, 8, 1031)
        true_loss, (true_grad,) = oracle(subject, student, teacher)
        for errors_of, call in ((ours, lambda s, t: subject.call(s, t, backend)), (eagers, subject.eager)):
            loss, (grad,) = gradients(lambda s, call=call, t=teacher: call(s, t).float(), student)
            errors_of.append((relative_error(loss, true_loss), relative_error(grad, true_grad)))
    ours, eagers = (torch.tensor(x).square().mean(0).sqrt() for x in (ours, eagers))
    one_rounding = torch.finfo(dtype).eps / 2
    assert ours[0] <= eagers[0] + 1e-6
    assert ours[1] <= 1.25 * eagers[1] + one_rounding
    assert (ours <= 1e-2).all()


@on_every_backend
def test_two_runs_are_bitwise_equal(subject, backend):
    student, teacher = inputs(subject, backend, 5, torch.float32, 7, 1000)
    (first, (first_grad,)), (second, (second_grad,)) = (run(subject, backend, student, teacher) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first_grad, second_grad)


@pytest.mark.skipif(not backends.INTERPRETED, reason="a GPU runs programs in an order of its own")
@pytest.mark.parametrize("order", ["reversed", "shuffled"])
@on_every_backend
def test_programs_run_in_any_order(subject, backend, order, monkeypatch):
    """None reads what another one of the same launch writes: the bits stay the same."""
    if backend != "triton":
        pytest.skip("not a launch of programs")
    from triton.runtime.interpreter import interpreter_builder as builder

    student, teacher = inputs(subject, backend, 5, torch.float32, 5, 600)
    loss, (grad,) = run(subject, backend, student, teacher)
    set_place, moved = builder.set_grid_idx, []

    def set_another(*place):
        grid = builder.grid_dim
        count = math.prod(grid)
        places = torch.randperm(count, generator=torch.Generator().manual_seed(count))
        places = torch.arange(count).flip(0) if order == "reversed" else places
        another = np.unravel_index(int(places[np.ravel_multi_index(place, grid)]), grid)
        moved.append(another != place)
        set_place(*map(int, another))

    monkeypatch.setattr(builder, "set_grid_idx", set_another)
    other_loss, (other_grad,) = run(subject, backend, student, teacher)
    assert any(moved) and torch.equal(other_loss, loss) and torch.equal(other_grad, grad)


@on_every_backend
def test_nothing_returned_aliases_a_buffer(subject, backend):
    """Two results held at once, and two backwards through one graph, leave each other alone; inputs stay as they were."""
    student, teacher = inputs(subject, backend, 6, torch.float32, 4, 333)
    before = student.clone(), teacher.clone()
    leaf = student.clone().requires_grad_()
    loss = subject.call(leaf, teacher, backend)
    loss_before = loss.detach().clone()
    (grad,) = torch.autograd.grad(loss.sum(), leaf, retain_graph=True)
    grad_before = grad.clone()
    other, (other_grad,) = run(subject, backend, *inputs(subject, backend, 60, torch.float32, 4, 333))
    (again,) = torch.autograd.grad(loss.sum(), leaf)
    assert torch.equal(loss, loss_before) and torch.equal(grad, grad_before) and torch.equal(again, grad_before)
    assert not torch.equal(other, loss) and not torch.equal(other_grad, grad)
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])


@on_every_backend
def test_strided_inputs(subject, backend):
    student, teacher = inputs(subject, backend, 7, torch.float32, 6, 257)
    wide = torch.full((6, 600), float("nan"), device=student.device)
    wide[:, 100:357] = student
    strided, transposed = wide[:, 100:357], teacher.t().contiguous().t()
    assert not strided.is_contiguous() and not transposed.is_contiguous()
    loss, (grad,) = run(subject, backend, student, teacher)
    other = strided.detach().requires_grad_()
    other_loss = subject.call(other, transposed, backend)
    upstream = randn(*loss.shape, seed=7).to(loss) + 1.5
    (other_grad,) = torch.autograd.grad(other_loss, other, upstream)
    torch.testing.assert_close(other_loss, loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(other_grad, grad, rtol=1e-5, atol=1e-7)


@on_every_backend
def test_a_nan_row_poisons_only_itself(subject, backend):
    student, teacher = inputs(subject, backend, 8, torch.float32, 5, 100)
    clean, (clean_grad,) = run(subject, backend, student, teacher)
    student = student.clone()
    student[2, 17] = float("nan")
    if subject.stem == "transport" and student.device.type == "cpu":
        with pytest.raises(ValueError, match="costs must be finite"):
            run(subject, backend, student, teacher)
        return
    loss, (grad,) = run(subject, backend, student, teacher)
    others = [0, 1, 3, 4]
    assert loss[2].isnan() and grad[2].isnan().any()
    assert torch.equal(loss[others], clean[others]) and torch.equal(grad[others], clean_grad[others])


@on_every_backend
def test_equal_student_and_teacher(subject, backend):
    _, teacher = inputs(subject, backend, 9, torch.float32, 5, 300)
    loss, (grad,) = run(subject, backend, teacher.clone(), teacher)
    if subject.stem == "contrast":
        assert loss.isfinite().all() and grad.isfinite().all()  # a query at its positive still has its negatives
    elif subject.stem == "gram":  # eps / (|P| |Q| + eps)
        assert loss.abs().max() <= 1e-5 and grad.abs().max() <= 1e-4
    elif subject.variant == "soft_ce":
        assert (grad == 0).all()
    else:
        assert (loss == 0).all() and (grad == 0).all()


@on_every_backend
def test_mixed_dtypes(subject, backend):
    """A bfloat16 teacher beside a float32 student is the normal case; the gradient comes in the student's dtype."""
    student, teacher = inputs(subject, backend, 10, torch.float32, 5, 300)
    teacher = teacher.bfloat16()
    loss, (grad,) = run(subject, backend, student, teacher)
    true_loss, (true_grad,) = oracle(subject, student, teacher)
    assert loss.dtype == torch.float32 and grad.dtype == torch.float32
    assert relative_error(loss, true_loss) <= 1e-6 and relative_error(grad, true_grad) <= 1e-5


@the_reference_in_long
def test_compiled_equals_eager(subject, backend):
    if (subject.stem, backend) == ("transport", "reference"):
        pytest.skip("the reference solves in Python integers")
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda s, t: subject.call(s, t, backend), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for rows, width in ((4, 65), (5, 130)):
        student, teacher = inputs(subject, backend, 11, torch.float32, rows, width)
        loss, (grad,) = run(subject, backend, student, teacher)
        other, (other_grad,) = gradients(lambda s, t=teacher: compiled(s, t), student)
        torch.testing.assert_close(other, loss, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(other_grad, grad, rtol=1e-5, atol=1e-7)
