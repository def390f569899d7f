"""`make gpu` on a machine without one: the plan, what it leaves out when time is short, and that a red test means no speed."""

import csv
import subprocess
import tarfile

import pytest
import torch
from fastkd.bench import run as bench_run
from fastkd.bench.cases import STEMS
from fastkd.bench.evidence import gpu, sanitizer_smoke

from cases import ROOT
from fastkd.cli import profile

HERE = lambda tool: f"/usr/bin/{tool}"  # noqa: E731
QUIET = lambda *_, **__: None  # noqa: E731


class Machine:
    """Each stage takes the seconds that are set, or 10; `failing` ones exit with 1."""

    def __init__(self, seconds=(), failing=()):
        self.now, self.seconds, self.failing, self.ran, self.says = 0.0, dict(seconds), set(failing), [], ""

    def clock(self):
        return self.now

    def execute(self, stage, allowed):
        self.ran.append(stage.name)
        wanted = self.seconds.get(stage.name, 10.0)
        self.now += min(wanted, allowed)
        if wanted > allowed:
            return None, "so far\n"
        if self.says and stage.needs == gpu.SANITIZER:
            return 66, self.says
        return (1, "boom\n") if stage.name in self.failing else (0, "fine\n")


def outcomes_of(machine, seconds=570.0, which=HERE):
    found = gpu.run(gpu.plan(), seconds, machine.execute, machine.clock, which, QUIET)
    return {entry["stage"]: entry for entry in found}


def test_everything_runs_where_there_is_time():
    machine = Machine()
    found = outcomes_of(machine)
    assert machine.ran == [stage.name for stage in gpu.plan()]
    kinds = [stage.kind for stage in gpu.plan()]
    assert kinds.index("build") < kinds.index("test") < kinds.index("speed")
    assert {name.removeprefix("bench: ") for name in found if name.startswith("bench: ")} >= set(STEMS)
    assert {"profile: bert-base", "profile: llama-1b"} <= set(found)


def test_when_time_is_short_the_last_are_left_out_by_name():
    machine = Machine()
    found = outcomes_of(machine, seconds=100.0)
    left_out = [name for name, entry in found.items() if entry["outcome"] == "left out"]
    order = [stage.name for stage in gpu.plan()]
    assert left_out and "build" not in left_out and "memcheck on small cases" not in left_out
    assert {"racecheck on small cases"} <= set(left_out)
    assert "s are left, and it takes at least" in found[left_out[-1]]["why"]
    assert [name for name in order if name in machine.ran] == machine.ran
    assert machine.now <= 100.0


def test_a_stage_that_hangs_is_stopped_and_the_next_begins():
    machine = Machine(seconds={"bench: gram": 1e9})
    found = outcomes_of(machine)
    assert found["bench: gram"]["outcome"] == "stopped" and found["bench: gram"]["seconds"] == 75
    assert found["bench: contrast"]["outcome"] == "ok"


@pytest.mark.parametrize("failing", ["build", "tests: every kernel against float64", "memcheck on small cases"])
def test_red_means_no_speed(failing):
    machine = Machine(failing={failing})
    found = outcomes_of(machine)
    assert not [name for name in machine.ran if name.startswith(("bench", "profile"))]
    assert found["bench: gram"]["why"] == f"no speed on a red test ({failing})"


def test_a_tool_that_is_not_there_is_named():
    found = outcomes_of(Machine(), which=lambda tool: None if tool == gpu.SANITIZER else tool)
    assert found["memcheck on small cases"]["why"] == "compute-sanitizer is not on PATH"
    assert found["bench: gram"]["outcome"] == "ok"
    without = outcomes_of(Machine(), which=lambda tool: None)
    assert without["build"]["outcome"] == "left out" and without["bench: gram"]["outcome"] == "left out"


def test_a_sanitizer_that_the_machine_does_not_let_in_is_left_out():
    """Some virtual machines do not; a bug that it found is another matter."""
    says = "========= Error: Device not supported\n", "Invalid __global__ write of size 4 bytes\n"
    for out, outcome, speed in ((says[0], "left out", "ok"), (says[1], "failed", "left out")):
        machine = Machine()
        machine.says = out
        found = outcomes_of(machine)
        assert found["memcheck on small cases"]["outcome"] == outcome and found["bench: gram"]["outcome"] == speed
    assert "Device not supported" in gpu.outcome_of(gpu.sanitize("memcheck"), 1, says[0], 1.0)["why"]
    assert gpu.outcome_of(gpu.plan()[0], 1, says[0], 1.0)["outcome"] == "failed"


