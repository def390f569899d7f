"""fastkd.compat.trl against the real TRL: signatures, losses, gradients, entropies and counts over random cases."""

import importlib
import inspect
import random

import pytest
import torch

import fastkd
from cases import randn, relative_error
from fastkd import compat
from fastkd.compat import trl as ours

pytest.importorskip("trl", reason="needs trl: pip install --no-deps trl==1.16.0")

CHUNKED = "trl.trainer.distillation_trainer", "_chunked_divergence_loss"
LOSSES = {
    ours.generalized_jsd_loss: ("trl.experimental.gkd.gkd_trainer", "GKDTrainer.generalized_jsd_loss"),
    ours.gold_jsd_loss: ("trl.experimental.gold.gold_trainer", "GOLDTrainer.generalized_jsd_loss"),
    ours.iw_opd_jsd_loss: ("trl.experimental.iw_opd.iw_opd_trainer", "IWOPDTrainer.generalized_jsd_loss"),
}
BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)


def theirs(module, name):
    try:
        importlib.import_module(module)
    except ImportError as error:
        pytest.skip(f"{module} cannot be imported here: {error}")
    return compat.original(module, name)


def chunked_case(seed, dtype=torch.float32, **fixed):
    """The tensors, and the other arguments, of a random call; leaves are the student's."""
    draw = random.Random(seed)
    lead, vocab = (draw.randint(1, 3), draw.randint(1, 7)), draw.choice([2, 7, 33, 257])
    widths = draw.randint(1, 9), draw.randint(1, 9)
    student, teacher = (
        [randn(*lead, d, seed=seed + i), randn(vocab, d, seed=seed + 10 + i), randn(vocab, seed=seed + 20 + i)]
        for i, d in enumerate(widths)
    )
    count = randn(*lead, seed=seed + 30) > draw.choice([-9, 0, 9])
    options = {
        "beta": draw.choice(BETAS),
        "num_items_in_batch": draw.choice([None, 5, torch.tensor(11)]),
        "student_logit_scale": draw.choice([1.0, 0.5]),
        "teacher_logit_scale": draw.choice([1.0, 2.0]),
        "student_final_logit_softcapping": draw.choice([None, 3.0]),
        "teacher_final_logit_softcapping": draw.choice([None, 5.0]),
        "temperature": draw.choice([1.0, 0.7, 3.0]),
    }
    biased = draw.random() < 0.5
    student, teacher = ([x.to(dtype) for x in side[: 3 if biased else 2]] for side in (student, teacher))
    return student, teacher, count.long(), options | fixed


def chunked(function, student, teacher, mask, options):
    """((loss, entropy, count), gradients), where 0.37 times the loss is differentiated."""
    leaves = [x.detach().clone().requires_grad_() for x in student]
    biases = {"student_lm_head_bias": leaves[2], "teacher_lm_head_bias": teacher[2]} if len(leaves) > 2 else {}
    found = function(leaves[0], teacher[0], leaves[1], teacher[1], mask, **options, **biases)
    return found, torch.autograd.grad(0.37 * found[0], leaves)


def test_chunked_divergence_loss():
    original = theirs(*CHUNKED)
    for seed in range(40):
        case = chunked_case(seed)
        (found, gradients), (wanted, wanted_gradients) = (
            chunked(ours.chunked_divergence_loss, *case),
            chunked(original, *case),
        )
        assert [x.dtype for x in found] == [x.dtype for x in wanted] and found[2] == wanted[2], seed
        for x, y in zip((*found[:2], *gradients), (*wanted[:2], *wanted_gradients), strict=True):
            torch.testing.assert_close(x, y, rtol=2e-4, atol=2e-6, msg=lambda text, seed=seed: f"case {seed}: {text}")


@pytest.mark.parametrize("autocast", [False, True])
def test_chunked_divergence_loss_in_bfloat16_is_no_further_from_float64(autocast):
    """float32 inputs under autocast are rounded as the original rounds them, and gradients once more, as those of nn.Linear."""
    original, errors, gradient_errors = theirs(*CHUNKED), {"ours": 0.0, "theirs": 0.0}, {"ours": 0.0, "theirs": 0.0}
    for seed in range(20):
        student, teacher, mask, options = chunked_case(seed, torch.bfloat16, num_items_in_batch=None)
        if not mask.any():
            continue
        if autocast:  # biases stay as they are
            student, teacher = [x.float() for x in student], [x.float() for x in teacher]
        exact = [x.double() for x in student], [x.double() for x in teacher]
        wanted, wanted_gradients = chunked(ours.chunked_divergence_loss, *exact, mask, options)
        for name, function in {"ours": ours.chunked_divergence_loss, "theirs": original}.items():
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                found, gradients = chunked(function, student, teacher, mask, options)
            assert [x.dtype for x in gradients] == [x.dtype for x in student]
            errors[name] += sum(relative_error(x, y) ** 2 for x, y in zip(found[:2], wanted[:2], strict=True))
            pairs = zip(gradients, wanted_gradients, strict=True)
            gradient_errors[name] += sum(relative_error(x, y) ** 2 for x, y in pairs)
    assert errors["ours"] <= errors["theirs"], errors
    assert gradient_errors["ours"] <= (1.25 if autocast else 1.0) ** 2 * gradient_errors["theirs"], gradient_errors


