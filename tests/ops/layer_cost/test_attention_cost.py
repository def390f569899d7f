"""attention_costs through its kernels: against the float64 reference, and without a matrix of scores."""

import pytest
import torch
from test_layer_cost import device_of, on_every_backend

from fastkd import backends, functional
from fastkd.losses.bert_emd import BertEMDLoss

on_every_kernel = pytest.mark.parametrize(on_every_backend.args[0], on_every_backend.args[1][1:])
has_cpu = pytest.mark.skipif(backends.UNAVAILABLE["cpu"] is not None, reason="the C++ kernels are not built")
B, H, S = 2, 4, 37


def layers(count, width, seed, *, groups=H, length=S, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda heads: torch.randn(B, heads, length, width, generator=generator).to(dtype)  # noqa: E731
    return [(draw(H), draw(groups)) for _ in range(count)]


def padding(length=S):
    return (torch.arange(length) < torch.tensor([[length], [length // 3]])).long()


def both(students, teachers, backend, dtype=None, **options):
    """Costs, and the gradients of every query and key under an upstream that no cost escapes; some are 0. It is
    large, so that gradients are numbers that float16 has."""
    device = device_of(backend)
    cast = lambda xs: [tuple(x.detach().to(device, dtype or x.dtype) for x in pair) for pair in xs]  # noqa: E731
    students, teachers = cast(students), cast(teachers)
    if options.get("mask") is not None:
        options["mask"] = options["mask"].to(device)
    leaves = [x.requires_grad_() for pair in students for x in pair]
    costs = functional.attention_costs(students, teachers, backend=backend, **options)
    upstream = 1e3 * torch.linspace(-1, 2, costs.numel(), dtype=costs.dtype).reshape(costs.shape).relu()
    upstream = upstream.to(device)
    return costs.detach().cpu(), [x.cpu() for x in torch.autograd.grad(costs, leaves, upstream)]


def error(x, truth):
    return ((x.double() - truth).norm() / (truth.norm() or 1)).item()


def compare(students, teachers, backend, tolerance=2e-6, **options):
    costs, grads = both(students, teachers, backend, **options)
    true_costs, true_grads = both(students, teachers, "reference", torch.float64, **options)
    assert error(costs, true_costs) <= tolerance
    for grad, truth in zip(grads, true_grads, strict=True):
        assert error(grad, truth) <= max(tolerance, 3 * torch.finfo(grad.dtype).eps)


@on_every_kernel
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, padding()], ids=["whole", "padded"])
@pytest.mark.parametrize(("groups", "heads"), [(H, None), (1, None), (2, "mean")])
def test_against_float64(groups, heads, mask, causal, backend):
    students, teachers = layers(2, 8, 1, groups=groups), layers(5, 12, 2)
    compare(students, teachers, backend, mask=mask, causal=causal, heads=heads)
    compare(students, teachers, backend, mask=mask, causal=causal, heads=heads, scale=0.7)


@on_every_kernel
def test_different_numbers_of_heads_by_their_mean(backend):
    students = [(q[:, :2], k[:, :2]) for q, k in layers(2, 8, 1)]
    compare(students, layers(3, 8, 2), backend, heads="mean")
    compare(students, layers(3, 40, 2), backend, heads="mean")  # wider than a block of columns


@on_every_kernel
@pytest.mark.parametrize("counts", [(1, 1), (4, 19), (13, 2)], ids=str)
def test_more_layers_than_a_tile_holds(counts, backend):
    n, m = counts
    compare(layers(n, 4, 1, length=9), layers(m, 4, 60, length=9), backend, mask=padding(9))


@has_cpu
def test_many_blocks_of_rows_and_a_length_that_nothing_divides():
    compare(layers(3, 48, 1, length=523), layers(7, 48, 2, length=523), "cpu", mask=padding(523), causal=True)


@on_every_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, backend):
    """Scores are float32 sums of products of half-precision numbers: nothing is lost but the rounding of the result."""
    if backend == "triton" and backends.INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies bfloat16 wrongly")
    compare(layers(2, 64, 1, dtype=dtype), layers(3, 64, 2, dtype=dtype), backend, mask=padding())
    compare(layers(2, 64, 1), layers(3, 64, 2, dtype=dtype), backend, mask=padding())


def errors_near_convergence(distance, backend, **options):
    """Of the costs of students that are so far away from a teacher each."""
    teachers = layers(3, options.pop("width", 16), 2, **options)
    students = [tuple(x + distance * torch.randn_like(x) for x in pair) for pair in teachers[:2]]
    costs, grads = both(students, teachers, backend)
    truth, true_grads = both(students, teachers, "reference", torch.float64)
    return (costs / truth - 1).abs().diagonal().max().item(), max(map(error, grads, true_grads))


@on_every_kernel
def test_near_convergence(backend):
    """A thousandth away from a teacher: the difference keeps its digits, as no Gram identity would."""
    assert errors_near_convergence(1e-3, backend)[0] <= 1e-4


LONG = {"length": 601, "width": 4}  # narrow heads of long sequences: d x d matrices are cheaper than scores


@has_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", [None, padding(601)], ids=["whole", "padded"])
@pytest.mark.parametrize(("groups", "heads"), [(H, None), (1, None), (2, "mean")])
def test_long_sequences_by_the_identity(groups, heads, mask, dtype):
    students = layers(2, 4, 1, groups=groups, length=601, dtype=dtype)
    compare(students, layers(3, 7, 2, length=601), "cpu", mask=mask, heads=heads)


@has_cpu
@pytest.mark.parametrize("distance", [1, 0.3, 0.1, 0.03, 1e-2, 1e-3])
def test_the_identity_is_not_used_where_it_cancels(distance):
    cost, gradient = errors_near_convergence(distance, "cpu", **LONG)
    scores, pulled = errors_near_convergence(distance, "cpu", width=64, length=37)
    assert cost <= max(1e-5, 3 * scores) and gradient <= max(1e-5, 3 * pulled)


@on_every_kernel
def test_student_equal_to_teacher(backend):
    for shape in ({"length": 601}, {}) if backend == "cpu" else ({},):
        teachers = layers(2, 4, 2, **shape)
        costs, grads = both(teachers[:1], teachers[:1], backend)
        assert costs.item() == 0 and all((grad == 0).all() for grad in grads)


@has_cpu
@on_every_kernel
def test_frozen_students_have_no_gradient_and_no_cost(backend, monkeypatch):
    """Of three students one is wholly frozen and one's queries are; the others' gradients are what they were."""
    from fastkd.ops.layer_cost import ATTENTION

    students, teachers, seen = layers(3, 8, 1), layers(2, 8, 2), []
    cast = lambda x: x.to(device_of(backend))  # noqa: E731
    trained = ((True, True), (False, False), (False, True)), ((True, True),) * 3
    partly, free = ([tuple(cast(x.clone()).requires_grad_(own) for x, own in zip(pair, which, strict=True))
                     for pair, which in zip(students, sides, strict=True)] for sides in trained)  # fmt: skip
    kernels = ATTENTION[backend]
    counting = kernels._replace(bwd=lambda *args: (seen.append(len(args[1])), kernels.bwd(*args))[1])
    monkeypatch.setitem(ATTENTION, backend, counting)
    for side in (partly, free):
        costs = functional.attention_costs(side, [tuple(map(cast, pair)) for pair in teachers], backend=backend)
        (costs * torch.arange(1.0, 7).view(3, 2).to(costs)).sum().backward()
    assert seen == [2, 3]
    for pair, whole in zip(partly, free, strict=True):
        for x, y in zip(pair, whole, strict=True):
            assert torch.equal(x.grad, y.grad) if x.requires_grad else x.grad is None


def test_strides_as_models_have_them():
    flat = torch.randn(B, S, H * 8, generator=torch.Generator().manual_seed(3))
    view = lambda x: x.view(B, S, H, 8).transpose(1, 2)  # noqa: E731
    students, teachers = [(view(flat), view(flat.flip(1)))], [(view(flat * 2), view(flat.sin()))]
    dense = lambda xs: [tuple(x.contiguous() for x in pair) for pair in xs]  # noqa: E731
    costs, grads = both(students, teachers, "cpu", mask=padding())
    dense_costs, dense_grads = both(dense(students), dense(teachers), "cpu", mask=padding())
    assert torch.equal(costs, dense_costs) and all(map(torch.equal, grads, dense_grads))


@on_every_kernel
@pytest.mark.parametrize("length", [S, 601])
def test_what_masked_keys_hold_does_not_matter_and_nothing_valid_is_zero(length, backend):
    if backend == "triton" and length != S:
        pytest.skip("the long form is the C++ kernel's")
    students, teachers = layers(1, 8, 1, length=length), layers(2, 8, 2, length=length)
    clean = both(students, teachers, backend, mask=padding(length))
    for pair in (*students, *teachers):
        pair[1].masked_fill_(padding(length)[:, None, :, None] == 0, torch.nan)
    dirty = both(students, teachers, backend, mask=padding(length))
    assert torch.equal(clean[0], dirty[0]) and all(map(torch.equal, clean[1], dirty[1]))
    costs, grads = both(students, teachers, backend, mask=torch.zeros(B, length))
    assert (costs == 0).all() and all((grad == 0).all() for grad in grads)


@has_cpu
def test_bitwise_the_same_for_any_number_of_threads():
    students, teachers, results = layers(2, 8, 1), layers(3, 8, 2), []
    long = layers(2, 4, 1, length=601), layers(3, 4, 2, length=601)
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(both(students, teachers, "cpu", mask=padding(), causal=True))
        results[-1][1].extend(both(*long, "cpu")[1])
    assert torch.equal(results[0][0], results[1][0]) and all(map(torch.equal, results[0][1], results[1][1]))


@has_cpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [None, "mean"])
def test_materialised_scores_use_layer_cost(heads, causal):
    generator = torch.Generator().manual_seed(4)
    scores = [10 * torch.randn(B, H, S, S, generator=generator) for _ in range(4)]
    scores[1][:, :, :, -5:] = -1e4
    options = {"mask": padding(), "causal": causal, "heads": heads}
    leaf = scores[0].clone().requires_grad_()
    costs = functional.attention_costs([leaf, scores[1]], scores[2:], backend="cpu", **options)
    true_leaf = scores[0].double().requires_grad_()
    double = [x.double() for x in scores[1:]]
    truth = functional.attention_costs([true_leaf, double[0]], double[1:], backend="reference", **options)
    assert error(costs.detach(), truth.detach()) <= 1e-6
    (grad,), (true_grad,) = torch.autograd.grad(costs.sum(), leaf), torch.autograd.grad(truth.sum(), true_leaf)
    assert error(grad, true_grad) <= 1e-6


@has_cpu
def test_compiled_without_a_graph_break_and_opcheck():
    students, teachers = layers(2, 8, 1), layers(2, 8, 2)
    compiled = torch.compile(functional.attention_costs, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(students, teachers), functional.attention_costs(students, teachers))
    (sq, sk), (tq, tk) = (list(map(list, zip(*xs, strict=True))) for xs in (students, teachers))
    torch.library.opcheck(torch.ops.fastkd.attention_cost_fwd, (sq, sk, tq, tk, [0.5] * 4, padding() == 1, True))
    grad = torch.ones(2, 2)
    torch.library.opcheck(torch.ops.fastkd.attention_cost_bwd, (grad, sq, sk, tq, tk, [0.5] * 4, padding() == 1, True))


@has_cpu
def test_bert_emd_uses_it():
    loss = BertEMDLoss(2, 4)
    students = [tuple(x.requires_grad_() for x in pair) for pair in layers(2, 8, 1)]
    attention, hidden = loss(students, layers(4, 8, 2), None, None, padding())
    names, todo = set(), [attention.grad_fn]
    while todo:
        node = todo.pop()
        names.add(type(node).__name__)
        todo += [follower for follower, _ in node.next_functions if follower is not None]
    assert "AttentionCostBackward" in names and hidden == 0
