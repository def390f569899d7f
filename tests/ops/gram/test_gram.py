"""gram: correlation of self-similarity matrices, held against explicit loops, the authors' numbers and its own laws."""

import itertools

import numpy as np
import pytest
import torch

from cases import GOLDENS, det, gradients, randn, relative_error
from fastkd import backends, checks, functional
from fastkd.ops import gram as ops
from fastkd.reference.gram import gram

SHAPES = [(4, 7, 12, 20), (2, 5, 6, 6), (3, 9, 16, 8)]
# level, grouping, pearson
KINDS = [
    ("token", "position", "matrix"),
    ("token", "position", "row"),
    ("sequence", "position", "matrix"),
    ("sequence", "position", "row"),
    ("sequence", "official", "matrix"),
]
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]], dtype=torch.bool)


# Kernels are for float32 and below.
# (On a GPU, Triton's are tests/ops/gram/test_triton_gram.py's.)
KERNELS = [b for b in ops.KERNELS if b == "cpu" or backends.INTERPRETED]
HERE = ["reference", *KERNELS]
EVERY_KIND = [(backend, *kind) for backend in HERE for kind in KINDS]
on_every_backend = pytest.mark.parametrize("backend", HERE)
on_every_kind = pytest.mark.parametrize(("backend", "level", "grouping", "pearson"), EVERY_KIND)


def loss(student, teacher, backend="reference", **options):
    if backend != "reference":
        student, teacher = (x.float() if x.dtype == torch.float64 else x for x in (student, teacher))
    return functional.gram_correlation_loss(student, teacher, backend=backend, **options)


def close(backend, factor=1.0):
    """Relative tolerance: of float64 in the reference, of float32 in a kernel."""
    return factor * (1e-12 if backend == "reference" else 1e-6)


def values_and_valid(backend, student, teacher, mask, level, pearson="matrix"):
    if backend == "reference":
        return gram(student, teacher, mask, level, "position", pearson, True, 1e-6)
    row = pearson == "row"
    values, valid = ops.gram([student.float()], [teacher.float()], mask, (level,), row, True, 1e-6, backend)
    return values[0], valid[0]


def brute_force(student, teacher, keep, level, grouping, pearson, normalize):
    """numpy's corrcoef over lists of dot products, gathered one at a time: [mean over the groups that count]."""
    s, t, keep = student.numpy(), teacher.numpy(), keep.numpy()
    if normalize:
        s, t = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (s, t))
    if level == "sequence":
        s, t, keep = s.swapaxes(0, 1), t.swapaxes(0, 1), keep.swapaxes(0, 1)
    lists = []
    for group in range(len(s)):
        rows = np.flatnonzero(keep[group])
        if not keep.all() and len(rows) < {"token": 2, "sequence": 3}[level]:
            continue
        entries = [[(s[group, i] @ s[group, j], t[group, i] @ t[group, j]) for j in rows] for i in rows]
        lists += entries if pearson == "row" else [list(itertools.chain(*entries))]
    if grouping == "official":
        flat = list(itertools.chain(*lists))
        size = len(flat) // s.shape[1]
        lists = [flat[k : k + size] for k in range(0, len(flat), size)]
    return np.mean([1 - np.corrcoef(np.array(pairs).T)[0, 1] for pairs in lists])


@on_every_backend
@pytest.mark.parametrize("shape", SHAPES)
def test_the_authors_numbers(shape, backend):
    B, N, Ds, Dt = shape
    golden = GOLDENS[f"fcd_B{B}_N{N}_Ds{Ds}_Dt{Dt}"]
    student, teacher = det((B, N, Ds), 1).requires_grad_(), det((B, N, Dt), 2)
    token = loss(student, teacher, backend, level="token")
    official = loss(student, teacher, backend, level="sequence", grouping="official")
    position = loss(student, teacher, backend, level="sequence", grouping="position")
    near = close(backend)
    assert token.item() == pytest.approx(golden["token"], abs=near)
    assert official.item() == pytest.approx(golden["seq_official_viewB"], abs=near)
    assert position.item() == pytest.approx(golden["seq_viewN"], abs=near)
    (grad,) = torch.autograd.grad(token + official, student)
    assert grad.abs().sum().item() == pytest.approx(golden["grad_l1"], abs=near)
    assert grad[0, 0, 0].item() == pytest.approx(golden["grad_000"], abs=near)
    assert grad[-1, -1, -1].item() == pytest.approx(golden["grad_last"], abs=near)


