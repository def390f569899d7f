"""What a first user meets: help, mistakes, a teacher to be trained first, seeds, a test set, an interruption, the model card."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from test_distill_cli import files, flags, save_pair  # noqa: F401

import tiny

pytest.importorskip("transformers")
from huggingface_hub import ModelCard
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, Trainer

from fastkd.cli import arguments, main, methods
from fastkd.train import tokenisation
from fastkd.train.methods import METHODS, find


def said(capsys, *argv) -> str:
    """The line with which a command refuses."""
    assert main(list(argv)) == 2
    before, _, line = capsys.readouterr().err.rpartition(f"fastkd {argv[0]}: ")
    assert line.count("\n") == 1 and line.endswith("\n") and "Traceback" not in before and "usage" not in before
    return line


def help_of(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(argv))
    assert ended.value.code == 0
    return capsys.readouterr().out


def headless(folder):
    """The teacher's trunk and tokenizer, without a head."""
    save_pair(folder / "teacher", "bert", "classification")
    AutoModel.from_pretrained(folder / "teacher").save_pretrained(folder / "trunk")
    AutoTokenizer.from_pretrained(folder / "teacher").save_pretrained(folder / "trunk")
    return folder / "trunk"


@pytest.mark.parametrize(("command", "lines"), [("distill", 80), ("finetune", 60)])
def test_help_is_short_and_help_all_is_whole(command, lines, capsys):
    short, whole = help_of(capsys, command, "--help"), help_of(capsys, command, "--help-all")
    assert len(short.splitlines()) < lines and "--max_length" in short and "--early_stopping_patience" in short
    assert "--adam_beta1" not in short and "--adam_beta1" in whole
    assert set(re.findall(r"^  --\w+", short, re.M)) < set(re.findall(r"^  --\w+", whole, re.M))


def test_methods_lists_all_and_explains_every_option(capsys):
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[: len(METHODS)]] == list(METHODS)
    assert max(map(len, out.splitlines())) < 160
    for name in METHODS:
        found = methods.options(find(name))
        assert set(found) == find(name).options() | {"weight"}
        assert all(meaning for _, meaning in found.values()), (name, found)
    assert main(["methods", "pkd"]) == 0
    assert re.search(r"beta=100\.0 +Weight of the sentence vectors", capsys.readouterr().out)
    assert "there is no 'kdd'" in said(capsys, "methods", "kdd")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--max_length", "long"], "--max_length: invalid int value: 'long'"),
        (["--techer", "x"], "there is no '--techer'; did you mean '--teacher'?"),
        (["--save_strategy", "often"], "--save_strategy: invalid choice: 'often'"),
        (["--method", "fcd", "+", "kd"], "+: belongs to no option; put values with blanks in quotes"),
        (["--resume_from_checkpoint", "nowhere"], "resume_from_checkpoint: a run resumes by itself"),
        (["--do_predict"], "do_predict: leave it out; --test_file is evaluated at the end"),
        (["--label_smoothing_factor", "0.1"], "label_smoothing_factor: the losses of fastkd have none, got 0.1"),
        (["--early_stopping_patience", "2", "--eval_strategy", "no"], "early_stopping_patience: needs evaluations"),
        (["--seeds", "0"], "seeds: expected at least 1, got 0"),
    ],
)
def test_a_mistake_is_one_line(argv, sentence, tmp_path, capsys):
    assert sentence in said(capsys, "distill", "--output_dir", str(tmp_path / "run"), *argv)


