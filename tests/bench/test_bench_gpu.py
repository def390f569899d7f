"""`make gpu` on a machine without one: the plan, and what is on disk wherever the run is cut."""

import csv
import subprocess
import sys
import tarfile
import time

import pytest
import torch
from bench_fakes import FACTS, FIELDS, toy_case
from fastkd.bench import cases, check, machine, report
from fastkd.bench import run as bench_run
from fastkd.bench.baselines import Absent, Provider
from fastkd.bench.cases import STEMS
from fastkd.bench.evidence import gpu, sanitizer_smoke

from cases import ROOT
from fastkd.cli import profile

HERE = lambda tool: f"/usr/bin/{tool}"  # noqa: E731
QUIET = lambda *_, **__: None  # noqa: E731
ORDER = ["G1", "G6", "G12", "G7", "G8", "G9", "G13", "G10", "G11", "G14"]


class Machine:
    """Each stage takes the seconds that are set, or 10; `failing` ones exit with 1."""

    def __init__(self, seconds=(), failing=(), says=()):
        self.now, self.seconds, self.failing, self.ran, self.says = 0.0, dict(seconds), set(failing), [], dict(says)

    def clock(self):
        return self.now

    def execute(self, stage, allowed, show):
        self.ran.append(stage.name)
        wanted = self.seconds.get(stage.name, 10.0)
        self.now += min(wanted, allowed)
        if wanted > allowed:
            return None, "so far\n"
        said = self.says.get(stage.name, "fine\n")
        return (1, said) if stage.name in self.failing else (0, said)


def outcomes_of(machine, seconds=480.0, which=HERE, plan=None):
    found = gpu.run(gpu.plan() if plan is None else plan, seconds, machine.execute, machine.clock, which, QUIET)
    return {entry["stage"]: entry for entry in found}


def test_the_order_is_that_of_worth():
    names = [stage.name for stage in gpu.plan()]
    assert names[:3] == ["build", "environment", "smoke"] and names[33].startswith("tests: ")
    assert names[3:33] == [f"target: {name}, {how}" for how in ("plain", "graph", "compile") for name in ORDER]
    assert names[-1] == "synccheck on small cases"
    assert {name.removeprefix("bench: ") for name in names if name.startswith("bench: ")} == STEMS.keys()
    assert [stage.name for stage in gpu.plan(built=True)] == names[1:]
    assert {case.target.split()[0] for case in cases.targets().values()} == set(ORDER)


def test_what_there_is_no_time_for_is_left_out_by_name():
    machine = Machine()
    found = outcomes_of(machine, 300.0)
    left_out = [name for name, entry in found.items() if entry["outcome"] == "left out"]
    assert machine.now <= 300.0 and [stage.name for stage in gpu.plan() if stage.name in machine.ran] == machine.ran
    assert "s are left, and it takes at least" in found[left_out[-1]]["why"]
    assert not [name for name in left_out if name.startswith("tests") or name.endswith("plain")]


def test_the_tests_keep_their_time():
    """However long the targets take."""
    machine = Machine({stage.name: 1e9 for stage in gpu.plan() if stage.name.startswith("target")})
    found = outcomes_of(machine)
    assert "target: G14, plain" in machine.ran and "target: G6, graph" not in machine.ran
    assert found["tests: no waiting, CUDA graphs, large sizes"]["outcome"] == "ok"


def test_a_stage_that_hangs_is_stopped_and_the_next_begins():
    machine = Machine(seconds={"target: G7, plain": 1e9})
    found = outcomes_of(machine)
    stopped = found["target: G7, plain"]
    assert (stopped["outcome"], stopped["seconds"]) == ("stopped", 20) and "what it had written stays" in stopped["why"]
    assert found["target: G8, plain"]["outcome"] == "ok"


def test_a_red_stem_silences_its_own_speed_and_no_other():
    machine = Machine(failing={"smoke"}, says={"smoke": "ok: gram fcd triton\nred: relation self triton off by 2\n"})
    found = outcomes_of(machine, 900.0)
    own = {name for name, entry in found.items() if entry["why"] == "no speed of relation, which is red in: smoke"}
    assert own == {*(f"target: G7, {how}" for how in ("plain", "graph", "compile")), "bench: relation"}
    assert {entry["outcome"] for name, entry in found.items() if name not in own} == {"ok", "failed"}


@pytest.mark.parametrize("failing", ["smoke", "tests: every kernel against float64", "memcheck on small cases"])
def test_what_names_no_stem_silences_none(failing):
    found = outcomes_of(Machine(failing={failing}), 900.0)
    assert [name for name, entry in found.items() if entry["outcome"] != "ok"] == [failing]


