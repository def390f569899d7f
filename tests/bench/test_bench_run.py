"""What the bench is asked for is checked in one place, before anything is built or measured: 2, and a sentence that helps."""

import os

import pytest
import torch
from fastkd.bench import compare, machine, run

from fastkd.cli import main as fastkd


@pytest.fixture(autouse=True)
def nothing_is_measured(monkeypatch):
    for module, name in ((run, "run_cases"), (machine, "passive_threads"), (compare, "against")):
        monkeypatch.setattr(module, name, lambda *_, name=name: pytest.fail(f"{name} was called"))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["grm"], "stem: expected one of 'divergence', 'gram'"),
        (["--shape", "bert-base", "grm"], "stem: expected one of"),
        (["--others", "eager,sklearn"], "others: expected one of 'eager', 'compile'"),
        (["--case", "no-such"], "no case matches all of case='no-such'; leave one out"),
        (["--list", "gram", "--case", "no-such"], "no case matches all of stems=['gram'], case='no-such'"),
        (["--threads", "0"], "threads: expected at least 1, got 0"),
        (["--rounds", "5"], "rounds: expected at least 6, got 5"),
        (["--budget", "nan"], "budget: expected at least 0, got nan"),
        (["--tolerance", "-1"], "tolerance: expected at least 0, got -1.0"),
        (["--device", "gpu"], "device: 'gpu' cannot be used here"),
        (["--device", "meta"], "device: expected cpu or cuda, got 'meta'"),
        (["--against", "HEAD", "--no-publish"], "compares what is published"),
        (["--against", "HEAD", "--force"], "compares what is published"),
        (["--out", __file__], "test_bench_run.py"),
    ],
)
def test_a_mistake_is_named_and_nothing_is_measured(argv, said, monkeypatch, capsys):
    monkeypatch.setattr(machine, "passive_threads", lambda *_: None)
    assert fastkd(["bench", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastkd bench: ") and said in error


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--rounds", "many"], "argument --rounds: invalid int value: 'many'"),
        (["--dtype", "float23"], "argument --dtype: invalid choice: 'float23'"),
        (["--mode", "bth"], "argument --mode: invalid choice: 'bth'"),
        (["--round", "9"], "unrecognized arguments: --round"),
        (["--aga", "HEAD"], "unrecognized arguments: --aga"),  # it would reach the children, and there again
        (["--against", "HEAD", "--list"], "not allowed with argument"),
    ],
)
def test_argparse_answers_in_two_lines(argv, said, capsys):
    with pytest.raises(SystemExit) as status:
        run.main(argv)
    error = capsys.readouterr().err
    assert status.value.code == 2 and said in error and len(error.splitlines()) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_named(capsys):
    assert fastkd(["bench", "gram", "--device", "cuda"]) == 2 == fastkd(["doctor", "--device", "cuda"])
    bench, other = capsys.readouterr().err.splitlines()
    assert bench.startswith("fastkd bench: device: 'cuda' cannot be used here") and "name cpu" in bench
    assert other.startswith("fastkd doctor: device: 'cuda' cannot be used here")
    assert run.main(["gram", "--device", "cuda", "--list"]) == 0  # what would be measured there


@pytest.mark.parametrize("device", ["gpu", "cuda:", "", "cpu:x"], ids=repr)  # "gpu" as a name would be a marker
def test_a_device_that_is_none_is_named_by_the_doctor(device, capsys):
    assert fastkd(["doctor", "--device", device]) == 2
    assert f"device: {device!r} cannot be used here" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_to(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(machine, "passive_threads", lambda *_: None)
    monkeypatch.setattr(os, "open", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    assert fastkd(["bench", "gram", "--device", "cpu", "--out", str(tmp_path)]) == 2
    assert "out: " in capsys.readouterr().err


def test_settings_are_what_was_asked_for():
    settings = lambda *argv: run.parsed(["--device", "cpu", *argv])  # noqa: E731
    assert settings("--budget", "0").budget == 0.0 and settings().budget == 20.0 and settings("--quick").rounds == 10
