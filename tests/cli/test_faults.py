"""`fastkd distill` when something happens to it: signals, a kill in the export, full disks, dirty data and names."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_distill_cli import files, flags, save_pair  # noqa: F401

import tiny
from kills import prepare

pytest.importorskip("transformers")
import torch
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer

from fastkd.cli import arguments, main
from fastkd.train import report, tokenisation
from fastkd.train.trainer import DistillTrainer

pytestmark = pytest.mark.usefixtures("interruptible")


def contents(folder):
    return sorted(path.name for path in folder.iterdir())


def weights(run):
    return (run / "student" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A teacher, data, and a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("source")
    prepare(folder)
    assert main(["distill", *flags(folder, output_dir=folder / "undisturbed")]) == 0
    return folder


@pytest.fixture
def argv(source, tmp_path):
    return ["distill", *flags(source, output_dir=tmp_path / "run")]


def assert_undisturbed(argv, source, tmp_path, capsys):
    """The same command finishes the run, whose student is the undisturbed run's; a third time it refuses."""
    assert main(argv) == 0, capsys.readouterr().err
    assert weights(tmp_path / "run") == weights(source / "undisturbed")
    assert {"index.html", "report.json"} <= set(contents(tmp_path / "run" / "report"))
    assert main(argv) == 2
    assert "it is finished" in capsys.readouterr().err
    assert not [name for name in contents(tmp_path / "run") if name.startswith(".")]


TERMINATED, INTERRUPTED = (signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")
SIGNALS = [("training", *TERMINATED)]
MORE = [("evaluation", *INTERRUPTED), ("report", *TERMINATED), ("report", *INTERRUPTED)]


@pytest.mark.parametrize(
    ("place", "number", "code", "word"), SIGNALS + [pytest.param(*row, marks=pytest.mark.long) for row in MORE]
)
def test_a_signal_saves_says_how_to_go_on_and_exports_nothing(
    place, number, code, word, argv, source, tmp_path, capsys, monkeypatch
):  # fmt: skip
    where = {
        "training": (Trainer, "training_step"),
        "evaluation": (Trainer, "prediction_step"),
        "report": (report, "draw"),
    }
    holder, name = where[place]
    method, calls = getattr(holder, name), []

    def strike(*args, **kwargs):
        calls.append(1)
        if len(calls) == (1 if place == "report" else 3):
            os.kill(os.getpid(), number)
        return method(*args, **kwargs)

    monkeypatch.setattr(holder, name, strike)
    assert main(argv) == code
    error, run = capsys.readouterr().err, tmp_path / "run"
    step = {"training": 3, "evaluation": 2, "report": 4}[place]
    assert f"fastkd distill: {word}; the same command goes on from {run / f'checkpoint-{step}'}\n" in error
    assert "Traceback" not in error and not (run / "report").exists()
    assert (run / "student").exists() == (place == "report")
    assert_undisturbed(argv, source, tmp_path, capsys)


LATE = [("save_model", ()), ("_page", pytest.mark.long), ("measure", pytest.mark.long), ("card", pytest.mark.long)]


@pytest.mark.parametrize("place", [pytest.param(place, marks=marks) for place, marks in LATE])
def test_a_run_that_died_after_training_is_finished_by_the_same_command(
    place, argv, source, tmp_path, capsys, monkeypatch
):  # fmt: skip
    from fastkd.train import card

    where = {"save_model": DistillTrainer, "card": card}.get(place, report)
    with monkeypatch.context() as patch:
        patch.setattr(where, "write" if place == "card" else place, lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(argv)
    run = tmp_path / "run"
    for scratch in (".report.partial", ".student.partial"):  # as kill −9 leaves them
        (run / scratch).mkdir()
        (run / scratch / "of the killed process").touch()
    assert not (run / "report").exists()
    assert_undisturbed(argv, source, tmp_path, capsys)


def test_a_run_that_something_stops_is_not_exported(argv, tmp_path, capsys, monkeypatch):
    step = DistillTrainer.training_step

    def stopping(self, *args, **kwargs):
        self.control.should_training_stop = self.state.global_step == 1
        return step(self, *args, **kwargs)

    monkeypatch.setattr(DistillTrainer, "training_step", stopping)
    assert main(argv) == 1
    assert "training was stopped after step 2 of 4, so nothing is exported; the same command" in capsys.readouterr().err
    assert not (tmp_path / "run" / "student").exists()


@pytest.mark.long
def test_a_damaged_checkpoint_is_named_and_stepped_over(source, tmp_path, capsys):
    shutil.copytree(source, tmp_path / "source")
    run = tmp_path / "source" / "undisturbed"
    argv = ["distill", *flags(tmp_path / "source", output_dir=run)]
    shutil.rmtree(run / "report")
    (run / "run.yaml").unlink()
    arguments.save(arguments.parse(argv[1:]))
    path = run / "checkpoint-4" / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:-1])
    assert main(argv) == 0, capsys.readouterr().err
    said = capsys.readouterr()
    assert f"skipped: {run / 'checkpoint-4'} has " in said.out and " bytes of optimizer.pt instead of " in said.out
    assert f"resuming from {run / 'checkpoint-2'}" in said.out and weights(run) == weights(source / "undisturbed")
    shutil.rmtree(run / "report")
    for step in (2, 4):
        (run / f"checkpoint-{step}" / "rng_state.pth").unlink()
    assert main(argv) == 2
    assert "none of its checkpoints can be resumed from: " in capsys.readouterr().err


