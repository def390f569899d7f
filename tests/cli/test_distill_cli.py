"""`fastkd distill` from files to an exported student and a report; the packaged dataset; error messages for wrong input."""

import csv
import gzip
import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
import yaml

import tiny

pytest.importorskip("transformers")
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

import fastkd
from fastkd.cli import arguments, distill, main
from fastkd.cli import models as loading
from fastkd.train import data, student

WORDS = [  # moods first: three good, three bad
    "good", "fine", "great", "bad", "poor", "awful", "film", "plot", "actor", "was", "is", "the", "a", "it", "very",
    "quite",
]  # fmt: skip
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def save_pair(folder: Path, family: str, task: str, **sizes) -> Path:
    """A tiny teacher with a word tokenizer, as from_pretrained finds them."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=ends
    )
    names = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    PreTrainedTokenizerFast(tokenizer_object=raw, **names).save_pretrained(folder)
    tiny.model(family, task, vocab_size=len(vocabulary), **sizes).save_pretrained(folder)
    return folder


def rows(count: int = 40) -> list[tuple[str, str]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(count):
        others = [WORDS[6 + int(x)] for x in torch.randint(0, 10, (1 + i % 6,), generator=generator)]
        mood = WORDS[i % 2 * 3 + i % 3]
        found.append((" ".join([*others, mood]), "pos" if i % 2 == 0 else "neg"))
    return found


@pytest.fixture
def files(tmp_path):
    """train.tsv and valid.csv with columns text, label, score, and words.txt."""
    for name, delimiter in (("train.tsv", "\t"), ("valid.csv", ",")):
        with open(tmp_path / name, "w", newline="") as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerow(["text", "label", "score"])
            writer.writerows([text, label, 0.25 + (label == "pos") / 2] for text, label in rows())
    (tmp_path / "words.txt").write_text("\n".join(text for text, _ in rows()))
    return tmp_path


def flags(folder: Path, **changes) -> list[str]:
    options = {
        "teacher": folder / "teacher", "student_layers": "every:2", "train_file": folder / "train.tsv",
        "validation_file": folder / "valid.csv", "output_dir": folder / "run", "max_steps": 4, "logging_steps": 1,
        "per_device_train_batch_size": 8, "save_strategy": "steps", "save_steps": 2, "use_cpu": True, "report_to": "none",
        "max_length": 16, "dataloader_pin_memory": False, "eval_strategy": "steps", "eval_steps": 2,
        "allow_weak_teacher": True,
    }  # fmt: skip
    options.update(changes)
    return [x for key, value in options.items() if value is not None for x in (f"--{key}", str(value))]


def test_a_run_from_files_to_a_student_and_a_report(files, capsys):
    save_pair(files / "teacher", "bert", "classification")
    assert distill.main(flags(files, method="bert_emd:beta=0.5 + kd:weight=0.5")) == 0, capsys.readouterr().err
    run = files / "run"
    loaded, info = AutoModelForSequenceClassification.from_pretrained(run / "student", output_loading_info=True)
    assert loaded.config.num_hidden_layers == 2 and not info["unexpected_keys"] and not info["missing_keys"]
    assert AutoTokenizer.from_pretrained(run / "student").get_vocab()["good"] == 5
    page = (run / "report" / "index.html").read_text()
    assert (
        page.count("data:image/png;base64,") == 5
        and "http" not in page.replace("https://", "http://").split("<pre>")[0]
    )
    record = json.loads((run / "report" / "report.json").read_text())
    assert [row["name"] for row in record["models"]] == ["teacher", "student"]
    assert len(record["transport"]) == 4 and len(record["transport"][0]["flows"]["hidden"]) == 2
    assert record["versions"]["fastkd"] == fastkd.__version__
    assert "Terms of the loss" in capsys.readouterr().out
    resolved = yaml.safe_load((run / "run.yaml").read_text())
    assert resolved["method"] == "bert_emd:beta=0.5 + kd:weight=0.5" and "learning_rate" not in resolved


def test_a_second_run_refuses_or_resumes_and_never_overwrites(files, capsys):
    save_pair(files / "teacher", "bert", "classification")
    assert distill.main(flags(files)) == 0
    weights = (files / "run" / "student" / "model.safetensors").read_bytes()
    assert main(["distill", *flags(files)]) == 2
    assert "it is finished; choose another folder" in capsys.readouterr().err
    assert main(["distill", *flags(files, max_steps=6)]) == 2
    assert "holds another run (max_steps differ)" in capsys.readouterr().err
    run = files / "run"  # as a crash after step 2 would leave it
    for folder in ("report", "student", "checkpoint-4"):
        for file in (run / folder).iterdir():
            file.unlink()
        (run / folder).rmdir()
    assert distill.main(flags(files)) == 0
    assert "resuming from" in capsys.readouterr().out
    assert (run / "student" / "model.safetensors").read_bytes() == weights


def test_the_saved_run_repeats_itself_as_a_config(files):
    save_pair(files / "teacher", "bert", "classification")
    assert distill.main(flags(files, method="fcd:share=0.5", learning_rate=1e-3)) == 0
    again = ["--config", str(files / "run" / "run.yaml"), "--output_dir", str(files / "again")]
    assert distill.main(again) == 0
    first, second = ((files / run / "student" / "model.safetensors").read_bytes() for run in ("run", "again"))
    assert first == second


@pytest.mark.parametrize(
    ("task", "family", "method", "extra"),
    [
        ("regression", "bert", "pkd", {"label_column": "score"}),
        ("masked_lm", "bert", "distilbert", {"train_file": "words.txt", "validation_file": "words.txt"}),
        ("masked_lm", "bert", "codir:feat_dim=8", {"train_file": "words.txt", "validation_file": "words.txt"}),
        ("causal_lm", "gpt2", "jsd", {"train_file": "words.txt", "validation_file": "words.txt"}),
        ("cloze", "bert", "glmd", {"template": "{mask} film {text}", "answers": "bad,good"}),
    ],
)
def test_the_other_tasks_run(task, family, method, extra, files, capsys):
    save_pair(files / "teacher", family, task)
    extra = {key: files / value if key.endswith("file") else value for key, value in extra.items()}
    assert distill.main(flags(files, task=task, method=method, **extra)) == 0, capsys.readouterr().err
    record = json.loads((files / "run" / "report" / "report.json").read_text())
    wanted = {"regression": "pearson", "cloze": "accuracy"}.get(task, "perplexity")
    assert {row["metric_name"] for row in record["models"]} == {wanted}


WRONG = [
    ({"teacher": None}, "teacher: name one"),
    ({"teacher": "no/such"}, "no/such is neither a folder with a model"),
    ({"student_layers": None}, "student: give exactly one of"),
    ({"student_layers": "0,9"}, "the teacher has 4 layers, 0 to 3; 9 is out of range"),
    ({"student_layers": "first"}, "student_layers: expected numbers as in 0,2,4 or every:2"),
    ({"text_column": "body"}, "has no column 'body'; it has 'text', 'label', 'score'"),
    ({"train_file": "empty.csv"}, "empty.csv is empty"),
    ({"train_file": "headers.csv"}, "headers.csv has no rows"),
    ({"train_file": "one.csv"}, "every training row has the one label 'pos'"),
    ({"train_file": "gone.csv"}, "there is no file"),
    ({"train_file": "rows.xlsx"}, "rows.xlsx is none of .csv"),
    ({"train_file": None, "validation_file": None}, "dataset: name one"),
    ({"train_file": None, "dataset": "glue/sst3"}, "GLUE has no task 'sst3'"),
    ({"max_length": 64}, "max_length: 64 tokens are asked for, but the BertForSequenceClassification has 32 positions"),
    ({"method": "forward_kl"}, "forward_kl makes no sense for a model with bidirectional attention"),
    ({"method": "minilmv2"}, "relation_heads=48 does not divide"),
    ({"pack": True}, "pack: is for the task causal_lm, got 'classification'"),
    ({"task": "summary"}, "task: expected one of classification"),
    ({"task": "cloze"}, "template, answers: cloze needs both"),
    ({"device": "cuda", "use_cpu": None}, "device: cuda was asked for, but torch finds no CUDA device"),
    ({"label_column": "score"}, "'score' holds fractions; for a number to predict choose --task regression"),
    ({"output_dir": "."}, "holds something that is not a run of fastkd"),
    ({"student_layers": None, "student_config": "hidden_size=10"}, "hidden_size=10 must be a multiple of num_attention"),
    ({"student_layers": None, "student_config": "width=8"}, "BertConfig has no width"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "sentence"), WRONG)
def test_wrong_input_raises_one_sentence_before_training(changes, sentence, files, capsys):
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    save_pair(files / "teacher", "bert", "classification")
    (files / "empty.csv").touch()
    (files / "headers.csv").write_text("text,label\n")
    (files / "one.csv").write_text("text,label\ngood film,pos\nfine plot,pos\n")
    (files / "rows.xlsx").touch()
    capsys.readouterr()
    changes = {k: files / v if k in ("train_file", "output_dir") and v else v for k, v in changes.items()}
    assert main(["distill", *flags(files, **changes)]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.startswith("fastkd distill: ")
    assert not (files / "run" / "run.yaml").exists()  # and so the folder is still free


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("teecher: x", "there is no option 'teecher'; did you mean 'teacher'"),
        ("max_length: long", "--max_length: invalid int value: 'long'"),
        ("eval_strategy: true", "--eval_strategy: invalid choice: 'True' (choose from"),
        ("- a\n- b", "must hold option: value lines"),
        ("method: !!python/object/apply:os.system ['true']", "is not plain YAML"),
    ],
)
def test_a_wrong_config_raises_one_sentence(text, sentence, tmp_path):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        arguments.parse(["--config", str(tmp_path / "run.yaml")])


def test_flags_win_over_the_config(tmp_path):
    (tmp_path / "run.yaml").write_text(f"teacher: theirs\nmax_steps: 5\noutput_dir: {tmp_path}\n")
    model, _, _, args, _ = arguments.parse(["--config", str(tmp_path / "run.yaml"), "--max_steps", "7"])
    assert (model.teacher, args.max_steps) == ("theirs", 7)


def test_a_full_disk_is_reported_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(distill.shutil, "disk_usage", lambda path: type("usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match="checkpoints need about"):
        distill.check_space(tiny.model("bert"), tiny.arguments(tmp_path, save_strategy="steps"))


@pytest.mark.parametrize("family", tiny.MORE_FAMILIES)
def test_a_student_of_chosen_layers_has_their_weights(family):
    teacher = tiny.model(family, seed=4)
    order = (0, 3) if family == "modernbert" else (3, 0)  # its first layer is built differently
    made = student.from_layers(teacher, list(order))
    name = student.layer_list(teacher)
    ours, theirs = made.get_submodule(name), teacher.get_submodule(name)
    assert len(ours) == 2
    for i, j in enumerate(order):
        for key, value in ours[i].state_dict().items():
            if value.shape == theirs[j].state_dict()[key].shape:
                assert torch.equal(value, theirs[j].state_dict()[key])
    assert torch.equal(made.get_input_embeddings().weight, teacher.get_input_embeddings().weight)
    assert made.get_input_embeddings().weight.data_ptr() != teacher.get_input_embeddings().weight.data_ptr()
    assert student.from_config(teacher, "num_hidden_layers=1").config.num_hidden_layers == 1


def test_the_packaged_dataset_is_split_by_a_hash_of_its_text():
    path = Path(data.__file__).parent.parent / "data" / "movie_reviews.tsv.gz"
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    found = {"train": set(), "validation": set(), "test": set()}
    for line in lines[1:]:
        _, split, rating, text = line.split("\t")
        words = " ".join(re.findall(r"[a-z0-9]+", text.lower()))
        first = hashlib.sha256(words.encode()).digest()[0]
        assert split == ("test" if first < 26 else "validation" if first < 52 else "train")
        assert -4 <= float(rating) <= 4
        found[split].add(words)
    assert len(lines) == 10_606
    assert not found["train"] & found["test"] and not found["train"] & found["validation"]
    sizes = [len(data.movie_reviews(split)) for split in ("train", "validation", "test")]
    assert sizes == [8418, 1071, 1079]
    assert len(data.movie_reviews("test", "regression")) == 1081
    labels = data.movie_reviews("train")["label"]
    assert 0.45 < sum(labels) / len(labels) < 0.55
    for kind in ("LICENSE", "md"):
        assert (path.parent / f"movie_reviews.{kind}").stat().st_size > 500


def test_import_fastkd_does_not_import_transformers():
    import subprocess
    import sys

    code = "import sys, fastkd; sys.exit('transformers' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(data.__file__).parents[2]).returncode == 0


def test_the_packaged_dataset_can_be_named_as_a_dataset(files, capsys):
    save_pair(files / "teacher", "bert", "classification")
    few = {"dataset": "movie-reviews", "train_file": None, "validation_file": None, "max_train_samples": 16}
    assert distill.main(flags(files, **few, max_eval_samples=16)) == 0, capsys.readouterr().err
    config = json.loads((files / "run" / "student" / "config.json").read_text())
    assert config["num_hidden_layers"] == 2


def test_classes_have_the_numbers_of_the_teachers_outputs_also_in_a_student_without_names(files):
    for folder, names in (("teacher", {0: "Pos", 1: "Neg"}), ("student", {0: "LABEL_0", 1: "LABEL_1"})):
        save_pair(files / folder, "bert", "classification", id2label=names)
    own = {"student": files / "student", "student_layers": None}
    run = arguments.parse(flags(files, **own))
    corpus = data.load(run.data, "classification")
    *_, made, _ = loading.load(run, corpus)
    assert corpus.train["label"][:] == [0, 1] * 20 and corpus.names == ["Pos", "Neg"]
    assert made.config.id2label == {0: "Pos", 1: "Neg"} and made.config.label2id == {"Pos": 0, "Neg": 1}


def test_unlabelled_text_teaches_a_classifier(files, capsys):
    save_pair(files / "teacher", "bert", "classification")
    text = {"train_file": files / "words.txt", "validation_file": None}
    assert main(["distill", *flags(files, method="kd", **text)]) == 2
    assert "labels: kd reads them, and the training set has none" in capsys.readouterr().err
    assert distill.main(flags(files, method="kd:alpha=1", **text)) == 0, capsys.readouterr().err
    assert "labels: none, so there is no evaluation" in capsys.readouterr().out


def test_packed_text_without_a_validation_file(files, capsys):
    save_pair(files / "teacher", "gpt2", "causal_lm")
    text = {"train_file": files / "words.txt", "validation_file": None, "task": "causal_lm", "pack": True}
    assert distill.main(flags(files, method="kd", **text)) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "rows: 38 train and 2 validation, held out of the training set" in said
    assert "rows of 16 tokens, nothing is cut" in said
    record = json.loads((files / "run" / "report" / "report.json").read_text())
    assert {row["metric_name"] for row in record["models"]} == {"perplexity"}


def test_a_teacher_that_says_the_same_of_every_text_stops_the_run(files, capsys):
    save_pair(files / "teacher", "bert", "classification")
    teacher = AutoModelForSequenceClassification.from_pretrained(files / "teacher")
    torch.nn.init.zeros_(teacher.classifier.weight)
    teacher.save_pretrained(files / "teacher")
    assert main(["distill", *flags(files, allow_weak_teacher=None)]) == 1
    assert "teacher: its balanced accuracy on the validation set is 50.0%" in capsys.readouterr().err
    assert not any((files / "run").iterdir())  # and so the folder is still free


def test_a_student_with_a_smaller_vocabulary_from_the_command_line(files, capsys):
    """Saved as `fastkd vocab` saves it; the report says how much of the text its words cover."""
    from fastkd.vocab import VocabMap

    save_pair(files / "teacher", "bert", "classification")
    teacher = AutoModelForSequenceClassification.from_pretrained(files / "teacher")
    whole = AutoTokenizer.from_pretrained(files / "teacher")
    kept = sorted(set(range(len(whole))) - {whole.get_vocab()["good"]})
    small = VocabMap(kept, teacher.config.vocab_size)
    small.shrink(teacher).save_pretrained(files / "student")
    small.shrink_tokenizer(whole).save_pretrained(files / "student")
    own = {"student": str(files / "student"), "student_layers": None}
    assert distill.main(flags(files, **own)) == 0, capsys.readouterr().err
    page = (files / "run" / "report" / "index.html").read_text()
    assert AutoTokenizer.from_pretrained(files / "run" / "student").get_vocab().get("good") is None
    assert f"The student has {len(kept)} of the teacher" in page and "% of the training text" in page
