"""fastkd.compat.liger against the real Liger-Kernel: names, defaults, losses and gradients over random cases.

Liger's chunked losses are PyTorch and run here. Its other losses are Triton kernels, which Triton's interpreter runs in a process
of its own: `python tests/compat/test_liger.py` compares them.
"""

import inspect
import os
import random
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fastkd
from cases import ROOT, randn, relative_error
from fastkd.compat import liger as ours

CHUNKED = ("LigerFusedLinearJSDLoss", "LigerFusedLinearCosineSimilarityLoss")
NAMES = ("LigerKLDIVLoss", "LigerJSD", "LigerTVDLoss", "LigerFusedLinearJSD", "LigerFusedLinearKLDivLoss")
BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
TOLERANCES = {torch.float32: {"rtol": 2e-4, "atol": 2e-6}, torch.bfloat16: {"rtol": 0.05, "atol": 0.02}}

needs_liger = pytest.mark.skipif(
    not ours.importlib.util.find_spec("liger_kernel"),
    reason="needs Liger-Kernel: pip install --no-deps liger-kernel==0.8.5",
)


def differentiated(loss, *inputs):
    """(value, gradients of those inputs that require one); 0.37 times the sum of the value is differentiated."""
    inputs = [x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for x in inputs]
    value = loss(*inputs)
    total = value[0] if isinstance(value, tuple) else value.sum()
    return value, torch.autograd.grad(
        0.37 * total, [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    )


def linear_sides(draw, seed, dtype, vocab=None, more=0):
    """The teacher has `more` tokens than the student."""
    rows, vocab = draw.randint(1, 9), vocab or draw.choice([2, 7, 65])
    widths = draw.randint(1, 8), draw.randint(1, 8)
    student, teacher = (
        [randn(rows, d, seed=seed + i).to(dtype), randn(vocab + i * more, d, seed=seed + 10 + i).to(dtype)]
        for i, d in enumerate(widths)
    )
    return (
        [x.requires_grad_() for x in student],
        teacher,
        torch.where(randn(rows, seed=seed + 3) > -0.5, rows % vocab, -100),
    )


# -- Liger's chunked losses --------------------------------------------------------------------------------------------


@needs_liger
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CHUNKED)
def test_chunked_losses(name, dtype):
    """In bfloat16 Liger rounds the logits, so the comparison is of errors against float64."""
    from liger_kernel import chunked_loss

    errors, cosine = {"ours": 0.0, "theirs": 0.0}, name == "LigerFusedLinearCosineSimilarityLoss"
    for seed in range(24):
        draw = random.Random(seed)
        student, teacher, labels = linear_sides(draw, seed, dtype, more=draw.choice([0, 0, 3]) if cosine else 0)
        vocab = len(student[1])
        biases = (
            [randn(n, seed=seed + i).to(dtype) for i, n in ((5, vocab), (6, len(teacher[1])))]
            if draw.random() < 0.5
            else [None, None]
        )
        if biases[0] is not None:
            biases[0].requires_grad_()
        options = {
            "beta": draw.choice(BETAS),
            "temperature": draw.choice([1.0, 0.6, 3.0]),
            "weight_hard_loss": draw.choice([0.5, 0.0, 0.9]),
            "weight_soft_loss": draw.choice([0.5, 0.0, 1.0]),
            "return_soft_hard_loss": draw.random() < 0.3,
            "chunk_size": draw.choice([2, 1024]),
        }
        inputs = (*student, *teacher, labels, *biases)
        (value, gradients), (wanted, wanted_gradients) = (
            differentiated(loss, *inputs)
            for loss in (
                getattr(ours, name)(**options),
                getattr(chunked_loss, name)(**options, compiled=False),
            )
        )
        assert type(value) is type(wanted)
        value, wanted = ([*x] if isinstance(x, tuple) else [x] for x in (value, wanted))
        assert [x.dtype for x in value] == [x.dtype for x in wanted]
        assert [x.requires_grad for x in value] == [True] + [False] * (len(value) - 1)
        if dtype == torch.float32:
            for x, y in zip((*value, *gradients), (*wanted, *wanted_gradients), strict=True):
                torch.testing.assert_close(
                    x, y, **TOLERANCES[dtype], msg=lambda text, seed=seed: f"case {seed}: {text}"
                )
            continue
        exact = [
            x.detach().double().requires_grad_(x.requires_grad) if x is not None and x.is_floating_point() else x
            for x in inputs
        ]
        truth, true_gradients = differentiated(getattr(ours, name)(**options), *exact)
        truth = [*truth] if isinstance(truth, tuple) else [truth]
        for who, found in {"ours": (*value, *gradients), "theirs": (*wanted, *wanted_gradients)}.items():
            pairs = zip(found, (*truth, *true_gradients), strict=True)
            errors[who] += sum(relative_error(x, y) ** 2 for x, y in pairs)
    assert errors["ours"] <= errors["theirs"], errors


