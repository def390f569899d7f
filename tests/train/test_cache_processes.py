"""A cache that several processes build and read, and one whose processes are killed at any moment."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("transformers")
from test_teacher_cache import losses, same_tensors, trained

from fastkd.train import cache
from fastkd.train.cache.shards import INDEX, shard_name
from ranks import on_two_ranks

KILLS = int(os.environ.get("FASTKD_KILLS", "4"))
RANKS = """
os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")
from pathlib import Path
from test_teacher_cache import losses, parameters, trained
from fastkd.train import cache
from fastkd.train.cache import shards
made, write = [], shards.write
shards.write = lambda path, *args: made.append(path.name) or write(path, *args)
kept = cache.Options({folder!r} + "/cache", examples_per_shard=4)
run = trained(Path({folder!r}), {method!r}, "causal_lm", kept, per_device_train_batch_size=4, max_steps=1)
result = made, losses(run), parameters(run)
"""


@pytest.mark.long
@pytest.mark.parametrize("method", ["forward_kl"])
def test_two_processes_build_and_read_it_together(method, tmp_path):
    (first, ours, weights), (second, _, others) = on_two_ranks(RANKS.format(folder=str(tmp_path), method=method))
    assert first == ["head.safetensors", shard_name(0), shard_name(2)] and second == [shard_name(1)]
    assert torch.equal(weights, others)
    options = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 4, "max_steps": 1}
    alone = trained(tmp_path, method, "causal_lm", cache.Options(tmp_path / "alone", examples_per_shard=4), **options)
    for name in map(shard_name, range(3)):
        assert same_tensors(tmp_path / "cache" / name, tmp_path / "alone" / name)
    assert ours == pytest.approx(losses(alone), rel=1e-5)


BUILD = """
import sys, time
from pathlib import Path
import tiny, torch
from test_teacher_cache import trainer
from test_methods import pair
from fastkd.train import cache
torch.set_num_threads(1)
teacher, _ = pair("gpt2", "causal_lm")
teacher.register_forward_hook(lambda *_: time.sleep(0.01))
print("ready", flush=True)
kept = cache.Options(Path(sys.argv[1]) / "cache", top_k=7, examples_per_shard=2)
trainer(Path(sys.argv[1]), "forward_kl", "causal_lm", kept, teacher=teacher, data=tiny.dataset("causal_lm", rows=120))
print("done", flush=True)
"""


@pytest.mark.long
def test_killed_at_random_moments_it_is_finished_by_the_same_command(tmp_path):
    def started(folder):
        path = os.pathsep.join([*filter(None, sys.path), os.environ.get("PYTHONPATH", "")])
        process = subprocess.Popen(
            [sys.executable, "-c", BUILD, str(folder)],
            env=os.environ | {"PYTHONPATH": path},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout.readline() == "ready\n"
        return process

    whole, chance, seen = tmp_path / "whole", random.Random(0), {}
    begun = time.perf_counter()
    assert started(whole).communicate(timeout=300)[0].endswith("done\n")
    lasts = time.perf_counter() - begun
    for _ in range(KILLS):
        process = started(tmp_path)
        time.sleep(chance.uniform(0, 0.4 * lasts))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        now = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("shard-*")}
        assert now.items() >= seen.items()  # no finished shard was written again
        seen = now
    assert started(tmp_path).communicate(timeout=300)[0].endswith("done\n")
    names = sorted(path.name for path in (whole / "cache").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "cache").iterdir()) and len(names) == 61 and INDEX in names
    names.remove(INDEX)
    assert all(same_tensors(tmp_path / "cache" / name, whole / "cache" / name) for name in names)
    assert all((tmp_path / "cache" / name).stat().st_mtime_ns == at for name, at in seen.items())
