"""What tests/ops/test_kernels.py tests of each stem: inputs, a call, and eager PyTorch; and on which backends here."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fastkd.bench import baselines

from cases import gradients, randn, relative_error
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
    """Each row is a layer; the costs are the diagonal of the matrix of all pairs."""
    students, teachers = ([row[None, None] for row in x] for x in (student, teacher))
    return functional.layer_costs(students, teachers, backend=backend).diagonal()


LAYER_COST = Subject("layer_cost", "rows", _logits, layer_costs_of_rows, lambda s, t: (s - t).square().mean(-1))


def _contrast_inputs(seed, dtype, rows, width, noise=None):
    """Queries (student) near their positives (teacher) on a sphere of 3 to 300 dimensions; all share one bank."""
    width = min(max(width, 3), 300)
    teacher = F.normalize(randn(rows, width, seed=seed), dim=1)
    student = teacher + (0.5 if noise is None else noise) * F.normalize(randn(rows, width, seed=seed + 1), dim=1)
    return student.to(dtype), teacher.to(dtype)


# Made once, since Dynamo does not trace generators.
BANK = randn(301, 300, seed=99)
INDEX = torch.randint(301, (64, 65), generator=torch.Generator().manual_seed(5))


def _bank_of(teacher):
    """[301, D]; a bank is float32 whatever the dtype of the batch."""
    bank = F.normalize(BANK[:, : teacher.shape[1]], dim=1).float().to(teacher.device)
    return bank.double() if teacher.dtype == torch.float64 else bank


def _index_of(teacher):
    return INDEX[: teacher.shape[0]].to(teacher.device)


def _with_own_rows(teacher):
    """A bank that begins with the teacher's rows, and an index with these in its first column."""
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
    """One coordinate per token, times a power of two: both products are exact, so that only the arithmetic of rows has errors."""
    index = torch.arange(width, device=device)
    head = torch.zeros(width, width, dtype=dtype, device=device)
    head[index, (index * 3 + 1) % width if width % 3 else index] = 0.5
    return head


def _in_rows(x):
    """Wide rows cut into pieces, since a head of 32000 x 32000 would not fit."""
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


def _pieces(rows, d):
    """[rows, width] -> [rows, pieces, d], padded with zeros."""
    return F.pad(rows, (0, -rows.shape[1] % d)).unflatten(1, (-1, d))


def _queries(rows):
    """[rows, width] -> [rows, 1, L, d]: each query is a piece of a row."""
    return _pieces(rows, 8 if rows.shape[1] < 5000 else 128)[:, None]


def _keys(x):
    """One coordinate per key, times a power of two: scores are exact, so that only the softmaxes have errors."""
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


def _gram(level, d):
    """Each row is a group: pieces of d columns are its tokens, or the sequences at a position."""

    def call(student, teacher, backend=None):
        sides = [_pieces(x, d if x.shape[1] < 2000 else 128) for x in (student, teacher)]
        sides = [x.transpose(0, 1) if level == "sequence" else x for x in sides]
        if backend is None:
            return baselines.gram.eager(*sides, level)
        return functional.gram_correlation_loss(*sides, level=level, reduction="none", backend=backend)

    return Subject("gram", level, _logits, call, call)


def _costs(student, teacher):
    """[rows, 6, 6]: each row is six points per side, whose mean squared distances are the costs."""
    sides = (_pieces(x, -(-x.shape[1] // 6)) for x in (student, teacher))
    s, t = (F.pad(x, (0, 0, 0, 6 - x.shape[1])) for x in sides)
    return (s[:, :, None] - t[:, None]).square().mean(-1)


def transport_of_rows(student, teacher, backend):
    sides = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (student, teacher))
    return functional.transport(_costs(*sides), backend=backend).value


def eager_transport(student, teacher):
    """PyTorch has no solver: eager are the costs."""
    return functional.transport(_costs(student, teacher), backend="reference").value


SUBJECTS = [
    *(_divergence(kind) for kind in ("forward_kl", "reverse_kl", "skew_kl", "jsd", "tvd", "soft_ce", "mse")),
    LAYER_COST,
    RELATION,
    _gram("token", 8),
    _gram("sequence", 4),
    Subject("transport", "points", _logits, transport_of_rows, eager_transport),
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
# The reference is plain PyTorch, which takes longer than the kernels.
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
