"""Rows before training: classes by name, what is held out, dirty files, what is cut, the order of the batches."""

import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import tiny

pytest.importorskip("transformers")
from datasets import Dataset
from test_methods import pair
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastkd.cli import arguments
from fastkd.train import agreement, data, metrics, tokenisation
from fastkd.train.trainer import DistillTrainer


def load(folder, text: str = "", name: str = "train.csv", task: str = "classification", evaluates=True, **options):
    """What data.load makes of a file with this text."""
    (folder / name).write_text(text)
    options = arguments.DataArguments(train_file=str(folder / name), **options)
    return data.load(options, task, evaluates=evaluates)


def reviews(labels) -> str:
    return "text,label\n" + "".join(f"text {i},{label}\n" for i, label in enumerate(labels))


def numbered(corpus, names) -> list[int]:
    data.number_classes(corpus, dict(enumerate(names)))
    return corpus.train["label"][:]


def test_classes_are_numbered_by_the_names_of_the_teachers_outputs(tmp_path):
    corpus = load(tmp_path, reviews(["loc", "NUM", "loc", "hum"]), evaluates=False)
    assert numbered(corpus, ["Num", "Loc", "Hum", "Desc"]) == [1, 0, 1, 2]
    assert corpus.names == ["Num", "Loc", "Hum", "Desc"]


def test_a_hub_data_sets_class_names_are_matched_too():
    corpus = data.Corpus(data.movie_reviews("validation"), None, "text", None, "label", found=[0, 1])
    before = corpus.train["label"][:]
    assert numbered(corpus, ["POSITIVE", "NEGATIVE"]) == [1 - x for x in before]


def test_a_class_whose_only_row_is_held_out_has_a_number(tmp_path):
    corpus = load(tmp_path, reviews(range(40)))
    assert numbered(corpus, [f"LABEL_{i}" for i in range(40)]) and len(set(corpus.train["label"])) == 38
    assert len(corpus.names) == 40


def test_outputs_without_names_leave_the_sorted_order(tmp_path):
    corpus = load(tmp_path, reviews(["b", "a", "b"]), evaluates=False)
    assert numbered(corpus, ["LABEL_0", "LABEL_1"]) == [1, 0, 1]
    numbers = load(tmp_path, reviews([1, 0, 1]), name="numbers.csv", evaluates=False)
    assert numbered(numbers, ["no", "yes"]) == [1, 0, 1]


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["good", "bad"], "the data's labels are neg, pos, and the teacher's are good, bad"),
        (["LABEL_0", "LABEL_1", "LABEL_2"], "teacher: has 3 outputs, but the data has 2 classes (neg, pos)"),
    ],
)
def test_classes_that_disagree_are_refused(names, sentence, tmp_path):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        numbered(load(tmp_path, reviews(["pos", "neg", "pos"]), evaluates=False), names)


@pytest.mark.parametrize("label", ["1.0", "0.5"])
def test_labels_of_which_one_is_a_fraction_are_refused(label, tmp_path):
    with pytest.raises(ValueError, match="holds fractions; for a number to predict choose --task regression"):
        numbered(load(tmp_path, reviews(["0.25", label, "0.75"]), evaluates=False), ["LABEL_0", "LABEL_1"])


def test_whole_numbers_written_as_fractions_are_classes(tmp_path):
    found = numbered(load(tmp_path, reviews(["1.0", "0.0"]), evaluates=False), ["LABEL_0", "LABEL_1"])
    assert found == [1, 0] and all(isinstance(x, int) for x in found)


def test_regression_with_a_teacher_of_several_outputs_is_refused():
    teacher, student = tiny.model("bert"), tiny.model("bert")
    with pytest.raises(ValueError, match="teacher: has 2 outputs, and regression is about one number"):
        agreement.check_pair(student, teacher, "regression")


