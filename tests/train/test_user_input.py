"""DistillTrainer on ordinary data: what it takes, what it leaves as it is, and one sentence for each mistake."""

import copy

import pytest
import torch

import tiny

pytest.importorskip("transformers")
from test_methods import pair
from transformers import logging

from fastkd.train.trainer import DistillTrainer

logging.set_verbosity_error()


class Rows(torch.utils.data.Dataset):
    """Examples made on demand, with no columns."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return self.data[i]


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter(self.data)


def with_text(data):
    return data.add_column("text", ["a sentence"] * len(data))


@pytest.mark.parametrize("method", ["kd", "codir:nce_k=3,feat_dim=8", "minilm:share=1"])
@pytest.mark.parametrize("kind", [Rows, Stream, with_text, lambda data: Rows(with_text(data))])
def test_ordinary_data_train_as_columns_do(kind, method, tmp_path):
    """A map-style data set, an iterable one, and text columns that were kept."""
    found = []
    for data in (tiny.dataset("classification"), kind(tiny.dataset("classification"))):
        teacher, student = pair("bert", "classification")
        torch.manual_seed(0)
        args = tiny.arguments(tmp_path, max_steps=2)
        if kind is Stream and method.startswith("codir") and isinstance(data, Stream):
            with pytest.raises(
                ValueError, match="train_dataset: codir keeps a vector of every example, so it needs a data"
            ):
                DistillTrainer(student, teacher, method, args=args, train_dataset=data)
            return
        trainer = DistillTrainer(student, teacher, method, args=args, train_dataset=data, eval_dataset=data)
        trainer.train()
        found.append((trainer.state.log_history[1]["loss"], trainer.evaluate()["eval_loss"]))
    if kind is Stream:  # not shuffled, and here that changes nothing: a step takes all of it
        assert found[0] == pytest.approx(found[1], rel=1e-5)
    else:
        assert found[0] == found[1]


@pytest.mark.parametrize("method", ["kd", "minilm:share=1"])
def test_what_the_user_passed_stays_as_it_was(method, tmp_path):
    teacher, student = pair("bert", "classification")
    args, data = tiny.arguments(tmp_path), tiny.dataset("classification")
    before, configuration, columns = copy.deepcopy(args).to_dict(), teacher.config.to_dict(), list(data.column_names)
    trainer = DistillTrainer(student, teacher, method, args=args, train_dataset=data)
    trainer.train()
    assert args.to_dict() == before and not trainer.args.logging_nan_inf_filter
    assert teacher.config.to_dict() == configuration and data.column_names == columns
    assert teacher.config._attn_implementation == ("fastkd" if method.startswith("minilm") else "sdpa")


def test_predictions_need_no_labels(tmp_path):
    teacher, student = pair("bert", "classification")
    data = tiny.dataset("classification")
    trainer = DistillTrainer(student, teacher, "kd", args=tiny.arguments(tmp_path), train_dataset=data)
    unlabelled = with_text(data.remove_columns("labels"))
    assert (trainer.predict(unlabelled).predictions == trainer.predict(data).predictions).all()


MISTAKES = [
    ({"method": None}, {}, "a teacher was given, and method=None; name one, for example method='kd'"),
    ({"teacher": None}, {}, "teacher: method='kd' needs one, got None"),
    (
        {"method": "codir:nce_k=3,feat_dim=8"},
        {"without": "example_id"},
        "give the data set a column 'example_id' with 0, 1",
    ),
    (
        {"method": "codir:nce_k=3,negatives=label"},
        {"without": "labels"},
        "negatives=label needs labels, and the training set",
    ),
    (
        {},
        {"without": "labels"},
        "labels: kd reads them, and the training set has none; give it a column 'labels' (.*), or choose kd:alpha=1",
    ),
    ({"method": "kd:weight=abc"}, {}, "kd:weight: expected a finite number, got 'abc'"),
    ({}, {"labels": 7}, r"labels: must lie in 0 to 1, or be -100, got 7; number the classes from 0"),
    ({"method": "fcd:share=0"}, {"labels": -3}, r"labels: must lie in 0 to 1, or be -100, got -3"),
    ({"teacher_cache": "folder"}, {"without": "example_id"}, "train_dataset has no column 'example_id'; add one"),
]


@pytest.mark.parametrize(("options", "change", "message"), MISTAKES)
def test_mistakes_get_one_sentence(options, change, message, tmp_path):
    teacher, student = pair("bert", "classification")
    data = tiny.dataset("classification")
    if "without" in change:
        data = data.remove_columns(change["without"])
    if "labels" in change:
        data = data.remove_columns("labels").add_column("labels", [0] * 7 + [change["labels"]])
    options = {"teacher": teacher, "method": "kd", **options}
    with pytest.raises(ValueError, match=message):
        DistillTrainer(student, args=tiny.arguments(tmp_path), train_dataset=data, **options).train()


@pytest.mark.parametrize(("method", "family"), [("kd", "gpt2"), ("distilbert", "bert"), ("fcd:share=0", "bert")])
def test_labels_beyond_the_vocabulary_get_one_sentence(method, family, tmp_path):
    task = "causal_lm" if family == "gpt2" else "masked_lm"
    teacher, student = pair(family, task)
    data = tiny.dataset(task)
    labels = [[*row[:-1], 600] for row in data["labels"]]
    trainer = DistillTrainer(
        student, teacher, method, task=task, args=tiny.arguments(tmp_path),
        train_dataset=data.remove_columns("labels").add_column("labels", labels),
    )  # fmt: skip
    with pytest.raises(ValueError, match="labels: must lie in 0 to 59, or be -100, got 600"):
        trainer.train()
