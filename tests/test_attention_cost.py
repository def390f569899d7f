"""attention_costs through the C++ kernel: against the float64 reference, and without a matrix of scores."""

import pytest
import torch

from fastkd import backends, functional
from fastkd.losses.bert_emd import BertEMDLoss

pytestmark = pytest.mark.skipif(backends.UNAVAILABLE["cpu"] is not None, reason="the C++ kernels are not built")
B, H, S = 2, 4, 37


def layers(count, width, seed, *, groups=H, length=S, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda heads: torch.randn(B, heads, length, width, generator=generator).to(dtype)  # noqa: E731
    return [(draw(H), draw(groups)) for _ in range(count)]


def padding(length=S):
    return (torch.arange(length) < torch.tensor([[length], [length // 3]])).long()


def both(students, teachers, backend, dtype=None, **options):
    """Costs, and the gradients of every query and key under an upstream that no cost escapes; some are 0."""
    cast = lambda xs: [tuple(x.detach().to(dtype or x.dtype) for x in pair) for pair in xs]  # noqa: E731
    students, teachers = cast(students), cast(teachers)
    leaves = [x.requires_grad_() for pair in students for x in pair]
    costs = functional.attention_costs(students, teachers, backend=backend, **options)
    upstream = torch.linspace(-1, 2, costs.numel(), dtype=costs.dtype).reshape(costs.shape).relu()
    return costs.detach(), torch.autograd.grad(costs, leaves, upstream)


def error(x, truth):
    return ((x.double() - truth).norm() / (truth.norm() or 1)).item()


def compare(students, teachers, tolerance=2e-6, **options):
    costs, grads = both(students, teachers, "cpu", **options)
    true_costs, true_grads = both(students, teachers, "reference", torch.float64, **options)
    assert error(costs, true_costs) <= tolerance
    for grad, truth in zip(grads, true_grads, strict=True):
        assert error(grad, truth) <= max(tolerance, 3 * torch.finfo(grad.dtype).eps)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, padding()], ids=["whole", "padded"])
@pytest.mark.parametrize(("groups", "heads"), [(H, None), (1, None), (2, "mean")])
def test_against_float64(groups, heads, mask, causal):
    students, teachers = layers(2, 8, 1, groups=groups), layers(5, 12, 2)
    compare(students, teachers, mask=mask, causal=causal, heads=heads)
    compare(students, teachers, mask=mask, causal=causal, heads=heads, scale=0.7)


def test_different_numbers_of_heads_by_their_mean():
    students = [(q[:, :2], k[:, :2]) for q, k in layers(2, 8, 1)]
    compare(students, layers(3, 8, 2), heads="mean")


def test_many_blocks_of_rows_and_a_length_that_nothing_divides():
    compare(layers(3, 16, 1, length=523), layers(7, 16, 2, length=523), mask=padding(523))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """Scores are float32 sums of products of half-precision numbers: nothing is lost but the rounding of the result."""
    compare(layers(2, 64, 1, dtype=dtype), layers(3, 64, 2, dtype=dtype), mask=padding())
    compare(layers(2, 64, 1), layers(3, 64, 2, dtype=dtype), mask=padding())


def test_near_convergence():
    """A thousandth away from a teacher: the difference keeps its digits, as no Gram identity would."""
    teachers = layers(3, 16, 2)
    students = [tuple(x + 1e-3 * torch.randn_like(x) for x in pair) for pair in teachers[:2]]
    costs, _ = both(students, teachers, "cpu")
    truth, _ = both(students, teachers, "reference", torch.float64)
    assert abs(costs[0, 0] / truth[0, 0] - 1) <= 1e-4 and abs(costs[1, 1] / truth[1, 1] - 1) <= 1e-4


def test_strides_as_models_have_them():
    flat = torch.randn(B, S, H * 8, generator=torch.Generator().manual_seed(3))
    view = lambda x: x.view(B, S, H, 8).transpose(1, 2)  # noqa: E731
    students, teachers = [(view(flat), view(flat.flip(1)))], [(view(flat * 2), view(flat.sin()))]
    dense = lambda xs: [tuple(x.contiguous() for x in pair) for pair in xs]  # noqa: E731
    costs, grads = both(students, teachers, "cpu", mask=padding())
    dense_costs, dense_grads = both(dense(students), dense(teachers), "cpu", mask=padding())
    assert torch.equal(costs, dense_costs) and all(map(torch.equal, grads, dense_grads))


def test_what_masked_keys_hold_does_not_matter_and_nothing_valid_is_zero():
    students, teachers = layers(1, 8, 1), layers(2, 8, 2)
    clean = both(students, teachers, "cpu", mask=padding())
    for pair in (*students, *teachers):
        pair[1].masked_fill_(padding()[:, None, :, None] == 0, torch.nan)
    dirty = both(students, teachers, "cpu", mask=padding())
    assert torch.equal(clean[0], dirty[0]) and all(map(torch.equal, clean[1], dirty[1]))
    costs, grads = both(students, teachers, "cpu", mask=torch.zeros(B, S))
    assert (costs == 0).all() and all((grad == 0).all() for grad in grads)


def test_bitwise_the_same_for_any_number_of_threads():
    students, teachers, results = layers(2, 8, 1), layers(3, 8, 2), []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(both(students, teachers, "cpu", mask=padding(), causal=True))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0][0], results[1][0]) and all(map(torch.equal, results[0][1], results[1][1]))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [None, "mean"])
def test_scores_that_exist_go_through_layer_cost(heads, causal):
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


def test_compiled_without_a_break_and_checked_ops():
    students, teachers = layers(2, 8, 1), layers(2, 8, 2)
    compiled = torch.compile(functional.attention_costs, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(students, teachers), functional.attention_costs(students, teachers))
    (sq, sk), (tq, tk) = (list(map(list, zip(*xs, strict=True))) for xs in (students, teachers))
    torch.library.opcheck(torch.ops.fastkd.attention_cost_fwd, (sq, sk, tq, tk, padding() == 1, True, 0.0))
    grad = torch.ones(2, 2)
    torch.library.opcheck(torch.ops.fastkd.attention_cost_bwd, (grad, sq, sk, tq, tk, padding() == 1, True, 0.0))


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
