"""layer_cost: all-pairs mean squared differences, held against explicit loops, closed forms and its own laws."""

import pytest
import torch

from cases import gradients, randn, relative_error
from fastkd import backends, functional

MASK = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
B, H, S, D = 3, 2, 5, 6


def available(backend):
    if backend == "triton":
        return backend in backends.WRITTEN["layer_cost"]
    return backend == "reference" or backends.UNAVAILABLE[backend] is None


def device_of(backend):
    return "cuda" if backend == "triton" and not backends.INTERPRETED else "cpu"


on_every_backend = pytest.mark.parametrize(
    "backend",
    [
        pytest.param(backend, marks=[pytest.mark.gpu] if device_of(backend) == "cuda" else [])
        for backend in ("reference", "cpu", "triton")
        if available(backend)
    ],
)


def hidden(count, seed, dtype=torch.float64, backend="reference", shape=(B, S, D)):
    """float64 for the reference; kernels take float32, of values that it holds exactly."""
    dtype = torch.float32 if backend != "reference" and dtype == torch.float64 else dtype
    return [randn(*shape, seed=seed + i, dtype=dtype).to(device_of(backend)) for i in range(count)]


def precision(backend):
    return 1e-13 if backend == "reference" else 5e-7


def queries_and_keys(count, seed, d, groups=H):
    return [(randn(B, H, S, d, seed=seed + i), randn(B, groups, S, d, seed=seed + 50 + i)) for i in range(count)]


def layer_costs(*args, backend="reference", **options):
    return functional.layer_costs(*args, backend=backend, **options)


def attention_costs(*args, **options):
    return functional.attention_costs(*args, backend="reference", **options)


def on(mask, backend):
    return None if mask is None else mask.to(device_of(backend))


def entry(x, clamp):
    return 0.0 if clamp is not None and x <= clamp else float(x)


@on_every_backend
@pytest.mark.parametrize("clamp", [None, -0.5])
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
def test_hidden_costs_in_loops(mask, clamp, backend):
    students, teachers = hidden(2, 1, backend=backend), hidden(3, 11, backend=backend)
    students[0][0, 0, 0] = -0.5  # a value at the clamp counts as 0
    costs = layer_costs(students, teachers, mask=on(mask, backend), clamp=clamp, backend=backend)
    assert costs.shape == (2, 3) and costs.dtype == students[0].dtype
    for i, s in enumerate(students):
        for j, t in enumerate(teachers):
            squares = [
                (entry(s[b, n, k], clamp) - entry(t[b, n, k], clamp)) ** 2
                for b in range(B)
                for n in range(S)
                for k in range(D)
                if mask is None or mask[b, n]
            ]
            assert costs[i, j].item() == pytest.approx(sum(squares) / len(squares), rel=precision(backend))