@pytest.mark.parametrize(("found", "rows", "stops"), [(0.5, 40, True), (0.51, 40, False), (0.0, 10, False)])
def test_a_teacher_at_chance_stops_the_run(found, rows, stops):
    trainer = SimpleNamespace(
        task="classification", teacher=None, eval_dataset={"labels": [i % 2 for i in range(rows)]},
        evaluate_other=lambda teacher: {"eval_balanced_accuracy": found},
    )  # fmt: skip
    trainer.eval_dataset = Dataset.from_dict(trainer.eval_dataset)
    expected = pytest.raises(RuntimeError, match=r"chance is 50\.0%.*Fine-tune it.*--allow_weak_teacher")
    with expected if stops else nullcontext():
        agreement.check_teacher(trainer)


def test_balanced_accuracy_does_not_reward_the_most_frequent_class():
    logits = torch.tensor([[1.0, 0.0]]).expand(10, 2).numpy()
    wanted = torch.tensor([0] * 9 + [1]).numpy()
    found = metrics.of_task("classification")(SimpleNamespace(predictions=logits, label_ids=wanted))
    assert (found["accuracy"], found["balanced_accuracy"]) == (0.9, 0.5)


@pytest.mark.parametrize(("rows", "held"), [(2, 1), (40, 2), (50_000, 2000)])
def test_a_part_of_the_training_set_is_held_out(rows, held):
    found = []
    for _ in range(2):
        corpus = data.Corpus(Dataset.from_dict({"text": list(map(str, range(rows)))}), None, "text", None, None)
        data._hold_out(corpus, seed=3)
        found.append((corpus.train["text"][:], corpus.validation["text"][:]))
    assert found[0] == found[1]
    train, validation = map(set, found[0])
    assert len(validation) == held and not train & validation and len(train | validation) == rows


def test_without_evaluation_nothing_is_held_out(tmp_path):
    text = reviews(["a", "b"] * 20)
    corpus = load(tmp_path, text)
    assert (len(corpus.train), len(corpus.validation), corpus.held_out) == (38, 2, True)
    corpus = load(tmp_path, text, evaluates=False)
    assert (len(corpus.train), corpus.validation, corpus.held_out) == (40, None, False)


def test_fewer_training_rows_are_a_random_choice(tmp_path):
    text = reviews(["a"] * 50 + ["b"] * 50)
    chosen = [load(tmp_path, text, max_train_samples=20, evaluates=False).train["label"][:] for _ in range(2)]
    assert chosen[0] == chosen[1] and len(chosen[0]) == 20 and set(chosen[0]) == {"a", "b"}


DIRTY = [
    ("text,label\na,x\nb,\n", {}, "label_column: {} has no label in column 'label', row 2"),
    ("text,label\n1,x\n2,y\n", {}, "text_column: {} has no text in column 'text', row 1 (the first row of data is 1): 1;"),
    ("text,other,label\na,b,x\na,,y\n", {"pair_column": "other"}, "pair_column: {} has an empty second text in column 'other', row 2"),
    ("text,label\na,1\nb,c\n", {"task": "regression"}, "label_column: {} has no number in column 'label', row 1"),
    ("text,label\n,x\n ,y\n", {}, "text_column: every row of column 'text' of {} is empty"),
    ("text,lable\na,x\n", {"label_column": "class"}, "label_column: {} has no column 'class'; it has 'text', 'lable'"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "options", "sentence"), DIRTY)
def test_dirty_data_is_refused_by_file_column_and_row(text, options, sentence, tmp_path):
    with pytest.raises(ValueError, match=re.escape(sentence.format(tmp_path / "train.csv"))):
        load(tmp_path, text, **options)


@pytest.mark.parametrize("name", ["train.csv", "train.jsonl", "train.txt"])
def test_a_file_that_is_not_utf8_is_refused_by_its_line(name, tmp_path):
    lines = {"train.csv": b"text,label\ncaf\xe9,x\n", "train.jsonl": b'{"text": "a"}\n{"text": "caf\xe9"}\n'}
    (tmp_path / name).write_bytes(lines.get(name, b"a\ncaf\xe9\n"))
    options = arguments.DataArguments(train_file=str(tmp_path / name))
    with pytest.raises(ValueError, match=rf"train_file: .*{name} is not UTF-8: line 2 has the byte 0xe9"):
        data.load(options, "masked_lm")


def test_a_file_that_cannot_be_read_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"train_file: .*train\.jsonl cannot be read: "):
        load(tmp_path, '{"text": "a"}\n{"text": \n', name="train.jsonl", task="masked_lm")


