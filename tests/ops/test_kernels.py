"""What counts as right (DESIGN: numbers), for every stem × backend that has a kernel.

Each stem brings one `Subject`: inputs at a typical and at awkward shapes, a call, and the idiomatic eager PyTorch that it
must not be less accurate than. Everything else here is the same for all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fastkd.bench import baselines

from cases import AWKWARD_SIZES, TOLERANCES, gradients, randn, relative_error
from fastkd import backends, functional


@dataclass(frozen=True)
class Subject:
    """call(student, teacher, backend) -> unreduced loss; eager(student, teacher) -> the same in idiomatic PyTorch."""

    stem: str
    variant: str
    inputs: Callable  # (seed, dtype, rows, width, noise) -> (student, teacher)
    call: Callable
    eager: Callable

    def __str__(self):
        return f"{self.stem}-{self.variant}"


def _logits(seed, dtype, rows, width, noise=None):
    teacher = randn(rows, width, seed=seed, scale=3.0)
    student = (
        randn(rows, width, seed=seed + 1, scale=3.0) if noise is None else teacher + noise * randn(rows, width, seed=9)
    )
    return student.to(dtype), teacher.to(dtype)


def _divergence(kind, temperature=2.0):
    return Subject(
        "divergence",
        kind,
        _logits,
        lambda s, t, backend: functional.divergence(
            s, t, kind=kind, temperature=temperature, reduction="none", backend=backend
        ),
        lambda s, t: baselines.divergence.eager(s, t, kind, temperature),
    )


def layer_costs_of_rows(student, teacher, backend):
    """Every row a layer of its own; of the matrix of all pairs the diagonal."""
    students, teachers = ([row[None, None] for row in x] for x in (student, teacher))
    return functional.layer_costs(students, teachers, backend=backend).diagonal()


LAYER_COST = Subject("layer_cost", "rows", _logits, layer_costs_of_rows, lambda s, t: (s - t).square().mean(-1))


def _contrast_inputs(seed, dtype, rows, width, noise=None):
    """Queries near their positives (student, teacher) on a sphere (3 to 300 wide); the bank is the same for all."""
    width = min(max(width, 3), 300)
    teacher = F.normalize(randn(rows, width, seed=seed), dim=1)
    student = teacher + (0.5 if noise is None else noise) * F.normalize(randn(rows, width, seed=seed + 1), dim=1)
    return student.to(dtype), teacher.to(dtype)


# Made once: Dynamo will not have a generator inside of what it compiles.
BANK = randn(301, 300, seed=99)
INDEX = torch.randint(301, (64, 65), generator=torch.Generator().manual_seed(5))


def _bank_of(teacher):
    """[301, D]; a bank is kept in float32 whatever the batch is in."""
    bank = F.normalize(BANK[:, : teacher.shape[1]], dim=1).float().to(teacher.device)
    return bank.double() if teacher.dtype == torch.float64 else bank


def _index_of(teacher):
    return INDEX[: teacher.shape[0]].to(teacher.device)


def _with_own_rows(teacher):
    """A bank that begins with the teacher's rows, and an index whose first column is them."""
    bank, index = _bank_of(teacher), _index_of(teacher) + teacher.shape[0]
    own = torch.arange(teacher.shape[0], device=teacher.device)
    return torch.cat([teacher.to(bank.dtype), bank]), torch.cat([own[:, None], index[:, 1:]], 1)


def info_nce_of_rows(student, teacher, backend, gathered=False):
    index = _index_of(teacher) if gathered else None
    return functional.info_nce_loss(
        student, teacher, _bank_of(teacher), index, temperature=0.1, reduction="none", backend=backend
    )


def eager_info_nce(student, teacher, gathered=False):
    """In the student's dtype, as under autocast."""
    index = _index_of(teacher) if gathered else None
    return baselines.contrast.eager_info_nce(student, teacher, _bank_of(teacher).to(student.dtype), index, 0.1)


NCE = {"n_data": 1000, "temperature": 0.1, "z": 1500.0}


def nce_of_rows(student, teacher, backend):
    return functional.nce_loss(student, *_with_own_rows(teacher), **NCE, reduction="none", backend=backend)