def test_no_gradient_flows_to_the_teacher_or_from_the_entropy():
    student, teacher, _, options = chunked_case(3)
    leaves = [x.requires_grad_() for x in (*student[:2], *teacher[:2])]
    mask = torch.ones(student[0].shape[:-1])
    loss, entropy, _ = ours.chunked_divergence_loss(leaves[0], leaves[2], leaves[1], leaves[3], mask, **options)
    loss.backward()
    assert [x.grad is not None for x in leaves] == [True, True, False, False] and not entropy.requires_grad


@every_loss
def test_signatures_are_the_originals(loss):
    pairs = {loss: LOSSES[loss], ours.chunked_divergence_loss: CHUNKED}
    for function, place in pairs.items():
        wanted = inspect.signature(theirs(*place)).parameters.values()
        assert [(x.name, x.default) for x in wanted] == [
            (x.name, x.default) for x in inspect.signature(function).parameters.values()
        ]


@every_loss
def test_generalized_jsd_loss(loss):
    original = theirs(*LOSSES[loss])
    for seed in range(40):
        draw = random.Random(seed)
        shape = draw.randint(1, 3), draw.randint(1, 5), draw.choice([2, 9, 50])
        student, teacher = randn(*shape, seed=seed).float(), randn(*shape, seed=seed + 1, scale=2.0).float()
        labels = torch.where(randn(*shape[:2], seed=seed + 2) > 0, 1, -100)
        options = {
            "beta": draw.choice(BETAS),
            "temperature": draw.choice([1.0, 0.8, 4.0]),
            "reduction": draw.choice(["batchmean", "sum", "mean", "none"]),
            "num_items_in_batch": draw.choice([None, None, 7, torch.tensor(9)]),
            "labels": draw.choice([None, labels]),
        }
        if options["reduction"] == "mean" and options["labels"] is not None and not (labels != -100).any():
            continue  # NaN there, 0 here
        if loss is ours.gold_jsd_loss and options["reduction"] == "none":
            options["reduction"] = "sum"  # the original returns None
        found, wanted = ((f, student.clone().requires_grad_()) for f in (loss, original))
        for function, leaf in (found, wanted):
            value = function(leaf, teacher, **options)
            (value * randn(*value.shape, seed=seed).float()).sum().backward()
            leaf.value = value
        say = lambda text, seed=seed: f"case {seed}: {text}"  # noqa: E731
        torch.testing.assert_close(found[1].value, wanted[1].value, rtol=1e-4, atol=1e-6, msg=say)
        torch.testing.assert_close(found[1].grad, wanted[1].grad, rtol=1e-4, atol=1e-6, msg=say)


def test_what_the_kernels_do_not_cover_goes_to_the_original():
    student, teacher = randn(2, 3, 11, seed=1).float(), randn(2, 3, 11, seed=2).float()
    probabilities = student.softmax(-1), teacher.softmax(-1)
    cases = [
        (ours.gold_jsd_loss, probabilities, {"logits_are_probs": True, "beta": 0.3}),
        *((ours.iw_opd_jsd_loss, (student, teacher), {"top_k": 4, "beta": beta}) for beta in BETAS),
        (ours.generalized_jsd_loss, (student, teacher), {"reduction": "none"}),
    ]
    for loss, sides, options in cases:
        assert torch.equal(loss(*sides, **options), theirs(*LOSSES[loss])(*sides, **options))


def test_patch():
    places = [CHUNKED, *LOSSES.values()]
    with fastkd.patch("trl") as patched:
        assert len(patched.replaced) + len(patched.skipped) == len(places) and len(patched.replaced) >= 2, patched
        gkd = importlib.import_module(LOSSES[ours.generalized_jsd_loss][0]).GKDTrainer
        assert gkd.generalized_jsd_loss is ours.generalized_jsd_loss
        assert importlib.import_module(CHUNKED[0])._chunked_divergence_loss is ours.chunked_divergence_loss
        x = randn(2, 3, 5, seed=1).float()
        assert gkd.generalized_jsd_loss(x, x + 1, reduction="none").shape == x.shape  # the original's
    assert gkd.generalized_jsd_loss.__module__.startswith("trl.")
