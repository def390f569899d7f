"""`make gpu`: everything that only a CUDA machine can show, in one go and without a network.

Build, then tests, then speed, in this order of worth; what there was no time for is left out by name. Red tests mean that
no speed is measured. Without a GPU, or with --dry-run, the plan is printed and nothing is run. After every stage, where the
environment names a folder OUT, one archive of all results lies there: make_gpu.tar.gz, to be unpacked in a checkout.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence

from fastkd.bench import machine, report

RESULTS = machine.ROOT / "bench" / "results"
STEMS = ("linear_divergence", "layer_cost", "transport", "relation", "gram", "contrast", "divergence")
PROFILES = (
    ("bert-base", "all", ("--batch", "32", "--length", "128")),
    ("llama-1b", "all", ("--batch", "1", "--length", "512")),
)
PY = sys.executable
SANITIZER = "compute-sanitizer"
SMOKE = "fastkd.bench.evidence.sanitizer_smoke"
NO_DEVICE = "Device not supported"  # what it says on a virtual machine that hides what it needs
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
LOGS = machine.ROOT / "build" / "make_gpu"
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


def sanitize(tool: str, least: float, most: float) -> Stage:
    """The caching allocator off, since it hides an overrun inside its blocks."""
    command = (SANITIZER, "--tool", tool, "--error-exitcode", "66", PY, "-m", SMOKE, "--device", "cuda")
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Stage(f"{tool} on small cases", "test", command, least, most, environment, needs=SANITIZER)


def gpu_tests() -> list[str]:
    """The files with tests for a GPU; the others may need packages that such a machine lacks."""
    found = sorted((machine.ROOT / "tests").rglob("test_*.py"))
    return [
        str(path.relative_to(machine.ROOT))
        for path in found
        if "pytest.mark.gpu" in path.read_text() and path.stem != "test_bench_gpu"
    ]


def tests(workers: int) -> tuple[str, ...]:
    """Most of a first run is the compilation of kernels, each on one core: hence workers."""
    several = ("-n", str(workers), "--dist", "worksteal") if importlib.util.find_spec("xdist") else ()
    return (PY, "-m", "pytest", "-m", "gpu", "-rs", "-q", *several)


def plan() -> list[Stage]:
    """In the order in which they run: what comes late is left out first."""
    test, largest = (*tests(8), "-k", f"not {LARGEST}"), (*tests(2), "-k", LARGEST, "tests/ops/test_gpu.py")
    bench = (PY, "-m", "fastkd.bench.run", "--device", "cuda")
    profile = (PY, "-m", "fastkd", "profile", "--device", "cuda", "--steps", "6", "--no-trace", "--out", str(RESULTS))
    build = (PY, "setup.py", "-q", "build_ext", "--inplace")
    sync = ("tests/ops/test_gpu.py", "tests/ops/test_gpu_stems.py")
    rest = tuple(path for path in gpu_tests() if path not in sync)
    stages = [
        Stage("build", "build", build, 30, 240, {"FASTKD_BUILD": "cuda"}, needs="nvcc"),
        Stage("tests: no waiting, CUDA graphs, large sizes", "test", (*test, *sync), 20, 120),
        Stage("tests: every kernel against float64", "test", (*test, *rest), 20, 180),
        Stage("tests: more than 2³¹ elements", "test", largest, 20, 60),
        sanitize("memcheck", 20, 90),
    ]
    stages += [Stage(f"bench: {stem}", "speed", (*bench, stem, "--budget", "2"), 20, 75) for stem in STEMS]
    for model, method, options in PROFILES:
        command = (*profile, "--from-config", model, "--method", method, *options)
        stages.append(Stage(f"profile: {model}", "speed", command, 30, 90))
    stages.append(Stage("README figures", "after", (PY, "-m", "fastkd.bench.evidence.readme"), 5, 60))
    stages += [sanitize(tool, 20, 90) for tool in ("racecheck", "initcheck", "synccheck")]
    command = (*bench, "--scale", "--mode", "both", "--budget", "1")
    return [*stages, Stage("bench: curves to their far ends", "speed", command, 60, 600)]


def execute(stage: Stage, seconds: float) -> tuple[int | None, str]:
    """(exit status, last lines); None where the time ran out. The stage's own children end with it."""
    environment = {**os.environ, **stage.environment, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "PATH": PATH}
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


def which_tool(tool: str) -> str | None:
    return shutil.which(tool, path=PATH)