@pytest.mark.long
def test_a_folder_that_is_deleted_meanwhile_is_still_a_run(argv, source, tmp_path, capsys, monkeypatch):
    step, calls, run = Trainer.training_step, [], tmp_path / "run"

    def deleting(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            shutil.rmtree(run)
        return step(*args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", deleting)
    assert main(argv) == 0, capsys.readouterr().err
    assert weights(run) == weights(source / "undisturbed")
    assert yaml.safe_load((run / "run.yaml").read_text())["max_steps"] == 4


FULL = [
    ("torch.save", errno.ENOSPC, pytest.mark.long),
    ("fastkd.train.trainer.DistillTrainer.save_model", errno.ENOSPC, ()),
    ("fastkd.train.report._page", errno.EROFS, pytest.mark.long),
]


@pytest.mark.parametrize(("place", "code"), [pytest.param(*row, marks=marks) for *row, marks in FULL])
def test_a_disk_that_takes_nothing_more_is_one_sentence(place, code, argv, source, tmp_path, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        if place.endswith("save_model") and "run/.student" in args[1]:
            raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})")
        if place.endswith("save_model"):
            return save_model(*args, **kwargs)
        raise OSError(code, os.strerror(code), "somewhere")

    save_model = DistillTrainer.save_model
    with monkeypatch.context() as patch:
        patch.setattr(place, refuse)
        assert main(argv) == 1
    error = capsys.readouterr().err
    assert os.strerror(code) in error and "Traceback" not in error
    assert_undisturbed(argv, source, tmp_path, capsys)


def test_run_yaml_is_replaced_whole(files, monkeypatch):  # noqa: F811
    run = arguments.parse(flags(files))
    arguments.save(run)
    before = (files / "run" / "run.yaml").read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        arguments.save(run.changed(max_steps=9))
    assert contents(files / "run") == ["run.yaml"] and (files / "run" / "run.yaml").read_bytes() == before
    (files / "run" / "run.yaml").write_text("max_steps: [")
    with pytest.raises(ValueError, match=r"run.yaml is not plain YAML"):
        arguments.is_finished(run)
    (files / "run" / "run.yaml").unlink()
    (files / "run" / ".77-run.yaml").touch()  # killed while it was written
    assert not arguments.is_finished(run)
    (files / "run" / "cache").mkdir()  # and while the teacher cache was built
    assert not arguments.is_finished(run.changed(teacher_cache=str(files / "run" / "cache")))
    with pytest.raises(ValueError, match="holds something that is not a run of fastkd"):
        arguments.is_finished(run)


def test_jit_checkpoints_are_refused(tmp_path):
    with pytest.raises(ValueError, match="enable_jit_checkpoint: SIGTERM and Ctrl-C save a checkpoint without it"):
        arguments.parse(["--output_dir", str(tmp_path), "--enable_jit_checkpoint", "true"])


def test_a_report_escapes_whatever_comes_from_data_and_names(tmp_path):
    evil = "<script>alert('$x_{$')</script>`[red]"
    row = {"metric": 0.9, "metric_name": "accuracy", "parameters": 9, "bytes": 36, "latency": 1.0, "all": {}}
    rows = [row | {"name": evil}, row | {"name": f"{evil} 2", "gain": (1.0, 0.5)}]
    history = [
        {"step": i, "loss": 1.0, f"term/{evil}": 1.0 / i, f"weight/{evil}": 1.0, f"eval_{evil}": 0.5} for i in (1, 2)
    ]
    rows = [x | {"metric_name": evil} for x in rows]
    options = {
        "title": evil,
        "lead": evil,
        "histories": {evil: history},
        "maps": [],
        "config": {evil: evil},
        "where": evil,
    }
    page = report.write(tmp_path / "report", rows=rows, **options).read_text()
    assert "<script" not in page and page.count("&lt;script&gt;") >= 5
    report.print_table(rows)


def test_code_that_comes_with_a_model_runs_only_where_it_was_asked_for(files, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setenv("HF_MODULES_CACHE", str(files / "modules"))
    teacher = save_pair(files / "teacher", "bert", "classification")
    config = json.loads((teacher / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}
    (teacher / "config.json").write_text(json.dumps(config))
    (teacher / "mine.py").write_text(f"open({str(files / 'ran')!r}, 'w').close()\nraise ImportError('stop here')\n")
    assert main(["distill", *flags(files)]) == 2
    assert "trust_remote_code" in capsys.readouterr().err and not (files / "ran").exists()
    with pytest.raises(ImportError, match="stop here"):
        main(["distill", *flags(files), "--trust_remote_code"])
    assert (files / "ran").exists()


@pytest.mark.long
def test_empty_texts_and_a_class_never_seen_are_survived(files, capsys):  # noqa: F811
    names = {0: "neg", 1: "pos", 2: "mixed"}  # nothing is labelled mixed
    save_pair(files / "teacher", "bert", "classification", id2label=names)
    with open(files / "train.tsv", "a") as file:
        file.write("\tpos\t1\n   \tneg\t0\n")
    assert main(["distill", *flags(files)]) == 0, capsys.readouterr().err
    assert "dropped: 2 rows without text" in capsys.readouterr().out
    made = AutoModelForSequenceClassification.from_pretrained(files / "run" / "student")
    assert made.config.num_labels == 3


def test_masks_depend_on_the_seed_and_the_batch_alone(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(save_pair(tmp_path, "bert", "masked_lm"))
    rows = [{"input_ids": list(range(5, 20))}, {"input_ids": list(range(6, 21))}]
    first, again, other, turned = (
        tokenisation.collator(tokenizer, "masked_lm", 0.5, seed=seed)(batch)
        for seed, batch in ((1, rows), (1, rows), (2, rows), (1, rows[::-1]))
    )
    assert torch.equal(first["labels"], again["labels"]) and torch.equal(first["input_ids"], again["input_ids"])
    assert not torch.equal(first["labels"], other["labels"])
    assert not torch.equal(first["labels"], turned["labels"].flip(0))
    before = torch.get_rng_state()
    tokenisation.collator(tokenizer, "masked_lm", 0.5)(rows)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.long
def test_kill_9_at_random_moments():
    """Few here; `python tests/kills.py 20` has more."""
    folder = Path(tiny.__file__).parent
    path = os.pathsep.join(str(folder / part) for part in ("..", ".", "cli", "train"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [path, os.environ.get("PYTHONPATH")]))}
    done = subprocess.run(
        [sys.executable, str(folder / "kills.py"), "3"], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 kills, every run went on" in done.stdout
