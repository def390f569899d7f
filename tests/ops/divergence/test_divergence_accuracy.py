"""No divergence is less accurate than idiomatic eager PyTorch in float32, whatever the two distributions are.

Errors are ‖x - o‖ of a draw's rows against the reference in float64, o. Allowed is 1.25 times eager's, for noise; four units
of float32's last place of o; of a gradient, a difference of numbers of q's size, as many of ‖upstream q / T‖; and of
soft_ce, the logarithm of a number near 1 where a teacher is sure, two units of 1. Nothing is asked of numbers below the
smallest normal one, 1.2e-38, which exp may replace by zero.
"""

import math

import pytest
import subjects
import torch
from fastkd.bench import baselines
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import gradients, randn
from fastkd import backends
from fastkd.checks import KINDS
from fastkd.functional import divergence
from fastkd.ops.divergence import KERNELS

ULP, SMALLEST_NORMAL = torch.finfo(torch.float32).eps, torch.finfo(torch.float32).tiny
INTERPRETED = backends.INTERPRETED
HERE = [
    pytest.param(name, marks=[pytest.mark.gpu] if subjects.device_of(name) == "cuda" else [])
    for name in (*KERNELS["dense"], "reference")
]
every_backend = pytest.mark.parametrize("backend", HERE)
ROWS = 3


def log_uniform(low, high):
    return st.floats(math.log(low), math.log(high)).map(math.exp)


def pairs(largest_vocabulary):
    """What to draw a student and a teacher from, and options of the divergence."""
    return st.fixed_dictionaries(
        {
            "kind": st.sampled_from(KINDS),
            "vocabulary": log_uniform(3, largest_vocabulary).map(round),
            "seed": st.integers(0, 1 << 20),
            "relation": st.sampled_from(["independent", "independent", "near", "close", "identical"]),
            "stds": st.tuples(log_uniform(0.1, 10), log_uniform(0.1, 10)),
            "peaks": st.sampled_from(["none", "none", "student", "teacher", "same", "different"]),
            "offset": st.one_of(st.just(0.0), st.floats(-1000, 1000)),
            "masked": st.sampled_from([None, None, (-math.inf, -math.inf), (-1e4, -1e4), (-1e4, 0.0), (0.0, -1e4)]),
            "temperature": st.one_of(st.just(1.0), log_uniform(0.1, 100)),
            "alpha": st.sampled_from([0.0, 1e-6, 1e-3, 0.1, 0.5, 1 - 1e-6]),
            "beta": st.sampled_from([1e-6, 1e-3, 0.3, 0.5, 1 - 1e-6]),
        }
    )


def draw(vocabulary, seed, relation, stds, peaks, offset, masked):
    """(student, teacher) [ROWS, vocabulary], float32, and the tokens that eager PyTorch can be asked about [vocabulary]."""
    teacher, noise = (randn(ROWS, vocabulary, seed=seed + i) for i in (0, 1))
    teacher = teacher * stds[1]
    scale = {"near": 1e-3, "close": 0.3, "identical": 0.0}.get(relation)
    student = noise * stds[0] if scale is None else teacher + scale * noise
    rows = torch.arange(ROWS)
    if peaks in ("student", "same", "different"):
        student[rows, rows % vocabulary] += 20
    if peaks in ("teacher", "same", "different"):
        teacher[rows, (rows + (peaks == "different")) % vocabulary] += 20
    keep = randn(vocabulary, seed=seed + 2) < 0.5
    keep[:2] = True
    if masked is not None:
        student, teacher = (x.masked_fill(~keep, low) for x, low in zip((student, teacher), masked, strict=True))
    if masked != (-math.inf, -math.inf):
        keep[:] = True
    return (student + offset).float(), teacher.float(), keep


def eager(student, teacher, keep, kind, temperature, alpha, beta):
    if kind == "skew_kl" and alpha == 0:
        kind = "forward_kl"
    rows = baselines.divergence.eager(student[:, keep], teacher[:, keep], kind, temperature, beta, alpha)
    return rows if kind == "mse" else rows / temperature**2


def undecided(student, teacher, temperature):
    """Tokens [ROWS, V] whose p and q float32 cannot distinguish, so that either sign is correct in tvd's gradient."""
    log_q, log_p = (torch.log_softmax(x.double() / temperature, -1) for x in (student, teacher))
    return ((log_q - log_p).abs() <= 2 * ULP) & (log_p > -torch.inf), log_q.exp()