def leave_out(stage: Stage, left: float, red: Sequence[str], which: Callable = which_tool) -> str:
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
        which: Callable = which_tool, show: Callable = print, keep: Callable = lambda *_: None) -> list[dict]:  # fmt: skip
    """Stage after stage until the time is up; what became of each. keep(outcomes, output): after each."""
    end, red, outcomes = clock() + seconds, [], []
    for stage in stages:
        reason = leave_out(stage, end - clock(), red, which)
        if reason:
            show(f"– {stage.name}: left out: {reason}")
            outcomes.append({"stage": stage.name, "outcome": "left out", "seconds": 0.0, "why": reason})
            red += [stage.name] if stage.kind == "build" else []
            keep(outcomes, "")
            continue
        show(f"▸ {stage.name}", flush=True)
        begun = clock()
        status, out = run_stage(stage, min(stage.most, end - begun))
        outcome = outcome_of(stage, status, out, clock() - begun)
        outcomes.append(outcome)
        tail = out.strip().splitlines()
        show("\n".join(f"    {line}" for line in tail[-(3 if status == 0 else 40) :]))
        show(f"  {outcome['outcome']} in {outcome['seconds']:.0f} s {outcome['why']}", flush=True)
        keep(outcomes, out)
        stopped = outcome["outcome"] == "stopped" and stage.kind == "build"
        if stopped or (outcome["outcome"] == "failed" and stage.kind in ("build", "test")):
            red.append(stage.name)
    return outcomes


def keeper(folder: pathlib.Path, logs: pathlib.Path, facts: dict, to: str = "") -> Callable:
    """Writes down what became of the stages so far and what each said, and packs it: the run may be cut at any time."""

    def keep(outcomes: Sequence[dict], out: str) -> None:
        for path in (folder, logs):
            path.mkdir(parents=True, exist_ok=True)
        (folder / "make_gpu.log.json").write_text(
            json.dumps({"facts": facts, "stages": list(outcomes)}, indent=1) + "\n"
        )
        name = machine.slug(outcomes[-1]["stage"])
        if out:
            (logs / f"{len(outcomes):02}-{name}.log").write_text(out)
        if to:
            bring_back(pathlib.Path(to), folder, logs)

    return keep


def bring_back(to: pathlib.Path, folder: pathlib.Path, logs: pathlib.Path) -> None:
    """One archive, since a lent machine may hand back a few files only, and complete at any time."""
    to.mkdir(parents=True, exist_ok=True)
    unfinished = to / "make_gpu.part"
    with tarfile.open(unfinished, "w:gz") as archive:
        archive.add(folder, f"bench/results/{folder.name}")
        archive.add(logs, "build/make_gpu")
        archive.add(machine.ROOT / "README.md", "README.md")
    unfinished.replace(to / "make_gpu.tar.gz")


def verdict(outcomes: Sequence[dict]) -> int:
    """0: all that ran was right. 1: something failed."""
    return 1 if any(outcome["outcome"] == "failed" for outcome in outcomes) else 0


def print_plan(stages: Sequence[Stage], seconds: float) -> None:
    print(f"make gpu, in {seconds:.0f} s:")
    for i, stage in enumerate(stages, 1):
        words = " ".join([f"{k}={v}" for k, v in stage.environment.items()] + [shown(word) for word in stage.command])
        print(
            f"{i:3}. {stage.name}: at most {stage.most:.0f} s, not begun with less than {stage.least:.0f}\n       $ {words}"
        )
    print("What comes late is left out first; a stage that runs past its seconds is stopped, and its results stay.")


def shown(word: str) -> str:
    return "python" if word == PY else word.replace(str(machine.ROOT) + os.sep, "")


def here() -> list[str]:
    """What this machine has of what the plan needs."""
    import torch

    found = [f"GPU: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none visible'}"]
    found.append(f"torch {torch.__version__}, CUDA build: {torch.version.cuda or 'no'}")
    return found + [f"{tool}: {which_tool(tool) or 'not on PATH'}" for tool in ("nvcc", SANITIZER, "nvidia-smi")]


def main(argv: Sequence[str] | None = None) -> int:
    import torch

    parser = argparse.ArgumentParser("make gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=570, help="for everything (570: under ten minutes)")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, run nothing")
    arguments = parser.parse_args(argv)
    stages = plan()
    print_plan(stages, arguments.seconds)
    print(*here(), sep="\n")
    if arguments.dry_run:
        print("dry run: nothing was run")
        return 0
    if not torch.cuda.is_available():
        print("make gpu needs a CUDA GPU, and torch sees none here: nothing was run (this was the plan; exit status 3)")
        return 3
    shutil.rmtree(LOGS, ignore_errors=True)
    facts = machine.facts(torch.device("cuda"))
    folder = RESULTS / facts["device"]
    outcomes = run(stages, arguments.seconds, keep=keeper(folder, LOGS, facts, os.environ.get("OUT", "")))
    lines = [(o["stage"], o["outcome"], f"{o['seconds']:.0f}", o["why"]) for o in outcomes]
    report.show_table(("stage", "outcome", "seconds", "why"), lines, "\nmake gpu", 2)
    print(f"results: {pathlib.Path(shown(str(folder)))}")
    return verdict(outcomes)


if __name__ == "__main__":
    sys.exit(main())
