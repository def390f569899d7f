"""relation's kernels against the float64 reference: masks, causality, pairs, the gradient in the forward and in the backward,
sabotage, repetition and instruction sets."""

import os
import subprocess
import sys

import pytest
import torch
from fastkd.bench import baselines

import cases
from cases import ROOT, gradients, randn, relative_error
from fastkd import backends, functional
from fastkd.ops.relation import KERNELS, MOST_KEYS

not_interpreted = pytest.mark.skipif(backends.INTERPRETED, reason="slow in the interpreter, which has shorter ones")


def device_of(backend):
    return "cuda" if backend in ("triton", "cuda") and not backends.INTERPRETED else "cpu"


on_every_kernel = pytest.mark.parametrize(
    "backend", [pytest.param(b, marks=[pytest.mark.gpu] if device_of(b) == "cuda" else []) for b in KERNELS]
)
CASES = ["self", "causal self", "pair", "causal pair", "pair against self", "self against pair"]


def states(seed, B, H, L, ds, dt, dtype=torch.float32):
    """x and y of the student, of the teacher."""
    return [randn(B, H, L, d, seed=seed + k).to(dtype) for k, d in enumerate((ds, ds, dt, dt))]


def sides(case, xs, ys, xt, yt):
    student, teacher = {
        "pair": ((xs, ys), (xt, yt)),
        "self": (xs, xt),
        "pair against self": ((xs, ys), xt),
        "self against pair": (xs, (xt, yt)),
    }[case.removeprefix("causal ")]
    return student, teacher


def run(case, tensors, backend, mask=None, constant=False, weights=None, **options):
    """Rows and the gradients of xs and ys (zeros where the case has no ys), under a random or a constant upstream; or the sum
    of weights * rows and its gradients."""
    xs, ys, xt, yt = (x.to(device_of(backend)) for x in tensors)
    mask = None if mask is None else mask.to(xs.device)

    def call(xs, ys):
        student, teacher = sides(case, xs, ys, xt, yt)
        rows = functional.relation_kl_loss(
            [student], [teacher], mask=mask, causal="causal" in case, reduction="none", backend=backend, **options
        )[0]
        if weights is not None:
            rows = (rows * weights.to(rows)).sum()
        return (rows.sum() if constant else rows) + 0 * ys.double().nan_to_num(0, 0, 0).sum()

    value, grads = gradients(call, xs, ys)
    return value.cpu(), [x.cpu() for x in grads]


def errors(case, tensors, backend, **options):
    value, grads = run(case, tensors, backend, **options)
    true_value, true_grads = run(case, [x.double() for x in tensors], "reference", **options)
    return relative_error(value, true_value), max(map(relative_error, grads, true_grads))


# A length for each path of a kernel; the interpreter takes only the short one.
LENGTHS = [50] if backends.INTERPRETED else [50, MOST_KEYS + 10]


def some_masked(B, L):
    """Left padding, right padding, holes, one token, all masked."""
    token = torch.arange(L)
    rows = [token >= L // 3, token < L - L // 4, token % 3 > 0, token == L // 2, token < 0]
    return torch.stack([rows[b % len(rows)] for b in range(B)])


@on_every_kernel
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_every_case(case, masked, constant, backend):
    heads = 1 if backends.INTERPRETED else 3
    for B, H, L, ds, dt in ((5, heads, 70, 16, 24), (5, 1, 1, 3, 2), (5, 2, 33, 64, 7)):
        mask = some_masked(B, L) if masked else None
        loss_error, grad_error = errors(case, states(1, B, H, L, ds, dt), backend, mask=mask, constant=constant)
        assert loss_error <= 1e-6 and grad_error <= 1e-5


@not_interpreted
@on_every_kernel
@pytest.mark.parametrize("heads", [1, pytest.param(17, marks=pytest.mark.long)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", ["self", "causal self", "pair", "causal pair"])
def test_beyond_what_fits_in_scratch(case, masked, heads, backend):
    """On both sides of the limit, with threads that share a head and threads that each have one."""
    for L in (MOST_KEYS, MOST_KEYS + 77):
        mask = some_masked(3, L)[[0, 2]] if masked else None
        tensors = states(2, 2 if masked else 1, heads, L, 4, 6)
        loss_error, grad_error = errors(case, tensors, backend, mask=mask)
        assert loss_error <= 1e-6 and grad_error <= 1e-5


@on_every_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("case", ["self", "causal pair"])
def test_half_precision_is_no_worse_than_eager(case, length, dtype, backend):
    """RMS over seeds against idiomatic PyTorch in the same dtype: loss 1.0x, gradient 1.25x and one rounding."""
    if backends.INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies bfloat16 wrongly")
    ours, eagers = [], []
    for seed in range(8):
        tensors = states(10 * seed, 1, 2, length, 32, 32, dtype)
        true_value, true_grads = run(case, [x.double() for x in tensors], "reference")
        for found, call in ((ours, lambda t: run(case, t, backend)), (eagers, lambda t: eager(case, t))):
            value, grads = call(tensors)
            found.append((relative_error(value, true_value), max(map(relative_error, grads, true_grads))))
    ours, eagers = (torch.tensor(x).square().mean(0).sqrt() for x in (ours, eagers))
    assert ours[0] <= eagers[0] + 1e-6 and ours[1] <= 1.25 * eagers[1] + torch.finfo(dtype).eps / 2
    assert (ours <= 1e-2).all()


def eager(case, tensors, temperature=None):
    """As people write it, in the dtype of the states."""
    _, _, xt, yt = tensors

    def call(xs, ys):
        rows = baselines.relation.eager(*(x if case == "self" else (x, y) for x, y in ((xs, ys), (xt, yt))),
                                        causal="causal" in case, temperature=temperature)  # fmt: skip
        return rows.float() + 0 * ys.double().sum()

    return gradients(call, *tensors[:2])


@on_every_kernel
@pytest.mark.parametrize("case", ["self", "causal pair"])
def test_near_convergence(case, backend):
    """student = teacher + 1e-3: as accurate as float32 scores allow, and as the reference in float32."""
    for length in LENGTHS:
        tensors = states(3, 2, 2, length, 16, 16)
        tensors[:2] = [(t.double() + 1e-3 * randn(*t.shape, seed=8)).float() for t in tensors[2:]]
        oracle = run(case, [x.double() for x in tensors], "reference")
        ours, theirs = (
            (relative_error(value, oracle[0]), max(map(relative_error, grads, oracle[1])))
            for value, grads in (run(case, tensors, backend), run(case, tensors, "reference"))
        )
        assert ours[0] <= max(1e-5, 1.5 * theirs[0]) and ours[1] <= 1.5 * theirs[1]
        assert ours[1] <= 2e-3


@on_every_kernel
def test_a_student_equal_to_its_teacher(backend):
    for length, width in ((LENGTHS[0], 8), (LENGTHS[-1], 8), (33, 80), (33, 128)):
        for case in CASES[:4]:
            tensors = states(4, 2, 2, length, width, width)
            tensors[:2] = tensors[2:]
            value, grads = run(case, tensors, backend)
            assert (value == 0).all() and all((g == 0).all() for g in grads)


@on_every_kernel
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("garbage", [1e30, float("nan"), float("inf")])
def test_what_padding_holds_does_not_matter(garbage, length, backend):
    tensors, mask = states(5, 5, 2, length, 8, 8), some_masked(5, length)
    dirty = [x.masked_fill(~mask[:, None, :, None], garbage) for x in tensors]
    for case in ("self", "causal pair"):
        value, grads = run(case, tensors, backend, mask=mask)
        other, other_grads = run(case, dirty, backend, mask=mask)
        assert torch.equal(value, other) and all(map(torch.equal, grads, other_grads))
        assert (value[~mask[:, None].expand_as(value)] == 0).all()


@on_every_kernel
def test_a_nan_poisons_only_its_own_head(backend):
    for length in LENGTHS:
        tensors = states(6, 2, 2, length, 8, 8)
        clean, (grad, _) = run("self", tensors, backend)
        tensors[0][1, 0, 3, 2] = float("nan")
        value, (other, _) = run("self", tensors, backend)
        assert value[1, 0].isnan().all() and other[1, 0].isnan().any()
        for b, h in ((0, 0), (0, 1), (1, 1)):
            assert torch.equal(value[b, h], clean[b, h]) and torch.equal(other[b, h], grad[b, h])


@on_every_kernel
def test_extreme_scores(backend):
    """Scores up to ±1e4, which overflow or lose their digits in a plain softmax."""
    for length in LENGTHS:
        tensors = [60 * x for x in states(7, 1, 2, length, 3, 3)]
        value, (grad, _) = run("self", tensors, backend)
        oracle, (true_grad, _) = run("self", [x.double() for x in tensors], "reference")
        reference, (reference_grad, _) = run("self", tensors, "reference")
        assert relative_error(value, oracle) <= 1.5 * relative_error(reference, oracle) + 1e-6
        assert relative_error(grad, true_grad) <= 1.5 * relative_error(reference_grad, true_grad) + 1e-5


@on_every_kernel
@pytest.mark.parametrize(("student", "teacher"), [(0.05, 3.0), (3.0, 0.05)])
@pytest.mark.parametrize("case", ["self", "pair"])
def test_a_flat_against_a_sharp_distribution(case, student, teacher, backend):
    """Hundreds of keys: the sums of the two softmaxes differ so much that their difference would lose digits."""
    for length in [200] if backends.INTERPRETED else [300, MOST_KEYS + 77]:
        tensors = states(12, 1, 1 if backends.INTERPRETED else 17, length, 16, 16)
        tensors = [student * x for x in tensors[:2]] + [teacher * x for x in tensors[2:]]
        assert max(errors(case, tensors, backend)) <= 2e-6


@on_every_kernel
@pytest.mark.parametrize("case", ["self", "pair"])
def test_scales_of_both_sides(case, backend):
    """Scales of student, teacher and temperature drawn separately: RMS over seeds no worse than eager float32, up to rounding."""
    drawn = torch.rand(4 if backends.INTERPRETED else 12, 3, generator=torch.Generator().manual_seed(1))
    extreme = torch.tensor([[0.0, 0.7, 0.0], [0.3, 1.0, 0.5], [1.0, 0.0, 0.5]])
    compared = 0
    for draw in torch.cat([extreme, drawn]):
        of_student, of_teacher = (10 ** (-2 + 3.477 * draw[:2])).tolist()  # 0.01 … 30
        temperature = 10 ** (-1 + 2 * float(draw[2]))
        found = []
        for seed in range(4 if backends.INTERPRETED else 8):
            tensors = states(20 + 4 * seed, 1, 1, 40, 16, 16)
            tensors = [of_student * x for x in tensors[:2]] + [of_teacher * x for x in tensors[2:]]
            value, grads = run(case, [x.double() for x in tensors], "reference", temperature=temperature)
            for other, others in (
                run(case, tensors, backend, temperature=temperature),
                eager(case, tensors, temperature),
            ):
                found.append((relative_error(other, value), max(map(relative_error, others, grads))))
        loss, grad = torch.tensor(found).view(-1, 2, 2).square().mean(0).sqrt().T.tolist()
        if max(loss[1], grad[1]) > 1e-2:
            continue  # rows with one key, where float32 cannot tell other scores from the largest
        compared += 1
        assert loss[0] <= 1.25 * loss[1] + 5e-7, (of_student, of_teacher, temperature)
        assert grad[0] <= 1.25 * grad[1] + 5e-7, (of_student, of_teacher, temperature)
    assert compared >= 4


@on_every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["self", "pair"])
def test_sharp_softmaxes(case, dtype, backend):
    """T = 0.1: nearly all of a row is one key, and its gradient nearly 0, if the backward computes the forward's scores."""
    if backends.INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies bfloat16 wrongly")
    for width in (16, 32, 64):
        tensors = states(16, 1, 2, 70, width, width, dtype)
        _, grads = run(case, tensors, backend, temperature=0.1)
        _, true = run(case, [x.double() for x in tensors], "reference", temperature=0.1)
        allowed = 2e-5 if dtype == torch.float32 else 1e-2
        assert all((a - b).norm() <= allowed * b.norm() + 1e-8 for a, b in zip(grads, true, strict=True))


@on_every_kernel
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("case", ["self", "pair"])
def test_one_query_whose_upstream_differs(case, length, backend):
    """The others agree, the first and the last among them, and a gradient made for upstream 1 is not enough."""
    tensors = states(17, 2, 2, length, 8, 8)
    for at in (0, length // 2, length - 1):
        weights = torch.ones(length).index_fill(0, torch.tensor([at]), 3.0).to(device_of(backend))
        for mask in (None, torch.arange(length) % 2 == at % 2):
            of_which = None if mask is None else mask.expand(2, length)
            assert max(errors(case, tensors, backend, mask=of_which, weights=weights)) <= 1e-5


@not_interpreted
@on_every_kernel
@pytest.mark.parametrize("tokens", ["alike", "one is large", "one is zero"])
def test_scores_of_a_token_with_itself_far_below_the_largest(tokens, backend):
    """A token's score with itself is no bound if another token is much larger: the kernel then searches the maximum."""
    tensors = states(13, 1, 2, MOST_KEYS + 77, 8, 8)
    for x in tensors:
        x[..., MOST_KEYS // 2, :] *= {"alike": 1.0, "one is large": 300.0, "one is zero": 0.0}[tokens]
    value, (grad, _) = run("self", tensors, backend)
    oracle, (true_grad, _) = run("self", [x.double() for x in tensors], "reference")
    reference, (reference_grad, _) = run("self", tensors, "reference")
    assert relative_error(value, oracle) <= 1.5 * relative_error(reference, oracle) + 1e-6
    assert relative_error(grad, true_grad) <= 1.5 * relative_error(reference_grad, true_grad) + 1e-5


@on_every_kernel
@pytest.mark.parametrize("case", ["self", "causal pair"])
def test_strided_and_mixed(case, backend):
    """Heads as a model lays them out, [B, L, H·d], and a half-precision teacher with a float32 student."""
    tensors = states(8, 3, 4, 37, 8, 12)
    other = torch.float16 if backends.INTERPRETED else torch.bfloat16
    tensors[2:] = [x.to(other) for x in tensors[2:]]
    flat = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    assert not flat[0].is_contiguous()
    value, grads = run(case, tensors, backend)
    xs, ys, xt, yt = (x.to(device_of(backend)) for x in flat)
    xs, ys = xs.requires_grad_(), ys.requires_grad_()
    student, teacher = sides(case, xs, ys, xt, yt)
    rows = functional.relation_kl_loss(
        [student], [teacher], causal="causal" in case, reduction="none", backend=backend
    )[0]
    strided_grads = torch.autograd.grad(rows, (xs, ys), randn(*rows.shape, seed=7).to(rows) + 1.5, allow_unused=True)
    assert torch.equal(rows.cpu(), value) and torch.equal(strided_grads[0].cpu(), grads[0])
    loss_error, grad_error = errors(case, tensors, backend)
    assert loss_error <= 1e-6 and grad_error <= 1e-5


@on_every_kernel
@pytest.mark.parametrize("length", LENGTHS)
def test_any_number_of_threads_gives_the_same_bits(length, backend):
    found = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        value, grads = run("pair", states(9, 2, 2, length, 8, 8), backend)
        found.append((value, *grads))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@on_every_kernel
@pytest.mark.parametrize("length", LENGTHS)
def test_two_backwards_and_two_results_at_once(length, backend):
    tensors = [x.to(device_of(backend)) for x in states(10, 2, 2, length, 8, 8)]
    before = [x.clone() for x in tensors]
    leaf = tensors[0].clone().requires_grad_()
    rows = functional.relation_kl_loss([leaf], [tensors[2]], reduction="none", backend=backend)
    rows_before = rows.detach().clone()
    (grad,) = torch.autograd.grad(rows.sum(), leaf, retain_graph=True)
    first = grad.clone()
    grad.mul_(3)
    run("self", states(11, 2, 2, length, 8, 8), backend)
    (again,) = torch.autograd.grad(rows.sum(), leaf)
    assert torch.equal(rows, rows_before) and torch.equal(again, first)
    assert all(map(torch.equal, tensors, before))


def in_the_ordinary_range(backend, constant):
    for case in ("self", "pair"):
        loss_error, grad_error = errors(case, states(12, 2, 3, 70, 16, 24), backend, constant=constant)
        assert loss_error <= 1e-6 and grad_error <= 1e-5


MUTANTS = {
    **cases.MUTANTS,
    "one tile dropped": lambda g: g.index_fill(2, torch.arange(32, 40, device=g.device), 0) if g.shape[2] > 40 else g,
    "one head dropped": lambda g: g.index_fill(1, torch.tensor([0], device=g.device), 0),
}


@on_every_kernel
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("where", ["gradient", "loss"])
@pytest.mark.parametrize("mutant", MUTANTS)
def test_no_mutant_survives(mutant, where, constant, backend, monkeypatch):
    how, kernels = MUTANTS[mutant], KERNELS[backend]

    def fwd(*args):
        rows, *saved = kernels.fwd(*args)
        return how(rows) if where == "loss" else rows, *saved

    def bwd(*args):
        return tuple(how(x) if where == "gradient" else x for x in kernels.bwd(*args))

    in_the_ordinary_range(backend, constant)
    monkeypatch.setitem(KERNELS, backend, backends.Kernels(fwd, bwd))
    with pytest.raises(AssertionError):
        in_the_ordinary_range(backend, constant)


@pytest.mark.skipif("cpu" not in KERNELS, reason="the C++ kernels are not built")
@pytest.mark.skipif("FASTKD_MAX_ISA" in os.environ, reason="this is the run on a lower instruction set")
@pytest.mark.parametrize("ceiling", [pytest.param("plain", marks=pytest.mark.long), "avx2"])
def test_lower_instruction_sets(ceiling):
    wanted = "every_case or (fits_in_scratch and 1-cpu and not 17) or equal_to or extreme"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", __file__, "-k", wanted],
        env=os.environ | {"FASTKD_MAX_ISA": ceiling, "OMP_WAIT_POLICY": "PASSIVE"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:]