@needs_liger
def test_a_teacher_with_more_tokens_goes_to_liger():
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    student, teacher, labels = linear_sides(random.Random(1), 1, torch.float32, more=2)
    found, wanted = (
        differentiated(loss(compiled=False), *student, *teacher, labels)
        for loss in (ours.LigerFusedLinearJSDLoss, LigerFusedLinearJSDLoss)
    )
    assert torch.equal(found[0], wanted[0]) and all(map(torch.equal, found[1], wanted[1]))


@needs_liger
@pytest.mark.parametrize("name", [*NAMES, *CHUNKED])
def test_signatures_are_the_originals(name):
    from liger_kernel import chunked_loss, transformers

    theirs = getattr(transformers, name, None) or getattr(chunked_loss, name)
    for method in ("__init__", "forward"):
        found, wanted = (
            inspect.signature(getattr(x, method)).parameters.values() for x in (getattr(ours, name), theirs)
        )
        assert [(x.name, x.default, x.kind) for x in found] == [(x.name, x.default, x.kind) for x in wanted]


@needs_liger
def test_patch():
    from liger_kernel import chunked_loss, transformers

    before = transformers.LigerJSD
    with fastkd.patch("liger") as patched:
        assert not patched.skipped and transformers.LigerJSD is ours.LigerJSD
        assert all(getattr(chunked_loss, name) is getattr(ours, name) for name in CHUNKED)
        test_a_teacher_with_more_tokens_goes_to_liger()
    assert transformers.LigerJSD is before


# -- the definitions, which need no Liger ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")
def test_kl_is_torchs():
    x, y = randn(5, 9, seed=1).log_softmax(-1), randn(5, 9, seed=2).log_softmax(-1)
    for reduction in ("mean", "batchmean", "sum", "none"):
        for log_target in (False, True):
            target = y if log_target else y.exp()
            found = differentiated(
                ours.LigerKLDIVLoss(reduction=reduction, log_target=log_target),
                x.float().requires_grad_(),
                target.float(),
            )
            wanted = differentiated(
                torch.nn.KLDivLoss(reduction=reduction, log_target=log_target), x.requires_grad_(), target
            )
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7, check_dtype=False)


@pytest.mark.parametrize("beta", BETAS)
def test_jsd_has_the_derivative_of_its_value_by_free_log_probabilities(beta):
    x, y = randn(3, 7, seed=1).log_softmax(-1).requires_grad_(), randn(3, 7, seed=2).log_softmax(-1)

    def definition(x):
        p, q = y.exp(), x.exp()
        m = beta * p + (1 - beta) * q
        if beta in (0, 1):
            return (p * (y - x) if beta == 0 else q * (x - y)).sum() / 3
        return (beta * p * (y - m.log()) + (1 - beta) * q * (x - m.log())).sum() / 3

    found, wanted = differentiated(ours.LigerJSD(beta), x.float(), y.float()), differentiated(definition, x)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7, check_dtype=False)


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum", "none"])
def test_tvd(reduction):
    """With "none" the elements [N, V], of which those of ignored rows are 0."""
    p, q = randn(4, 7, seed=1).softmax(-1).requires_grad_(), randn(4, 7, seed=2).softmax(-1)
    labels = torch.tensor([1, -100, 2, 3])

    def definition(p):
        elements = 0.5 * (p - q).abs() * (labels != -100)[:, None]
        return elements if reduction == "none" else elements.sum() / {"batchmean": 3, "mean": 21, "sum": 1}[reduction]

    found = differentiated(ours.LigerTVDLoss(reduction), p.float(), q.float(), labels)
    torch.testing.assert_close(found, differentiated(definition, p), rtol=1e-5, atol=1e-7, check_dtype=False)


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
def test_a_target_of_given_probabilities(reduction):
    """Also one that does not sum to 1, and one without any mass."""
    hidden, head = randn(5, 4, seed=1).requires_grad_(), randn(9, 4, seed=2).requires_grad_()
    target = randn(5, 9, seed=3).softmax(-1) * torch.tensor([1.0, 0.5, 1.7, 0.0, 1.0])[:, None]
    target[1, :4] = 0
    labels = torch.tensor([1, 2, 3, 4, -100])

    def definition(hidden, head):
        log_q = (F.linear(hidden, head) / 2).log_softmax(-1)
        total = (torch.xlogy(target, target) - target * log_q)[:4].sum()
        return total / {"batchmean": 4, "mean": 36, "sum": 1}[reduction]

    loss = ours.LigerFusedLinearKLDivLoss(reduction, temperature=2.0)
    found = differentiated(lambda *x: loss(*x, target, labels), hidden.float(), head.float())
    torch.testing.assert_close(found, differentiated(definition, hidden, head), rtol=1e-4, atol=1e-6, check_dtype=False)


