"""linear_divergence with heads spread over two processes: the loss and every gradient of one process with all tokens."""

import pytest
import torch

import fastkd
from cases import randn, relative_error
from ranks import on_two_ranks

ROWS, D, T_D, VOCABULARY = 300, 6, 5, 23  # more rows than are computed at a time; shards of 11 and 12 tokens
SPLIT = (0, 11, VOCABULARY)
OPTIONS = [
    {"kind": kind, "temperature": temperature}
    for kind, temperature in (
        ("forward_kl", 2.0), ("reverse_kl", 1.0), ("jsd", 1.5), ("skew_kl", 1.0), ("tvd", 1.0), ("soft_ce", 1.0), ("mse", 1.0),
    )
] + [
    {"hard_weight": 0.3, "temperature": 2.0, "masked": True},
    {"logit_scale": (2.0, 0.5), "logit_softcap": 3.0, "weighted": True, "masked": True},
    {"reduction": "sum", "masked": True},
    {"sparse": None, "masked": True}, {"sparse": True, "kind": "reverse_kl", "hard_weight": 0.3, "temperature": 2.0},
    {"sparse": "given", "kind": "jsd", "logit_softcap": 3.0}, {"sparse": True, "kind": "forward_kl", "tokens": 15},
    {"reduction": "none", "masked": True}, {"recompute_logits": True, "kind": "jsd"},
    {"absent": range(9, VOCABULARY), "kind": "jsd"}, {"absent": (3, 12), "kind": "forward_kl"},  # no token of the second rank's
]  # fmt: skip
CASES = [(options, near) for options in OPTIONS for near in (False, True)]
# Few, since Triton's interpreter is slow; the values of two kinds come from one look at the logits, those of four from two.
INTERPRETED = [
    *(({"rows": 60, "kind": kind, "masked": True}, True) for kind in ("forward_kl", "reverse_kl", "skew_kl", "jsd", "tvd", "mse")),
    ({"rows": 5, "kind": "soft_ce", "hard_weight": 0.3}, False), ({"rows": 5, "sparse": True, "kind": "jsd"}, False),
]  # fmt: skip

RUN = """
import fastkd
from test_vocab_parallel import CASES, INTERPRETED, inputs, loss_of, shard
result = []
for options, near in {cases}:
    leaves, sides, more = inputs(options, near, torch.{dtype})
    student = shard(leaves[1:], rank)
    teacher = shard(sides[1:], rank)
    own = [leaves[0].requires_grad_(), *(x.requires_grad_() for x in student)]
    loss = loss_of(own, sides[0], teacher, process_group=group, backend="{backend}", **more)
    result.append((loss.detach(), torch.autograd.grad(0.37 * loss.sum(), own, retain_graph=True)))
again = torch.autograd.grad(0.37 * loss.sum(), own)
assert all(torch.equal(x, y) for x, y in zip(again, result[-1][1]))
more.pop("reduction", None)
with torch.autocast("cpu", torch.bfloat16):
    inside = loss_of(own, sides[0], teacher, process_group=group, **more)
cast = [[x if x.dtype == torch.float64 else x.bfloat16() for x in side] for side in (own, sides[:1], teacher)]
assert torch.equal(inside, loss_of(cast[0], cast[1][0], cast[2], process_group=group, **more))  # autocast leaves float64 alone
try:
    fastkd.linear_divergence(
        sides[0], teacher[0], sides[0], teacher[0], labels=torch.full((len(sides[0]),), 23), hard_weight=1.0, process_group=group
    )
except ValueError as error:
    assert "labels: a label that counts must be a token of one of the shards" in str(error)
else:
    raise AssertionError("a label outside of all shards was accepted")
try:
    fastkd.linear_divergence(sides[0], teacher[0], fastkd.TopK(torch.full((len(sides[0]), 1), 23), torch.zeros(len(sides[0]), 1)), process_group=group)
except ValueError as error:
    assert "indices must be a token of one of the shards" in str(error)
else:
    raise AssertionError("a TopK with a token outside of all shards was accepted")
"""


def inputs(options, near, dtype):
    """(hidden, head, bias) of the student and of the teacher, and the rest of the arguments."""
    options = dict(options)
    rows = options.pop("rows", ROWS)
    tail, tokens = options.pop("sparse", "dense"), options.pop("tokens", 4)
    teacher = [randn(rows, D, seed=1), randn(VOCABULARY, D, seed=2), randn(VOCABULARY, seed=3)]
    generator = torch.Generator().manual_seed(4)
    student = [x + (1e-3 if near else 1.0) * torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in teacher]
    if options.pop("masked", False):
        options["mask"] = torch.arange(rows) % 3 > 0
    for token in options.pop("absent", ()):
        student[2][token] = teacher[2][token] = -torch.inf
    if options.pop("weighted", False):
        options["weights"] = torch.arange(rows, dtype=torch.float32) / rows
    if "hard_weight" in options:
        options["labels"] = torch.arange(rows) % VOCABULARY
    if tail != "dense":
        log_p = (torch.nn.functional.linear(*teacher) / options.get("temperature", 1.0)).log_softmax(-1)
        log_probs, indices = log_p.topk(tokens, -1)
        given = log_probs.exp().sum(-1).neg().log1p() if tail == "given" else tail
        options["topk"] = fastkd.TopK(indices, log_probs.to(dtype), given)
    return [x.to(dtype) for x in student], [x.to(dtype) for x in teacher], options


