"""FCDLoss against the authors' numbers, its terms one by one, and over two ranks."""

import pytest
import torch

from cases import GOLDENS, det, gradients, randn, relative_error
from fastkd import backends
from fastkd.functional import gram_correlation_loss
from fastkd.losses.fcd import FCDLoss
from fastkd.ops import gram as ops
from ranks import on_two_ranks

MASK = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
HERE = [b for b in ops.KERNELS if b == "cpu" or backends.INTERPRETED]


def fcd(**options):
    return FCDLoss(backend="reference", **options)


@pytest.mark.parametrize(
    ("dtype", "backend"), [(torch.float64, "reference"), (torch.float32, "reference"), (torch.float32, "auto")]
)
@pytest.mark.parametrize(("B", "N", "Ds", "Dt"), [(4, 7, 12, 20), (2, 5, 6, 6), (3, 9, 16, 8)])
def test_the_authors_numbers(B, N, Ds, Dt, dtype, backend):
    def fcd(**options):
        return FCDLoss(backend=backend, **options)

    golden, tolerance = GOLDENS[f"fcd_B{B}_N{N}_Ds{Ds}_Dt{Dt}"], {torch.float64: 1e-12, torch.float32: 1e-5}[dtype]
    student, teacher = det((B, N, Ds), 1, dtype).requires_grad_(), det((B, N, Dt), 2, dtype)
    official = fcd(grouping="official")(student, teacher)
    official.backward()
    assert official.item() == pytest.approx(golden["token_plus_seq"], abs=tolerance)
    assert fcd(beta=0.0)(student, teacher).item() == pytest.approx(golden["token"], abs=tolerance)
    assert fcd(alpha=0.0)(student, teacher).item() == pytest.approx(golden["seq_viewN"], abs=tolerance)
    assert fcd()(student, teacher).item() == pytest.approx(golden["token"] + golden["seq_viewN"], abs=2 * tolerance)
    assert student.grad.abs().sum().item() == pytest.approx(golden["grad_l1"], abs=tolerance)
    assert student.grad[0, 0, 0].item() == pytest.approx(golden["grad_000"], abs=tolerance)
    assert student.grad[-1, -1, -1].item() == pytest.approx(golden["grad_last"], abs=tolerance)


def test_weights_and_lists():
    students = [randn(4, 5, 6, seed=seed) for seed in (1, 2)]
    teachers = [randn(4, 5, 3, seed=seed) for seed in (3, 4)]
    token, sequence = (
        [gram_correlation_loss(s, t, level=level) for s, t in zip(students, teachers, strict=True)]
        for level in ("token", "sequence")
    )
    value = fcd(alpha=0.3, beta=2.0, loss_weight=10.0)(students, teachers)
    expected = 10 * (0.3 * (token[0] + token[1]) + 2.0 * (sequence[0] + sequence[1])) / 2
    assert relative_error(value, expected) < 1e-13
    assert torch.equal(fcd()(students[:1], teachers[:1]), fcd()(students[0], teachers[0]))


def test_without_the_token_term_the_official_features_stay_raw():
    student, teacher = randn(4, 5, 6, seed=1), randn(4, 5, 3, seed=2)
    stretch = torch.linspace(0.5, 2, 5)[None, :, None].double()
    raw, position = fcd(alpha=0.0, grouping="official"), fcd(alpha=0.0)
    assert relative_error(raw(student * stretch, teacher), raw(student, teacher)) > 1e-3
    assert relative_error(position(student * stretch, teacher), position(student, teacher)) < 1e-12
    expected = gram_correlation_loss(student, teacher, level="sequence", grouping="official", normalize=False)
    assert torch.equal(raw(student, teacher), expected)


@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("grouping", ["position", "official"])
def test_the_random_relation_draws_as_the_authors_do(beta, grouping):
    """K rows of randperm over tokens in (position, sequence) order if the sequence term is on; row-wise correlation."""
    student, teacher = randn(4, 5, 6, seed=1), randn(4, 5, 3, seed=2)
    with_random, without = (fcd(alpha=1.0, beta=beta, gamma=g, K=7, grouping=grouping) for g in (0.5, 0.0))
    torch.manual_seed(3)
    value, (grad,) = gradients(lambda s: with_random(s, teacher) - without(s, teacher), student)
    torch.manual_seed(3)
    drawn = torch.randperm(20)[:7]

    def expected_loss(s):
        grams = []
        for x in (s, teacher):
            x = x / x.norm(dim=-1, keepdim=True)
            x = x.transpose(0, 1).reshape(20, -1)[drawn] if beta else x.reshape(20, -1)[drawn]
            grams.append(x @ x.T)
        a, b = (g - g.mean(1, keepdim=True) for g in grams)
        rho = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-6)
        return 0.5 * (1 - rho.mean())

    expected, (expected_grad,) = gradients(expected_loss, student)
    assert relative_error(value, expected) < 1e-12
    assert relative_error(grad, expected_grad) < 1e-10


