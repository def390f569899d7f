"""What a GPU would take for the cases that have targets, computed without one: `python -m fastkd.bench.evidence.gpu_model`.

The cases run on meta tensors, through the launchers that a GPU would run, with a driver that compiles each kernel as it is
launched and runs nothing. Per launch: registers, spills and shared memory from the compiler; instructions, exponentials,
FLOPs and bytes from the machine code and its loops' iterations (ITERATIONS). A kernel takes the largest of what its
bytes, FLOPs, instructions and exponentials take, times its waves rounded up; PyTorch's own operations take their bytes or
their FLOPs; a step takes the sum of these, or 4 µs for each launch if that is more. Eager PyTorch goes through the same model.

Nothing here is measured. Other chips than sm_90 have what the compiler made, and no times. `--check` compiles again and compares
with the CSV, for the same version of Triton.
"""

import argparse
import contextlib
import csv
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from unittest import mock

import torch
from fastkd.bench import baselines, cases, check, machine
from fastkd.bench.cases.case import BF16, FP32, Case, Inputs
from fastkd.bench.evidence.gpu_launch import FLOAT, MEMORY, TENSOR, Launch, flat, kernel_launch
from fastkd.bench.evidence.machine_code import examine
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fastkd import backends

LAUNCH = 4e-6  # seconds between two launches at least
CSV = machine.ROOT / "bench/results/gpu_model.csv"
COMPILED = ("registers", "stack", "shared", "programs_per_multiprocessor", "main_loop", "instructions_per_element")
MARGIN = {"registers": 4, "stack": 0, "instructions_per_element": 1.02}  # more than committed; times, for the last
FREE = ("empty", "detach", "expand", "alias")  # beside views


SMALL = (  # where launches take the time and not what they do: does eager win?
    ("divergence", "forward_kl", 8, 128), ("divergence", "mse", 8, 128), ("linear_divergence", "forward_kl", 64, 1024, 64, 64),
    ("contrast", "info_nce", 8, 256, 16), ("contrast", "nce", 8, 16, 16, 64), ("relation", "self", 2, 2, 16, 16, 3),
    ("contrast", "codir_step_given", 8, 16, 16, 64, 32), ("layer_cost", "hidden", 1, 1, 2, 16, 32),
    ("layer_cost", "hidden", 2, 3, 2, 16, 32), ("gram", "fcd", 4, 16, 32, 48),
    *(("contrast", "in_batch", *sizes) for sizes in ((16, 64), (512, 768), (2048, 768), (8192, 768))),
)  # fmt: skip
H200, TIMES = 90, ("waves", "microseconds", "bound")
LOSS = 0.95  # of eager's time over ours: below, eager wins
# A transport has no kernel in Triton.
CASES = {name: case for name, case in cases.targets().items() if case.stem != "transport" and case.kind != "emd_step"}
CASES |= {f"G15 {case.name}": case for stem, kind, *sizes in SMALL for dtype in ((FP32, BF16) if kind == "in_batch" else (BF16,))
          for case in [cases.STEMS[stem].case(kind, *sizes, dtype=dtype)]}  # fmt: skip


class Driver:
    """What Triton asks of a GPU before it compiles."""

    def __init__(self, target):
        self.target = target

    def get_current_device(self) -> int:
        return self.target.arch  # Triton asks a device for its target once

    def get_current_stream(self, _) -> int:
        return 0

    def get_current_target(self):
        return self.target


class Operations(TorchDispatchMode):
    """Notes PyTorch's operations beside the kernels, and the most memory that is alive beyond what was there."""

    def __init__(self, launches: list):
        super().__init__()
        self.launches, self.alive, self.peak, self.seen = launches, 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name, results = function.overloadpacket.__name__, list(flat([out]))
        for storage in {x.untyped_storage() for x in results} - {x.untyped_storage() for x in flat([*args])}:
            if storage not in self.seen:
                self.seen.add(storage)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self.forget, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        if function.is_view or any(word in name for word in FREE) or not results:
            return out
        inputs = list(flat(args))
        moved = sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in [*inputs, *results])
        if function.overloadpacket in flop_registry:
            flops = float(flop_registry[function.overloadpacket](*flat(args), out_val=out))
            half = any(x.dtype.itemsize == 2 for x in inputs)
            self.launches.append(Launch("GEMM", moved, 0 if half else flops, flops if half else 0))
        else:
            self.launches.append(Launch("PyTorch", moved))
        return out

    def forget(self, size: int) -> None:
        self.alive -= size


