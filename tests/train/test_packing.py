"""Packed rows: each document as if it were alone, for the models, the labels, the counts and the methods."""

from itertools import chain

import pytest
import torch

import tiny

pytest.importorskip("transformers")
from datasets import Dataset
from test_methods import pair
from transformers import logging

from fastkd.train import packing
from fastkd.train.batch import UNITS, count_units
from fastkd.train.trainer import DistillTrainer, arguments_of, real_tokens

logging.set_verbosity_error()
LENGTHS = (5, 1, 9, 3, 4, 2)
DECODERS = ("gpt2", "llama", "qwen2")


def documents() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(5, tiny.VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]


def packed(length: int) -> Dataset:
    return packing.pack(Dataset.from_dict({"input_ids": documents()}), length)


def batch_of(rows) -> dict:
    return packing.Collator(1)([rows[i] for i in range(len(rows))])


def test_no_token_is_lost_and_positions_begin_anew_with_a_document_and_a_row():
    rows = packed(10)
    assert list(chain(*rows["input_ids"])) == list(chain(*documents()))
    assert list(map(len, rows["input_ids"])) == [10, 10, 4]
    assert rows["position_ids"][:] == [[0, 1, 2, 3, 4, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 1, 2, 0, 1], [0, 1, 0, 1]]
    assert rows["example_id"][:] == [0, 1, 2]


def test_a_document_ends_with_one_end_of_sequence_token():
    assert packing.ended([5, 6], 2) == packing.ended([5, 6, 2], 2) == [5, 6, 2]
    assert packing.ended([5, 6], None) == [5, 6]


def test_labels_and_counts_never_cross_a_boundary():
    batch = batch_of(packed(10))
    labels = batch["labels"]
    assert torch.equal(labels == -100, batch["position_ids"] == 0)
    assert torch.equal(labels[labels != -100], batch["input_ids"][labels != -100])
    assert batch["attention_mask"].sum(1).tolist() == [10, 10, 4]
    counts = dict(zip(UNITS, count_units("causal_lm", real_tokens(batch), labels).tolist(), strict=True))
    assert counts["tokens"] == 24 and counts["labels"] == 24 - 8  # six documents, two of them in two rows


@pytest.mark.parametrize("family", DECODERS)
def test_the_logits_of_a_packed_document_are_those_of_the_document_alone(family):
    model = tiny.model(family, "causal_lm").eval()
    accepts = arguments_of(model)
    batch = batch_of(packed(24))
    inputs = {name: x for name, x in packing.model_inputs(batch).items() if name in accepts}
    together = model(**inputs).logits[0]
    for ids, logits in zip(documents(), together.split(LENGTHS), strict=True):
        alone = model(input_ids=torch.tensor([ids])).logits[0]
        torch.testing.assert_close(logits, alone, rtol=1e-5, atol=1e-5)
    packing.check_model(model, accepts)


def test_a_model_that_mixes_the_documents_is_refused():
    model = tiny.model("gpt2", "causal_lm")
    with pytest.raises(ValueError, match="pack: a GPT2LMHeadModel cannot distinguish the documents of a row"):
        packing.check_model(model, {"input_ids", "use_cache"})
    assert model.training


METHODS = ["kd", "glmd:normalize=tokens", "distilbert", "forward_kl", "reverse_kl", "jsd", "skew_kl"]


@pytest.mark.parametrize("method", METHODS)
def test_the_step_of_packed_rows_is_that_of_the_documents(method, tmp_path):
    """Three rows in three micro-batches against six documents in one: loss and parameters."""
    ids = documents()
    longest = max(LENGTHS)
    alone = Dataset.from_dict({
        "input_ids": [x + [1] * (longest - len(x)) for x in ids],
        "attention_mask": [[1] * len(x) + [0] * (longest - len(x)) for x in ids],
        "labels": [x + [-100] * (longest - len(x)) for x in ids], "example_id": list(range(len(ids))),
    })  # fmt: skip
    found = []
    for rows, collator, accumulation in ((packed(15), packing.Collator(1), 2), (alone, None, 1)):
        teacher, student = pair("llama", "causal_lm")
        args = tiny.arguments(
            tmp_path / str(accumulation), per_device_train_batch_size=len(rows) // accumulation, optim="sgd",
            gradient_accumulation_steps=accumulation, learning_rate=0.1,
        )  # fmt: skip
        trainer = DistillTrainer(
            student, teacher, method, task="causal_lm", args=args, train_dataset=rows, data_collator=collator
        )
        trainer.train()
        weights = torch.cat([p.detach().flatten() for p in student.parameters()])
        found.append((trainer.state.log_history[0]["loss"], weights))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["fcd", "bert_emd", "tinybert", "minilm", "minilmv2:relation_heads=4", "kd + fcd"])
def test_methods_that_compare_tokens_with_each_other_are_refused(method, tmp_path):
    teacher, student = pair("llama", "causal_lm")
    args = tiny.arguments(tmp_path)
    with pytest.raises(ValueError, match=r"pack: \w+ compares the tokens of a row with each other.*choose kd, glmd"):
        DistillTrainer(student, teacher, method, task="causal_lm", args=args, train_dataset=packed(10))