def test_yaml_is_read_as_flags_are(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "student_layers: 2\nmethod: [kd, 'fcd:share=1']\neval_strategy: no\nlearning_rate: 1e-3\nsave_total_limit: null\n"
        "lr_scheduler_kwargs: {num_cycles: 2}\nuse_cpu: yes\nlabel_names: [labels]\n"
    )
    argv = ["--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path)]
    run = arguments.parse(argv)
    assert (run.model.student_layers, run.method.method) == ("2", "kd + fcd:share=1")
    assert (run.args.eval_strategy, run.args.learning_rate, run.args.save_total_limit) == ("no", 1e-3, None)
    assert (run.args.lr_scheduler_kwargs, run.args.use_cpu, run.args.label_names) == (
        {"num_cycles": 2},
        True,
        ["labels"],
    )
    assert arguments.read(run.options).options == run.options


def test_a_teacher_without_a_trained_head_is_refused_and_fine_tuned_first(files, capsys):  # noqa: F811
    trunk = headless(files)
    options = flags(files, teacher=trunk, learning_rate=1e-2, max_steps=8, test_file=files / "valid.csv")
    error = said(capsys, "distill", *options)
    assert "has no trained head for classification (classifier.bias, classifier.weight" in error
    assert f"`fastkd finetune --model {trunk}`" in error
    assert "out of range" in said(capsys, "distill", *options, "--finetune_teacher", "--student_layers", "9")
    run = files / "run"
    assert not (run / "run.yaml").exists()  # refused before the teacher was trained
    assert main(["distill", *options, "--finetune_teacher"]) == 0, capsys.readouterr().err
    assert "test accuracy" in capsys.readouterr().out
    record = json.loads((run / "report" / "report.json").read_text())
    assert [row["name"] for row in record["models"]] == ["teacher", "student"]
    trained = json.loads((run / "teacher" / "report" / "report.json").read_text())
    assert trained["models"][0]["all"]["loss"] == pytest.approx(record["models"][0]["all"]["loss"], rel=1e-5)
    assert record["models"][0]["test"] == record["models"][0]["metric"]  # of the same rows
    teacher = AutoModelForSequenceClassification.from_pretrained(run / "teacher" / "model")
    assert teacher.config.id2label == {0: "neg", 1: "pos"}
    weights = (run / "teacher" / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(run / "report")
    assert main(["distill", *options, "--finetune_teacher"]) == 0
    assert "teacher is finished" in capsys.readouterr().out
    assert (run / "teacher" / "model" / "model.safetensors").read_bytes() == weights


def test_fine_tuning_of_its_own(files, capsys):  # noqa: F811
    trunk = headless(files)
    argv = [
        *flags(
            files, teacher=None, student_layers=None, allow_weak_teacher=None, task="regression", label_column="score"
        ),
        "--model",
        str(trunk),
    ]
    assert main(["finetune", *argv]) == 0, capsys.readouterr().err
    assert AutoModelForSequenceClassification.from_pretrained(files / "run" / "model").config.num_labels == 1
    assert "it is finished" in said(capsys, "finetune", *argv)
    assert "model: name one" in said(capsys, "finetune", "--output_dir", str(files / "other"))
    card = ModelCard.load(files / "run" / "model" / "README.md")
    assert "fine-tuning" in card.data.tags and "AutoModelForSequenceClassification.from_pretrained" in card.text


def test_the_student_has_a_model_card(files):  # noqa: F811
    save_pair(files / "teacher", "bert", "classification")
    assert main(["distill", *flags(files, method="kd:alpha=0.9")]) == 0
    card = ModelCard.load(files / "run" / "student" / "README.md")
    assert card.data.library_name == "transformers" and "knowledge-distillation" in card.data.tags
    record = json.loads((files / "run" / "report" / "report.json").read_text())
    for part in (
        "kd:alpha=0.9",
        str(files / "teacher"),
        "train.tsv",
        f"{record['models'][1]['metric']:.2%}",
        "fastkd 0",
    ):
        assert part in card.text


def test_seeds_are_runs_of_their_own_with_a_mean_and_a_deviation(files, capsys, monkeypatch):  # noqa: F811
    save_pair(files / "teacher", "bert", "classification", dropout=0.1)
    argv = ["distill", *flags(files, learning_rate=1e-2, test_file=files / "valid.csv"), "--seeds", "2"]
    assert main(argv) == 0, capsys.readouterr().err
    run = files / "run"
    records = [json.loads((run / f"seed-{k}" / "report" / "report.json").read_text()) for k in (1, 2)]
    assert [record["config"]["seed"] for record in records] == [1, 2]
    found = json.loads((run / "seeds.json").read_text())["student"]
    values = torch.tensor([record["models"][1]["metric"] for record in records], dtype=torch.float64)
    assert found["metric"] == pytest.approx({"mean": values.mean().item(), "sd": values.std().item()})
    assert "test" in found and " ± " in capsys.readouterr().out
    monkeypatch.setattr(Trainer, "train", lambda *_, **__: pytest.fail("a finished run was trained again"))
    assert main(argv) == 0


def test_an_interruption_says_how_to_go_on(files, capsys, monkeypatch):  # noqa: F811
    save_pair(files / "teacher", "bert", "classification")
    step, calls = Trainer.training_step, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", interrupted)
    assert main(["distill", *flags(files)]) == 130
    error = capsys.readouterr().err
    assert f"interrupted; the same command goes on from {files / 'run' / 'checkpoint-2'}" in error
    assert "Traceback" not in error
    assert main(["distill", *flags(files)]) == 0
    assert len(calls) == 6 and "resuming from" in capsys.readouterr().out


def test_early_stopping_ends_the_run_and_keeps_the_best(files, capsys):  # noqa: F811
    save_pair(files / "teacher", "bert", "classification")
    argv = flags(files, max_steps=40, learning_rate=0.0, eval_steps=1, save_steps=500, early_stopping_patience=2)
    assert main(["distill", *argv]) == 0, capsys.readouterr().err
    record = json.loads((files / "run" / "report" / "report.json").read_text())
    assert (
        max(entry["step"] for entry in record["histories"]["student"]) == 3
    )  # nothing improves on the first evaluation
    assert yaml.safe_load((files / "run" / "run.yaml").read_text())["load_best_model_at_end"]


@pytest.mark.parametrize(
    ("family", "task", "sentence"),
    [
        ("bert", "causal_lm", "(bert) is an encoder, whose tokens see the tokens that causal_lm asks for"),
        ("distilbert", "causal_lm", "(distilbert) has no model for the task causal_lm"),
        ("t5", "classification", "(t5) is an encoder-decoder, and fastkd trains encoders and decoders"),
    ],
)
def test_models_that_cannot_serve_are_refused_by_name(family, task, sentence, files, capsys):  # noqa: F811
    from transformers import T5Config

    teacher = save_pair(files / "teacher", "bert" if family == "t5" else family, "masked_lm")
    if family == "t5":
        T5Config().save_pretrained(teacher)
    words = {"train_file": files / "words.txt", "validation_file": None, "eval_strategy": "no"}
    assert sentence in said(capsys, "distill", *flags(files, task=task, **({} if family == "t5" else words)))


@pytest.mark.parametrize("family", ["roberta", "xlm-roberta", "bert"])
def test_positions_behind_the_padding_are_all_that_a_text_can_have(family):
    config = tiny.config("roberta" if family != "bert" else "bert").to_dict()
    config |= {"model_type": family}
    made = tiny.AutoConfig.for_model(config.pop("model_type"), **config)
    model = AutoModelForSequenceClassification.from_config(made).eval()
    limit = 32
    tokenisation.check_length(model, None, limit)
    model(input_ids=torch.full((1, limit), 5))
    with pytest.raises(ValueError, match=f"max_length: {limit + 1} tokens are asked for, but .* has {limit} positions"):
        tokenisation.check_length(model, None, limit + 1)


def test_a_new_head_of_a_language_model_is_fine_tuned_too(files, capsys):  # noqa: F811
    trunk = headless(files)
    words = {"train_file": files / "words.txt", "validation_file": files / "words.txt", "task": "masked_lm"}
    argv = flags(files, **words, teacher=None, student_layers=None, allow_weak_teacher=None)
    assert main(["finetune", *argv, "--model", str(trunk)]) == 0, capsys.readouterr().err


PAGES = """
import os, resource, sys, torch
from fastkd.cli import main
try:
    main([sys.argv[1], "--help"])
except SystemExit:
    pass
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = faults()
torch.empty(1 << 24).fill_(1)
print("found", os.environ["THP_MEM_ALLOC_ENABLE"], faults() - before)
"""
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not HUGE_PAGES.is_file() or "[madvise]" not in HUGE_PAGES.read_text(), reason="nobody asks for huge pages here"
)
def test_training_puts_large_tensors_on_huge_pages(monkeypatch):
    """64 MiB are 16384 pages of 4 KiB; where memory is in pieces, some remain. A user's own choice is left alone."""

    def found():
        done = subprocess.run([sys.executable, "-c", PAGES, "finetune"], capture_output=True, text=True, check=True)
        return done.stdout.rpartition("found")[2].split()

    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    chosen, with_them = found()
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    own, without = found()
    assert (chosen, own) == ("1", "0") and int(without) > 16000 > int(with_them)
