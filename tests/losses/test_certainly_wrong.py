"""Inputs whose values show that something else was meant: additive masks, attention probabilities, vectors without unit length."""

import pytest
import torch
from torch.nn.functional import normalize

import fastkd
from fastkd import checks

HIDDEN = [torch.randn(3, 2, 4, 6, generator=torch.Generator().manual_seed(i)).unbind() for i in range(2)]
SCORES = [torch.randn(3, 2, 2, 4, 4, generator=torch.Generator().manual_seed(i)).unbind() for i in range(2)]
ONES = torch.ones(2, 4)


def bert_emd(student_attention=None, teacher_attention=None, mask=ONES):
    loss = fastkd.BertEMDLoss(3, 3)(student_attention, teacher_attention, *HIDDEN, mask)
    return sum(loss)


def softmax(scores):
    return [x.softmax(-1) for x in scores]


WRONG = [
    (lambda: bert_emd(softmax(SCORES[0]), SCORES[1]), r"student_attention\[0\]: expected scores, and these are prob"),
    (lambda: bert_emd(SCORES[0], [*SCORES[1][:2], SCORES[1][2].softmax(-1)]), r"teacher_attention\[2\]: expected scores"),
    (lambda: bert_emd([x.bfloat16() for x in softmax(SCORES[0])], SCORES[1]), r"student_attention\[0\]: expected scores"),
    (lambda: fastkd.TinyBERTLoss()(softmax(SCORES[0]), SCORES[1], *HIDDEN), r"student_attention\[0\]: expected scores"),
    (lambda: bert_emd(mask=-1e4 * torch.eye(4)[:2]), "mask: must be 1 .* an additive mask .* pass mask == 0"),
    (lambda: bert_emd(mask=ONES * 0.5), "mask: must be 1 where something counts and 0 elsewhere"),
    (lambda: fastkd.FCDLoss()(HIDDEN[0][0], HIDDEN[1][0], mask=-1e4 * torch.eye(4)[:2]), "mask: must be 1"),
    (lambda: fastkd.divergence(ONES, ONES, mask=torch.tensor([0.0, -1e4])), "mask: must be 1"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), WRONG)
def test_it_is_refused_with_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("mask", [ONES, ONES.bool(), ONES.long(), ONES.half(), torch.eye(4)[:2]])
def test_masks_of_ones_and_zeros_of_any_dtype(mask):
    assert bert_emd(mask=mask).isfinite()


@pytest.mark.parametrize(
    "scores",
    [
        torch.rand(2, 2, 4, 4, generator=torch.Generator().manual_seed(0)),  # in [0, 1], with other sums
        torch.ones(2, 2, 1, 1),  # a single key, of which nothing can be told
        torch.cat([torch.zeros(1, 2, 4, 4).softmax(-1), torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))]),
        torch.empty(0, 2, 4, 4),
    ],
)  # fmt: skip
def test_scores_that_only_look_like_probabilities_in_part(scores):
    checks.scores("scores", scores, None)


@pytest.mark.parametrize("which", ["query", "positive"])
def test_unit_length_is_checked_on_request(which, monkeypatch):
    vectors = {name: normalize(torch.randn(4, 8), dim=1) for name in ("query", "positive", "bank")}
    longer = {**vectors, which: vectors[which] * 1.1}
    assert fastkd.info_nce_loss(**longer).isfinite()  # a loss all the same
    monkeypatch.setattr(checks, "CHECK_VALUES_EVERYWHERE", True)
    fastkd.info_nce_loss(**vectors)
    with pytest.raises(
        ValueError, match=f"{which}: rows must have unit length under FASTKD_CHECK=1; torch.nn.functional.n"
    ):
        fastkd.info_nce_loss(**longer)
