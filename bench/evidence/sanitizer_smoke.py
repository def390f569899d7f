"""Every stem in every implementation that runs here, tiny and checked: for compute-sanitizer, under which a step takes a
thousand times as long, and as the first thing on a GPU that nothing ran on. A line for each kernel, which begins with ok or red.
`compute-sanitizer --tool memcheck python -m fastkd.bench.evidence.sanitizer_smoke`; `… --processes` as `make gpu` calls it.
"""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import torch
from fastkd.bench import baselines, check
from fastkd.bench.baselines import Absent
from fastkd.bench.cases import STEMS
from fastkd.bench.cases.case import BF16, FP32, Case, build

SIZES = {"N": 7, "V": 131, "K": 20, "B": 3, "Ds": 24, "Dt": 40, "H": 2, "L": 19, "d": 16, "R": 2, "S": 9, "D": 24, "n": 50,
         "P": 5, "M": 6}  # primes and one more than a block: tails are where overruns happen  # fmt: skip
SIZES_OF = {"layer_cost": {"N": 2, "M": 3}, "transport": {"N": 4}, "linear_divergence": {"R": 37}, "gram": {"N": 19}}
LIMITS = {FP32: 1e-4, torch.float64: 1e-9, BF16: 5e-2}
PROCESSES = 2  # processes for a stem: most of a first run is the compilation of kernels, each on one core


def small_cases(stems: Sequence[str] = tuple(STEMS)) -> Iterator[Case]:
    """One of each kind of each stem, in float32 and bfloat16."""
    for stem in stems:
        module = STEMS[stem]
        for kind, axes in module.AXES.items():
            sizes = [SIZES_OF.get(stem, {}).get(axis, SIZES[axis]) for axis in axes]
            found = [module.case(kind, *sizes, dtype=dtype) for dtype in (FP32, BF16)]
            yield from {case.name: case for case in found}.values()  # some have one dtype, whatever is asked for


def implementations(case: Case, inputs) -> list:
    """fastkd as it dispatches, and every other kernel that can run."""
    return [p for p in baselines.ours(case, inputs) if not isinstance(p, Absent)]


def say(line: str) -> None:
    """In one write, so that the lines of several processes do not mix."""
    print(line + "\n", end="", flush=True)


def main(device: str, cases: Sequence[Case] | None = None) -> int:
    wrong = count = 0
    for case in small_cases() if cases is None else cases:
        inputs = build(case, torch.device(device))
        oracle = check.make_oracle(case, inputs)
        for provider in implementations(case, inputs):
            try:
                problem = check.verdict(check.errors_of(provider.call, inputs, oracle), (LIMITS[case.dtype],) * 2)
            except Exception as error:  # it does not compile, or cannot be launched
                problem = f"{type(error).__name__}: {error}".splitlines()[0]
            kernel = "" if provider.served_by in ("reference", "eager") else "kernel"
            say(f"{'red' if problem else 'ok'}: {case.stem} {case.name} {provider.served_by} {kernel} {problem}")
            wrong += bool(problem)
            count += bool(kernel)
    say(f"{count} kernel runs, {wrong} wrong")
    return 1 if wrong else 0


def in_processes() -> int:
    """Every stem in processes of its own, all at the same time: one that dies, and with it all that its process had on the
    device, is red by itself."""
    command = (sys.executable, "-m", "fastkd.bench.evidence.sanitizer_smoke")
    jobs = [(stem, str(part)) for stem in STEMS for part in range(PROCESSES)]
    with ThreadPoolExecutor(len(jobs)) as pool:
        runs = {pool.submit(subprocess.run, [*command, *job]): job[0] for job in jobs}
        for done in as_completed(runs):
            if done.result().returncode not in (0, 1):
                say(f"red: {runs[done]} died with status {done.result().returncode}")
    return 1 if any(done.result().returncode for done in runs) else 0


if __name__ == "__main__":
    if sys.argv[1:] == ["--processes"]:
        sys.exit(in_processes())
    here = "cuda" if torch.cuda.is_available() else "cpu"
    sys.exit(main(here, list(small_cases(sys.argv[1:2]))[int(sys.argv[2]) :: PROCESSES] if sys.argv[1:] else None))
