"""Errors teach: which argument, what came, what to do."""

import pytest
import torch

import fastkd
from fastkd import functional as F

X = torch.randn(2, 5, 8)
L = torch.randn(4, 7)
H = torch.randn(2, 3, 5, 4)
Q = torch.randn(3, 6)
BANK = torch.randn(9, 6)
INDEX = torch.zeros(3, 2, dtype=torch.int64)

# (the call, what its message must contain): the argument's name first, then what came or what to do
WRONG = {
    "shape of the student": (lambda: F.gram_correlation_loss(X[0], X), "student_hidden: expected shape [B, N, D], got float32[5, 8]"),
    "not a tensor": (lambda: F.divergence([1.0], L), "student_logits: expected a tensor [..., V], got list"),
    "integer logits": (lambda: F.divergence(L.long(), L), "cast it, for example with .float()"),
    "batch differs": (lambda: F.gram_correlation_loss(X, X[:1]), "student_hidden and teacher_hidden must agree in their first 2 axes"),
    "vocabularies differ": (lambda: F.divergence(L, L[:, :5]), "select the teacher's columns"),
    "teacher with a graph": (lambda: F.divergence(L, L.clone().requires_grad_()), "teacher_logits requires grad"),
    "mask of another shape": (lambda: F.divergence(L, L, mask=torch.ones(3)), "mask: expected shape [...] = [4]"),
    "unknown kind": (lambda: F.divergence(L, L, kind="kl"), "kind: expected one of 'forward_kl'"),
    "unknown reduction": (lambda: F.divergence(L, L, reduction="avg"), "expected one of 'mean', 'batchmean', 'sum', 'none'"),
    "temperature 0": (lambda: F.divergence(L, L, temperature=0), "temperature: must be a finite number > 0, got 0"),
    "beta beyond its end": (lambda: F.divergence(L, L, kind="jsd", beta=1.1), "beta: must lie in [0, 1]"),
    "sparse teacher out of range": (
        lambda: F.divergence(L, fastkd.TopK(torch.full((4, 2), 7), torch.zeros(4, 2))),
        "teacher_logits.indices: indices must lie in [0, 7)",
    ),
    "sparse teacher has no logits": (
        lambda: F.divergence(L, fastkd.TopK(torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4, 2)), kind="mse"),
        "use soft_ce or forward_kl",
    ),
    "reverse KL without a tail": (
        lambda: F.divergence(L, fastkd.TopK(torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4, 2)), kind="reverse_kl"),
        "tail=True",
    ),
    "official grouping under a mask": (
        lambda: F.gram_correlation_loss(X, X, level="sequence", grouping="official", mask=torch.tensor([[1, 1, 1, 1, 0]] * 2)),
        "grouping='official' has no defined meaning",
    ),
    "no layers": (lambda: F.layer_costs([], [X]), "student_hidden: the list of layers is empty"),
    "not a list of layers": (lambda: F.layer_costs(X, [X]), "student_hidden: expected a list with one entry per layer"),
    "widths of layers differ": (lambda: F.layer_costs([X], [X[..., :4]]), "project the student to the teacher's width"),
    "head counts differ": (lambda: F.attention_costs([(H, H)], [(H[:, :2], H[:, :2])]), "heads='mean'"),
    "batches of scores differ": (
        lambda: F.attention_costs([torch.randn(2, 3, 4, 4)], [torch.randn(3, 3, 4, 4)]),
        "teacher_attention[0] and student_attention[0] must be of the same batch and length",
    ),
    "lengths of scores differ": (
        lambda: F.attention_costs([torch.randn(2, 3, 4, 4)], [torch.randn(2, 3, 5, 5)]),
        "teacher_attention[0] and student_attention[0] must be of the same batch and length",
    ),
    "queries and keys of other lengths": (lambda: F.attention_costs([(H, H[:, :, :4])], [(H, H)]), "student_attention[0]: q and k must be"),
    "clamp in words": (lambda: F.layer_costs([X], [X], clamp="low"), "clamp: expected a number, got 'low'"),
    "temperature in words": (lambda: F.divergence(L, L, temperature="2"), "temperature: must be a finite number > 0, got '2'"),
    "no temperature": (lambda: F.divergence(L, L, temperature=None), "temperature: must be a finite number > 0, got None"),
    "mask as a list": (lambda: F.divergence(L, L, mask=[1, 1, 1, 1]), "mask: expected a tensor, got a list of 4"),
    "tail that is no mass": (
        lambda: F.divergence(L, fastkd.TopK(torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4, 2), False)),
        "teacher_logits.tail: expected None, True or",
    ),
    "relation heads in words": (lambda: F.relation_kl_loss([H], [H], heads="3"), "heads: expected a whole number > 0, got '3'"),
    "label outside the vocabulary": (
        lambda: F.linear_divergence(L, L, L, L, labels=torch.tensor([0, 1, 4, -100]), hard_weight=1.0),
        "labels: a label that counts must lie in [0, 4)",
    ),
    "half a layer": (lambda: fastkd.BertEMDLoss(2.5, 3), "n_student: expected a whole number > 0, got 2.5"),
    "relations do not pair up": (lambda: F.relation_kl_loss([H], [H, H]), "student_relations and teacher_relations must pair up one to one"),
    "relation heads": (lambda: F.relation_kl_loss([H], [H], heads=5), "heads: must divide the width of student_relations[0], 3·4 = 12"),
    "negative mass": (lambda: F.transport(torch.rand(2, 3), torch.tensor([1.5, -0.5])), "a: masses must be finite and >= 0"),
    "NaN cost": (lambda: F.transport(torch.full((2, 3), float("nan"))), "cost: costs must be finite"),
    "unequal mass": (lambda: F.transport(torch.rand(2, 3), torch.ones(2)), "a and b must have the same total mass"),
    "bank of another width": (lambda: F.info_nce_loss(Q, Q, BANK[:, :4]), "bank: expected the width of query, 6"),
    "index out of range": (lambda: F.info_nce_loss(Q, Q, BANK, INDEX + 9), "index: indices must lie in [0, 9)"),
    "only the positive": (
        lambda: F.nce_loss(Q, BANK, INDEX[:, :1], n_data=9, temperature=0.1, z=1.0),
        "index: expected the positive and at least one negative",
    ),
    "transposed head": (lambda: F.linear_divergence(L, L.t(), L, L), "a head is [V, D], as nn.Linear.weight"),
    "heads of different size": (
        lambda: F.linear_divergence(L, torch.randn(20, 7), L, torch.randn(30, 7)),
        "if the student's vocabulary is a subset, pass vocab=",
    ),
    "device": (
        lambda: F.divergence(L, torch.empty(4, 7, device="meta")),
        "teacher_logits is on meta, but student_logits is on cpu; move it with teacher_logits.to(student_logits.device)",
    ),
    "layer count of BERT-EMD": (
        lambda: fastkd.BertEMDLoss(3, 2)(None, None, [X, X], [X, X]),
        "expected 3",
    ),
    "lists of FCD": (lambda: fastkd.FCDLoss()([X], [X, X]), "must pair up one to one"),
    "kept ids where a map belongs": (lambda: fastkd.GLMDLoss(vocab=[1, 2]), "vocab: expected a VocabMap, got a list of 2"),
    "no kept ids": (lambda: fastkd.VocabMap([], 10), "kept_ids: is empty; keep at least one id"),
}  # fmt: skip


