"""gram in Triton for correlations of rows of Grams: the released code's grouping, and pearson="row" in tiled groups. Against
float64, on a GPU or in the interpreter (started by test_triton_interpreted.py)."""

import pytest
import torch
from test_gram_kernels import anisotropic
from test_triton_gram import (
    BFLOAT,
    DEVICE,
    FLOAT,
    HALF,
    INTERPRETED,
    MUTANTS,
    TILED,
    check,
    judge,
    loss,
    oracle,
    run,
    some_masked,
)

from cases import gradients, randn, relative_error
from fastkd.ops import gram as ops
from fastkd.reference.gram import gram as reference

pytestmark = [] if INTERPRETED else pytest.mark.gpu
OPTIONS = {"official": {"level": "sequence", "grouping": "official"}, "row": {"pearson": "row"}}
in_both = pytest.mark.parametrize("form", OPTIONS)
of_every_dtype = pytest.mark.parametrize("dtype", [FLOAT, HALF, BFLOAT], ids=str)


def states(form, seed, groups, rows, *widths_and_offset, dtype=FLOAT, **options):
    """A group's rows are tokens, and in the official grouping sequences."""
    shape = (rows, groups) if form == "official" else (groups, rows)
    return anisotropic(seed, *shape, *widths_and_offset, dtype=dtype, **options)


@of_every_dtype
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (17, 2, 7, 2), (3, 5, 33, 65), (5, 16, 64, 40), (4, 1, 9, 9)], ids=str)
def test_official_grouping(shape, dtype):
    """Fewer positions than sequences, more, and as many as make a value's rows end within a position."""
    for normalize in (True, False):
        student, teacher = states("official", 1, *shape, 0.3, dtype=dtype)
        check(student, teacher, normalize=normalize, **OPTIONS["official"])


@of_every_dtype
@in_both
def test_groups_of_several_tiles(form, dtype):
    for normalize in (True, False):
        student, teacher = states(form, 2, 2, TILED[dtype], 8, 12, 1.0, dtype=dtype)
        check(student, teacher, normalize=normalize, **OPTIONS[form])


@of_every_dtype
def test_per_row_under_a_mask(dtype):
    student, teacher = states("row", 3, 5, TILED[dtype], 20, 12, 1.0, dtype=dtype)
    check(student, teacher, mask=some_masked(5, TILED[dtype]), **OPTIONS["row"])


@pytest.mark.parametrize("types", [(FLOAT, BFLOAT), (BFLOAT, FLOAT), (HALF, FLOAT)], ids=str)
@in_both
def test_mixed_dtypes(form, types):
    student, teacher = states(form, 4, 3, 70 if form == "row" else 6, 24, 40, 1.0)
    check(student.to(types[0]), teacher.to(types[1]), **OPTIONS[form])


@pytest.mark.parametrize("rows", [4, 70])
def test_official_under_a_mask_is_the_references(rows):
    """The public function refuses a mask that hides anything. The op computes what the reference does: 3 positions with
    some valid rows, one of which has too few."""
    student, teacher = states("official", 5, 3, rows, 8, 9, 0.5)
    mask = torch.ones(rows, 3, dtype=torch.bool)
    mask[::3, 0], mask[1:-1, 1] = False, False
    leaf = student.to(DEVICE).requires_grad_()
    values, valid = ops.gram([leaf], [teacher.to(DEVICE)], mask.to(DEVICE), ("official",), False, True, 1e-6, "triton")
    upstream = randn(rows, seed=6).float().to(DEVICE)
    (grad,) = torch.autograd.grad(values[0], leaf, upstream)
    true_leaf = student.double().requires_grad_()
    true, true_valid = reference(true_leaf, teacher.double(), mask, "sequence", "official", "matrix", True, 1e-6)
    (true_grad,) = torch.autograd.grad(true, true_leaf, upstream.cpu().double())
    assert torch.equal(valid[0].cpu(), true_valid) and 0 < true_valid.sum() < rows
    assert relative_error(values[0].cpu(), true) <= 1e-6 and relative_error(grad.cpu(), true_grad) <= 1e-5
    assert (grad.cpu()[~mask] == 0).all()


