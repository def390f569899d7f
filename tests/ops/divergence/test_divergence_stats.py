"""return_stats of divergence and linear_divergence: the loss and the gradient of before, and of each row what float64 says."""

import pytest
import torch
import torch.nn.functional as F

from cases import gradients, randn, relative_error
from fastkd import TopK
from fastkd.functional import divergence, linear_divergence

LIMITS = {torch.float64: 1e-11, torch.float32: 2e-5}
DTYPES = pytest.mark.parametrize("dtype", LIMITS)  # float32: the kernels where they are built
MASK = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]])
T = 0.8
HIDDEN, WIDE, HEAD, WIDE_HEAD, BIAS = (
    randn(*shape, seed=seed) for seed, shape in enumerate([(3, 4, 6), (3, 4, 10), (17, 6), (17, 10), (17,)])
)
S, TEACHER = 3 * torch.tanh(0.5 * F.linear(HIDDEN, HEAD, BIAS) / 3), F.linear(WIDE, WIDE_HEAD)
SPARSE = TopK(*reversed((TEACHER / T).log_softmax(-1).topk(5)), tail=True)
SHAPED = {"logit_scale": (0.5, 1.0), "logit_softcap": (3.0, None)}


def cast(x, dtype):
    return TopK(x.indices, x.log_probs.to(dtype), True) if isinstance(x, TopK) else x.to(dtype)


def of_logits(dtype, teacher, **options):
    found = []

    def loss(s):
        found.append(divergence(s, cast(teacher, dtype), temperature=T, mask=MASK, **options))
        return found[-1][0] if options.get("return_stats") else found[-1]

    return gradients(loss, S.to(dtype)), found[-1]


def of_hidden(dtype, teacher, **options):
    found, sparse = [], isinstance(teacher, TopK)
    theirs = (cast(teacher, dtype), None) if sparse else (WIDE.to(dtype), WIDE_HEAD.to(dtype))

    def loss(hidden, head, bias):
        found.append(
            linear_divergence(hidden, head, *theirs, student_bias=bias, temperature=T, mask=MASK, **SHAPED, **options)
        )
        return found[-1][0] if options.get("return_stats") else found[-1]

    return gradients(loss, HIDDEN.to(dtype), HEAD.to(dtype), BIAS.to(dtype)), found[-1]


@DTYPES
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("teacher", [TEACHER, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd", "skew_reverse_kl"])
@pytest.mark.parametrize("function", [of_logits, of_hidden])
def test_stats_are_those_of_float64_and_change_nothing(function, kind, teacher, reduction, dtype):
    if function is of_hidden and kind == "skew_reverse_kl":
        kind = "tvd"  # linear_divergence has no skew_reverse_kl
    options = {"kind": kind, "reduction": reduction}
    (loss, grads), _ = function(dtype, teacher, **options)
    (found, found_grads), (_, stats) = function(dtype, teacher, return_stats=True, **options)
    assert torch.equal(found, loss) and all(map(torch.equal, found_grads, grads))
    log_q = (S / T).log_softmax(-1)
    value = divergence(S, teacher, kind=kind, temperature=T, mask=MASK, reduction="none", backend="reference")
    wanted = [value, -(log_q.exp() * log_q).sum(-1)]
    wanted += [teacher.log_probs.exp().sum(-1)] if isinstance(teacher, TopK) else []
    for x, y in zip(stats, wanted if len(wanted) == 3 else [*wanted, None], strict=True):
        if y is None:
            assert x is None
            continue
        assert x.dtype == dtype and not x.requires_grad and (x[MASK == 0] == 0).all()
        assert relative_error(x, torch.where(MASK == 1, y, 0.0)) < LIMITS[dtype]


@DTYPES
@pytest.mark.parametrize("recompute_logits", [False, True])
def test_the_value_has_no_weights_and_no_divisor(recompute_logits, dtype):
    weights, labels = randn(3, 4, seed=8).abs(), torch.arange(12).view(3, 4)
    options = {"labels": labels, "hard_weight": 0.7, "recompute_logits": recompute_logits, "return_stats": True}
    _, (_, stats) = of_hidden(dtype, TEACHER, weights=weights, num_items_in_batch=5, **options)
    _, (plain, _) = of_hidden(dtype, TEACHER, reduction="none", **options)
    assert relative_error(stats.value, plain.double()) < LIMITS[dtype]


@DTYPES
def test_the_value_of_a_part_of_the_vocabulary(dtype):
    kept = torch.tensor([0, 3, 4, 9, 16])
    sides = HIDDEN.to(dtype).requires_grad_(), HEAD[kept].to(dtype), WIDE.to(dtype), WIDE_HEAD.to(dtype)
    options = {"vocab": kept, "teacher_tokens": "all", "temperature": T, "mask": MASK}
    loss, stats = linear_divergence(*sides, **options, return_stats=True)
    rows = linear_divergence(*(x.double() for x in sides), **options, reduction="none", backend="reference")
    assert relative_error(stats.value, rows) < LIMITS[dtype] and relative_error(loss, rows.sum() / 7) < LIMITS[dtype]
    log_q = (F.linear(HIDDEN, HEAD[kept]) / T).log_softmax(-1)
    entropy = torch.where(MASK == 1, -(log_q.exp() * log_q).sum(-1), 0.0)
    assert relative_error(stats.student_entropy, entropy) < LIMITS[dtype]


def test_tokens_without_probability_have_no_entropy():
    s = torch.tensor([[0.0, 0.0, -torch.inf], [0.0, -torch.inf, -torch.inf], [torch.nan, 0.0, 0.0]])
    _, stats = divergence(s, torch.zeros(3, 3), kind="forward_kl", mask=torch.tensor([1, 1, 0]), return_stats=True)
    torch.testing.assert_close(stats.student_entropy, torch.tensor([2.0, 1.0, 1.0]).log())


def test_what_has_no_stats_is_refused():
    sides, kept = (HIDDEN, HEAD[:5], WIDE, WIDE_HEAD), torch.arange(5)
    options = {
        "vocab": kept,
        "teacher_tokens": "all",
        "labels": torch.zeros(3, 4, dtype=torch.long),
        "hard_weight": 1.0,
    }
    with pytest.raises(
        ValueError, match="return_stats: cannot be combined with process_group, nor with hard_weight where"
    ):
        linear_divergence(*sides, **options, return_stats=True)
    for call in (
        lambda: linear_divergence(HIDDEN, HEAD, WIDE, WIDE_HEAD, return_stats=1),
        lambda: divergence(S, S, return_stats=1),
    ):
        with pytest.raises(ValueError, match="return_stats: expected True or False, got 1"):
            call()