def test_a_command_names_the_extra_that_it_lacks(capsys, monkeypatch):
    from fastkd import cli

    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name="datasets.arrow")

    monkeypatch.setattr(cli.importlib, "import_module", missing)
    assert cli.main(["distill"]) == 1
    assert capsys.readouterr().err == "fastkd distill: datasets.arrow is not installed; pip install 'fastkd[train]'\n"


@pytest.mark.parametrize("mistake", WRONG)
def test_error_names_the_argument(mistake):
    call, message = WRONG[mistake]
    with pytest.raises(ValueError) as error:  # noqa: PT011 - what it must say is checked below, without escapes
        call()
    assert message in str(error.value)


def test_a_teacher_under_no_grad_may_be_a_parameter():
    with torch.no_grad():
        F.divergence(L, L.clone().requires_grad_())


def test_nothing_counts_is_zero_with_a_graph():
    leaf = L.clone().requires_grad_()
    loss = F.divergence(leaf, L * 2, mask=torch.zeros(4))
    assert loss.item() == 0
    loss.backward()
    assert (leaf.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_reach_inside(dtype):
    """Under autocast the losses still compute in float32: the reference's matrix products would lose their digits."""
    student = X.clone().requires_grad_()
    outside = F.gram_correlation_loss(student, X + 0.1)
    with torch.autocast("cpu", dtype):
        inside = F.gram_correlation_loss(student, X + 0.1)
    assert inside.dtype == torch.float32 and torch.equal(inside, outside)


def test_scaled_half_precision_gradients_come_back():
    """What fp16's GradScaler does: a large upstream factor, gradients in the student's dtype, finite."""
    student = L.half().requires_grad_()
    (F.divergence(student, L, temperature=2.0) * 2.0**10).backward()
    assert student.grad.dtype == torch.float16 and student.grad.isfinite().all() and student.grad.abs().sum() > 0


def test_a_library_older_than_its_sources_is_reported():
    from fastkd import backends

    if backends.UNAVAILABLE["cpu"] is not None:
        pytest.skip("the C++ kernels are not built")
    with pytest.raises(ImportError, match="has no op of_tomorrow, so it is older than the sources; build it again"):
        backends.kernels("divergence", "of_tomorrow", "of_tomorrow")