@in_both
def test_a_mask_of_ones_changes_no_bit(form):
    student, teacher = states(form, 7, 3, TILED[FLOAT], 8, 9, 0.5)
    expected = run(student, teacher, **OPTIONS[form])
    found = run(student, teacher, mask=torch.ones(student.shape[:2]), **OPTIONS[form])
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("garbage", [1e30, float("nan")])
def test_what_padding_holds_does_not_matter(garbage):
    student, teacher = states("row", 8, 5, TILED[FLOAT], 8, 9, 0.5)
    mask = some_masked(5, TILED[FLOAT])
    value, grad = run(student, teacher, mask=mask, **OPTIONS["row"])
    dirty = (x.masked_fill(~mask[..., None], garbage) for x in (student, teacher))
    other, other_grad = run(*dirty, mask=mask, **OPTIONS["row"])
    assert torch.equal(value, other) and torch.equal(grad, other_grad)
    assert (grad[~mask] == 0).all() and (value[:3][mask[:3]] != 0).all() and (value[3:] == 0).all()


@in_both
def test_a_nan_reaches_all_that_is_computed_from_it(form):
    student, teacher = (
        states(form, 9, 3, TILED[FLOAT], 8, 9, 0.5) if form == "row" else anisotropic(9, 6, 12, 8, 9, 0.5)
    )
    clean, clean_grad = run(student, teacher, **OPTIONS[form])
    student[1, 4, 2] = float("nan")
    value, grad = run(student, teacher, **OPTIONS[form])
    true_value, true_grad = oracle(student, teacher, **OPTIONS[form])
    spared = ~true_value.isnan()
    assert spared.any() and not spared.all()
    assert torch.equal(value.isnan(), ~spared) and torch.equal(value[spared], clean[spared])
    untouched = ~true_grad.isnan().any(-1)
    assert untouched.any() and torch.equal(grad[untouched], clean_grad[untouched])


@pytest.mark.parametrize("offset", [10.0, 200.0])
@in_both
def test_outlier_dimensions(form, offset):
    """Three dimensions that all rows share: entries are 1 - 1e-4, and the means of positions differ by less."""
    student, teacher = states(form, 10, 4, TILED[FLOAT] if form == "row" else 33, 64, 96, offset, outliers=3)
    value, grad = run(student, teacher, **OPTIONS[form])
    eager_value, eager_grad = run(student, teacher, "eager", **OPTIONS[form])
    true_value, true_grad = oracle(student, teacher, **OPTIONS[form])
    assert (value - true_value).abs().max() <= 1e-6
    assert relative_error(value, true_value) <= relative_error(eager_value, true_value) + 1e-7
    assert relative_error(grad, true_grad) <= min(1e-5, relative_error(eager_grad, true_grad))


@in_both
def test_near_convergence(form):
    teacher = states(form, 11, 5, TILED[FLOAT] if form == "row" else 24, 48, 48, 2.0)[0]
    student = (teacher + 1e-3 * randn(*teacher.shape, seed=5)).float()
    value, grad = run(student, teacher, **OPTIONS[form])
    _, eager_grad = run(student, teacher, "eager", **OPTIONS[form])
    true_value, true_grad = oracle(student, teacher, **OPTIONS[form])
    assert (value - true_value).abs().max() <= 1e-6
    assert relative_error(grad, true_grad) <= relative_error(eager_grad, true_grad)


@pytest.mark.parametrize("offset", [0.0, 3.0])
@in_both
def test_half_precision_is_as_good_as_float32_arithmetic(form, offset):
    """RMS over seeds: the loss within twice float32 eager's error, the gradient within 1e-2."""
    dtype, ours, full = HALF if INTERPRETED else BFLOAT, [], []
    for seed in range(3 if INTERPRETED else 8):
        rows = TILED[dtype] if form == "row" else 40
        student, teacher = states(form, 20 * seed, 2, rows, 64, 96, offset, dtype=dtype)
        true_value, true_grad = oracle(student, teacher, **OPTIONS[form])
        found = run(student, teacher, **OPTIONS[form])
        eager = run(student.float(), teacher.float(), "eager", **OPTIONS[form])
        for errors_of, (value, grad) in ((ours, found), (full, eager)):
            errors_of.append((relative_error(value, true_value), relative_error(grad, true_grad)))
    ours, full = (torch.tensor(x).square().mean(0).sqrt() for x in (ours, full))
    assert ours[0] <= 2 * full[0] + 1e-7 and ours[1] <= 1e-2


@in_both
def test_weights_made_in_parts(form, monkeypatch):
    """As many groups as fit into the budget at a time, or as many rows of one group, which are half the tiles then."""
    from fastkd.kernels.gram import tiled

    student, teacher = states(form, 12, 3, 2 * TILED[FLOAT], 8, 12, 1.0)
    value, grad = run(student, teacher, **OPTIONS[form])
    for budget in (2 * 192 * 144 * 4, 64 * 144 * 4):  # two groups of three; 64 rows of one
        monkeypatch.setattr(tiled, "BUDGET", budget)
        made = run(student, teacher, **OPTIONS[form])
        assert torch.equal(made[0], value) and relative_error(made[1], grad) <= 1e-6