@contextlib.contextmanager
def pretended(target, launches: list) -> Iterator[None]:
    """Kernels take meta tensors and are compiled for `target` in place of being launched."""
    import triton
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled = examine(run(self, *args, grid=grid, warmup=True, **kwargs), target.arch)
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        launches.append(kernel_launch(self, grid, arguments, compiled))

    triton.runtime.driver.set_active(Driver(target))
    with (
        mock.patch.object(backends, "INTERPRETED", True), mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(torch, "is_autocast_enabled", return_value=False),  # neither knows the device "meta"
        mock.patch.object(backends, "full_precision", return_value=contextlib.nullcontext()),
    ):  # fmt: skip
        yield


def inputs_of(case: Case) -> Inputs:
    with torch.device("meta"):
        raw = Inputs(case.make(case, torch.Generator()), case.options, case.leaves)
    return raw.to(case.dtype, None, case.keep)


def launches_of(call: Callable, case: Case, target, gradient: bool = True) -> tuple[list[Launch], float]:
    """What the case launches, and the bytes beyond inputs and gradients at most."""
    launches: list[Launch] = []
    with pretended(target, launches):
        inputs, operations = inputs_of(case), Operations(launches)
        with operations:
            kept = check.loss_and_gradients(call, inputs)[1] if gradient else [torch.no_grad()(call)(inputs)]
    return launches, operations.peak - sum(x.nbytes for x in kept)


def step_seconds(launches: list[Launch]) -> float:
    return max(sum(launch.seconds[0] for launch in launches), LAUNCH * len(launches))


def floor_of(case: Case, mode: str) -> float:
    """Seconds of the fewest bytes and FLOPs: bench/cases counts them."""
    rate = TENSOR if case.gemms and case.dtype.itemsize == 2 else FLOAT
    return max(case.bytes.of(mode) / MEMORY, case.flops.of(mode) / rate)


def kernel_rows(launches: list[Launch]) -> Iterator[dict]:
    """One row for each kernel as it was compiled, and one for PyTorch's products and its other operations."""
    groups: dict = {}
    for launch in launches:
        groups.setdefault((launch.kernel, launch.compiled, launch.programs), []).append(launch)
    for (kernel, compiled, programs), same in groups.items():
        seconds, bounds = zip(*(launch.seconds for launch in same), strict=True)
        total = lambda of, same=same: sum(map(of, same))  # noqa: E731
        row = {
            "kernel": kernel, "launches": len(same), "microseconds": 1e6 * sum(seconds), "bound": bounds[0],
            "mbytes": total(lambda x: x.bytes) / 1e6, "cached_mbytes": total(lambda x: x.more.get("cached", 0)) / 1e6,
            "tensor_gflop": total(lambda x: x.tensor) / 1e9, "float_gflop": total(lambda x: x.flops) / 1e9,
            "gexponentials": total(lambda x: x.more.get("exponentials", 0)) / 1e9,
        }  # fmt: skip
        if compiled:
            row |= {"programs": programs, "warps": compiled.warps, "waves": same[0].waves,
                    "instructions_per_element": same[0].more["per_element"],
                    **{name: getattr(compiled, name) for name in COMPILED[:-1]}}  # fmt: skip
        yield row


def model(target, names=()) -> Iterator[dict]:
    """The rows of all cases on one chip: kernels, then the step beside eager's and the floor."""
    for name, case in CASES.items():
        if (names and name.split()[0] not in names) or (name.startswith("G15") and target.arch != H200):
            continue
        for mode in ("both", "loss_only") if name == "G1" else ("both",):
            common = {"target": name, "case": case.name, "mode": mode, "chip": target.arch, "triton": version()}
            ours, extra = launches_of(lambda x, case=case: case.ours(x, "triton"), case, target, mode == "both")
            if target.arch != H200:  # the rates of gpu_launch.py are not its own: what the compiler made, and no time
                yield from (
                    {**common, **row, **dict.fromkeys(TIMES, "")} for row in kernel_rows(ours) if "programs" in row
                )
                continue
            run = baselines.EAGER[case.stem]
            eager, eager_extra = launches_of(lambda x, run=run: run(dict(x), x.options), case, target, mode == "both")
            seconds, beside, floor = step_seconds(ours), step_seconds(eager), floor_of(case, mode)
            yield from ({**common, **row} for row in kernel_rows(ours) if not name.startswith("G15"))
            yield {
                **common, "kernel": "step", "launches": len(ours), "microseconds": 1e6 * seconds,
                "floor_microseconds": 1e6 * floor, "floor_share": floor / seconds, "extra_mib": extra / 2**20,
                "eager_launches": len(eager), "eager_microseconds": 1e6 * beside, "eager_extra_mib": eager_extra / 2**20,
                "times_eager": beside / seconds,
            }  # fmt: skip