def cosine_and_cross_entropy(hidden, head, teacher_hidden, teacher_head, labels):
    """The definition, for labels of which none is ignored."""
    x, y = F.linear(hidden, head), F.linear(teacher_hidden, teacher_head)
    return 0.5 * F.cross_entropy(x, labels) + 0.25 * (1 - F.cosine_similarity(x, y)).mean()


def test_a_cosine_near_1_keeps_its_digits():
    hidden, head, labels = randn(5, 4, seed=1), randn(65, 4, seed=2), torch.arange(5)
    teacher = (hidden + 1e-3 * randn(5, 4, seed=3)).float(), head.float()
    options = {"weight_hard_loss": 0.0}
    inputs = (hidden.float().requires_grad_(), head.float().requires_grad_(), *teacher, labels)
    exact = [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs]
    (value, gradients), (wanted, wanted_gradients) = (
        differentiated(ours.LigerFusedLinearCosineSimilarityLoss(**options), *x) for x in (inputs, exact)
    )
    assert 1e-8 < wanted < 1e-6
    textbook = differentiated(
        lambda *x: 0.25 * (1 - F.cosine_similarity(F.linear(*x[:2]), F.linear(*x[2:4]))).mean(), *exact
    )
    torch.testing.assert_close((wanted, wanted_gradients), textbook, rtol=1e-6, atol=1e-12)
    for x, y in zip((value, *gradients), (wanted, *wanted_gradients), strict=True):
        assert relative_error(x, y) < 1e-3


def test_cosines_of_rows_of_zeros_and_of_ignored_rows():
    """A row of zeros is as far as a row at a right angle; what an ignored row holds is not looked at."""
    student, teacher, _ = linear_sides(random.Random(3), 3, torch.float32, vocab=7)
    hidden, target = (x[0].detach()[:1].repeat(4, 1) for x in (student, teacher))
    hidden[0], target[1], hidden[2], target[2] = 0, 0, float("nan"), float("inf")
    labels = torch.tensor([1, 2, -100, 3])
    loss = ours.LigerFusedLinearCosineSimilarityLoss(0.0, 1.0, beta=1.0)
    head = student[1].detach()
    value, (of_hidden,) = differentiated(loss, hidden.requires_grad_(), head, target, teacher[1], labels)
    one = 1 - F.cosine_similarity(F.linear(hidden[3], head), F.linear(target[3], teacher[1]), dim=0)
    torch.testing.assert_close(value, (2 + one) / 3)
    assert (of_hidden[:3] == 0).all() and (of_hidden[3] != 0).any()
    hidden = hidden.detach()
    hidden[3] = float("nan")
    assert loss(hidden, head, target, teacher[1], labels).isnan()