def test_the_random_relation_draws_real_tokens_only():
    student, teacher = (randn(4, 5, d, seed=d).masked_fill(~MASK.bool()[..., None], float("nan")) for d in (6, 3))
    for K in (7, 20, 50):  # 16 tokens are real
        criterion = fcd(alpha=0.0, beta=0.0, gamma=1.0, K=K)
        value, (grad,) = gradients(lambda s, c=criterion: c(s, teacher, MASK), student)
        assert 0 < value < 2
        assert (grad[MASK == 0] == 0).all() and grad.isfinite().all()
        assert grad.any(-1).sum() == min(K, 16)
    few = fcd(alpha=0.0, beta=0.0, gamma=1.0, K=7)
    assert len({few(student, teacher, MASK).item() for _ in range(5)}) == 5  # another draw every time


@pytest.mark.parametrize("backend", ["reference", *ops.KERNELS])
@pytest.mark.parametrize("masked", [False, True])
def test_every_pair_of_layers_draws_its_own_tokens(backend, masked):
    """In one call of the kernel, with the gradients of all terms; the oracle draws the same in float64."""
    students = [randn(4, 5, d, seed=d).float() for d in (6, 16)]
    teachers = [randn(4, 5, 3, seed=20 + d).float() for d in (6, 16)]
    mask = MASK if masked else None

    def run(inputs, others, backend):
        torch.manual_seed(5)
        criterion = FCDLoss(alpha=0.5, gamma=2.0, K=14 if masked else 7, loss_weight=3.0, backend=backend)
        return gradients(lambda *s: criterion(list(s), others, mask), *inputs)

    value, grads = run(students, teachers, backend)
    exact, exact_grads = run([s.double() for s in students], [t.double() for t in teachers], "reference")
    assert relative_error(value, exact) < 1e-6
    for grad, exact_grad in zip(grads, exact_grads, strict=True):
        assert relative_error(grad, exact_grad) < 1e-5


def test_a_mask_of_ones_reduces_to_the_official_number():
    student, teacher = randn(4, 5, 6, seed=1), randn(4, 5, 3, seed=2)
    for grouping in ("position", "official"):
        criterion = fcd(grouping=grouping)
        assert torch.equal(criterion(student, teacher, torch.ones(4, 5)), criterion(student, teacher))


def test_padding_does_not_matter():
    student, teacher = randn(4, 5, 6, seed=1), randn(4, 5, 3, seed=2)
    value, (grad,) = gradients(lambda s: fcd()(s, teacher, MASK), student)
    hidden = MASK[..., None] == 0
    bad_teacher = teacher.masked_fill(hidden, float("nan"))
    dirty, (dirty_grad,) = gradients(lambda s: fcd()(s, bad_teacher, MASK), student.masked_fill(hidden, float("inf")))
    assert torch.equal(value, dirty) and torch.equal(grad, dirty_grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype):
    student, teacher = randn(4, 5, 6, seed=1, dtype=dtype), randn(4, 5, 3, seed=2)
    value, (grad,) = gradients(lambda s: fcd()(s, teacher), student)
    exact, (exact_grad,) = gradients(lambda s: fcd()(s, teacher), student.double())
    assert value.dtype == torch.float32 and grad.dtype == dtype
    assert relative_error(value, exact) < 1e-6 and relative_error(grad, exact_grad) < 1e-2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fcd()(student, teacher), value)


@pytest.mark.parametrize("B", [1, 2])
def test_batches_too_small_for_the_sequence_term_stay_finite(B):
    value, (grad,) = gradients(lambda s: fcd()(s, randn(B, 5, 3)), randn(B, 5, 6, seed=1))
    assert value.isfinite() and grad.isfinite().all()


