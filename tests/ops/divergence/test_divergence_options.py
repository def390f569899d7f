"""What divergence and linear_divergence share with other packages: reductions, denominators, temperatures, ends of beta, skew
reverse KL. Each is compared with what it is short for, on the reference in float64 and on the kernels in float32."""

import pytest
import torch
import torch.nn.functional as F

from cases import gradients, randn, relative_error
from fastkd import TopK
from fastkd.functional import divergence, linear_divergence, linear_entropy

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])  # float32: the kernels where they are built
LIMITS = {torch.float64: 1e-11, torch.float32: 2e-5}
MASK = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]])
HIDDEN, WIDE, HEAD, WIDE_HEAD = (
    randn(3, 4, 6, seed=1),
    randn(3, 4, 10, seed=2),
    randn(17, 6, seed=3),
    randn(17, 10, seed=4),
)


def logits(dtype):
    return [F.linear(*x).to(dtype) for x in ((HIDDEN, HEAD), (WIDE, WIDE_HEAD))]


def of_logits(dtype, t_factor=1.0, **options):
    """(loss, gradient) of divergence, of a teacher whose logits are multiplied by t_factor."""
    s, t = logits(dtype)
    return gradients(lambda x: divergence(x, t * t_factor, **options), s)


def of_hidden(dtype, teacher_head=WIDE_HEAD, **options):
    teacher = WIDE.to(dtype), teacher_head.to(dtype)
    return gradients(lambda *x: linear_divergence(*x, *teacher, **options), HIDDEN.to(dtype), HEAD.to(dtype))


def same(found, wanted, dtype, factor=1.0):
    (loss, grads), (wanted_loss, wanted_grads) = found, wanted
    pairs = zip((loss, *grads), (wanted_loss, *wanted_grads), strict=True)
    return all(relative_error(x, factor * y) < LIMITS[dtype] for x, y in pairs)


every_function = pytest.mark.parametrize("function", [of_logits, of_hidden])


@DTYPES
@every_function
@pytest.mark.parametrize(
    ("options", "long"),
    [
        ({"kind": "jsd", "beta": 0}, {"kind": "forward_kl"}),
        ({"kind": "jsd", "beta": 1.0}, {"kind": "reverse_kl"}),
        ({"temperature": torch.tensor(2.0)}, {"temperature": 2.0}),
        ({"temperature": torch.tensor([2.0], dtype=torch.float64), "kind": "tvd"}, {"temperature": 2.0, "kind": "tvd"}),
        (
            {"teacher_temperature": torch.tensor(2.0), "temperature": 2.0, "kind": "jsd"},
            {"temperature": 2.0, "kind": "jsd"},
        ),
        ({"kind": "mse", "teacher_temperature": 3.0, "temperature": 2.0}, {"kind": "mse"}),
    ],
)
def test_another_name_for(options, long, function, dtype):
    assert same(function(dtype, mask=MASK, **options), function(dtype, mask=MASK, **long), dtype)


@DTYPES
@every_function
@pytest.mark.parametrize(
    ("options", "times"),
    [
        ({"reduction": "batchmean"}, 1 / 3),
        ({"num_items_in_batch": 5}, 1 / 5),
        ({"num_items_in_batch": torch.tensor(5)}, 1 / 5),
        ({"num_items_in_batch": torch.tensor([0.75]), "recompute": True}, 1 / 0.75),
    ],
)
@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_denominators_of_the_sum(kind, options, times, function, dtype):
    options = dict(options)
    shared = {"kind": kind, "mask": MASK, "temperature": 2.0}
    if options.pop("recompute", False) and function is of_hidden:
        shared["recompute_logits"] = True
    assert same(function(dtype, **shared, **options), function(dtype, **shared, reduction="sum"), dtype, times)


def test_batchmean_is_torchs():
    s, t = (x.flatten(0, 1) for x in logits(torch.float64))
    wanted = F.kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction="batchmean", log_target=True)
    assert relative_error(divergence(s, t, reduction="batchmean"), wanted) < 1e-13
    assert relative_error(divergence(s[0], t[0], reduction="batchmean"), divergence(s[0], t[0], reduction="sum")) == 0