def test_results_come_back_after_every_stage(tmp_path):
    """A lent machine may be taken away at any time, and hand back a few files of one folder only."""
    results, logs, to = tmp_path / "results" / "a-gpu", tmp_path / "logs", tmp_path / "out"
    keep, machine, seen = gpu.keeper(results, logs, {"device": "a-gpu"}, str(to)), Machine(), []

    def kept(outcomes, out):
        keep(outcomes, out)
        (results / "gram.csv").write_text("a row\n")
        with tarfile.open(to / "make_gpu.tar.gz") as archive:
            names = archive.getnames()
            log = archive.extractfile("bench/results/a-gpu/make_gpu.csv").read().decode().splitlines()
        told = [(row["stage"], row["outcome"], row["device"]) for row in csv.DictReader(log)]
        assert told == [(entry["stage"], entry["outcome"], "a-gpu") for entry in outcomes]
        seen.append(names)

    found = gpu.run(gpu.plan(), 150.0, machine.execute, machine.clock, HERE, QUIET, kept)
    assert len(seen) == len(found) == len(gpu.plan()) and found[-1]["outcome"] == "left out"
    assert {"docs/performance.md", "bench/results/a-gpu/gram.csv", "build/make_gpu/01-build.log"} <= set(seen[-1])
    assert [path.name for path in to.iterdir()] == ["make_gpu.tar.gz"]
    gpu.keeper(results, logs, {}, "")(found, "")  # without OUT nothing is packed


def test_kernels_are_compiled_by_several_workers_and_the_largest_test_has_the_card_to_two(monkeypatch):
    """One process would spend 200 s on the compilation of the first file's kernels alone, and be stopped."""
    stages = {stage.name: stage for stage in gpu.plan() if stage.name.startswith("tests: ")}
    largest = stages.pop("tests: more than 2³¹ elements").command
    assert largest[largest.index("-k") + 1] in (ROOT / "tests/ops/test_gpu.py").read_text()
    assert largest[largest.index("-n") + 1] == "2"  # 20 GB each
    for stage in stages.values():
        assert int(stage.command[stage.command.index("-n") + 1]) >= 6
        assert stage.command[stage.command.index("-k") + 1] == f"not {gpu.LARGEST}"
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert not [stage for stage in gpu.plan() if "-n" in stage.command]  # without pytest-xdist, one process


def test_a_stopped_process_takes_its_children_with_it(tmp_path):
    """A shell whose child would write a file in a second."""
    late = tmp_path / "late"
    command = ("sh", "-c", f"echo begun; (sleep 1; touch {late}) & wait")
    status, out = gpu.execute(gpu.Stage("sleepy", "speed", command, 0, 1), 0.3)
    assert status is None and "begun" in out
    subprocess.run(["sleep", "1.2"], check=True)
    assert not late.exists()


def test_commands_of_the_plan_exist():
    """Every module and file that a stage names is there, and every option is one that it takes."""
    for stage in gpu.plan():
        words = list(stage.command)
        for word in words:
            if word.startswith("tests/"):
                assert (ROOT / word).is_file()
        if "bench" in words:
            bench_run.parser().parse_args(words[words.index("bench") + 1 :])
        if "profile" in words:
            profile.parser().parse_args(words[words.index("profile") + 1 :])
        if gpu.SANITIZER in words:
            assert stage.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_plan_is_printed_and_nothing_is_run(monkeypatch, capsys):
    def never(*_, **__):
        raise AssertionError("ran a stage without a GPU")

    monkeypatch.setattr(gpu, "run", never)
    assert gpu.main([]) == 3
    out = capsys.readouterr().out
    for stage in gpu.plan():
        assert stage.name in out
    assert "needs a CUDA GPU, and torch sees none here: nothing was run" in out
    assert gpu.main(["--dry-run"]) == 0 and "dry run: nothing was run" in capsys.readouterr().out


def test_every_gpu_test_is_in_the_plan():
    named = {word for stage in gpu.plan() for word in stage.command}
    stages = ("test_gpu", "test_gpu_stems", "test_kernels", "test_cuda_build", "transport/test_transport_simplex")
    assert {f"tests/ops/{name}.py" for name in stages} <= named
    assert "evidence.gpu" in (ROOT / "Makefile").read_text()


def test_small_cases_are_right_here_too(capsys):
    """What the sanitizer runs on a GPU, on this CPU."""
    assert sanitizer_smoke.main("cpu") == 0
    out = capsys.readouterr().out
    for stem in STEMS:
        assert f"\n{stem} " in "\n" + out
    assert ", 0 wrong" in out