def test_two_ranks_equal_the_global_batch():
    """The average of the ranks' gradients, as DDP takes it, is the gradient of the one loss on the global batch."""
    results = on_two_ranks("""
from cases import randn
from fastkd.losses.fcd import FCDLoss
student, teacher = randn(6, 5, 4, seed=1), randn(6, 5, 3, seed=2)
own = slice(3 * rank, 3 * rank + 3)
leaf = student[own].clone().requires_grad_()
value = FCDLoss(process_group=group, backend="reference")(leaf, teacher[own])
value.backward()
result = value.detach(), leaf.grad
""")
    student, teacher = randn(6, 5, 4, seed=1), randn(6, 5, 3, seed=2)
    value, (grad,) = gradients(lambda s: fcd()(s, teacher), student)
    upstream = float(randn(seed=7)) + 1.5
    assert relative_error((results[0][0] + results[1][0]) / 2, value) < 1e-13
    assert relative_error(torch.cat([r[1] for r in results]) / 2, grad / upstream) < 1e-12


PENALTY = """
import torch
from test_fcd import penalised
from cases import randn
from fastkd.losses.fcd import FCDLoss
own = slice(3 * rank, 3 * rank + 3)
student, teacher = randn(6, 5, 4, seed=1)[own].clone(), randn(6, 5, 3, seed=2)[own]
result = penalised(lambda s: FCDLoss(process_group=group, backend="reference")(s, teacher), student, ranks=1)
"""


def penalised(loss, student, ranks):
    """The gradient of a loss that has its own gradient in it: on every rank, the sum of what all ranks lose."""
    leaf = student.requires_grad_()
    value = ranks * loss(leaf)
    (grad,) = torch.autograd.grad(value, leaf, create_graph=True)
    return torch.autograd.grad(value + grad.square().sum(), leaf)[0]


def test_a_gradient_penalty_over_two_ranks():
    """Each rank's token term is its own, and all have the sequence term of the global batch: their sum is twice the loss."""
    results = on_two_ranks(PENALTY)
    teacher = randn(6, 5, 3, seed=2)
    expected = penalised(lambda s: fcd()(s, teacher), randn(6, 5, 4, seed=1), ranks=2)
    assert relative_error(torch.cat(results), expected) < 1e-11


def test_mistakes():
    x = randn(4, 5, 6)
    with pytest.raises(ValueError, match="grouping"):
        FCDLoss(grouping="rows")
    with pytest.raises(ValueError, match="not all 0"):
        FCDLoss(alpha=0, beta=0)
    with pytest.raises(ValueError, match="K"):
        FCDLoss(K=0)
    with pytest.raises(ValueError, match="pair up one to one"):
        fcd()([x], [x, x])
    with pytest.raises(ValueError, match="empty"):
        fcd()([], [])
    with pytest.raises(ValueError, match="no defined meaning"):
        fcd(grouping="official")(x, x, MASK)
    with pytest.raises(ValueError, match="mask"):
        fcd(gamma=1.0)(x, x, torch.ones(5, 4))


@pytest.mark.parametrize("backend", ["reference", *HERE])
@pytest.mark.parametrize("where", ["student", "teacher", "both"])
def test_padding_of_zeros_does_not_spoil_the_random_relation(backend, where):
    """Without a mask, drawn zeros are tokens like others: what rounding leaves of their rows is not divided by eps."""
    student, teacher = (randn(4, 9, d, seed=d) + 2 * randn(d, seed=50 + d) for d in (24, 33))
    padding = torch.arange(9) >= torch.tensor([9, 5, 7, 9])[:, None]
    student, teacher = (
        x.masked_fill(padding[..., None], 0) if where in (side, "both") else x
        for side, x in (("student", student), ("teacher", teacher))
    )

    def run(backend, dtype):
        torch.manual_seed(3)  # the same draws
        criterion = FCDLoss(alpha=0.3, beta=0.2, gamma=1.0, K=30, backend=backend)
        return gradients(lambda s: criterion(s, teacher.to(dtype)), student.to(dtype))

    exact, (exact_grad,) = run("reference", torch.float64)
    (value, (grad,)), (_, (eager_grad,)) = run(backend, torch.float32), run("reference", torch.float32)
    assert relative_error(value, exact) <= 1e-6
    errors = [relative_error(x[~padding], exact_grad[~padding]) for x in (grad, eager_grad)]
    assert errors[0] <= max(errors[1], 1e-6)