def scores_in_loops(q, k, mask, causal, scale):
    out = torch.zeros(B, H, S, S, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            for i in range(S):
                for j in range(S):
                    if (mask is None or mask[b, j]) and (j <= i or not causal):
                        out[b, h, i, j] = q[b, h, i] @ k[b, h * k.shape[1] // H, j] * scale
    return out


@pytest.mark.parametrize("groups", [H, 1])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
def test_attention_costs_in_loops(mask, causal, groups):
    students, teachers = queries_and_keys(2, 1, 3, groups), queries_and_keys(3, 11, 7, groups)
    costs = attention_costs(students, teachers, mask=mask, causal=causal)
    averaged = attention_costs(students, teachers, mask=mask, causal=causal, heads="mean", scale=0.5)
    for i, student in enumerate(students):
        for j, teacher in enumerate(teachers):
            s, t = scores_in_loops(*student, mask, causal, 3**-0.5), scores_in_loops(*teacher, mask, causal, 7**-0.5)
            assert costs[i, j].item() == pytest.approx(((s - t) ** 2).mean().item(), rel=1e-12)
            s, t = scores_in_loops(*student, mask, causal, 0.5), scores_in_loops(*teacher, mask, causal, 0.5)
            assert averaged[i, j].item() == pytest.approx(((s - t).mean(1) ** 2).mean().item(), rel=1e-12)


def test_pairs_equal_materialised_scores():
    students, teachers = queries_and_keys(2, 1, 3), queries_and_keys(3, 11, 7)
    additive = torch.where(MASK, 0.0, -10000.0)[:, None, None, :]

    def scores(layers):
        return [q @ k.transpose(2, 3) / q.shape[-1] ** 0.5 + additive for q, k in layers]

    expected = attention_costs(scores(students), scores(teachers))
    assert relative_error(attention_costs(students, teachers, mask=MASK), expected) < 1e-12
    assert relative_error(attention_costs(scores(students), scores(teachers), mask=MASK), expected) < 1e-12
    assert relative_error(attention_costs(scores(students), teachers, mask=MASK), expected) < 1e-12


def test_masked_scores_are_zero_on_each_side_separately():
    s, t = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    s[..., 0, 0], t[..., 0, 0], t[..., 1, 1] = -100.0, 3.0, -10000.0
    assert attention_costs([s], [t]).item() == 9.0 / 4
    s[..., 0, 0] = -99.0
    assert attention_costs([s], [t]).item() == 102.0**2 / 4


@on_every_backend
def test_gradient_is_the_closed_form(backend):
    """d/ds_i of sum f_ij d_ij = 2 / numel (s_i sum_j f_ij - sum_j f_ij t_j), and 0 where masked or clamped."""
    students, teachers = hidden(2, 1, backend=backend), hidden(3, 11, backend=backend)
    flow = randn(2, 3, seed=5, dtype=students[0].dtype).to(device_of(backend))
    for mask, clamp in ((None, None), (on(MASK, backend), None), (on(MASK, backend), -0.5)):
        leaves = [x.clone().requires_grad_() for x in students]
        (flow * layer_costs(leaves, teachers, mask=mask, clamp=clamp, backend=backend)).sum().backward()
        keep = torch.ones_like(students[0][..., :1], dtype=torch.bool) if mask is None else mask[..., None]
        for i, leaf in enumerate(leaves):
            wide = [x.double() for x in (students[i], *teachers)]
            s, *ts = (x if clamp is None else x.masked_fill(x <= clamp, 0) for x in wide)
            carried = sum(f * t for f, t in zip(flow[i].double(), ts, strict=True))
            expected = 2 / float(keep.sum() * D) * (flow[i].double().sum() * s - carried)
            alive = keep if clamp is None else keep & (students[i] > clamp)
            assert relative_error(leaf.grad, torch.where(alive, expected, 0.0)) < precision(backend)
            assert (leaf.grad[~alive.expand_as(leaf)] == 0).all()


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
def test_gradcheck(mask):
    students = tuple(x[..., :2].clone().requires_grad_() for x in hidden(2, 1))
    teachers = [x[..., :2] for x in hidden(2, 11)]
    assert torch.autograd.gradcheck(lambda *xs: layer_costs(xs, teachers, mask=mask, clamp=-1.0), students)
    assert torch.autograd.gradgradcheck(lambda *xs: layer_costs(xs, teachers, mask=mask), students)
    (q, k), teachers = queries_and_keys(1, 1, 2, 1)[0], queries_and_keys(2, 11, 3)
    leaves = q.requires_grad_(), k.requires_grad_()
    for causal in (False, True):
        options = {"mask": mask, "causal": causal}
        assert torch.autograd.gradcheck(lambda q, k, o=options: attention_costs([(q, k)], teachers, **o), leaves)


@on_every_backend
def test_a_mask_of_ones_changes_nothing(backend):
    students, teachers = hidden(2, 1, backend=backend), hidden(3, 11, backend=backend)
    ones = on(torch.ones(B, S, dtype=torch.int64), backend)
    masked = layer_costs(students, teachers, mask=ones, backend=backend)
    assert relative_error(masked, layer_costs(students, teachers, backend=backend)) <= precision(backend)
    if backend != "reference":
        return
    assert torch.equal(layer_costs(students, teachers, mask=ones), layer_costs(students, teachers))
    students, teachers = queries_and_keys(2, 1, 3), queries_and_keys(3, 11, 7)
    assert torch.equal(attention_costs(students, teachers, mask=ones), attention_costs(students, teachers))


@on_every_backend
@pytest.mark.parametrize("garbage", [1e30, float("nan"), float("inf")])
def test_what_padding_holds_does_not_matter(garbage, backend):
    students, teachers = hidden(2, 1, backend=backend), hidden(3, 11, backend=backend)
    options = {"mask": on(MASK, backend), "backend": backend}

    def dirty(layers):
        return [x.masked_fill(~options["mask"][..., None], garbage) for x in layers]

    value, grads = gradients(lambda *xs: layer_costs(xs, teachers, **options), *students)
    dirty_value, dirty_grads = gradients(lambda *xs: layer_costs(xs, dirty(teachers), **options), *dirty(students))
    assert torch.equal(value, dirty_value)
    for grad, dirty_grad in zip(grads, dirty_grads, strict=True):
        assert torch.equal(grad, dirty_grad)
        assert (grad[~options["mask"]] == 0).all()


@pytest.mark.parametrize("garbage", [1e30, float("nan"), float("inf")])
def test_what_masked_keys_hold_does_not_matter(garbage):
    # Attention masks keys only: pad queries count, as the authors count them.
    (q, k), teachers = queries_and_keys(1, 1, 3)[0], queries_and_keys(2, 11, 7)
    poisoned = [(x, y.masked_fill(~MASK[:, None, :, None], garbage)) for x, y in teachers]
    value, grads = gradients(lambda q, k: attention_costs([(q, k)], teachers, mask=MASK), q, k)
    bad_k = k.masked_fill(~MASK[:, None, :, None], garbage)
    dirty_value, dirty_grads = gradients(lambda q, k: attention_costs([(q, k)], poisoned, mask=MASK), q, bad_k)
    assert torch.equal(value, dirty_value)
    assert torch.equal(grads[0], dirty_grads[0]) and torch.equal(grads[1], dirty_grads[1])


@on_every_backend
def test_nothing_valid_is_zero_with_a_graph(backend):
    x = torch.full((B, S, D), float("nan"), device=device_of(backend))
    mask = on(torch.zeros(B, S), backend)
    value, (grad,) = gradients(lambda s: layer_costs([s], [x, x], mask=mask, backend=backend), x)
    assert (value == 0).all() and (grad == 0).all()


@on_every_backend
@pytest.mark.parametrize("clamp", [None, -0.5])
def test_a_nan_layer_poisons_only_its_row(clamp, backend):
    students, teachers = hidden(3, 1, backend=backend), hidden(2, 11, backend=backend)
    clean = layer_costs(students, teachers, clamp=clamp, backend=backend)
    students[1][0, 0, 0] = float("nan")
    costs, grads = gradients(lambda *xs: layer_costs(xs, teachers, clamp=clamp, backend=backend), *students)
    assert costs[1].isnan().all() and torch.equal(costs[[0, 2]], clean[[0, 2]])
    assert grads[1].isnan().sum() == 1 and not grads[0].isnan().any() and not grads[2].isnan().any()


@on_every_backend
def test_float32_keeps_its_digits_near_convergence(backend):
    """The Gram identity |s|² + |t|² - 2<s, t> loses them all; the test shows that it would be noticed."""
    teacher = randn(8, 16, 64, seed=1)
    student = (teacher + 1e-4 * randn(8, 16, 64, seed=2)).float().to(device_of(backend))
    teacher = teacher.float().to(device_of(backend))
    oracle, (oracle_grad,) = gradients(lambda s: layer_costs([s], [teacher.double()]), student.double())
    value, (grad,) = gradients(lambda s: layer_costs([s], [teacher], backend=backend), student)
    assert relative_error(value, oracle) < 1e-6
    assert relative_error(grad, oracle_grad) < 1e-6
    identity = (student**2).mean() + (teacher**2).mean() - 2 * (student * teacher).mean()
    assert relative_error(identity, oracle) > 1e-2
    assert layer_costs([teacher], [teacher], backend=backend).item() == 0


@on_every_backend
def test_the_backward_keeps_layers_not_differences(backend):
    students = [x.requires_grad_() for x in hidden(4, 1, backend=backend)]
    teachers = hidden(12, 21, backend=backend)
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        layer_costs(students, teachers, backend=backend)
    layer_bytes = students[0].untyped_storage().nbytes()
    assert sum(kept.values()) <= 17 * layer_bytes


@on_every_backend
def test_dtypes_strides_and_any_trailing_shape(backend):
    student, teacher = hidden(1, 1, torch.bfloat16, backend)[0], hidden(1, 2, backend=backend)[0]
    value, (grad,) = gradients(lambda s: layer_costs([s], [teacher.half()], backend=backend), student)
    assert value.dtype == torch.float32 and grad.dtype == torch.bfloat16
    assert relative_error(value, layer_costs([student.double()], [teacher.half().double()])) < 1e-6
    strided = teacher.transpose(0, 2).contiguous().transpose(0, 2)
    sliced = torch.full((B, 2 * S, D + 3), float("nan"), device=teacher.device, dtype=teacher.dtype)
    sliced[:, ::2, 1 : D + 1] = teacher
    for other in (strided, sliced[:, ::2, 1 : D + 1]):
        for layers in ([teacher, student], [student, student]):
            expected = layer_costs([teacher], layers, backend=backend)
            assert relative_error(layer_costs([other], layers, backend=backend), expected) <= precision(backend)
    shape = (B, S, 2, 3)
    x, y = hidden(2, 1, backend=backend, shape=shape)
    turned = y.transpose(2, 3).contiguous().transpose(2, 3)
    mask = on(MASK, backend)
    expected = layer_costs([x.flatten(2)], [y.flatten(2)], mask=mask, backend=backend)
    for layer in (y, turned):
        assert relative_error(layer_costs([x], [layer], mask=mask, backend=backend), expected) <= precision(backend)


def test_invalid_arguments_are_errors():
    x = hidden(1, 1)[0]
    with pytest.raises(ValueError, match="empty"):
        layer_costs([], [x])
    with pytest.raises(ValueError, match="project the student"):
        layer_costs([x], [randn(B, S, D + 1)])
    with pytest.raises(ValueError, match="mask"):
        layer_costs([x], [x], mask=torch.ones(B, S + 1))
    with pytest.raises(ValueError, match="requires grad"):
        layer_costs([x], [x.clone().requires_grad_()])
    with pytest.raises(ValueError, match="heads='mean'"):
        attention_costs(queries_and_keys(1, 1, 3), [tuple(y[:, :1] for y in queries_and_keys(1, 1, 3)[0])])


@on_every_backend
@pytest.mark.parametrize("masked", [False, True])
def test_an_empty_batch_costs_nothing_and_keeps_its_graph(masked, backend):
    layers = hidden(3, 1, backend=backend, shape=(0, S, D))
    leaf, mask = layers[0].requires_grad_(), torch.ones(0, S, device=layers[0].device) if masked else None
    costs = functional.layer_costs([leaf], layers[1:], mask=mask, backend=backend)
    pairs = [(x[:, None], x[:, None]) for x in layers]
    scores = functional.attention_costs(pairs[:1], pairs[1:], mask=mask, backend=backend)
    for found in (costs, scores):
        assert (found == 0).all() and torch.autograd.grad(found.sum(), leaf)[0].shape == leaf.shape