def version() -> str:
    import triton

    return triton.__version__


COLUMNS = (
    "target", "case", "mode", "chip", "triton", "kernel", "launches", "programs", "warps", *COMPILED, "waves", "mbytes",
    "cached_mbytes", "tensor_gflop", "float_gflop", "gexponentials", "microseconds", "bound", "floor_microseconds",
    "floor_share", "eager_launches", "eager_microseconds", "times_eager", "extra_mib", "eager_extra_mib",
)  # fmt: skip
SHOWN = ("target", "mode", "kernel", "launches", "registers", "stack", "shared", "programs_per_multiprocessor", "waves",
         "main_loop", "instructions_per_element", "microseconds", "bound", "floor_share", "times_eager", "extra_mib")  # fmt: skip


def losses(rows: Iterable[dict]) -> dict[str, float]:
    """Where the model says that eager wins: target and mode -> eager's time over ours."""
    steps = {f"{row['target']} {row['mode']}": float(row["times_eager"]) for row in rows if row["kernel"] == "step"}
    return {name: times for name, times in steps.items() if times < LOSS}


def text(row: dict) -> dict:
    return {
        name: f"{row[name]:.4g}" if isinstance(row.get(name), float) else str(row.get(name, "")) for name in COLUMNS
    }


def worse(now: list[dict], committed: list[dict]) -> Iterator[str]:
    """Where registers, spills or instructions are more than those committed for the same launch and compiler."""
    key = ("target", "mode", "chip", "triton", "kernel", "programs")
    before = {tuple(row[name] for name in key): row for row in committed if row["registers"]}
    for row in (row for row in now if row["registers"]):
        old = before.get(tuple(row[name] for name in key))
        for name, margin in MARGIN.items() if old else ():
            limit = float(old[name]) * margin if isinstance(margin, float) else float(old[name]) + margin
            if float(row[name]) > limit:
                yield f"{row['target']} {row['kernel']} sm_{row['chip']}: {name} {row[name]}, committed {old[name]}"


def committed_rows() -> list[dict]:
    with CSV.open(newline="") as handle:
        return list(csv.DictReader(handle))


def main(argv=None) -> int:
    parser = argparse.ArgumentParser("fastkd.bench.evidence.gpu_model", description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("targets", nargs="*", help="G1, G6 …; all of them where none is named")
    parser.add_argument("--chips", default="90,80", help="compute capabilities (90,80)")
    parser.add_argument("--check", action="store_true", help=f"compare with {CSV.name} in place of writing it")
    arguments = parser.parse_args(argv)
    from triton.backends.compiler import GPUTarget

    rows = []
    for chip in map(int, arguments.chips.split(",")):
        for row in model(GPUTarget("cuda", chip, 32), arguments.targets):
            rows.append(text(row))
            print(" ".join(rows[-1][name] or "–" for name in SHOWN), flush=True)
    print(*(f"eager wins: {name}, {times} of our time" for name, times in losses(rows).items()), sep="\n")
    committed = committed_rows()
    if arguments.check:
        problems = list(worse(rows, committed))
        print(*problems, sep="\n")
        return 1 if problems else 0
    made = {(row["target"], row["chip"], row["triton"]) for row in rows}
    kept = [row for row in committed if (row["target"], row["chip"], row["triton"]) not in made]
    with CSV.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, COLUMNS)
        writer.writeheader()
        writer.writerows([*kept, *rows])
    return 0


# fastkd looks its kernels up when it is imported, which `-m` does before this file is read.
PRETENDING = """
import sys, torch
seen, torch.cuda.is_available = torch.cuda.is_available, lambda: True
import fastkd
torch.cuda.is_available = seen
from fastkd.bench.evidence.gpu_model import main
sys.exit(main(sys.argv[1:]))
"""

if __name__ == "__main__":
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    sys.exit(subprocess.run([sys.executable, "-c", PRETENDING, *sys.argv[1:]], env=environment).returncode)
