"""`torchrun … -m fastkd distill`, as it is: one rank speaks and writes, and the student is the one of a single process."""

import datetime
import os
import subprocess
import sys

import pytest
import torch
from test_distill_cli import files, flags, save_pair  # noqa: F401

pytest.importorskip("transformers")
from safetensors.torch import load_file

from fastkd import distributed
from fastkd.cli import distill, main, options


def torchrun(*argv: str) -> subprocess.CompletedProcess:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "fastkd"]
    path = os.pathsep.join([*filter(None, sys.path), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*launch, *argv], env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.long
def test_two_ranks_distil_as_one_process_does(files, capsys):  # noqa: F811
    save_pair(files / "teacher", "bert", "classification")
    same = {"method": "bert_emd:beta=1 + kd:weight=0.5", "train_sampling_strategy": "random", "learning_rate": 1e-3}
    asked = {**same, "per_device_train_batch_size": 4, "output_dir": files / "two"}
    if not torch.accelerator.is_available():
        asked["use_cpu"] = None  # which nobody has to say
    two = torchrun("distill", *flags(files, **asked))
    assert two.returncode == 0, two.stderr
    for once in ("Terms of the loss", "report:", "student:", "rows: 40 train"):
        assert two.stdout.count(once) == 1, (once, two.stdout)
    assert distill.main(flags(files, **same, output_dir=files / "one")) == 0
    assert {p.name for p in (files / "two").iterdir()} == {p.name for p in (files / "one").iterdir()}
    assert (files / "two" / "report" / "report.json").exists()
    assert (files / "two" / "checkpoint-4" / "rng_state_1.pth").exists()
    weights = [load_file(files / name / "student" / "model.safetensors") for name in ("two", "one")]
    for name, x in weights[0].items():
        torch.testing.assert_close(x, weights[1][name], rtol=1e-3, atol=1e-5)
    assert main(["distill", *flags(files, **asked)]) == 2
    assert "it is finished; choose another folder" in capsys.readouterr().err


@pytest.mark.long
def test_what_all_ranks_would_say_is_said_once(tmp_path):
    ended = torchrun("distill", "--teacher", "none", "--method", "none", "--output_dir", str(tmp_path / "run"))
    assert ended.returncode != 0 and ended.stderr.count("fastkd distill: ") == 1, ended.stderr


@pytest.mark.parametrize(("sentences", "said"), [(("a", "a"), [0]), (("a", "b"), [0, 1]), ((None, "b"), [1])])
def test_a_rank_is_silent_only_about_what_the_first_one_says(sentences, said, monkeypatch):
    """None: that rank goes on, so the other one speaks after a moment."""
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(distributed, "TIMEOUT", datetime.timedelta(seconds=0.2))
    environment = {"WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
    for name, x in environment.items():
        monkeypatch.setenv(name, x)
    found = []
    for rank, sentence in enumerate(sentences):
        monkeypatch.setenv("RANK", str(rank))
        if sentence is not None and not distributed.is_said_by_first_rank(sentence):
            found.append(rank)
    assert found == said


def test_processes_without_gpus_are_told_of_each_other(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for world, told in (("1", None), ("2", "true")):
        monkeypatch.setenv("WORLD_SIZE", world)
        options._several_on_cpus()
        assert os.environ.pop("ACCELERATE_USE_CPU", None) == told