def eager_nce(student, teacher):
    bank, index = _with_own_rows(teacher)
    return baselines.contrast.eager_nce(student, bank.to(student.dtype), index, **NCE)


CONTRAST = [
    Subject("contrast", "info_nce", _contrast_inputs, info_nce_of_rows, eager_info_nce),
    Subject(
        "contrast",
        "info_nce_gathered",
        _contrast_inputs,
        partial(info_nce_of_rows, gathered=True),
        partial(eager_info_nce, gathered=True),
    ),
    Subject("contrast", "nce", _contrast_inputs, nce_of_rows, eager_nce),
]


def _head(width, device, dtype):
    """Every word one coordinate, times a power of two: both products are exact, what is left is the arithmetic of rows."""
    index = torch.arange(width, device=device)
    head = torch.zeros(width, width, dtype=dtype, device=device)
    head[index, (index * 3 + 1) % width if width % 3 else index] = 0.5
    return head


def _in_rows(x):
    """Wide rows in pieces: a head of 32000 x 32000 would not fit."""
    return x.reshape(-1, 500) if x.shape[1] == 32000 else x


def linear_divergence_of_rows(student, teacher, backend, kind="forward_kl"):
    s, t = _in_rows(student), _in_rows(teacher)
    heads = (_head(s.shape[1], s.device, x.dtype) for x in (s, t))
    rows = functional.linear_divergence(
        s, next(heads), t, next(heads), kind=kind, temperature=2.0, reduction="none", backend=backend
    )
    return rows.reshape(len(student), -1).sum(-1)


def _linear_divergence(kind):
    return Subject(
        "linear_divergence",
        kind,
        _logits,
        lambda s, t, backend: linear_divergence_of_rows(s, t, backend, kind),
        lambda s, t: baselines.divergence.eager(s * 0.5, t * 0.5, kind, 2.0),
    )


def _queries(rows):
    """[rows, width] -> [rows, 1, L, d]: every query a piece of a row."""
    d = 8 if rows.shape[1] < 5000 else 128
    return F.pad(rows, (0, -rows.shape[1] % d)).unflatten(1, (1, -1, d))


def _keys(x):
    """Every key one coordinate, times a power of two: scores are exact, what is left is the arithmetic of softmaxes."""
    L, d = x.shape[2:]
    index = torch.arange(L, device=x.device)
    picked = (index * 3 + 1)[:, None] % d == torch.arange(d, device=x.device)
    return (picked * torch.exp2((index % 3 - 1).to(torch.float32))[:, None]).to(x.dtype).expand(len(x), 1, L, d)


def relation_of_rows(student, teacher, backend):
    """Q·Kᵀ, one head of one sequence per row."""
    s, t = _queries(student), _queries(teacher)
    options = {"temperature": 2.0, "reduction": "none", "backend": backend}
    return functional.relation_kl_loss([(s, _keys(s))], [(t, _keys(t))], **options)[0].sum((1, 2))


def eager_relation(student, teacher):
    pairs = ((x, _keys(x)) for x in (_queries(student), _queries(teacher)))
    return baselines.relation.eager(*pairs, temperature=2.0).sum((1, 2))


RELATION = Subject("relation", "pairs", _logits, relation_of_rows, eager_relation)

SUBJECTS = [
    *(_divergence(kind) for kind in ("forward_kl", "reverse_kl", "skew_kl", "jsd", "tvd", "soft_ce", "mse")),
    LAYER_COST,
    RELATION,
    *CONTRAST,
    *(_linear_divergence(kind) for kind in ("forward_kl", "jsd")),
]


def device_of(backend):
    return "cuda" if backend in ("triton", "cuda") and not backends.INTERPRETED else "cpu"