def shard(head_and_bias, rank):
    return [x[SPLIT[rank] : SPLIT[rank + 1]].clone() for x in head_and_bias]


def loss_of(student, teacher_hidden, teacher, topk=None, **more):
    """student: (hidden, head, bias); teacher: (head, bias), where it is not a TopK."""
    if topk is not None:
        return fastkd.linear_divergence(student[0], student[1], topk, student_bias=student[2], **more)
    biases = {"student_bias": student[2], "teacher_bias": teacher[1]}
    return fastkd.linear_divergence(student[0], student[1], teacher_hidden, teacher[0], **biases, **more)


def in_one_process(options, near, dtype, wide):
    """(loss, gradients) with all tokens, of the inputs in `dtype`, computed in `wide`."""
    leaves, sides, more = inputs(options, near, getattr(torch, dtype))
    own, teacher = [x.to(wide).requires_grad_() for x in leaves], [x.to(wide) for x in sides]
    loss = loss_of(own, teacher[0], teacher[1:], backend="reference", **more)
    return loss.detach(), torch.autograd.grad(0.37 * loss.sum(), own)


@pytest.mark.parametrize(
    ("dtype", "backend", "limits"),
    [
        ("float32", "cpu", (1e-6, 1e-5)), pytest.param("float64", "reference", (1e-12, 1e-12), marks=pytest.mark.long),
        pytest.param("bfloat16", "cpu", (1e-6, 5e-3), marks=pytest.mark.long),
    ],
)  # fmt: skip
def test_two_processes_equal_one(dtype, backend, limits):
    """Products in float32 round logits, which shows near convergence: no more than in one process, then. The gradient of
    bfloat16 logits is rounded for its products."""
    compare_with_one_process(
        on_two_ranks(RUN.format(dtype=dtype, backend=backend, cases="CASES")), dtype, CASES, limits
    )


@pytest.mark.long
def test_two_processes_equal_one_in_tritons_interpreter():
    pytest.importorskip("triton")
    run = RUN.format(dtype="float32", backend="triton", cases="INTERPRETED")
    ranks = on_two_ranks('os.environ["TRITON_INTERPRET"] = "1"' + run, seconds=500)
    compare_with_one_process(ranks, "float32", INTERPRETED, (1e-6, 1e-5))


def compare_with_one_process(ranks, dtype, cases, limits):
    for i, (options, near) in enumerate(cases):
        true, true_grads = in_one_process(options, near, dtype, torch.float64)
        rounded = torch.float64 if dtype == "float64" else torch.float32
        same, same_grads = in_one_process(options, near, dtype, rounded)
        for rank in (0, 1):
            loss, grads = ranks[rank][i]
            where = f"{options} near={near} rank {rank}"
            assert relative_error(loss, true) <= max(limits[0], 2 * relative_error(same, true)), where
            expected, others = ([x[0], *shard(x[1:], rank)] for x in (true_grads, same_grads))
            for found, right, other in zip(grads, expected, others, strict=True):
                assert relative_error(found, right) <= max(limits[1], 2 * relative_error(other, right)), where


SECOND = """
import fastkd
hidden, head = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
loss = fastkd.linear_divergence(hidden, head, hidden.detach(), head + 1, process_group=group)
try:
    torch.autograd.grad(loss, hidden, create_graph=True)
except RuntimeError as error:
    result = str(error)
"""


def test_a_second_derivative_of_the_kernels_is_refused():
    for said in on_two_ranks(SECOND):
        assert "the C++ and Triton kernels have no second derivative" in said and "backend='reference'" in said


PENALTY = """
from test_vocab_parallel import inputs, penalised, shard
leaves, sides, more = inputs({"temperature": 2.0, "masked": True}, False, torch.float64)
result = penalised(leaves[0], shard(leaves[1:], rank), sides[0], shard(sides[1:], rank), process_group=group, **more)
"""


def penalised(hidden, student, teacher_hidden, teacher, **more):
    """Gradients of a loss that has the gradient of the divergence in it."""
    own = [x.requires_grad_() for x in (hidden, *student)]
    loss = fastkd.linear_divergence(
        own[0], own[1], teacher_hidden, teacher[0], student_bias=own[2], teacher_bias=teacher[1], **more
    ).square()
    (grad,) = torch.autograd.grad(loss, own[0], create_graph=True)
    return torch.autograd.grad(loss + 100 * grad.square().sum(), own)


def test_a_gradient_penalty_on_two_processes_equals_one():
    ranks = on_two_ranks(PENALTY)
    leaves, sides, more = inputs({"temperature": 2.0, "masked": True}, False, torch.float64)
    true = penalised(leaves[0], leaves[1:], sides[0], sides[1:], backend="reference", **more)
    for rank in (0, 1):
        for found, right in zip(ranks[rank], [true[0], *shard(true[1:], rank)], strict=True):
            assert relative_error(found, right) < 1e-11, rank


def test_what_cannot_be_sharded_is_an_error():
    hidden, head = torch.randn(3, 4), torch.randn(5, 4)
    with pytest.raises(ValueError, match="vocab: cannot be combined with process_group"):
        fastkd.linear_divergence(hidden, head, hidden, head, vocab=torch.arange(5), process_group=object())
    with pytest.raises(RuntimeError, match="backend='cpu' cannot run here: the input is float64"):
        fastkd.linear_divergence(*[x.double() for x in (hidden, head)] * 2, backend="cpu", process_group=object())
