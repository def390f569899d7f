"""The model of the GPU kernels: what it reads from machine code, and that no kernel got worse than its committed row."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from fastkd.bench.evidence import gpu_launch, gpu_model
from fastkd.bench.evidence.machine_code import Compiled

import fastkd
from cases import ROOT
from fastkd import backends, thresholds
from fastkd.ops import contrast

pytest.importorskip("triton")

TRITON = "3.9.0"  # of the rows that are compared below
STALL = "--:-:-:Y:2\t"
SASS = "\n".join([
    "Function:kernel", STALL + "MOV R1, c[0x0][0x28] ;", "LBB0:", STALL + "@!P0 LDG.E.128 R4, [R2.64] ;", "LBB1:",
    STALL + "FFMA R8, R4, R5, R8 ;", STALL + "HMMA.16816.F32.BF16 R8, R4, R5, R8 ;", STALL + "@P1 BRA LBB1;",
    STALL + "MUFU.EX2 R9, R8 ;", STALL + "@!PT LDS RZ, [RZ] ;", STALL + "@P2 BRA LBB0;", STALL + "STG.E [R2.64], R9 ;",
    STALL + "EXIT ;", "LBB2:", STALL + "BRA LBB2;", STALL + "NOP;",
])  # fmt: skip


def test_a_loop_counts_once_for_each_of_its_iterations():
    compiled = Compiled(90, 4, 0, 40, 0, SASS, "")
    assert compiled.main_loop == 3
    work = compiled.work("LDG", (5, 7))  # only the outer loop loads, so the 7 has no loop
    assert work == {
        "instructions": 4 + 5 * (3 + 3),
        "loaded": 5 * 16,
        "fma": 5 * 64,
        "HMMA": 5 * 4096,
        "exponentials": 5,
        "stored": 4,
    }
    assert compiled.work("MMA", (5, 7))["HMMA"] == 5 * 7 * 4096
    assert compiled.work("innermost MMA", (7,))["HMMA"] == 7 * 4096  # once around it


def test_a_block_that_stands_in_for_a_shuffle_is_no_loop():
    """As sm_80 has them behind the end. They return to the middle, and no label leads to them."""
    block = "\n".join([STALL + "MUFU.EX2 R9, R8 ;", STALL + "BRA LBB3 ;", "LBB2:"])
    split = "\n".join([STALL + "BRA.DIV ~URZ, 0x15aa0 ;", "LBB3:", STALL + "FFMA R8, R4, R5, R8 ;"])
    sass = SASS.replace("LBB2:", block).replace(STALL + "FFMA R8, R4, R5, R8 ;", split)
    (before, loops), (after, same) = (Compiled(80, 4, 0, 40, 0, text, "").code for text in (SASS, sass))
    assert len(after) == len(before) + 3 and [loop.start for loop in same] == [loop.start for loop in loops] == [1, 2]
    entered = sass.replace("BRA.DIV ~URZ, 0x15aa0", "@P5 BRA LBB5").replace(
        STALL + "MUFU.EX2 R9, R8 ;\n" + STALL + "BRA LBB3", "LBB5:\n" + STALL + "BRA LBB3"
    )
    assert len(Compiled(80, 4, 0, 40, 0, entered, "").code[1]) == 3


def test_a_wave_that_is_not_full_leaves_multiprocessors_idle():
    compiled = Compiled(90, 4, 0, 128, 0, SASS, "")  # four programs on each
    few, many = (gpu_launch.Launch("", gpu_launch.MEMORY, compiled=compiled, programs=p) for p in (66, 529))
    assert few.seconds == (2.0, "memory")
    assert many.seconds[0] == pytest.approx(2 * 528 / 529)


def row(**changes):
    base = {
        "target": "G6",
        "mode": "both",
        "chip": "90",
        "triton": "3.9.0",
        "kernel": "k",
        "programs": "8",
        "registers": "100",
    }
    return base | {"stack": "0", "instructions_per_element": "50"} | changes


@pytest.mark.parametrize(("changes", "found"), [({}, 0), ({"registers": "104"}, 0), ({"registers": "105"}, 1), ({"stack": "8"}, 1),
                                               ({"instructions_per_element": "51.5"}, 1), ({"triton": "3.6.0", "stack": "8"}, 0)])  # fmt: skip
def test_what_counts_as_worse(changes, found):
    assert len(list(gpu_model.worse([row(**changes)], [row()]))) == found


KNOWN = {  # where eager wins by the model and "auto" takes a kernel: eager rounds in-batch scores to bfloat16
    "G13 both", "G15 in_batch-2048x768-bfloat16 both", "G15 in_batch-8192x768-bfloat16 both",
}  # fmt: skip


def test_auto_knows_where_eager_would_win():
    """By the committed rows: there it takes plain PyTorch, or the loss is known."""
    rows = [row for row in gpu_model.committed_rows() if row["chip"] == "90" and row["triton"] == TRITON]
    lost = gpu_model.losses(rows)
    few = thresholds.UP_TO_ON_GPU["in_batch"]
    taken = {
        f"{name} both" for name, case in gpu_model.CASES.items() if case.kind == "in_batch" and case.shape["B"] <= few
    }
    assert taken <= set(lost) and set(lost) == taken | KNOWN


@pytest.mark.parametrize(("rows", "device", "dtype", "small"), [
    (512, "cuda", torch.float32, True), (512, "cuda", torch.bfloat16, True), (513, "cuda", torch.float32, False),
    (512, "cpu", torch.float32, True), (512, "cpu", torch.bfloat16, False), (4, "mps", torch.float32, False),
    (4, "cuda", torch.float64, False),
])  # fmt: skip
def test_in_batch_negatives_that_are_few(rows, device, dtype, small):
    class Rows(SimpleNamespace):
        def __len__(self):
            return rows

    x = Rows(device=torch.device(device), dtype=dtype)
    assert contrast.by_cross_entropy(x, x) == small
    assert not contrast.by_cross_entropy(
        x, Rows(device=x.device, dtype=torch.float16 if dtype != torch.float16 else torch.float32)
    )


def test_a_backend_that_is_named_is_not_overruled(monkeypatch):
    x, monkey = torch.randn(4, 8), lambda *_: pytest.fail("asked whether the batch is small")
    monkeypatch.setattr(contrast, "by_cross_entropy", monkey)
    fastkd.info_nce_loss(x, x, None, backend="reference")
    with pytest.raises(pytest.fail.Exception, match="asked"):
        fastkd.info_nce_loss(x, x, None)


def test_the_doctor_says_it_in_words():
    heading, line = thresholds.lines("cuda")
    assert heading == "On a GPU, by size (computed by a model of a GPU, not measured):"
    assert line.strip() == "info_nce_loss whose negatives are the batch  -> pytorch up to 512 examples, then kernels"
    assert thresholds.lines("mps") == []


@pytest.mark.long
@pytest.mark.skipif(backends.INTERPRETED, reason="the interpreter does not compile")
def test_no_kernel_is_worse_than_committed():
    if gpu_model.version() not in {row["triton"] for row in gpu_model.committed_rows()}:
        pytest.skip(f"no row of {gpu_model.CSV.name} is of triton {gpu_model.version()}")
    command = [sys.executable, "-m", "fastkd.bench.evidence.gpu_model", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
