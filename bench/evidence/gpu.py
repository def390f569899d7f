"""`make gpu`: everything that only a CUDA machine can show, in one go and without a network.

Build, then tests, then speed, in this order of worth; what there was no time for is left out by name. Red tests mean that
no speed is measured. Without a GPU, or with --dry-run, the plan is printed and nothing is run. After every stage, where the
environment names a folder OUT, one archive of all results lies there: make_gpu.tar.gz, to be unpacked in a checkout.
"""

import argparse
import csv
import dataclasses
import importlib.util
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence

import torch
from fastkd.bench import machine, report

RESULTS, LOGS = machine.ROOT / "bench/results", machine.ROOT / "build/make_gpu"
STEMS = ("linear_divergence", "layer_cost", "transport", "relation", "gram", "contrast", "divergence")
PROFILES = (("bert-base", 32, 128), ("llama-1b", 1, 512))  # model, batch, length
PY = sys.executable
SANITIZER = "compute-sanitizer"
NO_DEVICE = "Device not supported"  # what it says on a virtual machine that hides what it needs
LARGEST = "two_to_the_31"  # a test that takes 20 GB


@dataclasses.dataclass(frozen=True)
class Stage:
    """A command, the seconds below which it is not begun, and those after which it is stopped."""

    name: str
    kind: str  # build, test, speed or after
    command: tuple[str, ...]
    least: float
    most: float
    environment: dict = dataclasses.field(default_factory=dict)
    needs: str = ""  # a program that must be there


def sanitize(tool: str) -> Stage:
    """The caching allocator off, since it hides an overrun inside its blocks."""
    command = (SANITIZER, "--tool", tool, "--error-exitcode", "66", PY, "-m", "fastkd.bench.evidence.sanitizer_smoke")
    return Stage(f"{tool} on small cases", "test", command, 20, 90, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, SANITIZER)


def gpu_tests() -> list[str]:
    """The files with tests for a GPU; the others may need packages that such a machine lacks."""
    found = sorted((machine.ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(machine.ROOT)) for path in found
            if re.search(r"pytest\.mark\.gpu|\bsubjects\b", path.read_text()) and path.stem != "test_bench_gpu"]  # fmt: skip


def tests(workers: int, *what: str) -> tuple[str, ...]:
    """Most of a first run is the compilation of kernels, each on one core: hence workers."""
    several = ("-n", str(workers), "--dist", "worksteal") if importlib.util.find_spec("xdist") else ()
    return (PY, "-m", "pytest", "-m", "gpu", "-rs", "-q", *several, "-k", *what)


def plan() -> list[Stage]:
    """In the order in which they run: what comes late is left out first."""
    bench = (PY, "-m", "fastkd", "bench", "--device", "cuda")
    profile = (PY, "-m", "fastkd", "profile", "--device", "cuda", "--steps", "6", "--no-trace", "--out", str(RESULTS))
    build = (PY, "setup.py", "-q", "build_ext", "--inplace")
    sync = ("tests/ops/test_gpu.py", "tests/ops/test_gpu_stems.py")
    rest = tuple(path for path in gpu_tests() if path not in sync)
    few = f"not {LARGEST}"
    return [
        Stage("build", "build", build, 30, 240, {"FASTKD_BUILD": "cuda"}, needs="nvcc"),
        Stage("tests: no waiting, CUDA graphs, large sizes", "test", tests(8, few, *sync), 20, 120),
        Stage("tests: every kernel against float64", "test", tests(8, few, *rest), 20, 180),
        Stage("tests: more than 2³¹ elements", "test", tests(2, LARGEST, sync[0]), 20, 60),
        sanitize("memcheck"),
        *(Stage(f"bench: {stem}", "speed", (*bench, stem, "--budget", "2"), 20, 75) for stem in STEMS),
        *(Stage(f"profile: {model}", "speed", (*profile, "--from-config", model, "--method", "all", "--batch", str(batch),
                                               "--length", str(length)), 30, 90) for model, batch, length in PROFILES),
        Stage("docs/performance.md", "after", (PY, "-m", "fastkd.bench.evidence.performance"), 5, 60),
        *map(sanitize, ("racecheck", "initcheck", "synccheck")),
    ]  # fmt: skip


def execute(stage: Stage, seconds: float) -> tuple[int | None, str]:
    """(exit status, last lines); None where the time ran out. The stage's own children end with it."""
    environment = {**os.environ, **stage.environment, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        stage.command, cwd=machine.ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        out, _ = process.communicate(timeout=seconds)
        return process.returncode, out
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0]


