"""Whose commit, and which GPU: a repository that is not ours and a second device are not mistaken for our own."""

import subprocess
from types import SimpleNamespace

import pytest
import torch
from bench_fakes import facts, provider, toy_case
from fastkd.bench import machine, measure, roofline, run


def test_somebody_elses_repository_has_no_commit_of_ours(tmp_path, monkeypatch):
    """Installed into the virtual environment inside a project, as it is usual."""
    mine = tmp_path / "project"
    package = mine / ".venv" / "lib" / "fastkd"
    package.mkdir(parents=True)
    for command in (
        ["init", "-q"],
        ["-c", "user.name=x", "-c", "user.email=x@y", "commit", "-q", "--allow-empty", "-m", "x"],
    ):
        subprocess.run(["git", "-C", str(mine), *command], check=True)
    monkeypatch.setattr(machine, "ROOT", package)
    assert not machine.is_checkout() and machine.git("rev-parse", "HEAD") == ""
    assert machine.facts(torch.device("cpu"))["commit"] == "unknown"
    monkeypatch.setattr(machine, "ROOT", mine)
    assert machine.is_checkout() and len(machine.git("rev-parse", "HEAD")) == 40


class Smi:
    """nvidia-smi: two GPUs, the clocks of which rise with every case."""

    def __init__(self, monkeypatch, uuid="abc"):
        self.asked = []
        monkeypatch.setattr(machine, "output_of", self)
        properties = SimpleNamespace(**({"uuid": uuid} if uuid else {}))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    def __call__(self, program, *arguments):
        if program != "nvidia-smi":
            return ""
        self.asked.append(arguments)
        return "97" if "--query-gpu=utilization.gpu" in arguments else f"570.1, {345 + 600 * len(self.asked)}, 2619"


@pytest.mark.parametrize(("uuid", "index"), [("abc", "GPU-abc"), ("", "1")])
def test_the_gpu_that_is_used_is_asked(uuid, index, monkeypatch):
    smi = Smi(monkeypatch, uuid)
    device = torch.device("cuda", 1)
    assert machine.driver(device) == "570.1, 945, 2619"
    assert machine.gpu_busy_reason(device) == "the GPU was 97 % busy before the run"
    assert [arguments[:2] for arguments in smi.asked] == [("-i", index)] * 2
    assert machine.driver(torch.device("cpu")) == "" and len(smi.asked) == 2


def test_clocks_are_those_after_the_case(fake_measure, monkeypatch):
    """Queried before any work, they would be those of a GPU that sleeps."""
    cpu, work, interleave = torch.device("cpu"), [], measure.interleave
    monkeypatch.setattr(measure, "interleave", lambda *arguments: work.append(1) or interleave(*arguments))
    monkeypatch.setattr(machine, "driver", lambda device: f"570.1, {345 + 100 * len(work)}, 2619")
    known, settings = {**facts(), "driver": machine.driver(cpu)}, run.Settings(cpu, rounds=6)
    found = [
        run.bench_case(toy_case(), settings, roofline.Roofs(cpu, fake_measure), known, [provider("fastkd")])
        for _ in "ab"
    ]
    assert [{row.driver for row in case.rows} for case in found] == [{"570.1, 645, 2619"}, {"570.1, 945, 2619"}]