@in_both
def test_pairs_of_several_kinds(form):
    """In one call, and together with another level."""
    rows = TILED[FLOAT] if form == "row" else 6
    kinds = [(20, 12, FLOAT, FLOAT), (20, 12, FLOAT, HALF), (20, 12, FLOAT, FLOAT)]
    students, teachers = [], []
    for k, (ds, dt, of_s, of_t) in enumerate(kinds):
        s, t = anisotropic(20 + k, rows, 2, ds, dt, 1.0)
        students.append(s.to(of_s).to(DEVICE))
        teachers.append(t.to(of_t).to(DEVICE))
    options = OPTIONS[form] | {"level": {"token": 0.3, "sequence": 2.0}}
    found = gradients(lambda *s: loss(s, teachers, **options), *students)
    doubles = [t.double() for t in teachers]
    true = gradients(lambda *s: loss(s, doubles, "reference", **options), *(s.double() for s in students))
    assert relative_error(found[0], true[0]) <= 1e-6
    assert all(relative_error(x, y) <= 1e-5 for x, y in zip(found[1], true[1], strict=True))


@in_both
def test_strides_change_no_bit(form):
    student, teacher = states(form, 13, 3, TILED[FLOAT], 8, 9, 0.5)
    expected = run(student, teacher, **OPTIONS[form])
    wide = torch.full((*student.shape[:2], 40), float("nan"))
    wide[..., 5:13] = student
    for other in (wide[..., 5:13], student.transpose(0, 1).contiguous().transpose(0, 1)):
        value, grad = run(other, teacher, **OPTIONS[form])
        assert torch.equal(value, expected[0]) and torch.equal(grad, expected[1])


@in_both
def test_compiled_equals_eager(form):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda s, t: loss(s, t, reduction="none", **OPTIONS[form]), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for groups, rows in ((3, 5), (2, 6)):
        rows += 64 * (form == "row")
        student, teacher = (x.to(DEVICE) for x in states(form, 14, groups, rows, 20, 12, 1.0))
        value, (grad,) = gradients(lambda s, t=teacher: loss(s, t, reduction="none", **OPTIONS[form]), student)
        other, (other_grad,) = gradients(lambda s, t=teacher: compiled(s, t), student)
        assert torch.equal(value, other) and torch.equal(grad, other_grad)


@in_both
def test_opcheck(form):
    rows = 70 if form == "row" else 4
    sides = [[x.to(DEVICE) for x in anisotropic(19 + k, rows, 2, 5, 6, 1.0)] for k in range(2)]
    students, teachers = ([side[k] for side in sides] for k in (0, 1))
    options = ([0, 2] if form == "official" else [1], form == "row", True, 1e-6)
    args = (students, teachers, None, *options, True)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fastkd.gram_fwd_triton, args, test_utils=checks)
    values, _, saved = torch.ops.fastkd.gram_fwd_triton(*args)
    assert len(saved) == 2
    backward = ([torch.rand_like(x) for x in values], students, teachers, None, saved, *options)
    torch.library.opcheck(torch.ops.fastkd.gram_bwd_triton, backward, test_utils=checks)


def one_tile_dropped(x):
    return x.index_fill(1, torch.arange(3, 5, device=x.device), 0) if x.dim() > 1 else x * 1.01


@pytest.fixture(scope="module")
def in_the_ordinary_range():
    """What a kernel finds and what is true, for each form: [value, gradient]."""
    sides = {"official": anisotropic(21, 4, 6, 20, 12, 0.0), "row": anisotropic(21, 2, TILED[FLOAT], 20, 12, 0.0)}
    return {form: (run(*x, **OPTIONS[form]), oracle(*x, **OPTIONS[form])) for form, x in sides.items()}


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("mutant", MUTANTS)
@in_both
def test_no_mutant_survives(form, mutant, where, in_the_ordinary_range):
    found, true = in_the_ordinary_range[form]
    judge(found, true, FLOAT)
    how = (MUTANTS | {"one tile dropped": one_tile_dropped})[mutant]
    with pytest.raises(AssertionError):
        judge(
            [how(x) if name == where else x for x, name in zip(found, ("loss", "gradient"), strict=True)], true, FLOAT
        )