def check(kind, backend, *, temperature=1.0, alpha=0.1, beta=0.3, **drawn):
    student, teacher, keep = draw(**drawn)
    options = {"kind": kind, "temperature": temperature, "alpha": alpha, "beta": beta, "t_squared": False}
    device = subjects.device_of(backend)

    def run(x, where, on="cpu"):
        y = teacher.double() if where == "reference" and x.dtype == torch.float64 else teacher
        return divergence(x.to(on), y.to(on), backend=where, reduction="none", **options).cpu()

    loss, (grad,) = gradients(lambda x: run(x, backend, device), student)
    true_loss, (true_grad,) = gradients(lambda x: run(x, "reference"), student.double())
    of_eager, (eager_grad,) = gradients(lambda x: eager(x, teacher, keep, kind, temperature, alpha, beta), student)
    upstream = (randn(ROWS, seed=7) + 1.5)[:, None]
    unsure, q = undecided(student, teacher, temperature)
    near = drawn["relation"] == "near" and kind not in ("soft_ce", "mse") and drawn["offset"] == 0
    for found, true, other, floor in (
        (loss, true_loss, of_eager, 2 * ULP if kind == "soft_ce" else 0.0),
        (grad, true_grad, eager_grad, 4 * ULP * (upstream * q / temperature).norm() if kind != "mse" else 0.0),
    ):
        # A sign that nobody can tell moves q by at most q: where it stands, and through the mean everywhere.
        excused = (upstream * q * unsure / temperature).norm() * 2 if kind == "tvd" and found is grad else 0.0
        floor += SMALLEST_NORMAL * true.numel() ** 0.5
        error, size = (found - true).norm(), true.norm()
        of_baseline = (other - true).norm() if other.isfinite().all() else math.inf
        assert error <= 1.25 * of_baseline + 4 * ULP * size + floor + excused
        if near:
            assert error <= 1e-5 * size + floor + excused


@every_backend
@settings(max_examples=40 if INTERPRETED else 150, derandomize=True, deadline=None)
@given(drawn=pairs(600 if INTERPRETED else 5000))
def test_no_less_accurate_than_eager(drawn, backend):
    check(backend=backend, **drawn)


@every_backend
@pytest.mark.long
@settings(max_examples=20 if INTERPRETED else 300, derandomize=True, deadline=None)
@given(drawn=pairs(20_000 if INTERPRETED else 262_144))
def test_no_less_accurate_than_eager_over_large_vocabularies(drawn, backend):
    check(backend=backend, **drawn)


@every_backend
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("vocabulary", "stds"), [(32000, (1.0, 4.0)), (501, (5.0, 5.0)), (501, (10.0, 10.0))])
def test_untrained_students(kind, vocabulary, stds, backend):
    vocabulary = min(vocabulary, 3000) if INTERPRETED else vocabulary
    drawn = {"seed": 5, "relation": "independent", "peaks": "none", "masked": None}
    for offset in (0.0, 300.0):
        check(kind, backend, vocabulary=vocabulary, stds=stds, offset=offset, **drawn)


@every_backend
@pytest.mark.parametrize("peaks", ["none", "student", "teacher", "different"])
def test_skew_kl_with_alpha_0_is_forward_kl(peaks, backend):
    drawn = {"vocabulary": 200, "seed": 3, "relation": "independent", "stds": (4.0, 8.0), "offset": 0.0, "masked": None}
    student, teacher, _ = draw(peaks=peaks, **drawn)
    student, teacher = (x.to(subjects.device_of(backend)) for x in (student, teacher))
    found = [
        gradients(lambda x, kind=kind: divergence(x, teacher, kind=kind, alpha=0.0, backend=backend), student)
        for kind in ("skew_kl", "forward_kl")
    ]
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1][0], found[1][1][0])


@every_backend
@pytest.mark.parametrize("relation", ["independent", "close", "near"])
def test_skew_kl_and_jsd_at_the_ends_of_their_weight(relation, backend):
    """Near alpha 0 and beta 0 the divergences tend to forward_kl, near beta 1 to reverse_kl: the other weight must survive."""
    drawn = {"vocabulary": 300, "seed": 4, "relation": relation, "stds": (3.0, 6.0), "peaks": "none", "masked": None}
    for end in (1e-3, 1e-6, 1e-9):
        check("skew_kl", backend, alpha=end, offset=0.0, **drawn)
        check("skew_kl", backend, alpha=1 - end, offset=0.0, **drawn)
        for beta in (end, 1 - end):
            check("jsd", backend, beta=beta, offset=-40.0, **drawn)