@pytest.mark.parametrize("normalize", [True, False])
@on_every_kind
def test_against_corrcoef_in_loops(backend, level, grouping, pearson, normalize):
    student, teacher = randn(4, 6, 5, seed=1), randn(4, 6, 3, seed=2)
    options = {"level": level, "grouping": grouping, "pearson": pearson, "normalize": normalize}
    masks = [torch.ones(4, 6, dtype=torch.bool)] + ([MASK] if grouping == "position" else [])
    for mask in masks:
        value = loss(student, teacher, backend, mask=mask, eps=1e-30, **options)
        expected = brute_force(student, teacher, mask, **options)
        assert value.item() == pytest.approx(expected, rel=close(backend))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("level", "grouping", "pearson"), KINDS)
def test_gradcheck(level, grouping, pearson, normalize):
    student, teacher = randn(4, 6, 3, seed=3).requires_grad_(), randn(4, 6, 2, seed=4)
    for mask in [None] + ([MASK] if grouping == "position" else []):

        def values(x, mask=mask):
            return gram(x, teacher, mask, level, grouping, pearson, normalize, 1e-6)[0]

        assert torch.autograd.gradcheck(values, student)
    if (level, pearson, normalize) == ("token", "matrix", True):
        assert torch.autograd.gradgradcheck(values, student)


@on_every_kind
def test_a_mask_of_ones_changes_no_bit(backend, level, grouping, pearson):
    inputs = randn(4, 6, 5, seed=1), randn(4, 6, 3, seed=2)
    options = {"level": level, "grouping": grouping, "pearson": pearson}
    without = gradients(lambda s: loss(s, inputs[1], backend, **options), inputs[0])
    for dtype in (torch.bool, torch.int64, torch.float32):
        mask = torch.ones(4, 6, dtype=dtype)
        with_mask = gradients(lambda s, mask=mask: loss(s, inputs[1], backend, mask=mask, **options), inputs[0])
        assert torch.equal(without[0], with_mask[0])
        assert torch.equal(without[1][0], with_mask[1][0])


@pytest.mark.parametrize("shape", [(1, 5), (2, 5), (3, 5), (2, 1)], ids=str)
@on_every_backend
def test_a_mask_of_ones_is_no_mask_in_the_official_grouping(backend, shape):
    """Of one or two sequences too: without a mask no group is too small."""
    student, teacher = randn(*shape, 8, seed=1), randn(*shape, 6, seed=2)
    for level in ("token", "sequence", {"token": 1.0, "sequence": 0.5}):
        options = {"level": level, "grouping": "official"}
        without = gradients(lambda s, o=options: loss(s, teacher, backend, **o), student)
        found = gradients(lambda s, o=options: loss(s, teacher, backend, mask=torch.ones(shape), **o), student)
        assert without[0] > 0
        assert torch.equal(without[0], found[0]) and torch.equal(without[1][0], found[1][0])


@on_every_backend
def test_without_synchronising_a_mask_that_hides_tokens_gives_nan(backend, monkeypatch):
    """As on a GPU, where looking would synchronise."""
    monkeypatch.setattr(checks, "looks_are_free", lambda x: False)
    student, teacher = randn(4, 6, 5, seed=1), randn(4, 6, 3, seed=2)
    options = {"level": "sequence", "grouping": "official"}
    value, (grad,) = gradients(lambda s: loss(s, teacher, backend, mask=MASK, **options), student)
    assert value.isnan() and grad.isnan().all()
    without = gradients(lambda s: loss(s, teacher, backend, **options), student)
    found = gradients(lambda s: loss(s, teacher, backend, mask=torch.ones(4, 6), **options), student)
    assert torch.equal(without[0], found[0]) and torch.equal(without[1][0], found[1][0])


@on_every_kind
def test_relations_are_invariant_to_order_rotation_and_scale(backend, level, grouping, pearson):
    student, teacher = randn(4, 6, 5, seed=1), randn(4, 6, 3, seed=2)
    options = {"level": level, "grouping": grouping, "pearson": pearson}
    expected = loss(student, teacher, backend, **options)
    rotation = torch.linalg.qr(randn(5, 5, seed=5))[0]
    for scale in (3.5, 1e-9):
        assert relative_error(loss(scale * student @ rotation, teacher, backend, **options), expected) < close(backend)
    if grouping == "official":
        return  # its groups straddle positions, so that order matters
    tokens, sequences = torch.randperm(6), torch.randperm(4)
    shuffled = (x[sequences][:, tokens] for x in (student, teacher))
    assert relative_error(loss(*shuffled, backend, **options), expected) < close(backend)