def test_a_denominator_with_weights_and_labels():
    labels = torch.where(MASK == 0, -100, 3)
    shared = {"labels": labels, "weights": torch.rand(3, 4), "hard_weight": 0.4}
    wanted = of_hidden(torch.float64, reduction="sum", **shared)
    assert same(of_hidden(torch.float64, num_items_in_batch=9, **shared), wanted, torch.float64, 1 / 9)
    vocab = {"vocab": torch.arange(17), "teacher_tokens": "all", "teacher_head": torch.cat([WIDE_HEAD, WIDE_HEAD[:3]])}
    wanted = of_hidden(torch.float64, reduction="sum", **shared, **vocab)
    assert same(of_hidden(torch.float64, num_items_in_batch=9, **shared, **vocab), wanted, torch.float64, 1 / 9)


@DTYPES
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd", "soft_ce"])
def test_the_teachers_own_temperature(kind, dtype):
    shared = {"kind": kind, "temperature": 2.0, "mask": MASK}
    wanted = of_logits(dtype, 2.0 / 0.7, **shared)
    assert same(of_logits(dtype, teacher_temperature=0.7, **shared), wanted, dtype)
    found, wanted = (
        of_hidden(dtype, teacher_temperature=0.7, **shared),
        of_hidden(dtype, WIDE_HEAD * (2.0 / 0.7), **shared),
    )
    assert same(found, wanted, dtype)


def test_the_teachers_own_temperature_with_a_softcap():
    capped = 3 * torch.tanh(0.5 * F.linear(WIDE, WIDE_HEAD) / 3)
    wanted = gradients(lambda h, w: divergence(F.linear(h, w), capped * (2 / 0.7), temperature=2.0), HIDDEN, HEAD)
    more = {"logit_scale": (1.0, 0.5), "logit_softcap": (None, 3.0)}
    found = of_hidden(torch.float64, temperature=2.0, teacher_temperature=0.7, **more)
    assert same(found, wanted, torch.float64)


def test_a_temperature_that_may_not_be_read(monkeypatch):
    """As on a GPU, where reading would synchronise; bfloat16 is not rounded a second time."""
    s, t = (x.bfloat16() for x in logits(torch.float64))
    options = {
        "temperature": torch.tensor(1.7),
        "teacher_temperature": 0.9,
        "num_items_in_batch": torch.tensor(5),
        "mask": MASK,
    }
    wanted = gradients(lambda x: divergence(x, t, **options), s)
    monkeypatch.setattr("fastkd.checks.looks_are_free", lambda x: False)
    found = gradients(lambda x: divergence(x, t, **options), s)
    assert relative_error(found[0], wanted[0]) < 2e-5 and relative_error(found[1][0], wanted[1][0]) < 4e-3
    with pytest.raises(
        ValueError, match=r"temperature: reading .* would synchronise or break the graph; pass a number"
    ):
        of_hidden(torch.float32, temperature=torch.tensor(2.0))


def test_tensors_among_the_options_under_torch_compile():
    s, t = (x.float() for x in logits(torch.float64))
    call = lambda s, t, T, n: divergence(s, t, kind="jsd", beta=0, temperature=T, num_items_in_batch=n)  # noqa: E731
    numbers = torch.tensor(2.0), torch.tensor(7)
    torch.testing.assert_close(
        torch.compile(call, fullgraph=True, backend="eager")(s, t, *numbers), call(s, t, *numbers)
    )


