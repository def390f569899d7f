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

pytest.importorskip("transformers")
import torch
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer

from fastkd.cli import main
from fastkd.train import arguments, report, tokenisation
from fastkd.train.trainer import DistillTrainer


@pytest.fixture(autouse=True)
def interruptible():
    """A process that was started in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def contents(folder):
    return sorted(path.name for path in folder.iterdir())


def weights(run):
    return (run / "student" / "model.safetensors").read_bytes()


@pytest.fixture
def undisturbed(files, capsys):  # noqa: F811
    """The weights of the student of a run that nothing happens to."""
    save_pair(files / "teacher", "bert", "classification", dropout=0.1)
    assert main(["distill", *flags(files, output_dir=files / "undisturbed")]) == 0, capsys.readouterr().err
    return weights(files / "undisturbed")


SIGNALS = [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]


@pytest.mark.parametrize(("number", "code", "word"), SIGNALS)
@pytest.mark.parametrize("place", ["training", "evaluation", "report"])
def test_a_signal_saves_says_how_to_go_on_and_exports_nothing(
    number, code, word, place, files, undisturbed, capsys, monkeypatch  # noqa: F811
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
    assert main(["distill", *flags(files)]) == code
    error = capsys.readouterr().err
    step = {"training": 3, "evaluation": 2, "report": 4}[place]
    run = files / "run"
    assert f"fastkd distill: {word}; the same command goes on from {run / f'checkpoint-{step}'}\n" in error
    assert "Traceback" not in error and not (run / "report").exists()
    assert (run / "student").exists() == (place == "report")
    assert not [name for name in contents(run) if name.startswith(".")]
    assert main(["distill", *flags(files)]) == 0, capsys.readouterr().err
    assert weights(run) == undisturbed and arguments.is_finished(arguments.parse(flags(files)))


@pytest.mark.parametrize("place", ["save_model", "measure", "card", "draw", "_page"])
def test_a_run_that_died_after_training_is_finished_by_the_same_command(
    place, files, undisturbed, capsys, monkeypatch  # noqa: F811
):  # fmt: skip
    from fastkd.train import card

    where = {"save_model": DistillTrainer, "card": card}.get(place, report)
    monkeypatch.setattr(where, "write" if place == "card" else place, lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["distill", *flags(files)])
    run = files / "run"
    (run / ".report.partial").mkdir()  # kill −9 leaves scratch folders
    (run / ".report.partial" / "tradeoff.png").touch()
    (run / ".saving").mkdir(exist_ok=True)
    monkeypatch.undo()
    assert not (run / "report").exists()
    assert main(["distill", *flags(files)]) == 0, capsys.readouterr().err
    assert weights(run) == undisturbed
    assert {"index.html", "report.json", "tradeoff.png"} <= set(contents(run / "report"))
    assert ".report.partial" not in contents(run)
    assert main(["distill", *flags(files)]) == 2
    assert "it is finished" in capsys.readouterr().err


def test_a_run_that_something_stops_is_not_exported(files, capsys, monkeypatch):  # noqa: F811
    save_pair(files / "teacher", "bert", "classification")
    step = DistillTrainer.training_step

    def stopping(self, *args, **kwargs):
        self.control.should_training_stop = self.state.global_step == 1
        return step(self, *args, **kwargs)

    monkeypatch.setattr(DistillTrainer, "training_step", stopping)
    assert main(["distill", *flags(files)]) == 1
    assert "training was stopped after step 2 of 4, so nothing is exported; the same command" in capsys.readouterr().err
    assert not (files / "run" / "student").exists()


def test_a_damaged_checkpoint_is_named_and_stepped_over(files, undisturbed, capsys):  # noqa: F811
    run = files / "undisturbed"
    shutil.rmtree(run / "report")
    path = run / "checkpoint-4" / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:-1])
    argv = ["distill", *flags(files, output_dir=run)]
    assert main(argv) == 0, capsys.readouterr().err
    said = capsys.readouterr()
    assert f"skipped: {run / 'checkpoint-4'} has " in said.out and " bytes of optimizer.pt instead of " in said.out
    assert f"resuming from {run / 'checkpoint-2'}" in said.out and weights(run) == undisturbed
    shutil.rmtree(run / "report")
    for step in (2, 4):
        (run / f"checkpoint-{step}" / "rng_state.pth").unlink()
    assert main(argv) == 2
    assert "none of its checkpoints can be resumed from: " in capsys.readouterr().err


def test_a_folder_that_is_deleted_meanwhile_is_still_a_run(files, undisturbed, capsys, monkeypatch):  # noqa: F811
    step, calls, run = Trainer.training_step, [], files / "run"

    def deleting(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            shutil.rmtree(run)
        return step(*args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", deleting)
    assert main(["distill", *flags(files)]) == 0, capsys.readouterr().err
    assert weights(run) == undisturbed and yaml.safe_load((run / "run.yaml").read_text())["max_steps"] == 4
    assert main(["distill", *flags(files)]) == 2
    assert "it is finished" in capsys.readouterr().err


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize(
    "place",
    [
        "torch.save",
        "fastkd.train.trainer.DistillTrainer.save_model",
        "fastkd.train.card.write",
        "fastkd.train.report._page",
    ],
)
def test_a_disk_that_takes_nothing_more_is_one_sentence(place, code, files, undisturbed, capsys, monkeypatch):  # noqa: F811
    def refuse(*args, **kwargs):
        if place.endswith("save_model"):
            raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})")
        raise OSError(code, os.strerror(code), "somewhere")

    monkeypatch.setattr(place, refuse)
    assert main(["distill", *flags(files)]) == 1
    error = capsys.readouterr().err
    assert os.strerror(code) in error and "Traceback" not in error
    monkeypatch.undo()
    assert main(["distill", *flags(files)]) == 0, capsys.readouterr().err
    assert weights(files / "run") == undisturbed


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
        {"step": i, "loss": 1.0, f"term/{evil}": 1.0 / i, f"weight/{evil}": 1.0, "eval_accuracy": 0.5} for i in (1, 2)
    ]
    for metric in ("accuracy", evil):
        page = report.write(
            tmp_path / str(len(metric)), title=evil, lead=evil, rows=[x | {"metric_name": metric} for x in rows],
            histories={evil: history}, maps=[], config={evil: evil}, where=evil,
        ).read_text()  # fmt: skip
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
        [sys.executable, str(folder / "kills.py"), "6"], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 kills, every run went on" in done.stdout