def test_without_the_cuda_library_only_its_stem_has_no_speed():
    found = outcomes_of(Machine(), which=lambda tool: None)
    assert found["build"]["why"] == "nvcc is not on PATH" and "red in: build" in found["target: G11, plain"]["why"]
    assert found["target: G8, plain"]["outcome"] == "ok"
    assert (
        "compute-sanitizer is not on PATH"
        in outcomes_of(Machine(), 900, lambda tool: None)["memcheck on small cases"]["why"]
    )


def test_a_sanitizer_that_the_machine_does_not_let_in_is_left_out():
    """Some virtual machines do not; a bug that it found is another matter."""
    stage, says = gpu.sanitize("memcheck"), "========= Error: Device not supported\n"
    assert gpu.outcome_of(stage, 66, says, 1.0)["outcome"] == "left out"
    assert gpu.outcome_of(stage, 66, "Invalid __global__ write of size 4 bytes\n", 1.0)["outcome"] == "failed"
    assert gpu.outcome_of(gpu.SMOKE, 1, says, 1.0)["outcome"] == "failed"
    assert stage.command[3:5] == ("--report-api-errors", "no")


# The rehearsal: the bench itself, with providers that take seconds of a clock -----------------------------------------

# Seconds: until a process measures; until a case has inputs and its float64 check; to check a provider, which compiles it; to
# measure it in one mode.
START, MEASURING = 7.0, 0.7
INPUTS = {"G1": 5.0, "G1 jsd": 5.0, "G6 128k": 5.0, "G13": 5.0}  # else 2
CHECKING = {"fastkd": 3.0, "eager": 0.5, "compile": 18.0, "trl": 4.0, "liger": 4.0}  # else 2


class Cut(BaseException):
    """The run is taken away, or a stage's time is up."""


class Rehearsal(Machine):
    """A machine that is taken away at `end`, on which the commands of benches are run by the bench's own code."""

    def __init__(self, end, monkeypatch, **more):
        super().__init__({"environment": 8.0, "smoke": 45.0}, **more)
        self.end, self.stop = end, end
        devices = lambda text, *_, **__: torch.device(text)  # noqa: E731
        for module, name, fake in (
            (bench_run.checks, "device", devices), (bench_run, "build", lambda case, _: self.spend(INPUTS.get(case.target, 2.0))),
            (bench_run, "Roofline", lambda *_: self), (bench_run, "providers_of", self.providers_of),
            (bench_run, "checked", self.checked), (bench_run, "measure_mode", self.measure_mode),
            (bench_run.measure, "make_timer", QUIET), (check, "make_oracle", QUIET), (machine, "facts", lambda _: FACTS),
            (machine, "is_busy", lambda *_: False), (machine, "driver", QUIET), (machine, "available_bytes", lambda _: 2**60),
        ):  # fmt: skip
            monkeypatch.setattr(module, name, fake)

    copy_rate = gemm_rate = lambda *_: 1.0
    gemms_of = lambda *_: {}  # noqa: E731

    def spend(self, seconds):
        self.now += seconds
        if self.now > self.stop:
            self.now = self.stop
            raise Cut

    def providers_of(self, case, inputs, asked):
        there = [
            name for name in filter(None, asked.others.split(",")) if case.stem != "transport" or name == "authors"
        ]
        return [
            Provider("fastkd", None, served_by="triton"),
            *(Provider(name, None) for name in there),
            Absent("x", "y"),
        ]

    def checked(self, case, providers, inputs, oracle):
        for provider in providers:
            self.spend(CHECKING.get(provider.name, 2.0))
        return dict.fromkeys(providers, check.Errors(0.0, 0.0)), [], ""

    def measure_mode(self, case, mode, launch, passed, *_):
        self.spend(MEASURING * len(passed))
        common = {**FIELDS, "mode": mode, "launch": launch, "memory_method": bench_run.measure.Device.memory_method}
        return [{**common, "provider": p.name, "times_ours_median": 2.0} for p in passed], []

    def execute(self, stage, allowed, show):
        if "bench" not in stage.command:
            self.stop = self.end
            status = super().execute(stage, min(allowed, self.end - self.now), show)
            if self.now >= self.end:
                raise Cut
            return status
        self.ran.append(stage.name)
        self.stop = min(self.now + allowed, self.end)
        try:
            self.spend(START)
            asked = bench_run.parsed(stage.command[stage.command.index("bench") + 1 :])
            return bench_run.run(asked), ""
        except Cut:
            if self.now >= self.end:
                raise
            return None, ""


