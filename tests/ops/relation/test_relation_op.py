"""relation's ops under torch.compile and opcheck, and without a gradient."""

import pytest
import torch
from test_relation_kernels import device_of, on_every_kernel, sides, some_masked, states

from cases import randn
from fastkd import functional
from fastkd.ops.relation import KERNELS, MOST_KEYS


@on_every_kernel
@pytest.mark.parametrize("case", ["self", "causal pair"])
def test_compiled_equals_eager(case, backend):
    torch._dynamo.reset()

    def call(xs, ys, xt, yt, mask):
        student, teacher = sides(case, xs, ys, xt, yt)
        return functional.relation_kl_loss(
            [student], [teacher], mask=mask, causal="causal" in case, reduction="none", backend=backend
        )

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for B, L in ((3, 17), (4, 23)):
        xs, ys, xt, yt = (x.to(device_of(backend)) for x in states(13, B, 2, L, 8, 12))
        mask = some_masked(B, L).to(xs.device)
        for f in (call, compiled):
            leaves = xs.clone().requires_grad_(), ys.clone().requires_grad_()
            rows = f(*leaves, xt, yt, mask)
            grads = torch.autograd.grad(rows, leaves, randn(*rows.shape, seed=5).to(rows), allow_unused=True)
            if f is call:
                expected = rows, *grads
        for a, b in zip(expected, (rows, *grads), strict=True):
            assert a is b is None or torch.equal(a, b)


@pytest.mark.skipif("cpu" not in KERNELS, reason="the C++ kernels are not built")
@pytest.mark.parametrize("length", [5, MOST_KEYS + 3])
def test_opcheck(length):
    xs, ys, xt, yt = states(14, 2, 3, length, 5, 6)
    mask = torch.ones(2, length, dtype=torch.bool)
    for y, other in ((None, None), (ys, yt)):
        sides = (xs, y, xt, other, mask)
        torch.library.opcheck(torch.ops.fastkd.relation_fwd, (*sides, True, 0.5, 0.4, length <= MOST_KEYS))
        rows, *saved = torch.ops.fastkd.relation_fwd(*sides, True, 0.5, 0.4, length <= MOST_KEYS)
        torch.library.opcheck(torch.ops.fastkd.relation_bwd, (torch.rand_like(rows), *sides, *saved, True, 0.5, 0.4))


@pytest.mark.skipif("cpu" not in KERNELS, reason="the C++ kernels are not built")
def test_without_a_gradient_nothing_is_saved():
    xs, _, xt, _ = states(15, 2, 3, 9, 5, 6)
    *_, unit_grad_x, unit_grad_y = KERNELS["cpu"].fwd(xs, None, xt, None, None, False, 0.5, 0.4, False)
    assert unit_grad_x.numel() == 0 and unit_grad_y.numel() == 0
    assert not functional.relation_kl_loss([xs], [xt], backend="cpu").requires_grad
