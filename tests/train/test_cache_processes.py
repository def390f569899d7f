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
from test_teacher_cache import losses, parameters, same_tensors, trained, trainer

from fastkd.train import cache
from fastkd.train.cache.shards import INDEX, shard_name
from ranks import on_two_ranks

KILLS = int(os.environ.get("FASTKD_KILLS", "10"))
ONE_STEP = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.1}  # whose parameters show the gradient itself
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
run = trained(Path({folder!r}), {method!r}, "causal_lm", kept, per_device_train_batch_size=4, **{step!r})
result = made, losses(run), parameters(run)
"""


@pytest.mark.long
@pytest.mark.parametrize("method", ["forward_kl"])
def test_two_processes_build_and_read_it_together(method, tmp_path):
    script = RANKS.format(folder=str(tmp_path), method=method, step=ONE_STEP)
    (first, ours, weights), (second, _, others) = on_two_ranks(script)
    assert first == ["head.safetensors", shard_name(0), shard_name(2)] and second == [shard_name(1)]
    assert torch.equal(weights, others)
    options = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 4, **ONE_STEP}
    alone = trained(tmp_path, method, "causal_lm", cache.Options(tmp_path / "alone", examples_per_shard=4), **options)
    for name in map(shard_name, range(3)):
        assert same_tensors(tmp_path / "cache" / name, tmp_path / "alone" / name)
    assert ours == pytest.approx(losses(alone), rel=1e-5)
    step, before = parameters(alone), parameters(trainer(tmp_path, method, "causal_lm"))
    torch.testing.assert_close(weights - before, step - before, rtol=1e-4, atol=1e-6)
    assert (step - before).abs().max() > 1e-3


def process_of(script: str, *arguments) -> subprocess.Popen:
    path = os.pathsep.join([*filter(None, sys.path), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True)


BUILD = """
import sys, time
from pathlib import Path
import tiny, torch
from test_teacher_cache import trainer
from test_methods import pair
from fastkd.train import cache
torch.set_num_threads(1)
teacher, _ = pair("gpt2", "causal_lm")
teacher.register_forward_hook(lambda *_: time.sleep(0.05))
print("ready", flush=True)
kept = cache.Options(Path(sys.argv[1]) / "cache", top_k=7, examples_per_shard=2)
trainer(Path(sys.argv[1]), "forward_kl", "causal_lm", kept, teacher=teacher, data=tiny.dataset("causal_lm", rows=120))
print("done", flush=True)
"""


@pytest.mark.long
def test_killed_at_random_moments_it_is_finished_by_the_same_command(tmp_path):
    def started(folder):
        process = process_of(BUILD, folder)
        assert process.stdout.readline() == "ready\n"
        return process

    def shards():
        return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("shard-*")}

    whole, chance, seen = tmp_path / "whole", random.Random(0), {}
    process, begin = started(whole), time.perf_counter()
    assert process.communicate(timeout=300)[0].endswith("done\n")
    of_one = (time.perf_counter() - begin) / 60
    for _ in range(KILLS):
        process, few = started(tmp_path), chance.randint(0, 60 // KILLS - 3)
        while len(shards()) < len(seen) + few and process.poll() is None:
            time.sleep(of_one / 10)
        time.sleep(chance.uniform(0, of_one))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        now = shards()
        assert now.items() >= seen.items()  # no finished shard was written again
        seen = now
    assert 0 < len(seen) < 60  # so each kill met a build that was under way
    assert started(tmp_path).communicate(timeout=300)[0].endswith("done\n")
    names = sorted(path.name for path in (whole / "cache").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "cache").iterdir()) and len(names) == 61 and INDEX in names
    names.remove(INDEX)
    assert all(same_tensors(tmp_path / "cache" / name, whole / "cache" / name) for name in names)
    assert all((tmp_path / "cache" / name).stat().st_mtime_ns == at for name, at in seen.items())


LARGE = """
import re, sys, threading, time
from pathlib import Path
import tiny, torch
from datasets import Dataset
from test_teacher_cache import trained
from fastkd.train import cache
from fastkd.train.student import from_layers

def anonymous():
    return int(re.search(r"RssAnon:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

torch.set_num_threads(1)
folder, what = Path(sys.argv[1]), sys.argv[2]
sizes = {"hidden_size": 4096, "intermediate_size": 16, "head_dim": 4}  # wide, but quick
teacher = tiny.model("llama", "causal_lm", layers=2, **sizes)
ids = torch.randint(5, tiny.VOCAB, (1024, 32), generator=torch.Generator().manual_seed(0))
data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist(), "example_id": range(len(ids))})
student, peak, ended = from_layers(teacher, [0]), 0, threading.Event()

def watch():
    global peak
    while not ended.wait(0.005):
        peak = max(peak, anonymous())

kept = cache.Options(folder / "cache", examples_per_shard=64)
options = {"family": "llama", "student": student, "data": data, "num_train_epochs": 1, "max_steps": -1}
if what == "build":
    trained(folder, "forward_kl", "causal_lm", kept, teacher=teacher, **options | {"max_steps": 1})
else:
    trained(folder, "forward_kl", "causal_lm", data=tiny.dataset("causal_lm"))  # what the first run loads is not counted
    del teacher
    begin = anonymous()
    threading.Thread(target=watch, daemon=True).start()
    run = trained(folder, "forward_kl", "causal_lm", kept, teacher=None, **options)
    ended.set()
    assert run.state.global_step == 256
    print(peak - begin, run.cache.bytes())
"""


@pytest.mark.long
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc/self/status")
def test_a_cache_of_four_times_the_memory_trains(tmp_path):
    """Of the memory that no file backs, which is what a machine runs out of."""
    assert process_of(LARGE, tmp_path, "build").wait(300) == 0
    grown, size = map(int, process_of(LARGE, tmp_path, "train").communicate(timeout=300)[0].split()[-2:])
    assert size > 1 << 29 and grown < size / 4