def test_the_cosine_keeps_the_logits_of_one_chunk():
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            self.elements = max(self.elements, out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    hidden, head, labels = (
        randn(64, 3, seed=1).requires_grad_(),
        randn(50, 3, seed=2).requires_grad_(),
        torch.arange(64) % 50,
    )
    loss, teacher = (
        ours.LigerFusedLinearCosineSimilarityLoss(chunk_size=4),
        (randn(64, 2, seed=3), randn(50, 2, seed=4)),
    )
    with Largest() as seen:
        found = differentiated(loss, hidden, head, *teacher, labels)
    assert seen.elements == 4 * 50
    torch.testing.assert_close(found, differentiated(cosine_and_cross_entropy, hidden, head, *teacher, labels))


def test_the_cosine_of_half_of_what_could_have_a_gradient():
    """Of a frozen head, of hidden states alone, under no_grad, and under autocast; a second derivative is an error."""
    student, teacher, _ = linear_sides(random.Random(5), 5, torch.float32, vocab=7)
    labels = torch.arange(len(student[0])) % 7
    loss = ours.LigerFusedLinearCosineSimilarityLoss(chunk_size=2)
    value, both = differentiated(loss, *student, *teacher, labels)
    for i in (0, 1):
        only = [x.detach().requires_grad_(j == i) for j, x in enumerate(student)]
        assert torch.equal(differentiated(loss, *only, *teacher, labels)[1][0], both[i])
    with torch.no_grad():
        assert torch.equal(loss(*student, *teacher, labels), value)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, of_rounded = differentiated(loss, *student, *teacher, labels)
    assert [x.dtype for x in of_rounded] == [torch.float32] * 2
    torch.testing.assert_close((rounded, of_rounded), (value, both), **TOLERANCES[torch.bfloat16])
    (of_hidden,) = torch.autograd.grad(loss(*student, *teacher, labels), student[0], create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        of_hidden.sum().backward()
    with pytest.raises(
        ValueError, match="teacher_weight: expected at least the student's 7 tokens, got 6; pass the rows"
    ):
        loss(*student, teacher[0], teacher[1][:6], labels)


def test_nothing_counts_is_zero():
    student, teacher, _ = linear_sides(random.Random(1), 1, torch.float32)
    labels = torch.full(student[0].shape[:1], -100)
    x = F.linear(*student).log_softmax(-1).detach().requires_grad_()
    target = F.linear(*teacher).softmax(-1)
    losses = [
        differentiated(ours.LigerFusedLinearJSD(), *student, *teacher, labels),
        *(differentiated(getattr(ours, name)(), *student, *teacher, labels) for name in CHUNKED),
        differentiated(ours.LigerFusedLinearKLDivLoss(), *student, target, labels),
        differentiated(ours.LigerJSD(), x, target.log(), labels),
        differentiated(ours.LigerTVDLoss(), x, target, labels),
    ]
    for value, gradients in losses:
        assert value == 0 and all((g == 0).all() for g in gradients)


# -- Liger's Triton kernels --------------------------------------------------------------------------------------------


@needs_liger
@pytest.mark.long
def test_against_ligers_kernels_in_the_interpreter():
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.strip() == f"{len(NAMES)} losses agree", run.stdout + run.stderr


def kernel_case(name, seed, dtype):
    """(options, inputs) of a random call."""
    draw = random.Random(seed)
    student, teacher, labels = linear_sides(draw, seed, dtype)
    labels = draw.choice([None, labels]) if (labels != -100).any() else None
    temperature, beta = draw.choice([1.0, 0.6, 3.0]), draw.choice(BETAS)
    s, t = (F.linear(*x).detach() for x in (student, teacher))
    if name == "LigerKLDIVLoss":
        log_target, reduction = draw.random() < 0.5, draw.choice(["mean", "batchmean", "sum", "none"])
        target = t.log_softmax(-1) if log_target else t.softmax(-1)
        return {"reduction": reduction, "log_target": log_target}, (s.log_softmax(-1).requires_grad_(), target)
    if name == "LigerJSD":
        return {"beta": beta}, (s.log_softmax(-1).requires_grad_(), t.log_softmax(-1), labels)
    if name == "LigerTVDLoss":
        reduction = draw.choice(["mean", "batchmean", "sum", "none"])
        return {"reduction": reduction}, (s.softmax(-1).requires_grad_(), t.softmax(-1), labels)
    if name == "LigerFusedLinearJSD":
        return {"jsd_beta": beta, "temperature": temperature}, (*student, *teacher, labels)
    reduction = draw.choice(["mean", "batchmean", "sum"])
    return {"reduction": reduction, "temperature": temperature}, (*student, t.softmax(-1), labels)


def numbers_are_float32():
    """As in a compiled kernel; the interpreter leaves a Python float as it is, which has no `.to`."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def converted(x):
        if isinstance(x, float):
            return tl.tensor(interpreter.TensorHandle(np.array([x], dtype=np.float32), tl.float32), tl.float32)
        return convert(x)

    interpreter._implicit_cvt = converted


def main():
    from liger_kernel import transformers

    numbers_are_float32()
    for name in NAMES:
        for seed in range(8):
            for dtype, allowed in TOLERANCES.items():
                if name == "LigerTVDLoss" and dtype == torch.bfloat16:
                    continue  # its kernel subtracts in bfloat16, which the interpreter gets wrong
                options, inputs = kernel_case(name, seed, dtype)
                found, wanted = (differentiated(getattr(x, name)(**options), *inputs) for x in (ours, transformers))
                say = lambda text, case=(name, seed, dtype): f"{case}: {text}"  # noqa: E731
                torch.testing.assert_close(found, wanted, **allowed, msg=say)
    print(f"{len(NAMES)} losses agree")


if __name__ == "__main__":
    main()