def test_words_that_look_like_missing_values_are_texts_and_labels(tmp_path):
    corpus = load(tmp_path, "text,label\nnull,none\nNA,some\n", evaluates=False)
    assert corpus.train["text"][:] == ["null", "NA"] and corpus.train["label"][:] == ["none", "some"]


@pytest.fixture
def tokenizer():
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[END]", *"abcdefg"])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]")


def summary(corpus, tokenizer, length: int, task="classification", **options) -> list[str]:
    tokens, whole = {}, {}
    for split in ("train", "validation"):
        rows = getattr(corpus, split)
        if rows is not None:
            tokens[split], whole[split] = tokenisation.tokenise(rows, corpus, tokenizer, task, length, **options)
    return tokenisation.summary(corpus, tokens, whole, length, task)


def test_the_summary_says_what_is_dropped_held_out_and_cut(tokenizer, tmp_path):
    text = "text,label\n" + "a b c d e,x\n" * 10 + "a b,y\n" * 9 + "a b c,y\n" + " ,y\n"
    corpus = load(tmp_path, text, evaluates=False)
    data.number_classes(corpus)
    assert summary(corpus, tokenizer, 3) == [
        "rows: 20 train",
        "dropped: 1 rows without text",
        "classes: x 10, y 10",
        "tokens of a text: median 4, 95 % have at most 5, the longest 5",
        "cut: 10 of 20 texts to --max_length 3; 20 of 71 tokens (28.2%) are lost",
    ]
    assert not any(line.startswith("cut") for line in summary(corpus, tokenizer, 5))
    held = summary(load(tmp_path, text), tokenizer, 5)
    assert held[0].startswith("rows: 19 train and 1 validation, held out of the training set")


def test_text_without_labels_has_none_and_no_evaluation(tokenizer, tmp_path):
    corpus = load(tmp_path, "a b\nc d\n", name="train.txt")
    assert (corpus.label, corpus.validation) == (None, None)
    rows, _ = tokenisation.tokenise(corpus.train, corpus, tokenizer, "classification", 8)
    assert "labels" not in rows.column_names
    assert "labels: none, so there is no evaluation" in summary(corpus, tokenizer, 8)


UNLABELLED = [
    ("kd:alpha=1", None), ("bert_emd", None), ("minilm:share=1", None), ("fcd:share=1", None), ("tinybert", None),
    ("kd", "kd:alpha=1"), ("pkd", "pkd:alpha=1"), ("fcd", "fcd:share=1"), ("minilm", "minilm:share=1"),
    ("fcd + kd", "kd:alpha=1"), ("codir:negatives=in_batch,feat_dim=8", "codir:beta=1"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "wanted"), UNLABELLED)
def test_without_labels_a_method_that_reads_them_is_refused_before_training(method, wanted, tmp_path):
    teacher, student = pair("bert", "classification")
    rows = tiny.dataset("classification").remove_columns("labels")
    options = {"args": tiny.arguments(tmp_path), "train_dataset": rows}
    if wanted is None:
        DistillTrainer(student, teacher, method, **options).train()
    else:
        with pytest.raises(ValueError, match=f"labels: .* reads them, and the training set has none.*{wanted}"):
            DistillTrainer(student, teacher, method, **options)


def test_a_run_by_length_resumed_within_an_epoch_is_the_same(tmp_path):
    def run(folder, checkpoint=None):
        teacher, student = pair("bert", "classification")
        for module in student.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1
        args = tiny.arguments(
            tmp_path / folder, max_steps=9, per_device_train_batch_size=3, save_strategy="steps", save_steps=5,
            learning_rate=1e-2, train_sampling_strategy="group_by_length",
        )  # fmt: skip
        torch.manual_seed(len(folder))  # a fresh process starts elsewhere
        trainer = DistillTrainer(student, teacher, "kd", args=args, train_dataset=tiny.dataset("classification"))
        trainer.train(resume_from_checkpoint=checkpoint)
        return student.state_dict()

    straight = run("straight")
    resumed = run("again", str(tmp_path / "straight" / "checkpoint-5"))
    assert all(torch.equal(x, straight[name]) for name, x in resumed.items())
