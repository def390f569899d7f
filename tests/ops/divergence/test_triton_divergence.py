"""divergence in Triton against float64: on a GPU where there is one, else in the interpreter (test_triton_interpreted.py starts it)."""

from functools import partial

import pytest
import torch
from fastkd.bench import baselines

from cases import randn, relative_error
from fastkd import backends
from fastkd.checks import KINDS
from fastkd.functional import TopK, divergence

INTERPRETED = backends.INTERPRETED
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else pytest.mark.gpu
every_kind = pytest.mark.parametrize("kind", KINDS)
FLOAT32 = (1e-6, 1e-5)  # of the loss, of the gradient: DESIGN's ordinary range


def logits(rows, width, seed=0, noise=None, scale=3.0, dtype=torch.float32, teacher_dtype=None):
    teacher = randn(rows, width, seed=seed, scale=scale)
    student = randn(rows, width, seed=seed + 1, scale=scale)
    if noise is not None:
        student = teacher + noise * student / scale
    return student.to(DEVICE, dtype), teacher.to(DEVICE, teacher_dtype or dtype)


def rows_of(kind, teacher, backend, temperature=2.0, **options):
    options = {"beta": 0.3, "reduction": "none"} | options
    return lambda student: divergence(student, teacher, kind=kind, temperature=temperature, backend=backend, **options)


def both(kind, student, teacher, temperature=2.0, **options):
    """(loss, gradient) of the kernel, and of the reference in float64 on the same numbers, for one random upstream."""
    loss, (grad,) = gradients_on_device(rows_of(kind, teacher, "triton", temperature, **options), student)
    true = gradients_on_device(rows_of(kind, teacher.double(), "reference", temperature, **options), student.double())
    assert loss.dtype == torch.float32 and grad.dtype == student.dtype
    return loss, grad, true[0], true[1][0]


def gradients_on_device(function, student):
    leaf = student.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss = function(leaf)
    upstream = (randn(*loss.shape, seed=7) + 1.5).to(loss)
    return loss.detach(), torch.autograd.grad(loss, [leaf], upstream)


def check(kind, student, teacher, allowed=FLOAT32, **options):
    loss, grad, true_loss, true_grad = both(kind, student, teacher, **options)
    assert relative_error(loss, true_loss) <= allowed[0]
    assert relative_error(grad, true_grad) <= allowed[1]


# -- sizes and dtypes --------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("width", [1, 2, 7, 33, 129, 1024, 1025])
def test_awkward_widths(kind, width):
    student, teacher = logits(3, width, seed=width)
    loss, grad, true_loss, true_grad = both(kind, student, teacher)
    # One word or two may leave a gradient of exactly 0 in float64: compare with the size of the numbers involved.
    floor = 1e-6 * student.double().norm() if width <= 2 else 1e-7
    assert (loss - true_loss).norm() <= 1e-6 * true_loss.norm() + 1e-7
    assert (grad - true_grad).norm() <= 1e-5 * true_grad.norm() + floor


@every_kind
@pytest.mark.parametrize(("rows", "width"), [(9, 2049), (2, 4096), (2, 6150)])
def test_rows_of_several_blocks_beginning_at_any_element(kind, rows, width):
    check(kind, *logits(rows, width, seed=3))


@every_kind
def test_mixed_dtypes_and_strides(kind):
    """Student and teacher begin at different elements of 16 bytes; the teacher's dtype is its own."""
    student, teacher = logits(3, 2100, seed=4, teacher_dtype=torch.bfloat16)
    wide = torch.full((3, 4001), float("nan"), device=DEVICE)
    wide[:, 3:2103] = student
    check(kind, wide[:, 3:2103], teacher)
    check(kind, student[:, :7], teacher.t().contiguous().t()[:, :7])


@every_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_no_worse_than_eager(kind, dtype):
    """RMS over seeds: 1.0x eager's error for the loss, 1.25x for the gradient plus one rounding of the output."""
    ours, eagers = [], []
    for seed in range(2 if INTERPRETED else 8):
        student, teacher = logits(4, 515, seed=seed, dtype=dtype)
        loss, grad, true_loss, true_grad = both(kind, student, teacher, beta=0.5)
        ours.append((relative_error(loss, true_loss), relative_error(grad, true_grad)))
        call = partial(baselines.divergence.eager, teacher=teacher, kind=kind, temperature=2.0)
        eager = gradients_on_device(lambda s, call=call: call(s).float(), student)
        eagers.append((relative_error(eager[0], true_loss), relative_error(eager[1][0], true_grad)))
    ours, eagers = (torch.tensor(x).square().mean(0).sqrt() for x in (ours, eagers))
    # The interpreter's bfloat16 stores truncate: a whole unit of the last place instead of half.
    one_rounding = torch.finfo(dtype).eps / (1 if INTERPRETED and dtype == torch.bfloat16 else 2)
    assert ours[0] <= eagers[0] + 1e-6
    assert ours[1] <= 1.25 * eagers[1] + one_rounding
    assert (ours <= 1e-2).all()


