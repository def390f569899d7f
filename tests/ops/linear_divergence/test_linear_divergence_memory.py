"""What linear_divergence allocates beyond its inputs and its gradients, as the kernel counts the pages of this process.

Measured in a process whose blocks have pages of their own: in a heap that others have used, what happens to be free
moves the mark by 15 MiB from call to call.
"""

import functools
import json
import os
import subprocess
import sys

import pytest
import torch
from fastkd.bench import measure

from fastkd import backends

VOCABULARY, WIDTH, MIB = 8000, 128, 2**20
pytestmark = [
    pytest.mark.skipif(backends.UNAVAILABLE["cpu"] is not None, reason="the C++ kernels are not built"),
    pytest.mark.skipif(measure.peak_memory(measure.Task("", lambda _: None), torch.device("cpu"))[1][:5] != "VmHWM",
                       reason="this system has no high-water mark that one can reset"),
]  # fmt: skip

SCRIPT = f"""
import json, sys
import torch
from fastkd import linear_divergence
from fastkd.bench import measure

def extra(rows, dtype, memory, teacher_tokens):
    dtype = getattr(torch, dtype)
    make = lambda *shape: torch.randn(shape).to(dtype)
    leaves = [make(rows, {WIDTH}).requires_grad_(), make({VOCABULARY}, {WIDTH}).requires_grad_()]
    options = {{"recompute_logits": memory == "low", "teacher_tokens": teacher_tokens}}
    if teacher_tokens == "all":
        options["vocab"] = torch.arange({VOCABULARY}) * 4
    teacher = [make(rows, {WIDTH}), make({VOCABULARY} * (4 if "vocab" in options else 1), {WIDTH})]
    task = measure.make_task("ours", "both", lambda: linear_divergence(*leaves, *teacher, **options), leaves)
    task.run(None)
    peak, _ = measure.peak_memory(task, torch.device("cpu"))
    return (peak - sum(x.numel() * x.element_size() for x in leaves)) / {MIB}

memory = sys.argv[1]
sizes = {{"low": (1024, 8192), "speed": ({WIDTH}, 512, 4096)}}[memory]
cases = [(rows, dtype, memory, "kept") for dtype in ("float32", "bfloat16") for rows in sizes]
if memory == "low":
    cases.append((8192, "bfloat16", "low", "all"))
print(json.dumps([[case, extra(*case)] for case in cases]))
"""


@functools.cache
def measured(memory):
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(64 << 10), "FASTKD_THRESHOLDS": "kernels"}
    done = subprocess.run([sys.executable, "-c", SCRIPT, memory], capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    return {tuple(case): mib for case, mib in json.loads(done.stdout)}


def extra(rows, dtype, memory, teacher_tokens="kept"):
    """MiB at the peak of loss and gradients, less the gradients."""
    return measured(memory)[rows, str(dtype).removeprefix("torch."), memory, teacher_tokens]


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_stays_flat_as_rows_grow_eightfold(dtype):
    few, many = extra(1024, dtype, "low"), extra(8192, dtype, "low")  # a block holds 1024 rows
    of_rows = 7 * 1024 * (WIDTH * 4 + 9 * 4) / MIB  # float32 sums of the hidden gradient, and nine numbers per row
    assert many < few + of_rows + 2 < 8192 * VOCABULARY * dtype.itemsize / MIB / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_speed_is_bounded_by_one_chunk_whatever_the_rows(dtype):
    """Logits of 64 rows, the gradient of 256 spare rows; past one chunk, float32 sums of a bfloat16 head."""
    chunk = (2 * 64 * VOCABULARY * 4 + 256 * VOCABULARY * dtype.itemsize) / MIB
    sums = VOCABULARY * WIDTH * 4 / MIB if dtype == torch.bfloat16 else 0
    for rows in (512, 4096):
        of_rows = rows * WIDTH * 4 / MIB
        assert extra(rows, dtype, "speed") < chunk + sums + of_rows + 8
    assert chunk + sums + of_rows + 8 < 4096 * VOCABULARY * dtype.itemsize / MIB / 2


def test_speed_in_one_chunk_adds_less_than_the_gradient_of_the_logits():
    """No second copy of the head's gradient, and none of the logits."""
    assert extra(WIDTH, torch.bfloat16, "speed") < 2 * 64 * VOCABULARY * 4 / MIB + 8


@pytest.mark.long
def test_the_mass_of_other_tokens_takes_the_memory_of_one_block():
    """A teacher with four times the tokens: blocks of 1024 rows and tokens, the kept rows of its head, a few numbers per row."""
    block = 1024 * 1024 * (4 + 4 + 8) / MIB  # logits, exponentials, and those in float64
    more = block + VOCABULARY * WIDTH * 2 / MIB + 8192 * 10 * 8 / MIB
    assert extra(8192, torch.bfloat16, "low", "all") < extra(8192, torch.bfloat16, "low") + more + 2
