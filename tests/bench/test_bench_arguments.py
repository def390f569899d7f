"""What the bench is asked for is checked in one place, before anything is built or measured: 2, and a sentence that helps."""

import argparse
import dataclasses

import pytest
import torch
from bench_fakes import CPU, facts, provider, toy_case
from fastkd.bench import baselines, cli_errors, machine, run
from fastkd.bench.baselines import Absent
from fastkd.bench.cases import case as case_module

from fastkd.cli import doctor


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["grm"], "stem: there is no 'grm'; did you mean gram? there are divergence"),
        (["--shape", "bert-base", "grm"], "stem: there is no 'grm'; did you mean gram?"),
        (["gram", "--kind", "fcdd"], "kind: there is no 'fcdd'; did you mean fcd? there are fcd"),
        (["gram", "--kind", "jsd"], "kind: there is no 'jsd'; there are fcd"),  # another stem's
        (["--dtype", "float23"], "dtype: there is no 'float23'; did you mean float32?"),
        (["--shape", "gpt2", "--dtype", "float23"], "dtype: there is no 'float23'; did you mean float32?"),
        (["--rivals", "eagr"], "rivals: there is no 'eagr'; did you mean eager?"),
        (["--rivals", "eager,sklearn"], "rivals: there is no 'sklearn'; there are eager, compile"),
        (["--backends", "refrence"], "backends: there is no 'refrence'; did you mean reference?"),
        (["--case", "no-such"], "no case matches all of case='no-such'; leave one out"),
        (["--list", "gram", "--case", "no-such"], "no case matches all of stems=['gram'], case='no-such'"),
        (["--threads", "-1"], "argument --threads: expected a whole number of at least 1, got '-1'"),
        (["--threads", "0"], "argument --threads: expected a whole number of at least 1, got '0'"),
        (["--rounds", "5"], "at least 6; fewer samples have no 95 % interval, got '5'"),
        (["--rounds", "-3"], "argument --rounds: expected a whole number of at least 6"),
        (["--rounds", "many"], "argument --rounds: expected a whole number of at least 6"),
        (["--budget", "nan"], "argument --budget: expected a number of at least 0"),
        (["--memory", "0"], "argument --memory: expected a number of at least 0.01"),
        (["--tolerance", "5"], "argument --tolerance: expected a number of at least 0 and below 1, got '5'"),
        (["--device", "gpu"], "device: 'gpu' cannot be used here"),
        (["--device", "meta"], "device: expected cpu or cuda, got 'meta'"),
        (["--mode", "bth"], "argument --mode: invalid choice: 'bth'"),
        (["--round", "9"], "unrecognized arguments: --round"),
    ],
)
def test_a_mistake_is_named_and_nothing_is_measured(argv, said, monkeypatch, capsys):
    monkeypatch.setattr(run, "run_cases", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(machine, "passive_threads", lambda *_: pytest.fail("started again"))
    assert run.main(argv) == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_named(capsys):
    assert run.main(["gram", "--device", "cuda"]) == 2 == doctor.main(["--device", "cuda"])
    bench, other = capsys.readouterr().err.splitlines()
    assert bench.startswith("fastkd bench: device: 'cuda' cannot be used here") and "name cpu" in bench
    assert other.startswith("fastkd doctor: device: 'cuda' cannot be used here")
    assert run.main(["gram", "--device", "cuda", "--list"]) == 0  # what would be measured there


@pytest.mark.parametrize("device", ["gpu", "cuda:", "", "cpu:x"], ids=repr)  # "gpu" as a name would be a marker
def test_a_device_that_is_none_is_named_by_the_doctor(device, capsys):
    assert doctor.main(["--device", device]) == 2
    assert f"device: {device!r} cannot be used here" in capsys.readouterr().err


def test_the_doctor_still_answers(capsys):
    assert doctor.main(["--device", "cpu"]) == 0
    assert "float32 on cpu" in capsys.readouterr().out


def test_every_rival_of_the_table_can_be_asked_for():
    for case in case_module.select(quick=True):
        for found in baselines.rivals(case, CPU):
            cli_errors.one_of("rivals", found.name, baselines.names())


def test_numbers_come_as_they_were_meant():
    arguments = run.parser().parse_args(["--rounds", "6", "--budget", "0", "--tolerance", "0.1", "--threads", "2"])
    assert (arguments.rounds, arguments.budget, arguments.tolerance, arguments.threads) == (6, 0.0, 0.1, 2)
    assert run.settings_of(arguments).budget == 0.0 and run.settings_of(run.parser().parse_args([])).budget == 20.0
    with pytest.raises(argparse.ArgumentTypeError, match="at least 0 and below 1"):
        cli_errors.within(float, 0, 1)("1")


# Rivals that were not asked for -----------------------------------------------------------------------------------


def test_a_rival_that_was_not_asked_for_is_named_as_such(fake_measure, monkeypatch):
    there = [provider("eager"), provider("other"), Absent("liger", "liger_kernel is not installed")]
    monkeypatch.setattr(baselines, "ours", lambda *_: [provider("fastkd")])
    monkeypatch.setattr(baselines, "rivals", lambda *_: there)
    settings = run.Settings(CPU, modes=("both",), rounds=6)
    roofs = run.Roofs(CPU, fake_measure)
    everyone = run.bench_case(toy_case(), settings, roofs, facts())
    assert [row.provider for row in everyone.rows] == ["fastkd", "eager", "other"]
    fewer = run.bench_case(toy_case(), dataclasses.replace(settings, rivals=("eager",)), roofs, facts())
    assert [row.provider for row in fewer.rows] == ["fastkd", "eager"]
    assert fewer.absent == [Absent("other", "not asked for"), Absent("liger", "liger_kernel is not installed")]
