"""layer_cost: what only its kernels can get wrong: tiles, blocks, rows, element types, threads, registration."""

import os
import subprocess
import sys

import pytest
import torch
from test_layer_cost import MASK, device_of, hidden, layer_costs, on, on_every_backend

from cases import gradients, randn, relative_error
from fastkd import backends

on_every_kernel = pytest.mark.parametrize(on_every_backend.args[0], on_every_backend.args[1][1:])
has_cpu = pytest.mark.skipif(
    backends.UNAVAILABLE["cpu"] is not None, reason=f"C++ kernels: {backends.UNAVAILABLE['cpu']}"
)


def both(students, teachers, flow, backend, **options):
    """(costs, gradients) of sum flow * costs."""
    leaves = [x.detach().clone().requires_grad_() for x in students]
    costs = layer_costs(leaves, teachers, backend=backend, **options)
    return costs.detach(), torch.autograd.grad((costs * flow).sum(), leaves)


def error_of_both(students, teachers, flow, backend, **options):
    found, grads = both(students, teachers, flow, backend, **options)
    wide = ([x.double() for x in layers] for layers in (students, teachers))
    oracle, true_grads = both(*wide, flow.double(), "reference", **options)
    return relative_error(found, oracle), max(map(relative_error, grads, true_grads))


@on_every_kernel
@pytest.mark.parametrize("counts", [(1, 1), (6, 12), (7, 13), (5, 3), (13, 2)], ids=str)
def test_every_tile_of_pairs(counts, backend):
    """More layers than a tile holds, and fewer; sparse weights, a student without any."""
    n, m = counts
    students, teachers = (hidden(count, seed, backend=backend, shape=(2, 3, 33)) for count, seed in ((n, 1), (m, 50)))
    flow = randn(n, m, seed=5, dtype=torch.float32).to(device_of(backend))
    flow = flow * (flow > -0.3)
    flow[n // 2] *= n == 1
    errors = error_of_both(students, teachers, flow, backend)
    assert max(errors) < 1e-6
    assert n == 1 or (both(students, teachers, flow, backend)[1][n // 2] == 0).all()


LENGTHS = [1, 7, 33, 768, 1031]


@on_every_kernel
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16", "float16", "float32 bfloat16", "mixed"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("clamp", [None, -0.5])
@pytest.mark.parametrize("padded", [False, True])
def test_blocks_rows_and_dtypes(dtypes, length, clamp, padded, backend):
    """Across block borders, with and without gaps; every element size that a side can have."""
    tokens = (3, 5) if backend == "triton" and backends.INTERPRETED else (7, 41)
    if backend == "triton" and backends.INTERPRETED and (length > 33 or dtypes == "mixed"):
        pytest.skip("slow in the interpreter; test_every_tile_of_pairs and the short lengths go there")
    names = dtypes.split() * 2 if dtypes != "mixed" else ["float32", "float32"]
    students, teachers = (
        [x.to(getattr(torch, name)) for x in hidden(3, seed, backend=backend, shape=(*tokens, length))]
        for name, seed in zip(names, (1, 50), strict=False)
    )
    if dtypes == "mixed":
        students[1], teachers[2] = students[1].half(), teachers[2].bfloat16()
    mask = None
    if padded:  # the first is empty, the last full
        mask = torch.arange(tokens[1])[None] < torch.arange(tokens[0])[:, None] * 7
    flow = randn(3, 3, seed=5, dtype=torch.float32).to(device_of(backend))
    flow = flow * (students[0].numel() / 10)  # float16 has no room for the gradient of a mean
    cost_error, grad_error = error_of_both(students, teachers, flow, backend, mask=on(mask, backend), clamp=clamp)
    rounding = max(torch.finfo(x.dtype).eps for x in students)
    assert cost_error < 5e-7
    assert grad_error < (1e-6 if rounding < 1e-6 else 0.6 * rounding * (2 if backends.INTERPRETED else 1))


@on_every_kernel
def test_a_constant_difference_does_not_drift(backend):
    """Rounding of equal terms always errs the same way: a long sum in float32 shows it."""
    size = 1000 if backend == "triton" and backends.INTERPRETED else 1 << 20
    teacher = torch.zeros(1, 1, size, device=device_of(backend))
    cost = layer_costs([teacher + 0.1], [teacher], backend=backend).item()
    assert cost == pytest.approx(float(torch.tensor(0.1).double() ** 2), rel=1e-6)


@has_cpu
def test_any_number_of_threads_gives_the_same_bits():
    students, teachers = (hidden(count, seed, backend="cpu", shape=(4, 64, 768)) for count, seed in ((3, 1), (5, 50)))
    mask, flow = torch.arange(64)[None] < torch.tensor([64, 3, 0, 40])[:, None], randn(3, 5, dtype=torch.float32)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(both(students, teachers, flow, "cpu", mask=mask))
    assert torch.equal(found[0][0], found[1][0])
    assert all(map(torch.equal, found[0][1], found[1][1]))


@on_every_kernel
def test_only_wanted_gradients(backend):
    students, teachers = hidden(3, 1, backend=backend), hidden(2, 11, backend=backend)
    flow = randn(3, 2, seed=5, dtype=torch.float32).to(device_of(backend))
    _, expected = both(students, teachers, flow, backend)
    leaves = [x.clone().requires_grad_(i == 1) for i, x in enumerate(students)]
    (layer_costs(leaves, teachers, backend=backend) * flow).sum().backward()
    assert torch.equal(leaves[1].grad, expected[1]) and leaves[0].grad is None


@has_cpu
def test_opcheck():
    students, teachers = hidden(2, 1, backend="cpu"), hidden(3, 11, backend="cpu")
    torch.library.opcheck(torch.ops.fastkd.layer_cost_fwd.default, (students, teachers, MASK, -0.5))
    grad = randn(2, 3, dtype=torch.float32)
    torch.library.opcheck(torch.ops.fastkd.layer_cost_bwd.default, (grad, students, teachers, None, None))


@on_every_kernel
def test_compiled_lists_equal_eager(backend):
    torch._dynamo.reset()
    students, teachers = hidden(2, 1, backend=backend), hidden(3, 11, backend=backend)
    flow, mask = randn(2, 3, dtype=torch.float32).to(device_of(backend)), on(MASK, backend)

    def loss(*xs):
        return layer_costs(xs, teachers, mask=mask, clamp=-0.5, backend=backend) * flow

    value, grads = gradients(loss, *students)
    other, other_grads = gradients(torch.compile(loss, fullgraph=True, backend="aot_eager"), *students)
    assert torch.equal(value, other) and all(map(torch.equal, grads, other_grads))


@has_cpu
@pytest.mark.skipif("FASTKD_MAX_ISA" in os.environ, reason="this is the run on a lower instruction set")
@pytest.mark.parametrize("ceiling", [pytest.param("plain", marks=pytest.mark.long), "avx2"])
def test_every_instruction_set(ceiling):
    files = ["tests/ops/layer_cost/test_layer_cost.py", "tests/ops/layer_cost/test_layer_cost_kernels.py"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *files, "-k", "cpu and not compiled"],
        env=os.environ | {"FASTKD_MAX_ISA": ceiling, "OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout
