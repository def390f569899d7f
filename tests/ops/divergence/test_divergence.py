"""divergence against brute force, in float64: every kind, near convergence, at the extremes, with masks and top-k.

Of the reference; tests/ops/test_kernels.py holds every kernel to it.
"""

from functools import partial

import pytest
import torch
from fastkd.bench import baselines
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import AWKWARD_SIZES, TOLERANCES, gradients, randn, relative_error
from fastkd.functional import divergence
from fastkd.reference.digits import kl

KINDS = ("forward_kl", "reverse_kl", "skew_kl", "jsd", "tvd", "soft_ce", "mse")
COMPARISONS = KINDS[:-1]  # those of probabilities
ZERO_AT_EQUALITY = ("forward_kl", "reverse_kl", "skew_kl", "jsd", "tvd", "mse")
BETA, ALPHA = 0.3, 0.1

every_kind = pytest.mark.parametrize("kind", KINDS)


def textbook(s, t, kind, temperature=1.0, beta=BETA, alpha=ALPHA):
    """The definitions as a textbook writes them, without the T² factor; meant for float64."""
    if kind == "mse":
        return (s - t).square().sum(-1)
    p, q = torch.softmax(t / temperature, -1), torch.softmax(s / temperature, -1)
    return from_probabilities(p, q, kind, beta, alpha)


def from_probabilities(p, q, kind, beta=BETA, alpha=ALPHA):
    kl = lambda a, b: (torch.special.xlogy(a, a) - torch.special.xlogy(a, b)).sum(-1)  # noqa: E731  (a formula)
    if kind == "jsd":
        m = beta * p + (1 - beta) * q
        return beta * kl(p, m) + (1 - beta) * kl(q, m)
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "skew_kl": lambda: kl(p, alpha * p + (1 - alpha) * q),
        "tvd": lambda: (p - q).abs().sum(-1) / 2,
        "soft_ce": lambda: -torch.special.xlogy(p, q).sum(-1),
    }[kind]()


def ours(kind, backend, temperature=1.0, **options):
    """divergence as a function of the student and the teacher, unreduced unless told."""
    options = {"t_squared": False, "reduction": "none", "beta": BETA, "alpha": ALPHA} | options
    return lambda s, t: divergence(s, t, kind=kind, temperature=temperature, backend=backend, **options)


@pytest.fixture(scope="module")
def backend():
    return "reference"


def value_and_gradient(function, s, t):
    loss, (gradient,) = gradients(lambda x: function(x, t), s)
    return loss, gradient


# -- the definitions ---------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("vocabulary", AWKWARD_SIZES)
def test_matches_the_textbook(kind, vocabulary, backend):
    s, t = randn(3, 5, vocabulary, seed=1), randn(3, 5, vocabulary, seed=2, scale=2.0)
    for temperature in (0.7, 1.0, 15.0):
        loss, gradient = value_and_gradient(ours(kind, backend, temperature), s, t)
        wanted, wanted_gradient = value_and_gradient(partial(textbook, kind=kind, temperature=temperature), s, t)
        assert loss.shape == (3, 5)
        assert torch.allclose(loss, wanted, rtol=1e-11, atol=1e-14)
        assert torch.allclose(gradient, wanted_gradient, rtol=1e-10, atol=1e-14)


def test_forward_kl_is_torch_kl_div(backend):
    s, t = randn(4, 6, 33, seed=1), randn(4, 6, 33, seed=2)
    wanted = baselines.divergence.eager(s.flatten(0, 1), t.flatten(0, 1), "forward_kl", 3.0).mean()
    assert relative_error(divergence(s, t, temperature=3.0, backend=backend), wanted) < 1e-13


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_dtypes_against_float64_on_the_same_numbers(kind, dtype, backend):
    s, t = randn(8, 127, seed=1, dtype=dtype), randn(8, 127, seed=2, dtype=dtype)
    loss, gradient = value_and_gradient(ours(kind, backend, 2.0), s, t)
    wanted, wanted_gradient = value_and_gradient(ours(kind, "reference", 2.0), s.double(), t.double())
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    upstream = value_and_gradient(ours(kind, "reference", 2.0), s.float(), t.float())[1].to(dtype)
    allowed, allowed_gradient = TOLERANCES[torch.float32][0], TOLERANCES[dtype][1]
    assert relative_error(loss, wanted) < allowed
    if dtype == torch.float32:
        assert relative_error(gradient, wanted_gradient) < allowed_gradient
    else:  # the upstream of `gradients` is rounded with the loss, which is float32 here and float64 in the oracle
        assert relative_error(gradient, upstream) < allowed_gradient


@every_kind
def test_t_squared_and_the_reductions(kind, backend):
    s, t = randn(3, 4, 9, seed=1), randn(3, 4, 9, seed=2)
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]])
    rows = ours(kind, backend, 4.0, mask=mask)(s, t)
    factor = 1 if kind == "mse" else 16
    squared = ours(kind, backend, 4.0, mask=mask, t_squared=True)
    assert torch.allclose(squared(s, t), rows * factor, rtol=1e-14)
    assert torch.allclose(ours(kind, backend, 4.0, mask=mask, reduction="sum")(s, t), rows.sum())
    assert torch.allclose(ours(kind, backend, 4.0, mask=mask, reduction="mean")(s, t), rows.sum() / 7)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_the_reference(kind):
    s, t = randn(2, 3, seed=1).requires_grad_(), randn(2, 3, seed=2)
    mask = torch.tensor([True, False])
    assert torch.autograd.gradcheck(lambda x: ours(kind, "reference", 1.7, mask=mask)(x, t), s)
    if kind != "tvd":  # tvd's first derivative jumps; its second is checked by the next test's smooth pieces
        assert torch.autograd.gradgradcheck(lambda x: ours(kind, "reference", 1.7, mask=mask)(x, t), s)


@pytest.mark.parametrize("kind", COMPARISONS)
def test_second_derivative_where_student_and_teacher_agree_or_are_far(kind):
    """Both ways to the log-ratio, and the series of the Bregman term, must be differentiable twice."""
    t = randn(1, 4, seed=2)
    for s in (t + 1e-2 * randn(1, 4, seed=3), t + 4 * randn(1, 4, seed=4), t + 90 * randn(1, 4, seed=5).sign()):
        assert torch.autograd.gradcheck(
            lambda x: ours(kind, "reference", 1.3)(x, t), s.clone().requires_grad_(), eps=1e-7
        )
        if kind != "tvd":
            assert torch.autograd.gradgradcheck(
                lambda x: ours(kind, "reference", 1.3)(x, t), s.clone().requires_grad_(), eps=1e-7
            )


# -- near convergence --------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("temperature", [1.0, 15.0])
def test_near_convergence_float32_keeps_its_digits(kind, temperature, backend):
    t = randn(2, 32000, seed=1, dtype=torch.float32, scale=3.0)
    s = (t.double() + 1e-3 * randn(2, 32000, seed=2)).float()
    loss, gradient = value_and_gradient(ours(kind, backend, temperature), s, t)
    # The textbook loses its digits here even in float64 (1e-9 of a KL of 5e-7); it bounds the oracle from outside.
    oracle, oracle_gradient = value_and_gradient(ours(kind, "reference", temperature), s.double(), t.double())
    outside = textbook(s.double(), t.double(), kind, temperature)
    assert relative_error(oracle, outside) < 2e-6
    assert relative_error(loss, oracle) < 1e-5
    assert relative_error(gradient, oracle_gradient) < 1e-5


@pytest.mark.parametrize("kind", COMPARISONS)
def test_a_constant_added_to_all_logits_changes_nothing(kind, backend):
    t = randn(4, 1000, seed=1, dtype=torch.float32).mul(64).round() / 64
    s = t + (randn(4, 1000, seed=2, dtype=torch.float32) * 16).round() / 64
    plain = value_and_gradient(ours(kind, backend), s, t)
    shifted = value_and_gradient(ours(kind, backend), s + 256, t)  # exact: multiples of 1/64
    assert relative_error(shifted[0], plain[0]) < 1e-5
    assert relative_error(shifted[1], plain[1]) < 1e-5


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_logits_give_zero_and_no_gradient(kind, dtype, backend):
    for scale in (1.0, 1e3):
        s = randn(3, 129, seed=1, dtype=dtype, scale=scale)
        loss, gradient = value_and_gradient(ours(kind, backend, 0.3), s, s.clone())
        if kind in ZERO_AT_EQUALITY:
            assert (loss == 0).all()
        else:
            assert torch.allclose(loss.double(), textbook(s.double(), s.double(), kind, 0.3), rtol=1e-5)
        assert (gradient == 0).all()


def test_derivatives_where_two_formulas_meet():
    """PyTorch 2.14 gives a clamp another derivative at its limits than 2.13."""
    e = torch.tensor([-0.5, 0.5, 1.0, 2.0, 60.0], dtype=torch.float64, requires_grad=True)
    a = torch.tensor([0.3], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(kl(a, a * e.exp(), e), e)
    torch.testing.assert_close(gradient, a * e.detach().expm1())


# -- extremes ----------------------------------------------------------------------------------------------------------


def finite_or_matching(loss, wanted):
    """Equal where the textbook is finite; where it is infinite, so are we."""
    infinite = wanted.isinf()
    assert torch.equal(loss.isinf(), infinite)
    assert torch.allclose(loss[~infinite].double(), wanted[~infinite], rtol=2e-5, atol=1e-6)


@every_kind
@pytest.mark.parametrize("temperature", [0.1, 1.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_huge_logits(kind, temperature, dtype, backend):
    s = torch.tensor(
        [[1e4, -1e4, 0.0, 5.0], [-1e4, -1e4, -1e4, -1e4], [1e4, 1e4, 3.0, -2.0], [0.0, 1.0, 2.0, 3.0]], dtype=dtype
    )
    t = torch.tensor(
        [[-1e4, 1e4, 7.0, 5.0], [1e4, 1e4, 1e4, 1e4], [1e4, 9e3, 1.0, -1e4], [-1e4, 1.0, 1e4, 0.0]], dtype=dtype
    )
    loss, gradient = value_and_gradient(ours(kind, backend, temperature), s, t)
    assert gradient.isfinite().all() and loss.isfinite().all()
    # In logarithms: what the textbook's probabilities underflow to, its logarithms still know.
    a, b = torch.log_softmax(t.double() / temperature, -1), torch.log_softmax(s.double() / temperature, -1)
    by_logs = {"forward_kl": a.exp() * (a - b), "reverse_kl": b.exp() * (b - a), "soft_ce": -a.exp() * b}
    wanted = by_logs[kind].sum(-1) if kind in by_logs else textbook(s.double(), t.double(), kind, temperature)
    assert torch.allclose(loss.double(), wanted, rtol=1e-5, atol=1e-6)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tokens_masked_on_both_sides_do_not_exist(kind, dtype, backend):
    s, t = randn(5, 12, seed=1, dtype=dtype), randn(5, 12, seed=2, dtype=dtype)
    gone = torch.zeros(5, 12, dtype=torch.bool)
    gone[1:, [0, 5, 11]] = True
    gone[2] = True  # a row without any word
    s[4] = t[4]
    loss, gradient = value_and_gradient(
        ours(kind, backend, 2.0), s.masked_fill(gone, -torch.inf), t.masked_fill(gone, -torch.inf)
    )
    few = [i for i in range(12) if i not in (0, 5, 11)]
    wanted, wanted_gradient = value_and_gradient(ours(kind, backend, 2.0), s[:, few], t[:, few])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for row in (1, 3):
        assert relative_error(loss[row], wanted[row]) < tolerance
        assert relative_error(gradient[row, few], wanted_gradient[row]) < 10 * tolerance
    assert loss[2] == 0 and (gradient[gone] == 0).all()
    assert (gradient[4] == 0).all() and (kind == "soft_ce" or loss[4] == 0)


@pytest.mark.parametrize("kind", COMPARISONS)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_tokens_masked_on_one_side_only(kind, side, backend):
    """Finite where the definition is, infinite where it is (a KL against a word without mass), never NaN."""
    s, t = randn(3, 8, seed=1), randn(3, 8, seed=2)
    (s if side == "student" else t)[:, 2] = -torch.inf
    loss, gradient = value_and_gradient(ours(kind, backend, 1.5), s, t)
    finite_or_matching(loss, textbook(s, t, kind, 1.5))
    if loss.isfinite().all():
        wanted = value_and_gradient(lambda a, b: textbook(a, b, kind, 1.5), s[:, [0, 1, 3]], t[:, [0, 1, 3]])[1]
        assert gradient.isfinite().all() and gradient[:, [0, 1, 3]].shape == wanted.shape
        step = 1e-6 * randn(3, 8, seed=3)
        upstream = randn(3, seed=7) + 1.5
        value = lambda x: (ours(kind, backend, 1.5)(x, t) * upstream).sum()  # noqa: E731
        numeric = (value(s + step) - value(s - step)) / 2
        assert abs(numeric - (gradient * step).nan_to_num(0).sum()) < 1e-6 * abs(numeric) + 1e-12


@pytest.mark.parametrize("kind", COMPARISONS)
def test_masks_by_the_most_negative_number_match_masks_by_infinity(kind, backend):
    s, t = randn(3, 40, seed=1, dtype=torch.float32), randn(3, 40, seed=2, dtype=torch.float32)
    lowest = torch.finfo(torch.float32).min
    pairs = [(-torch.inf, -torch.inf), (lowest, -torch.inf), (-torch.inf, -1e4), (-65504.0, lowest), (-1e4, -1e4)]
    results = []
    for low_s, low_t in pairs:
        a, b = s.clone(), t.clone()
        a[:, 30:], b[:, 30:] = low_s, low_t
        results.append(value_and_gradient(ours(kind, backend), a, b))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])


@every_kind
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_nan_row_poisons_only_itself_and_is_reported(kind, bad, backend):
    s, t = randn(4, 33, seed=1), randn(4, 33, seed=2)
    clean, clean_gradient = value_and_gradient(ours(kind, backend), s, t)
    s[2, 7] = bad
    loss, gradient = value_and_gradient(ours(kind, backend), s, t)
    others = [0, 1, 3]
    assert not loss[2].isfinite()
    assert torch.equal(loss[others], clean[others]) and torch.equal(gradient[others], clean_gradient[others])


# -- masks -------------------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_masked_rows_are_zero_even_if_they_hold_nan(kind, reduction, backend):
    s, t = randn(2, 4, 9, seed=1), randn(2, 4, 9, seed=2)
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0]])
    few = mask.bool()
    wanted, wanted_gradient = value_and_gradient(ours(kind, backend, reduction=reduction), s[few], t[few])
    s[0, 2], t[0, 3], s[1, 1], t[1, 1], s[1, 3] = torch.nan, torch.inf, torch.inf, torch.nan, -torch.inf
    loss, gradient = value_and_gradient(ours(kind, backend, reduction=reduction, mask=mask), s, t)
    assert (gradient[~few] == 0).all()
    if reduction == "none":
        assert (loss[~few] == 0).all() and torch.allclose(loss[few], wanted)
    else:
        assert torch.allclose(loss, wanted) and torch.allclose(gradient[few], wanted_gradient)


@every_kind
def test_all_rows_masked_is_zero_with_a_graph(kind, backend):
    s = torch.full((3, 5), torch.nan, dtype=torch.float64)
    loss, gradient = value_and_gradient(ours(kind, backend, reduction="mean", mask=torch.zeros(3)), s, s.clone())
    assert loss == 0 and (gradient == 0).all()


def test_labels_mask_where_they_are_ignored(backend):
    s, t = randn(2, 3, 5, seed=1), randn(2, 3, 5, seed=2)
    labels, mask = torch.tensor([[1, -100, 2], [-100, 0, 4]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    both = (labels != -100) & mask.bool()
    assert torch.equal(
        divergence(s, t, labels=labels, mask=mask, backend=backend), divergence(s, t, mask=both, backend=backend)
    )


def test_results_do_not_alias_and_backward_runs_twice(backend):
    s, t = randn(4, 9, seed=1).requires_grad_(), randn(4, 9, seed=2)
    first = divergence(s, t, reduction="none", backend=backend)
    kept = first.detach().clone()
    divergence(s * 2, t, reduction="none", backend=backend)
    assert torch.equal(first.detach(), kept)
    once = torch.autograd.grad(first.sum(), s, retain_graph=True)[0]
    assert torch.equal(once, torch.autograd.grad(first.sum(), s)[0])


def test_strided_inputs(backend):
    s, t = randn(9, 6, 4, seed=1).transpose(0, 2), randn(4, 12, 9, seed=2)[:, ::2]
    assert not s.is_contiguous()
    loss, gradient = value_and_gradient(ours("jsd", backend), s, t)
    wanted, wanted_gradient = value_and_gradient(ours("jsd", backend), s.contiguous(), t.contiguous())
    assert torch.allclose(loss, wanted) and torch.allclose(gradient, wanted_gradient)


# -- properties --------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(ZERO_AT_EQUALITY),
    vocabulary=st.integers(1, 40),
    scale=st.sampled_from([1e-6, 1e-3, 1.0, 30.0, 1e4]),
    temperature=st.sampled_from([0.1, 1.0, 20.0]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1 << 20),
)
def test_never_negative_never_nan(kind, vocabulary, scale, temperature, dtype, seed, backend):
    t = randn(2, vocabulary, seed=seed, dtype=dtype)
    s = (t.double() + scale * randn(2, vocabulary, seed=seed + 1)).to(dtype)
    loss, gradient = value_and_gradient(ours(kind, backend, temperature), s, t)
    assert (loss >= 0).all() and loss.isfinite().all() and gradient.isfinite().all()
    if kind == "jsd":
        assert (loss <= torch.log(torch.tensor(2.0)) + 1e-6).all()
    if kind == "tvd":
        assert (loss <= 1 + 1e-6).all()
    if kind != "mse":  # no divergence of probabilities sees a constant: the gradient's sum is rounding alone
        rounding = 64 * torch.finfo(dtype).eps * (1 + loss.double()) / temperature
        assert (gradient.double().sum(-1).abs() <= 1e-2 * gradient.double().abs().sum(-1) + rounding).all()


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"student_logits": torch.zeros(2, 4)}, "student_logits"),
        ({"teacher": torch.zeros(2, 3, requires_grad=True)}, "teacher"),
        ({"teacher": torch.zeros(2, 3, dtype=torch.int64)}, "teacher"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"kind": "kl"}, "kind"),
        ({"kind": "jsd", "beta": 1.1}, "beta"),
        ({"kind": "jsd", "beta": -0.1}, "forward_kl"),
        ({"kind": "skew_kl", "alpha": 1.0}, "alpha"),
        ({"mask": torch.ones(3)}, "mask"),
        ({"labels": torch.zeros(2, 3)}, "labels"),
        ({"reduction": "average"}, "reduction"),
        ({"backend": "cudnn"}, "backend"),
    ],
)
def test_errors_name_the_argument(change, named):
    arguments = {"student_logits": torch.zeros(2, 3), "teacher": torch.zeros(2, 3)} | change
    with pytest.raises(ValueError, match=named):
        divergence(**arguments)