# -- digits ------------------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("temperature", [1.0, 15.0])
def test_near_convergence(kind, temperature):
    student, teacher = logits(3, 3001, seed=5, noise=1e-3)
    check(kind, student, teacher, (1e-5, 1e-5), temperature=temperature)


@every_kind
@pytest.mark.parametrize("offset", [0.0, 7.3])
def test_near_convergence_of_a_sure_teacher(kind, offset):
    """One word has nearly all the mass, and it is not in the first block; the student has an offset of its own."""
    student, teacher = logits(2, 4500, seed=6, noise=1e-3)
    teacher[:, 4321] += 20
    student[:, 4321] += 20
    student += offset  # rounds the student: the oracle sees the rounded one
    allowed = 1e-5
    if kind == "soft_ce":  # no divergence: it tends to the entropy, whose digits float32 sums of 1.0001 limit
        eager = baselines.divergence.eager(student, teacher, kind, 1.0)
        true = baselines.divergence.eager(student.double(), teacher.double(), kind, 1.0)
        allowed = relative_error(eager, true)
    check(kind, student, teacher, (allowed, 1e-5), temperature=1.0)


@every_kind
@pytest.mark.parametrize("where", ["later", "never", "student", "teacher"])
def test_a_first_block_unlike_the_rest_of_the_row(kind, where):
    """Reference points guessed from the first block let exponentials overflow, or vanish: the row is done again."""
    student, teacher = logits(2, 5000, seed=7)
    if where == "never":
        student[:, :2100] = teacher[:, :2100] = -torch.inf
        student[:, 2100:] -= 400
        teacher[:, 2100:] -= 300
    else:
        student[:, 4000:] += 200 if where != "teacher" else 0
        teacher[:, 4000:] += 200 if where != "student" else 0
    loss, grad, true_loss, true_grad = both(kind, student, teacher, temperature=1.0)
    assert relative_error(loss, true_loss) <= 1e-6
    # Where student and teacher have no word in common, gradients of the mixed kinds vanish into differences of ones.
    assert (grad - true_grad).norm() <= 1e-5 * true_grad.norm() + (
        0 if kind in ("forward_kl", "soft_ce", "mse") else 1e-7
    )


@every_kind
@pytest.mark.parametrize("temperature", [0.1, 20.0])
def test_logits_of_ten_thousand(kind, temperature):
    student, teacher = logits(3, 2500, seed=8, scale=1e4)
    student[0], teacher[0] = 1e4, -1e4  # uniform on both sides
    loss, grad, true_loss, _ = both(kind, student, teacher, temperature=temperature)
    assert loss.isfinite().all() and grad.isfinite().all() and (loss >= 0).all()
    assert torch.allclose(loss.double(), true_loss, rtol=1e-5, atol=1e-6)


@every_kind
def test_equal_student_and_teacher(kind):
    _, teacher = logits(3, 2200, seed=9)
    loss, grad, true_loss, _ = both(kind, teacher.clone(), teacher)
    assert (grad == 0).all()
    assert relative_error(loss, true_loss) <= 1e-6 if kind == "soft_ce" else (loss == 0).all()


# -- masks and broken rows ---------------------------------------------------------------------------------------------