def leave_out(stage: Stage, left: float, red: Sequence[str], which: Callable) -> str:
    """Why a stage is not begun; empty where it is."""
    if red and stage.kind == "speed":
        return f"no speed on a red test ({red[0]})"
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


def run(stages: Sequence[Stage], seconds: float, run_stage: Callable = execute, clock: Callable = time.monotonic,
        which: Callable = shutil.which, show: Callable = print,
        keep: Callable = lambda *_: None) -> list[dict]:  # fmt: skip
    """Stage after stage until the time is up; what became of each. keep(outcomes, output): after each."""
    end, red, outcomes = clock() + seconds, [], []
    for stage in stages:
        reason, out = leave_out(stage, end - clock(), red, which), ""
        if reason:
            outcome = {"stage": stage.name, "outcome": "left out", "seconds": 0.0, "why": reason}
        else:
            show(f"▸ {stage.name}", flush=True)
            begun = clock()
            status, out = run_stage(stage, min(stage.most, end - begun))
            outcome = outcome_of(stage, status, out, clock() - begun)
            show(*(f"    {line}" for line in out.strip().splitlines()[-(3 if status == 0 else 40) :]), sep="\n")
        show("– {stage}: {outcome} in {seconds:.0f} s {why}".format(**outcome), flush=True)
        outcomes.append(outcome)
        keep(outcomes, out)
        bad = {"build": ("failed", "stopped", "left out"), "test": ("failed",)}.get(stage.kind, ())
        red += [stage.name] if outcome["outcome"] in bad else []
    return outcomes


def keeper(folder: pathlib.Path, logs: pathlib.Path, facts: dict, to: str = "") -> Callable:
    """Writes down what became of the stages so far and what each said; and packs it into one archive, since the run may be
    cut at any time, and a lent machine may hand back a few files only."""

    def keep(outcomes: Sequence[dict], out: str) -> None:
        for path in (folder, logs):
            path.mkdir(parents=True, exist_ok=True)
        with (folder / "make_gpu.csv").open("w", newline="") as handle:
            writer = csv.DictWriter(handle, [*outcomes[0], *facts])
            writer.writeheader()
            writer.writerows({**outcome, **facts} for outcome in outcomes)
        (logs / f"{len(outcomes):02}-{machine.slug(outcomes[-1]['stage'])}.log").write_text(out)
        if not to:
            return
        unfinished = pathlib.Path(to) / "make_gpu.part"
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(unfinished, "w:gz") as archive:
            archive.add(folder, f"bench/results/{folder.name}")
            archive.add(logs, "build/make_gpu")
            archive.add(machine.ROOT / "docs/performance.md", "docs/performance.md")
        unfinished.replace(unfinished.with_name("make_gpu.tar.gz"))

    return keep


def shown(word: str) -> str:
    return "python" if word == PY else word.replace(str(machine.ROOT) + os.sep, "")


def main(argv: Sequence[str] | None = None) -> int:
    """0: all that ran was right. 1: something failed. 3: there is no GPU."""
    parser = argparse.ArgumentParser("make gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=570, help="for everything (570: under ten minutes)")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, run nothing")
    arguments = parser.parse_args(argv)
    stages = plan()
    for i, stage in enumerate(stages, 1):
        words = " ".join([*(f"{k}={v}" for k, v in stage.environment.items()), *map(shown, stage.command)])
        print(f"{i:3}. {stage.name}: {stage.least:.0f} to {stage.most:.0f} s\n       $ {words}")
    if arguments.dry_run:
        print("dry run: nothing was run")
        return 0
    if not torch.cuda.is_available():
        print("make gpu needs a CUDA GPU, and torch sees none here: nothing was run (this was the plan; exit status 3)")
        return 3
    shutil.rmtree(LOGS, ignore_errors=True)
    facts = machine.facts(torch.device("cuda"))
    folder = RESULTS / facts["device"]
    os.environ["PATH"] += os.pathsep + "/usr/local/cuda/bin"
    outcomes = run(stages, arguments.seconds, keep=keeper(folder, LOGS, facts, os.environ.get("OUT", "")))
    lines = [(o["stage"], o["outcome"], f"{o['seconds']:.0f}", o["why"]) for o in outcomes]
    report.show_table(("stage", "outcome", "seconds", "why"), lines, "\nmake gpu", 2)
    print(f"results: {shown(str(folder))}")
    return 1 if any(outcome["outcome"] == "failed" for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