@pytest.mark.parametrize("alpha", [0.0, 0.01, 0.1, 0.5, 0.9])
@DTYPES
def test_skew_reverse_kl(alpha, dtype):
    skewed = {"kind": "skew_reverse_kl", "alpha": alpha, "temperature": 2.0, "reduction": "none"}
    for scale in (1.0, 1e-3):  # of the difference: far from and near convergence

        def textbook(s, t):
            q, p = (s / 2).softmax(-1), (t / 2).softmax(-1)
            m = alpha * q + (1 - alpha) * p
            return 4 * (torch.special.xlogy(q, q) - torch.special.xlogy(q, m)).sum(-1)

        t = randn(5, 33, seed=1).to(dtype)
        s = (t.double() + scale * randn(5, 33, seed=2)).to(dtype)
        loss, (grad,) = gradients(lambda s, t=t: divergence(s, t, **skewed), s)
        wanted, (wanted_grad,) = gradients(lambda s, t=t: textbook(s, t.double()), s.double())
        allowed = (
            LIMITS[dtype] * (1 if scale == 1 or dtype == torch.float32 else 1e4) / (1 - alpha)
        )  # the textbook's digits
        assert relative_error(loss, wanted) < allowed and relative_error(grad, wanted_grad) < allowed
    topk = TopK(*((t / 2).log_softmax(-1).topk(4)[::-1]), True)
    assert divergence(s, topk, **skewed).shape == (5,)


@DTYPES
def test_log_probabilities_are_logits(dtype):
    s, t = logits(dtype)
    for kind in ("forward_kl", "reverse_kl", "jsd", "tvd"):
        wanted = gradients(lambda x, kind=kind: divergence(x, t, kind=kind), s)
        found = gradients(lambda x, kind=kind: divergence(x.log_softmax(-1), t.log_softmax(-1), kind=kind), s)
        assert same(found, wanted, dtype)


@DTYPES
@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "batchmean"])
def test_linear_entropy(reduction, dtype):
    bias = randn(17, seed=9)
    log_q = (3 * torch.tanh(0.5 * F.linear(HIDDEN, HEAD, bias) / 3) / 0.8).log_softmax(-1)
    rows = torch.where(MASK == 1, -(log_q.exp() * log_q).sum(-1), 0.0)
    wanted = {"mean": rows.sum() / 7, "sum": rows.sum(), "none": rows, "batchmean": rows.sum() / 3}[reduction]
    sides = HIDDEN.to(dtype).requires_grad_(), HEAD.to(dtype)
    shape = {"bias": bias.to(dtype), "logit_scale": 0.5, "logit_softcap": 3.0}
    found = linear_entropy(*sides, **shape, temperature=0.8, mask=MASK, reduction=reduction)
    assert relative_error(found, wanted) < LIMITS[dtype] and not found.requires_grad


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_items_in_batch": 3, "reduction": "sum"}, "num_items_in_batch: is what a mean divides by"),
        ({"num_items_in_batch": torch.ones(2)}, r"num_items_in_batch: expected one number, got float32\[2\]"),
        ({"num_items_in_batch": 0}, "num_items_in_batch: must be a finite number > 0, got 0"),
        ({"num_items_in_batch": torch.tensor(0)}, "num_items_in_batch: must be a finite number > 0"),
        ({"temperature": torch.ones(2)}, "temperature: expected a floating tensor of one number"),
        ({"temperature": torch.tensor(-1.0)}, "temperature: must be > 0"),
        ({"temperature": torch.tensor(1.0, requires_grad=True)}, "temperature requires grad"),
        ({"teacher_temperature": 0.0}, "teacher_temperature: must be a finite number > 0"),
        ({"kind": "jsd", "beta": 1.5}, r"beta: must lie in \[0, 1\], got 1\.5"),
    ],
)
@every_function
def test_errors_say_what_to_do(options, said, function):
    with pytest.raises(ValueError, match=said):
        function(torch.float32, **options)


def test_errors_of_one_function():
    with pytest.raises(ValueError, match=r"kind: expected one of .*, got 'skew_reverse_kl'"):
        of_hidden(torch.float32, kind="skew_reverse_kl")
    sparse = TopK(torch.zeros(3, 4, 1, dtype=torch.int64), torch.zeros(3, 4, 1))
    for call in (
        lambda **x: divergence(logits(torch.float32)[0], sparse, **x),
        lambda **x: linear_divergence(HIDDEN, HEAD, sparse, **x),
    ):
        with pytest.raises(ValueError, match="teacher_temperature: a TopK has log-probabilities"):
            call(teacher_temperature=1.0)
