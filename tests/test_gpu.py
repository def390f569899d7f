"""What only a GPU can show: no synchronisation, CUDA-graph capture, more than 2³¹ elements. Precision on the GPU is
tests/test_kernels.py's business, which runs there too."""

import pytest
import torch

import fastkd
from cases import randn, relative_error

pytestmark = pytest.mark.gpu


def logits(rows, width, dtype=torch.float32):
    return (randn(rows, width, seed=i, scale=3.0).to("cuda", dtype) for i in (1, 2))


def step(student, teacher, kind="forward_kl", mask=None):
    loss = fastkd.divergence(student, teacher, kind=kind, temperature=2.0, mask=mask)
    (grad,) = torch.autograd.grad(loss, student)
    return loss.detach(), grad


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "skew_kl", "jsd", "tvd", "soft_ce", "mse"])
def test_divergence_never_waits_for_the_device(kind):
    student, teacher = logits(64, 1000)
    student.requires_grad_()
    mask = torch.arange(64, device="cuda") % 3 > 0
    step(student, teacher, kind, mask)  # compiled outside
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(student, teacher, kind, mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_divergence_in_a_cuda_graph():
    student, teacher = logits(64, 1000)
    student.requires_grad_()
    expected = step(student, teacher)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(student, teacher)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(student, teacher)
    for x in captured:
        x.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_divergence_beyond_two_to_the_31_elements():
    rows, width = 17000, 131072  # 2.2e9 elements; the last row starts beyond 2³¹
    if torch.cuda.mem_get_info()[0] < 30 << 30:
        pytest.skip("needs 30 GiB of free GPU memory")
    student = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
    teacher = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
    loss = fastkd.divergence(student, teacher, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), student)
    last_student = student.detach()[-2:].double().requires_grad_()
    true_loss = fastkd.divergence(last_student, teacher[-2:].double(), reduction="none", backend="reference")
    (true_grad,) = torch.autograd.grad(true_loss.sum(), last_student)
    assert relative_error(loss[-2:], true_loss) < 1e-5
    assert relative_error(grad[-2:], true_grad) < 5e-3


def test_out_of_range_index_is_nan_and_no_fault():
    student, _ = logits(4, 50)
    indices = torch.tensor([[0, 1], [0, 99], [2, 3], [-1, 0]], device="cuda")
    loss = fastkd.divergence(student, fastkd.TopK(indices, torch.full((4, 2), -1.0, device="cuda")), reduction="none")
    assert loss.isnan().tolist() == [False, True, False, True]