HERE = [
    pytest.param(
        subject, backend, id=f"{subject}-{backend}", marks=[pytest.mark.gpu] if device_of(backend) == "cuda" else []
    )
    for subject in SUBJECTS
    for backend in ("cpu", "triton", "cuda", "reference")
    if backend == "reference"
    or (backend in backends.WRITTEN[subject.stem] and (backend != "cpu" or backends.UNAVAILABLE["cpu"] is None))
]
on_every_backend = pytest.mark.parametrize(("subject", "backend"), HERE)
# What is plain PyTorch takes longer here than the kernels do.
the_reference_in_long = pytest.mark.parametrize(
    ("subject", "backend"),
    [
        pytest.param(*x.values, id=x.id, marks=[*x.marks, *[pytest.mark.long] * (x.values[1] == "reference")])
        for x in HERE
    ],
)


def inputs(subject, backend, *arguments, **options):
    return (x.to(device_of(backend)) for x in subject.inputs(*arguments, **options))


def run(subject, backend, student, teacher):
    return gradients(lambda s: subject.call(s, teacher, backend), student)


def oracle(subject, student, teacher):
    """The reference in float64, on the same quantised inputs."""
    return run(subject, "reference", student.double(), teacher.double())


def errors(subject, backend, student, teacher):
    loss, (grad,) = run(subject, backend, student, teacher)
    true_loss, (true_grad,) = oracle(subject, student, teacher)
    return relative_error(loss, true_loss), relative_error(grad, true_grad)


@on_every_backend
@pytest.mark.parametrize("width", AWKWARD_SIZES)
@pytest.mark.parametrize("rows", [1, 5])
def test_awkward_shapes(subject, backend, rows, width):
    student, teacher = inputs(subject, backend, width, torch.float32, rows, width)
    loss, (grad,) = run(subject, backend, student, teacher)
    true_loss, (true_grad,) = oracle(subject, student, teacher)
    # One class or two may leave a loss or gradient of exactly 0 in float64: compare with the size of the numbers involved.
    floor = 1e-6 * student.double().norm()
    assert (loss.double() - true_loss).norm() <= 2e-6 * true_loss.norm() + 1e-6
    assert (grad.double() - true_grad).norm() <= 1e-5 * true_grad.norm() + (floor if width <= 2 else 1e-7)


@on_every_backend
def test_float32_in_the_ordinary_range(subject, backend):
    student, teacher = inputs(subject, backend, 3, torch.float32, 16, 4099)
    loss_error, grad_error = errors(subject, backend, student, teacher)
    allowed_loss, allowed_grad = TOLERANCES[torch.float32]
    assert loss_error <= allowed_loss
    assert grad_error <= allowed_grad


@on_every_backend
def test_near_convergence(subject, backend):
    """Where distillation lives: student = teacher + 1e-3."""
    student, teacher = inputs(subject, backend, 4, torch.float32, 16, 32000, noise=1e-3)
    loss_error, grad_error = errors(subject, backend, student, teacher)
    assert loss_error <= 1e-5
    assert grad_error <= 1e-5


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_worse_than_eager(subject, backend, dtype):
    """RMS over seeds: 1.0x eager's error for the loss, 1.25x for the gradient plus one rounding of the output."""
    if backend == "triton" and backends.INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter truncates where it stores bfloat16")
    ours, eagers = [], []
    for seed in range(8):
        student, teacher = inputs(subject, backend, seed, dtype, 8, 1031)
        true_loss, (true_grad,) = oracle(subject, student, teacher)
        for found, call in ((ours, lambda s, t: subject.call(s, t, backend)), (eagers, subject.eager)):
            loss, (grad,) = gradients(lambda s, call=call, t=teacher: call(s, t).float(), student)
            found.append((relative_error(loss, true_loss), relative_error(grad, true_grad)))
    ours, eagers = (torch.tensor(x).square().mean(0).sqrt() for x in (ours, eagers))
    one_rounding = torch.finfo(dtype).eps / 2
    assert ours[0] <= eagers[0] + 1e-6
    assert ours[1] <= 1.25 * eagers[1] + one_rounding
    assert (ours <= 1e-2).all()


@on_every_backend
def test_two_runs_are_bitwise_equal(subject, backend):
    student, teacher = inputs(subject, backend, 5, torch.float32, 7, 1000)
    (first, (first_grad,)), (second, (second_grad,)) = (run(subject, backend, student, teacher) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first_grad, second_grad)


