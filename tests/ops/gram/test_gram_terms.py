"""gram over several pairs of layers and several levels in one call: the same as one by one."""

import pytest
import torch

from cases import gradients, randn, relative_error
from fastkd import backends
from fastkd.functional import gram_correlation_loss as loss
from fastkd.ops import gram as ops
from ranks import on_two_ranks

HERE = [b for b in ops.KERNELS if b == "cpu" or backends.INTERPRETED]
on_every_backend = pytest.mark.parametrize("backend", ["reference", *HERE])
MASK = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
BOTH = {"token": 0.3, "sequence": 2.0}


def layers(dtype=torch.float32, widths=(6, 9, 4), others=(3, 7, 12)):
    students = [(randn(4, 5, d, seed=d) + 0.5 * randn(d, seed=50 + d)).to(dtype) for d in widths]
    return students, [randn(4, 5, d, seed=20 + d).to(dtype) for d in others]


def one_by_one(students, teachers, backend, **options):
    values = [loss(s, t, level=name, backend=backend, **options) * weight
              for s, t in zip(students, teachers, strict=True) for name, weight in BOTH.items()]  # fmt: skip
    return sum(values) / (len(students) if options.get("reduction", "mean") == "mean" else 1)


def close(found, expected, dtype=torch.float32):
    value, grads = found
    other, others = expected
    assert relative_error(value, other) <= 1e-6
    for x, y in zip(grads, others, strict=True):
        assert relative_error(x, y) <= (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("grouping", ["position", "official"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("masked", [False, True])
@on_every_backend
def test_all_pairs_and_levels_at_once(backend, masked, reduction, grouping):
    if masked and grouping == "official":
        pytest.skip("the official grouping knows no mask")
    students, teachers = layers()
    options = {"mask": MASK if masked else None, "reduction": reduction, "grouping": grouping}
    found = gradients(lambda *s: loss(s, teachers, level=BOTH, backend=backend, **options), *students)
    close(found, gradients(lambda *s: one_by_one(s, teachers, backend, **options), *students))


@pytest.mark.parametrize("expected", [None, ([1.0, 1.0], False)], ids=["", "expected"])
@on_every_backend
def test_a_level_that_nobody_uses_adds_nothing(backend, expected):
    (student, *_), (teacher, *_) = layers()

    def of_sequences(student):
        values, _ = ops.gram([student], [teacher], None, tuple(BOTH), False, True, 1e-6, backend, expected)
        return values[1].sum()

    options = {"level": "sequence", "reduction": "sum", "backend": "reference"}
    close(gradients(of_sequences, student), gradients(lambda s: loss(s, teacher, **options), student))


@pytest.mark.parametrize(("pearson", "level"), [("matrix", "token"), ("row", "token"), ("matrix", "sequence")])
@on_every_backend
def test_unreduced_has_a_row_per_pair(backend, pearson, level):
    students, teachers = layers()
    options = {"reduction": "none", "pearson": pearson, "level": level, "backend": backend}
    found = gradients(lambda *s: loss(s, teachers, **options), *students)
    assert found[0].shape == (3, *((4, 5) if pearson == "row" else (4,) if level == "token" else (5,)))
    singly = gradients(lambda *s: torch.stack([loss(*x, **options) for x in zip(s, teachers, strict=True)]), *students)
    close(found, singly)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@on_every_backend
def test_frozen_students_get_no_gradient(backend, dtype, monkeypatch):
    students, teachers = layers(dtype)
    expected = gradients(lambda *s: loss(s, teachers, level=BOTH, backend=backend), *students)
    asked = []
    if backend in ops.KERNELS:
        whole = ops.KERNELS[backend]

        def fwd(students, *rest):
            asked.append((len(students), rest[-1]))
            return whole.fwd(students, *rest)

        monkeypatch.setitem(ops.KERNELS, backend, backends.Kernels(fwd, whole.bwd))
    leaves = [students[0].clone().requires_grad_(), students[1], students[2].clone().requires_grad_()]
    value = loss(leaves, teachers, level=BOTH, backend=backend)
    value.backward(randn(seed=7).to(value) + 1.5)
    close((value, [leaves[0].grad, leaves[2].grad]), (expected[0], [expected[1][0], expected[1][2]]), dtype)
    assert leaves[0].grad.dtype == dtype and leaves[1].grad is None
    assert asked in ([], [(2, True), (1, False)], [(1, False)])


@on_every_backend
def test_one_level_with_a_weight(backend):
    students, teachers = layers()
    found = loss(students, teachers, level={"sequence": 3.0}, backend=backend)
    assert relative_error(found, 3 * loss(students, teachers, level="sequence", backend=backend)) <= 1e-6


@on_every_backend
def test_compiled_equals_eager(backend):
    torch._dynamo.reset()
    students, teachers = layers()
    compiled = torch.compile(
        lambda s, t, m: loss(s, t, level=BOTH, mask=m, backend=backend), fullgraph=True, backend="aot_eager"
    )
    for mask in (None, MASK):
        found = gradients(lambda *s, m=mask: compiled(list(s), teachers, m), *students)
        close(found, gradients(lambda *s, m=mask: loss(s, teachers, level=BOTH, mask=m, backend=backend), *students))


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_two_ranks_equal_the_global_batch(backend):
    """Token terms are of a rank's own sequences, sequence terms of everybody's."""
    results = on_two_ranks(f"""
from cases import randn
from fastkd.functional import gram_correlation_loss
students, teachers = [randn(6, 5, d, seed=d).float() for d in (4, 7)], [randn(6, 5, 3, seed=9 + d).float() for d in (4, 7)]
own = slice(3 * rank, 3 * rank + 3)
leaves = [x[own].clone().requires_grad_() for x in students]
level, mask = {BOTH!r}, torch.ones(3, 5)
value = gram_correlation_loss(leaves, [x[own] for x in teachers], level=level, process_group=group, mask=mask,
                              backend={backend!r})
value.backward()
result = value.detach(), [x.grad for x in leaves]
""")
    students = [randn(6, 5, d, seed=d).float() for d in (4, 7)]
    teachers = [randn(6, 5, 3, seed=9 + d).float() for d in (4, 7)]
    value, grads = gradients(lambda *s: loss(s, teachers, level=BOTH, backend=backend), *students)
    upstream = float(randn(seed=7)) + 1.5
    assert relative_error((results[0][0] + results[1][0]) / 2, value) < 1e-6
    for k, grad in enumerate(grads):
        assert relative_error(torch.cat([r[1][k] for r in results]) / 2, grad / upstream) < 1e-6


def test_invalid_arguments_are_errors():
    x = randn(3, 5, 8)
    with pytest.raises(ValueError, match=r"student_hidden\[1\] and student_hidden\[0\] must agree"):
        loss([x, x[:, :4]], [x, x[:, :4]])
    with pytest.raises(ValueError, match=r"teacher_hidden\[1\]: expected shape"):
        loss([x, x], [x, x[0]])
    with pytest.raises(ValueError, match="pair up one to one"):
        loss([x], [x, x])
    with pytest.raises(ValueError, match="expected a list with one entry per layer"):
        loss(None, [x])
    with pytest.raises(ValueError, match="level: expected one of 'token', 'sequence', got 'batch'"):
        loss(x, x, level={"token": 1.0, "batch": 1.0})
    with pytest.raises(ValueError, match="level: expected one of"):
        loss(x, x, level={})
    with pytest.raises(ValueError, match="pass one level"):
        loss(x, x, level=BOTH, reduction="none")