@every_kind
def test_masked_rows_are_not_read_and_broken_rows_poison_only_themselves(kind):
    width = 2049
    student, teacher = logits(7, width, seed=10)
    whole, whole_grad, _, _ = both(kind, student, teacher)
    mask = torch.tensor([1, 0, 1, 1, 0, 1, 1], device=DEVICE).bool()
    student[1], teacher[4] = torch.nan, torch.nan
    student[3, width // 2] = torch.nan
    teacher[5, width - 1] = torch.nan
    loss, (grad,) = gradients_on_device(rows_of(kind, teacher, "triton", mask=mask), student)
    assert (loss[~mask] == 0).all() and (grad[~mask] == 0).all()
    assert loss[[3, 5]].isnan().all() and grad[[3, 5]].isnan().any(-1).all()
    assert torch.equal(loss[[0, 2, 6]], whole[[0, 2, 6]]) and torch.equal(grad[[0, 2, 6]], whole_grad[[0, 2, 6]])
    loss, (grad,) = gradients_on_device(rows_of(kind, teacher, "triton", mask=torch.zeros_like(mask)), student)
    assert (loss == 0).all() and (grad == 0).all()


@every_kind
def test_tokens_that_do_not_exist(kind):
    """-inf on both sides, in all of a row, on one side."""
    student, teacher = logits(4, 140, seed=11)
    gone = torch.zeros(4, 140, dtype=torch.bool, device=DEVICE)
    gone[1:, 5:40] = True
    gone[2] = True
    student, teacher = student.masked_fill(gone, -torch.inf), teacher.masked_fill(gone, -torch.inf)
    loss, grad, true_loss, true_grad = both(kind, student, teacher)
    assert relative_error(loss, true_loss) <= 1e-6 and relative_error(grad, true_grad) <= 1e-5
    assert loss[2] == 0 and (grad[gone] == 0).all()
    for side in (student, teacher):
        one_sided = side.clone()
        one_sided[0, 3] = -torch.inf
        pair = (one_sided, teacher) if side is student else (student, one_sided)
        loss, grad, true_loss, _ = both(kind, *pair)
        assert torch.equal(loss.isinf(), true_loss.isinf()) and not loss.isnan().any()
        assert relative_error(loss[~loss.isinf()], true_loss[~true_loss.isinf()]) <= 1e-6


@every_kind
def test_deterministic_and_never_aliased(kind):
    student, teacher = logits(3, 2500, seed=12)
    leaf = student.clone().requires_grad_()
    loss = rows_of(kind, teacher, "triton")(leaf)
    kept = loss.detach().clone()
    (first,) = torch.autograd.grad(loss.mean(), leaf, retain_graph=True)  # an upstream without strides
    kept_first = first.clone()
    again = rows_of(kind, teacher, "triton")(leaf)
    (second,) = torch.autograd.grad(loss.mean(), leaf)
    gradients_on_device(rows_of(kind, student, "triton"), teacher)
    assert torch.equal(again, kept) and torch.equal(loss, kept)
    assert torch.equal(second, kept_first) and torch.equal(first, kept_first)


# -- a sparse teacher; the rest of it is tests/ops/divergence/test_divergence_topk.py's -------------------------------------------------


def test_topk_index_outside_the_vocabulary_is_nan_in_its_row_only():
    from fastkd.kernels.divergence.topk import divergence_topk_bwd, divergence_topk_fwd

    student, teacher = logits(4, 50, seed=18)
    log_probs, indices = torch.log_softmax(teacher, -1).topk(5, -1)
    top = TopK(indices, log_probs)
    clean, stats = divergence_topk_fwd(student, *top, None, 0, 1.0, 1.0)
    ones = torch.ones(4, device=DEVICE)
    clean_grad = divergence_topk_bwd(ones, student, *top, None, stats, 0, 1.0, 1.0)
    top.indices[1, 2], top.indices[3, 0] = 50, -1
    values, stats = divergence_topk_fwd(student, *top, None, 0, 1.0, 1.0)
    grad = divergence_topk_bwd(ones, student, *top, None, stats, 0, 1.0, 1.0)
    assert values[[1, 3]].isnan().all() and grad[[1, 3]].isnan().any(-1).all()
    assert torch.equal(values[[0, 2]], clean[[0, 2]]) and torch.equal(grad[[0, 2]], clean_grad[[0, 2]])


# -- sizes for which the interpreter is too slow -----------------------------------------------------------------------


@pytest.mark.skipif(INTERPRETED, reason="minutes in the interpreter")
@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [30522, 32000, 50257, 128256])
def test_real_vocabularies(kind, dtype, width):
    student, teacher = logits(16, width, seed=20, dtype=dtype)
    check(kind, student, teacher, FLOAT32 if dtype == torch.float32 else (1e-6, 1e-2))
    if dtype == torch.float32:
        student, teacher = logits(16, width, seed=21, noise=1e-3)
        check(kind, student, teacher, (1e-5, 1e-5))