@on_every_kind
def test_a_student_equal_to_its_teacher(backend, level, grouping, pearson):
    x = randn(4, 6, 5, seed=1)
    options = {"level": level, "grouping": grouping, "pearson": pearson}
    value, (grad,) = gradients(lambda s: loss(s, x, backend, **options), x)
    assert 0 < value < 1e-5  # eps / (ab + eps)
    assert grad.abs().max() < 1e-4
    value, (grad,) = gradients(lambda s: loss(s, x, backend, eps=1e-30, **options), x)
    nothing = 1e-14 if backend == "reference" else 1e-6
    assert value.abs() < nothing
    assert grad.abs().max() < nothing


@pytest.mark.parametrize("garbage", [1e30, float("nan"), float("inf")])
@pytest.mark.parametrize("pearson", ["matrix", "row"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@on_every_backend
def test_what_padding_holds_does_not_matter(backend, level, pearson, garbage):
    student, teacher = randn(4, 6, 5, seed=1), randn(4, 6, 3, seed=2)
    options = {"level": level, "pearson": pearson, "mask": MASK}
    value, (grad,) = gradients(lambda s: loss(s, teacher, backend, **options), student)
    dirty = (x.masked_fill(~MASK[..., None], garbage) for x in (student, teacher))
    dirty_student, dirty_teacher = dirty
    dirty_value, (dirty_grad,) = gradients(lambda s: loss(s, dirty_teacher, backend, **options), dirty_student)
    assert torch.equal(value, dirty_value)
    assert torch.equal(grad, dirty_grad)
    assert (grad[~MASK] == 0).all()
    assert (grad[2] != 0).any()


@on_every_backend
def test_a_padded_sequence_is_the_shorter_sequence(backend):
    student, teacher = randn(1, 6, 5, seed=1), randn(1, 6, 3, seed=2)
    for pearson, kept in itertools.product(("matrix", "row"), (slice(0, 4), slice(2, 6))):
        mask = torch.zeros(1, 6, dtype=torch.bool)
        mask[:, kept] = True
        padded = loss(student, teacher, backend, mask=mask, pearson=pearson)
        shorter = loss(student[:, kept], teacher[:, kept], backend, pearson=pearson)
        assert relative_error(padded, shorter) < close(backend, 0.1)


@pytest.mark.parametrize(("level", "enough"), [("token", 2), ("sequence", 3)])
@on_every_backend
def test_a_group_with_too_few_valid_rows_is_not_in_the_mean(backend, level, enough):
    student, teacher = randn(5, 5, 4, seed=1), randn(5, 5, 3, seed=2)
    mask = torch.ones(5, 5, dtype=torch.bool)
    groups = mask if level == "token" else mask.T
    groups[1, enough - 1 :] = False
    groups[2, enough:] = False
    values, valid = values_and_valid(backend, student, teacher, mask, level)
    assert valid.tolist() == [True, False, True, True, True]
    assert values[1] == 0
    assert loss(student, teacher, backend, level=level, mask=mask).item() == pytest.approx(values[valid].mean().item())
    rows, valid_rows = values_and_valid(backend, student, teacher, mask, level, "row")
    assert valid_rows.sum() == 15 + enough
    assert (rows[~valid_rows] == 0).all()


HAZARDS = {
    "a constant Gram": lambda x: x[:1, :1].expand_as(x),
    "one sequence": lambda x: x[:1],
    "one token": lambda x: x[:, :1],
    "a zero row": lambda x: torch.cat([x[:, :1] * 0, x[:, 1:]], 1),
    "nothing but zeros": lambda x: x * 0,
    "a huge scale": lambda x: x * 1e15,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("hazard", HAZARDS)
@on_every_kind
def test_hazards_stay_finite(backend, level, grouping, pearson, hazard, dtype):
    if backend != "reference" and dtype == torch.float64:
        pytest.skip("kernels do not take float64")
    student, teacher = randn(4, 6, 5, seed=1), randn(4, 6, 3, seed=2)
    teachers = [HAZARDS[hazard](teacher)] + ([teacher] if teacher.shape == HAZARDS[hazard](teacher).shape else [])
    for other in teachers:
        options = {"level": level, "grouping": grouping, "pearson": pearson}
        value, (grad,) = gradients(
            lambda s, t=other, o=options: loss(s, t.to(dtype), backend, **o), HAZARDS[hazard](student).to(dtype)
        )
        assert value.isfinite() and grad.isfinite().all()
        assert -1e-6 <= value <= 2


@on_every_backend
def test_one_sequence_has_sequence_loss_one_and_no_gradient(backend):
    value, (grad,) = gradients(lambda s: loss(s, randn(1, 6, 3), backend, level="sequence"), randn(1, 6, 5))
    assert value == 1 and (grad == 0).all()


@pytest.mark.parametrize("level", ["token", "sequence"])
@on_every_backend
def test_nothing_valid_is_zero_with_a_graph(backend, level):
    student = torch.full((3, 4, 5), float("nan"))
    value, (grad,) = gradients(lambda s: loss(s, student, backend, level=level, mask=torch.zeros(3, 4)), student)
    assert value == 0 and (grad == 0).all()


@pytest.mark.parametrize(("level", "axis"), [("token", 0), ("sequence", 1)])
@on_every_backend
def test_a_nan_row_poisons_only_its_group(backend, level, axis):
    student, teacher = randn(4, 6, 5, seed=1), randn(4, 6, 3, seed=2)
    options = {"level": level, "reduction": "none"}
    clean, (clean_grad,) = gradients(lambda s: loss(s, teacher, backend, **options), student)
    student[2, 2] = float("nan")
    values, (grad,) = gradients(lambda s: loss(s, teacher, backend, **options), student)
    others = torch.arange(student.shape[axis]) != 2
    assert values[2].isnan() and torch.equal(values[others], clean[others])
    grad, clean_grad = (x.transpose(0, axis) for x in (grad, clean_grad))
    assert grad[2].isnan().any() and torch.equal(grad[others], clean_grad[others])


@pytest.mark.parametrize("level", ["token", "sequence"])
@on_every_backend
def test_float32_near_convergence_on_anisotropic_features(backend, level):
    """Cosines around 0.95 and student = teacher + 1e-3: where moments that are not centred lose 1 - rho."""
    teacher = (randn(6, 16, 64, seed=1) + 4 * randn(64, seed=2)).float()
    student = (teacher + 1e-3 * randn(6, 16, 64, seed=3)).float()

    def raw_moments(s, t):
        a, b = (torch.nn.functional.normalize(x if level == "token" else x.transpose(0, 1), dim=-1) for x in (s, t))
        a, b = (a @ a.mT).flatten(1), (b @ b.mT).flatten(1)
        covariance, *variances = ((x * y).mean(1) - x.mean(1) * y.mean(1) for x, y in ((a, b), (a, a), (b, b)))
        return (1 - covariance / (variances[0] * variances[1]).sqrt()).mean()

    oracle, (oracle_grad,) = gradients(lambda s: loss(s, teacher.double(), level=level), student.double())
    value, (grad,) = gradients(lambda s: loss(s, teacher, backend, level=level), student)
    _, (raw_grad,) = gradients(lambda s: raw_moments(s, teacher), student)
    assert abs(value.item() - oracle.item()) < 1e-7
    assert relative_error(grad, oracle_grad) < 0.1 * relative_error(raw_grad, oracle_grad)


@on_every_backend
def test_dtypes_and_strides(backend):
    student, teacher = randn(3, 5, 24, seed=1, dtype=torch.bfloat16), randn(3, 5, 9, seed=2)
    for s, t in itertools.product((student, student.half(), student.float()), (teacher.bfloat16(), teacher.half())):
        value, (grad,) = gradients(lambda x, t=t: loss(x, t, backend), s)
        exact, (exact_grad,) = gradients(lambda x, t=t: loss(x, t.double()), s.double())
        assert value.dtype == torch.float32 and grad.dtype == s.dtype
        assert relative_error(value, exact) < 1e-6
        assert relative_error(grad, exact_grad) < (1e-5 if s.dtype == torch.float32 else 1e-2)
    for level in ("token", "sequence"):
        strided = student.float().transpose(0, 2).contiguous().transpose(0, 2)
        turned = student.float().transpose(0, 1).contiguous().transpose(0, 1)
        expected, (expected_grad,) = gradients(lambda s, o=level: loss(s, teacher, backend, level=o), student.float())
        for other in (strided, turned, student.float().repeat(1, 1, 2)[..., 24:]):
            value, (grad,) = gradients(lambda s, o=level: loss(s, teacher, backend, level=o), other)
            assert torch.equal(value, expected) and torch.equal(grad, expected_grad)


def test_invalid_arguments_are_errors():
    x = randn(3, 5, 8)
    with pytest.raises(ValueError, match="grouping"):
        loss(x, x, grouping="rows")
    with pytest.raises(ValueError, match="no defined meaning"):
        loss(x, x, level="sequence", grouping="official", mask=torch.tensor([[1, 1, 1, 1, 0]] * 3))
    with pytest.raises(ValueError, match="mask"):
        loss(x, x, mask=torch.ones(5, 3))
    with pytest.raises(ValueError, match="agree in their first 2 axes"):
        loss(x, randn(3, 6, 8))
    with pytest.raises(ValueError, match="requires grad"):
        loss(x, x.clone().requires_grad_())