def rehearsed(end, tmp_path, monkeypatch, **more):
    """What is on disk when a run is cut: (target, mode, launch) -> providers, and the stages of the archive."""
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setattr(bench_run.plots, "draw", QUIET)
    for name in ("setup.py", "docs/performance.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    rehearsal, plan = Rehearsal(end, monkeypatch, **more), gpu.plan(built=True)
    folder = tmp_path / "bench/results" / FACTS["device"]
    try:
        gpu.run(plan, 480.0, rehearsal.execute, rehearsal.clock, HERE, QUIET, gpu.keeper(folder, tmp_path, {}))
    except Cut:
        assert rehearsal.now == end
    targets = {(case.stem, case.name): name for name, case in cases.targets().items()}
    rows = {}
    for row in report.measured(report.rows_of(folder)):
        if (row["stem"], row["case"]) in targets:
            rows.setdefault((targets[row["stem"], row["case"]], row["mode"], row["launch"]), []).append(row["provider"])
    with tarfile.open(tmp_path / "make_gpu.tar.gz") as archive:
        told = archive.extractfile("bench/results/box/make_gpu.csv").read().decode().splitlines()
    return rows, [row["stage"] for row in csv.DictReader(told)], rehearsal


@pytest.fixture(autouse=True)
def quiet_output(monkeypatch):
    monkeypatch.setattr(bench_run, "show", QUIET)


def plain(rows):
    return {
        name: who
        for (name, mode, launch), who in rows.items()
        if launch == "plain" and (mode == "both" or name == "G11")
    }


@pytest.mark.parametrize("end", [30, 60, 120, 300, 480])
def test_a_run_that_is_cut_leaves_what_it_had_measured(end, tmp_path, monkeypatch):
    rows, stages, rehearsal = rehearsed(end, tmp_path, monkeypatch)
    found, everything = plain(rows), list(cases.targets())
    assert len(set(rehearsal.ran) - set(stages)) == (end < 480)  # the one in which it was cut
    if end == 30:
        assert stages == ["environment"] and not found
    elif end == 60:
        assert stages == ["environment", "smoke"] and not found
    elif end == 120:
        assert found["G1"] == ["fastkd", "eager", "trl"] and found["G1 jsd"]
        assert ("G1", "loss_only", "plain") in rows
    else:
        assert list(found) != [] and set(found) == set(everything)
        asked = {name: ["eager", *filter(None, others.split(","))] for name, (others, _) in gpu.TARGETS.items()}
        for name, providers in found.items():
            beside = [x for x in asked[name.split()[0]] if name != "G11" or x == "authors"]
            assert {"fastkd", *beside} <= set(providers), name
    if end == 480:
        replayed = {
            name: providers for (name, mode, launch), providers in rows.items() if (mode, launch) == ("both", "graph")
        }
        assert {"G1", "G6 32k", "G6 128k", "G12 32"} <= set(replayed) and set(replayed["G1"]) == {"fastkd", "eager"}
        assert "tests: no waiting, CUDA graphs, large sizes" in rehearsal.ran


def test_a_process_that_dies_takes_no_other_target_with_it(tmp_path, monkeypatch):
    rows, stages, _ = rehearsed(
        300, tmp_path, monkeypatch, says={"smoke": "red: gram fcd triton RuntimeError\n"}, failing={"smoke"}
    )
    assert set(cases.targets()) - set(plain(rows)) == {"G8", "G9"} and "target: G8, plain" in stages  # told as left out


def test_on_a_gpu_each_provider_is_published_before_the_next_compiles(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    rehearsal = Rehearsal(1e9, monkeypatch)
    asked, seen = (
        bench_run.parsed(["--device", "cuda", "--others", "eager,trl,compile", "--mode", "both", "--launch", "plain"]),
        [],
    )
    keep = lambda outcome, new: seen.append((rehearsal.now, [row["provider"] for row in new]))  # noqa: E731
    outcome = bench_run.bench_case(toy_case(), asked, rehearsal, FACTS, keep=keep)
    assert seen == [
        (pytest.approx(6.9), ["fastkd", "eager"]),
        (pytest.approx(12.3), ["trl"]),
        (pytest.approx(31.7), ["compile"]),
    ]
    assert [row["provider"] for row in outcome.rows] == ["fastkd", "eager", "trl", "compile"]


def test_results_are_packed_after_every_stage(tmp_path):
    results, keeping = tmp_path / "results" / "a-gpu", []
    keep = gpu.keeper(results, tmp_path, {"device": "a-gpu"})

    def kept(outcomes):
        keep(outcomes)
        (results / "gram.csv").write_text("a row\n")
        with tarfile.open(tmp_path / "make_gpu.tar.gz") as archive:
            keeping.append(archive.getnames())
            log = archive.extractfile("bench/results/a-gpu/make_gpu.csv").read().decode().splitlines()
        told = [(row["stage"], row["outcome"], row["device"]) for row in csv.DictReader(log)]
        assert told == [(entry["stage"], entry["outcome"], "a-gpu") for entry in outcomes]

    machine = Machine()
    gpu.run(gpu.plan(), 150.0, machine.execute, machine.clock, HERE, QUIET, kept)
    assert len(keeping) == len(gpu.plan())
    assert {"docs/performance.md", "bench/results/a-gpu/gram.csv"} <= set(keeping[-1])


def test_kernels_are_compiled_by_several_workers_and_the_largest_test_has_the_card_to_two(monkeypatch):
    stages = {stage.name: stage for stage in gpu.plan() if stage.name.startswith("tests: ")}
    largest = stages.pop("tests: more than 2³¹ elements").command
    assert largest[largest.index("-k") + 1] in (ROOT / "tests/ops/test_gpu.py").read_text()
    assert largest[largest.index("-n") + 1] == "2"  # 20 GB each
    for stage in stages.values():
        assert int(stage.command[stage.command.index("-n") + 1]) >= 6 and "-v" in stage.command
        assert stage.command[stage.command.index("-k") + 1] == f"not {gpu.LARGEST}"
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert not [stage for stage in gpu.plan() if "-n" in stage.command]  # without pytest-xdist, one process


def test_what_a_process_says_is_shown_at_once_and_a_stopped_one_takes_its_children_with_it(tmp_path):
    """A shell whose child would write a file in a second."""
    late, shown = tmp_path / "late", []
    command = ("sh", "-c", f"echo begun; (sleep 1; touch {late}) & wait")
    show = lambda line: shown.append((line.strip(), time.monotonic()))  # noqa: E731
    begun = time.monotonic()
    status, out = gpu.execute(gpu.Stage("sleepy", command, 0, 1), 0.5, show)
    assert status is None and out == "begun\n" and shown[0][0] == "begun" and shown[0][1] - begun < 0.5
    subprocess.run(["sleep", "1.2"], check=True)
    assert not late.exists()
    assert gpu.execute(gpu.Stage("wrong", ("sh", "-c", "exit 7"), 0, 1), 5, show)[0] == 7


def test_commands_of_the_plan_exist():
    """Every module and file that a stage names is there, and every option is one that it takes."""
    for stage in gpu.plan():
        words = list(stage.command)
        for word in words:
            if word.startswith("tests/"):
                assert (ROOT / word).is_file()
        if "bench" in words:
            asked = bench_run.parser().parse_args(words[words.index("bench") + 1 :])
            of = asked.target.split(",") if asked.target else ()
            for case in cases.select(asked.stems, gpu=True, of=of) if of else ():
                assert case.stem == stage.stem and (case.kind == "emd_step" or set(asked.mode) & set(case.modes))
            others = {*asked.others.split(",")} - {""}
            assert others <= set(bench_run.baselines.names())
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
    """What the sanitizer runs on a GPU, on this CPU; a kernel that raises is red, and the others still have their line."""
    assert sanitizer_smoke.main("cpu") == 0
    out = capsys.readouterr().out
    assert {line.split()[1] for line in out.splitlines() if line.startswith("ok: ")} == STEMS.keys()
    assert ", 0 wrong" in out and "red" not in out


def test_a_kernel_that_raises_is_red_and_the_others_still_have_their_line(capsys, monkeypatch):
    def broken(inputs):
        raise RuntimeError("an illegal memory access\nand more")

    right = lambda inputs: inputs["x"].square().sum()  # noqa: E731
    providers = [Provider("fastkd", broken, "triton"), Provider("fastkd:cpu", right, "cpu")]
    monkeypatch.setattr(sanitizer_smoke, "implementations", lambda *_: providers)
    assert sanitizer_smoke.main("cpu", [toy_case()]) == 1
    red, right, _ = capsys.readouterr().out.splitlines()
    assert red == "red: divergence forward_kl-3x5-float32 triton kernel RuntimeError: an illegal memory access"
    assert right.startswith("ok: divergence") and gpu.red_stems(gpu.SMOKE, "failed", red) == ["divergence"]


def test_a_stem_whose_process_dies_is_red(capfd, monkeypatch):
    monkeypatch.setattr(sanitizer_smoke, "STEMS", {"gram": None, "relation": None})
    died = lambda command: subprocess.CompletedProcess(command, -11 if "gram" in command else 0)  # noqa: E731
    monkeypatch.setattr(sanitizer_smoke.subprocess, "run", died)
    assert sanitizer_smoke.in_processes() == 1
    assert set(capfd.readouterr().out.splitlines()) == {"red: gram died with status -11"}
    assert sys.executable == gpu.SMOKE.command[0]
