"""`make gpu`: everything that only a CUDA machine can show, in one go of eight minutes and without a network.

In the order of worth: what is built, one launch of every kernel against float64, the speed of the cases that have targets, the
same replayed from CUDA graphs and beside torch.compile, then tests, whole benches, profiles and sanitizers. What there was no
time for is left out by name. A stem whose kernels are wrong has no speed; nothing else depends on it. Without a GPU, or with
--dry-run, the plan is printed and nothing is run.

In the folder OUT of the environment (build/make_gpu without one) lie make_gpu.log, line by line as it is said, and after every
stage make_gpu.tar.gz, all results, to be unpacked in a checkout. Packages under build/brought (pip install --target) are found.
"""

import argparse
import csv
import dataclasses
import functools
import importlib.util
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Sequence

import torch
from fastkd.bench import cases, machine, report

from fastkd import backends

RESULTS, BROUGHT = machine.ROOT / "bench/results", machine.ROOT / "build/brought"
# In the order of worth: the target, whom to measure beside eager, the seconds after which the next one begins.
TARGETS = {
    "G1": ("trl", 60), "G6": ("liger", 40), "G12": ("", 28), "G7": ("", 20), "G8": ("", 20), "G9": ("", 20),
    "G13": ("inf-cl-style,cut-cross-entropy", 30), "G10": ("authors", 32), "G11": ("authors", 20), "G14": ("authors", 32),
}  # fmt: skip
MODES = {"G1": ("both", "loss_only"), "G11": ("forward",)}
STEM_OF = {name.split()[0]: case.stem for name, case in cases.targets().items()}
KEPT_FOR_TESTS = 100.0  # seconds
PROFILES = (("bert-base", 32, 128), ("llama-1b", 1, 512))  # model, batch, length
PY = sys.executable
SANITIZER, NO_DEVICE = "compute-sanitizer", "Device not supported"  # a virtual machine may hide what it needs
LARGEST = "two_to_the_31"  # a test that takes 20 GB


@dataclasses.dataclass(frozen=True)
class Stage:
    """A command, the seconds below which it is not begun, and those after which it is stopped."""

    name: str
    command: tuple[str, ...]
    least: float
    most: float
    stem: str = ""  # the one whose speed it is
    environment: dict = dataclasses.field(default_factory=dict)
    needs: str = ""  # a program that must be there


SMOKE = Stage("smoke", (PY, "-m", "fastkd.bench.evidence.sanitizer_smoke", "--processes"), 10, 60)
BUILD = Stage("build", (PY, "setup.py", "-q", "build_ext", "--inplace"), 30, 240, "", {"FASTKD_BUILD": "cuda"}, "nvcc")


def bench(name: str, stem: str, most: float, *words: str, least: float = 12) -> Stage:
    command = (PY, "-m", "fastkd", "bench", "--device", "cuda", *words, "--rounds", "10", "--budget", "2")
    return Stage(name, command, least, most, stem)


def target(name: str, how: str) -> Stage:
    """Beside eager and the named peers; replayed from a graph, beside eager; beside torch.compile, which takes longest."""
    peers, seconds = TARGETS[name]
    others = {"plain": f"eager,{peers}".rstrip(","), "graph": "eager", "compile": "compile"}[how]
    modes = [word for mode in MODES.get(name, ("both",)) for word in ("--mode", mode)]
    words = ("--target", name, *modes, "--launch", "graph" if how == "graph" else "plain", "--others", others)
    least = 10 if how == "plain" else KEPT_FOR_TESTS + 15
    return bench(f"target: {name}, {how}", STEM_OF[name], seconds + 15 * (how == "compile"), *words, least=least)