@on_every_backend
def test_nothing_returned_aliases_a_buffer(subject, backend):
    """Two results held at once, and two backwards through one graph, leave each other alone; inputs stay as they were."""
    student, teacher = inputs(subject, backend, 6, torch.float32, 4, 333)
    before = student.clone(), teacher.clone()
    leaf = student.clone().requires_grad_()
    loss = subject.call(leaf, teacher, backend)
    kept_loss = loss.detach().clone()
    (grad,) = torch.autograd.grad(loss.sum(), leaf, retain_graph=True)
    kept_grad = grad.clone()
    other, (other_grad,) = run(subject, backend, *inputs(subject, backend, 60, torch.float32, 4, 333))
    (again,) = torch.autograd.grad(loss.sum(), leaf)
    assert torch.equal(loss, kept_loss) and torch.equal(grad, kept_grad) and torch.equal(again, kept_grad)
    assert not torch.equal(other, loss) and not torch.equal(other_grad, grad)
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])


@on_every_backend
def test_strided_inputs(subject, backend):
    student, teacher = inputs(subject, backend, 7, torch.float32, 6, 257)
    wide = torch.full((6, 600), float("nan"), device=student.device)
    wide[:, 100:357] = student
    strided, turned = wide[:, 100:357], teacher.t().contiguous().t()
    assert not strided.is_contiguous() and not turned.is_contiguous()
    loss, (grad,) = run(subject, backend, student, teacher)
    other = strided.detach().requires_grad_()
    other_loss = subject.call(other, turned, backend)
    upstream = randn(*loss.shape, seed=7).to(loss) + 1.5
    (other_grad,) = torch.autograd.grad(other_loss, other, upstream)
    torch.testing.assert_close(other_loss, loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(other_grad, grad, rtol=1e-5, atol=1e-7)


@on_every_backend
def test_a_nan_row_poisons_only_itself(subject, backend):
    student, teacher = inputs(subject, backend, 8, torch.float32, 5, 100)
    clean, (clean_grad,) = run(subject, backend, student, teacher)
    student = student.clone()
    student[2, 17] = float("nan")
    loss, (grad,) = run(subject, backend, student, teacher)
    others = [0, 1, 3, 4]
    assert loss[2].isnan() and grad[2].isnan().any()
    assert torch.equal(loss[others], clean[others]) and torch.equal(grad[others], clean_grad[others])


@on_every_backend
def test_equal_student_and_teacher(subject, backend):
    _, teacher = inputs(subject, backend, 9, torch.float32, 5, 300)
    loss, (grad,) = run(subject, backend, teacher.clone(), teacher)
    if subject.stem == "contrast":
        assert loss.isfinite().all() and grad.isfinite().all()  # a query at its positive still has its negatives
    elif subject.variant == "soft_ce":
        assert (grad == 0).all()
    else:
        assert (loss == 0).all() and (grad == 0).all()


@on_every_backend
def test_mixed_dtypes(subject, backend):
    """A bfloat16 teacher beside a float32 student is the normal case; the gradient comes in the student's dtype."""
    student, teacher = inputs(subject, backend, 10, torch.float32, 5, 300)
    teacher = teacher.bfloat16()
    loss, (grad,) = run(subject, backend, student, teacher)
    true_loss, (true_grad,) = oracle(subject, student, teacher)
    assert loss.dtype == torch.float32 and grad.dtype == torch.float32
    assert relative_error(loss, true_loss) <= 1e-6 and relative_error(grad, true_grad) <= 1e-5


@the_reference_in_long
def test_compiled_equals_eager(subject, backend):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda s, t: subject.call(s, t, backend), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for rows, width in ((4, 65), (5, 130)):
        student, teacher = inputs(subject, backend, 11, torch.float32, rows, width)
        loss, (grad,) = run(subject, backend, student, teacher)
        other, (other_grad,) = gradients(lambda s, t=teacher: compiled(s, t), student)
        torch.testing.assert_close(other, loss, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(other_grad, grad, rtol=1e-5, atol=1e-7)