def sanitize(tool: str) -> Stage:
    """The caching allocator off, since it hides an overrun inside its blocks."""
    command = (SANITIZER, "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "66", *SMOKE.command[:-1])
    return Stage(f"{tool} on small cases", command, 20, 90, "", {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, SANITIZER)


def gpu_tests() -> list[str]:
    """The files with tests for a GPU; the others may need packages that such a machine lacks."""
    found = sorted((machine.ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(machine.ROOT)) for path in found
            if re.search(r"pytest\.mark\.gpu|\bsubjects\b", path.read_text()) and path.stem != "test_bench_gpu"]  # fmt: skip


def tests(title: str, seconds: float, workers: int, *what: str) -> Stage:
    """A line for each test as it ends. Most of a first run is the compilation of kernels, each on one core: hence workers."""
    several = ("-n", str(workers), "--dist", "worksteal") if importlib.util.find_spec("xdist") else ()
    command = (PY, "-m", "pytest", "-m", "gpu", "-rs", "-v", "--tb=short", *several, "-k", *what)
    return Stage(f"tests: {title}", command, 20, seconds)


def plan(built: bool = False) -> list[Stage]:
    """In the order in which they run: what comes late is left out first."""
    profile = (PY, "-m", "fastkd", "profile", "--device", "cuda", "--steps", "6", "--no-trace", "--out", str(RESULTS))
    sync = ("tests/ops/test_gpu.py", "tests/ops/test_gpu_stems.py")
    return [
        *(() if built else (BUILD,)),
        Stage("environment", (PY, "-m", "fastkd", "doctor", "--device", "cuda"), 5, 20),
        SMOKE,
        *(target(name, how) for how in ("plain", "graph", "compile") for name in TARGETS),
        tests("no waiting, CUDA graphs, large sizes", 120, 8, f"not {LARGEST}", *sync),
        tests("every kernel against float64", 180, 8, f"not {LARGEST}", *(x for x in gpu_tests() if x not in sync)),
        tests("more than 2³¹ elements", 60, 2, LARGEST, sync[0]),
        *(bench(f"bench: {stem}", stem, 75, stem) for stem in dict.fromkeys(STEM_OF.values())),
        *(Stage(f"profile: {model}", (*profile, "--from-config", model, "--method", "all", "--batch", str(batch),
                                      "--length", str(length)), 30, 90) for model, batch, length in PROFILES),
        Stage("docs/performance.md", (PY, "-m", "fastkd.bench.evidence.performance"), 5, 60),
        *map(sanitize, ("memcheck", "racecheck", "initcheck", "synccheck")),
    ]  # fmt: skip


def execute(stage: Stage, seconds: float, show: Callable) -> tuple[int | None, str]:
    """(exit status, what it said, which is shown as it is said); None where the time ran out. Its own children end with it."""
    path = os.pathsep.join([str(BROUGHT), *filter(None, [os.environ.get("PYTHONPATH")])])
    more = {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": path}
    process = subprocess.Popen(
        stage.command, cwd=machine.ROOT, env={**os.environ, **stage.environment, **more}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    lines = []

    def read() -> None:
        for line in process.stdout:
            lines.append(line)
            show(f"    {line.rstrip()}")

    reader = threading.Thread(target=read, daemon=True)  # a worker of a worker may hold the pipe for longer
    reader.start()
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        status = None
    reader.join(5)
    return status, "".join(lines)


def leave_out(stage: Stage, left: float, red: dict, which: Callable) -> str:
    """Why a stage is not begun; empty where it is."""
    if stage.stem in red:
        return f"no speed of {stage.stem}, which is red in: {red[stage.stem]}"
    if stage.needs and which(stage.needs) is None:
        return f"{stage.needs} is not on PATH"
    if left < stage.least:
        return f"{max(left, 0):.0f} s are left, and it takes at least {stage.least:.0f}"
    return ""


def outcome_of(stage: Stage, status: int | None, out: str, took: float) -> dict:
    """What became of a stage that was begun."""
    outcome, why = {None: "stopped", 0: "ok"}.get(status, "failed"), ""
    if outcome == "failed" and stage.needs == SANITIZER and NO_DEVICE in out:
        outcome, why = "left out", f"{SANITIZER} says: {NO_DEVICE}"
    elif outcome != "ok":
        why = f"exit status {status}" if outcome == "failed" else f"after {took:.0f} s; what it had written stays"
    return {"stage": stage.name, "outcome": outcome, "seconds": round(took, 1), "why": why}


def red_stems(stage: Stage, outcome: str, out: str) -> list[str]:
    """Those whose speed would mean nothing: wrong in the smoke test, or without the library that has their kernels."""
    if stage == BUILD and outcome != "ok":
        return [stem for stem, written in backends.WRITTEN.items() if "cuda" in written]
    return re.findall(r"^red: (\w+)", out, re.M) if stage == SMOKE else []


def run(stages: Sequence[Stage], seconds: float, run_stage: Callable = execute, clock: Callable = time.monotonic,
        which: Callable = shutil.which, show: Callable = print,
        keep: Callable = lambda outcomes: None) -> list[dict]:  # fmt: skip
    """Stage after stage until the time is up; what became of each. keep(outcomes): after each."""
    end, red, outcomes = clock() + seconds, {}, []
    for stage in stages:
        reason, out = leave_out(stage, end - clock(), red, which), ""
        if reason:
            outcome = {"stage": stage.name, "outcome": "left out", "seconds": 0.0, "why": reason}
        else:
            show(f"▸ {stage.name}")
            begun = clock()
            status, out = run_stage(stage, min(stage.most, end - begun), show)
            outcome = outcome_of(stage, status, out, clock() - begun)
        show("– {stage}: {outcome} in {seconds:.0f} s {why}".format(**outcome))
        outcomes.append(outcome)
        keep(outcomes)
        red |= dict.fromkeys(red_stems(stage, outcome["outcome"], out), stage.name)
    return outcomes


def keeper(folder: pathlib.Path, to: pathlib.Path, facts: dict) -> Callable:
    """Writes down what became of the stages so far, and packs all results into one archive, since the run may be cut at any
    time, and a lent machine may hand back a few files only."""

    def keep(outcomes: Sequence[dict]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "make_gpu.csv").open("w", newline="") as handle:
            writer = csv.DictWriter(handle, [*outcomes[0], *facts])
            writer.writeheader()
            writer.writerows({**outcome, **facts} for outcome in outcomes)
        unfinished = to / "make_gpu.part"
        with tarfile.open(unfinished, "w:gz") as archive:
            archive.add(folder, f"bench/results/{folder.name}")
            archive.add(machine.ROOT / "docs/performance.md", "docs/performance.md")
        unfinished.replace(to / "make_gpu.tar.gz")

    return keep


def tell(log, text: str) -> None:
    for where in (sys.stdout, log):
        print(text, file=where, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """0: all that ran was right. 1: something failed. 3: there is no GPU."""
    parser = argparse.ArgumentParser("make gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=480, help="for everything (480)")
    parser.add_argument(
        "--only", default="", help="stages whose name has this, a regular expression: smoke|G7, tests, …"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan, run nothing")
    arguments = parser.parse_args(argv)
    stages = [x for x in plan(built=backends.UNAVAILABLE["cuda"] is None) if re.search(arguments.only, x.name)]
    for i, stage in enumerate(stages, 1):
        words = " ".join([*(f"{k}={v}" for k, v in stage.environment.items()), *stage.command])
        print(f"{i:3}. {stage.name}: {stage.least:.0f} to {stage.most:.0f} s\n       $ {words}")
    if arguments.dry_run:
        print("dry run: nothing was run")
        return 0
    if not torch.cuda.is_available():
        print("make gpu needs a CUDA GPU, and torch sees none here: nothing was run (this was the plan; exit status 3)")
        return 3
    to = pathlib.Path(os.environ.get("OUT") or machine.ROOT / "build/make_gpu")
    to.mkdir(parents=True, exist_ok=True)
    facts = machine.facts(torch.device("cuda"))
    folder = RESULTS / facts["device"]
    os.environ["PATH"] += os.pathsep + "/usr/local/cuda/bin"
    with (to / "make_gpu.log").open("w") as log:
        outcomes = run(stages, arguments.seconds, show=functools.partial(tell, log), keep=keeper(folder, to, facts))
    lines = [(o["stage"], o["outcome"], f"{o['seconds']:.0f}", o["why"]) for o in outcomes]
    report.show_table(("stage", "outcome", "seconds", "why"), lines, "\nmake gpu", 2)
    print(f"results: {folder}, and packed in {to}")
    return 1 if any(outcome["outcome"] == "failed" for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
