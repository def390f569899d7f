"""The bench's own honesty: statistics, interleaving, refusals, checks. Timers are faked; nothing is timed."""

import collections
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from bench_fakes import CPU, FACTS, FakeTimer, outcome_of, provider, square, toy_case
from fastkd.bench import check, machine, measure, run
from fastkd.bench.baselines import Absent
from fastkd.bench.cases.case import build

# Statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "dropped"), [(1, 0), (5, 0), (6, 0), (8, 0), (9, 1), (20, 5), (30, 9)])
def test_order_statistics_that_hold_the_median(count, dropped):
    assert measure.rank(count) == dropped
    covered = [1 - 2 * sum(math.comb(count, i) for i in range(d + 1)) / 2**count for d in (dropped, dropped + 1)]
    assert covered[1] < 0.95 <= covered[0] or count < measure.LEAST_SAMPLES


def test_the_interval_of_a_median_holds_it_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    samples = torch.rand(2000, 15, generator=generator).square()  # skewed; the median is 0.25
    inside = [low <= 0.25 <= high for low, high in map(measure.median_interval, samples.tolist())]
    assert 0.95 < sum(inside) / len(inside) < 0.98  # 96.5 % by the binomial


def test_a_ratio_is_sure_where_slow_moments_hit_both():
    mood = (1 + torch.rand(30, generator=torch.Generator().manual_seed(1))).tolist()  # a machine between 1x and 2x
    paired = measure.ratio_interval([3 * x for x in mood], mood)
    assert paired == (pytest.approx(3.0), pytest.approx(3.0))
    low, high = measure.ratio_interval([3 * x for x in mood], mood[::-1])
    assert low < 2.9 < 3.1 < high
    assert measure.ratio_interval([3 * x for x in mood], mood[::-1]) == (low, high)  # the same draws every time


def test_columns_are_in_milliseconds_per_call():
    found = measure.Timing((4.0, 1.0, 2.0, 3.0, 100.0), number=8).columns()
    assert (found["rounds"], found["calls_per_sample"]) == (5, 8)
    names = ("median_ms", "minimum_ms", "p20_ms", "p80_ms", "median_low_ms", "median_high_ms")
    assert [found[name] for name in names] == pytest.approx([3.0, 1.0, 1.8, 23.2, 1.0, 100.0])


@pytest.mark.parametrize(("seconds", "calls"), [(1.0, 1), (1e-3, 1), (1e-4, 10), (1e-9, 64), (0.0, 64)])
def test_short_calls_are_repeated_within_a_sample(seconds, calls):
    assert measure.calls_per_sample(seconds) == calls


def test_providers_are_interleaved():
    timer = FakeTimer({"a": 1e-2, "b": 2e-2, "c": 3e-2})
    tasks = [measure.Task(name, lambda _: None) for name in "abc"]
    timings = measure.interleave(tasks, timer, rounds=6, budget=1e9)
    assert "".join(timer.order) == "abc" + "abc" * 6  # one calibration each, then A B C A B C …
    assert timings["b"].median == pytest.approx(20.0) and len(timings["b"].samples) == 6


def test_a_budget_ends_the_rounds_but_not_before_six():
    ticks = iter(range(0, 400, 4))
    tasks = [measure.Task("a", lambda _: None)]
    timings = measure.interleave(tasks, FakeTimer({"a": 1.0}), rounds=30, budget=3.0, clock=lambda: next(ticks))
    assert len(timings["a"].samples) == 6  # five cannot give a 95 % interval


def test_preparation_and_flush_are_not_timed(monkeypatch):
    now = [0.0]

    def spend(seconds):
        now[0] += seconds

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    timer = measure.Timer(measure.Host(), lambda: spend(100.0))
    task = measure.Task("a", lambda state: spend(state), prepare=lambda: spend(10.0) or 2.0)
    assert timer.sample(task, 3) == pytest.approx(2.0)


def test_cuda_events_enclose_the_call_and_the_flush_comes_before(monkeypatch):
    log = []

    class Event:
        def record(self):
            log.append("event")

        def elapsed_time(self, end):
            return 4.0

    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    timer = measure.Timer(measure.Device(), lambda: log.append("flush"), every_call=True)
    task = measure.Task("a", lambda _: log.append("run"), prepare=lambda: log.append("prepare"))
    assert timer.sample(task, 2) == pytest.approx(4e-3)
    assert log == ["prepare", "flush", "event", "run", "event"] * 2 + ["synchronize"]


def test_modes_time_what_they_say():
    x = torch.randn(4, requires_grad=True)
    calls = []

    def call():
        calls.append(torch.is_grad_enabled())
        return x.square().sum()

    backward = measure.make_task("a", "backward", call, [x])
    loss = backward.prepare()
    assert calls == [True]
    backward.run(loss)
    assert calls == [True]  # the timed part ran no forward
    with pytest.raises(RuntimeError, match="second time"):
        backward.run(loss)  # it was a real backward: the graph is gone
    for mode, grad in (("forward", True), ("both", True), ("loss_only", False)):
        calls.clear()
        task = measure.make_task("a", mode, call, [x])
        task.run(task.prepare())
        assert calls == [grad], mode


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="Linux only")
def test_peak_memory_sees_temporaries_and_results():
    keep = []
    quiet = measure.Task("a", lambda _: None)
    temporary = measure.Task("b", lambda _: torch.ones(64 << 18).sum())  # 64 MiB, gone afterwards
    kept = measure.Task("c", lambda _: keep.append(torch.ones(32 << 18)))
    sizes = [measure.peak_memory(task, CPU)[0] / 2**20 for task in (quiet, temporary, kept)]
    assert sizes[0] < 4 and 60 < sizes[1] < 80 and 30 < sizes[2] < 44


# Refusals ---------------------------------------------------------------------------------------------------------


def test_a_right_case_gets_rows_with_both_ratios(fake_measure):
    outcome = outcome_of([provider("fastkd"), provider("eager"), provider("other")], fake_measure)
    assert outcome.refused == "" and len(outcome.rows) == 9
    eager = next(row for row in outcome.rows if (row["provider"], row["mode"]) == ("eager", "both"))
    assert eager["times_ours_median"] == pytest.approx(3.0) and eager["times_ours_minimum"] == pytest.approx(3.0)
    assert eager["peak_extra_mib"] == 1.0 and eager["match"] and eager["loss_error"] < 1e-6


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: square(x) * 1.001,
        lambda x: square(x).detach() + 1.01 * (square(x) - square(x).detach()),  # right loss, gradient 1 % too long
        lambda x: square(x).detach() - (square(x) - square(x).detach()),  # sign flipped
        lambda x: square(x).detach() + 0.0 * x["x"].sum(),  # zero gradient
        lambda x: square(x) * math.nan,
        lambda x: square(x).expand(2),  # another shape
    ],
)
def test_a_failing_check_means_no_speed(wrong, fake_measure, monkeypatch, capsys):
    def no_timing(*_):
        raise AssertionError("timed although the check failed")

    monkeypatch.setattr(measure, "interleave", no_timing)
    outcome = outcome_of([provider("fastkd", wrong), provider("eager")], fake_measure)
    assert outcome.rows == [] and "fastkd" in outcome.refused
    run.show(toy_case(), outcome)
    shown = capsys.readouterr().out
    assert "no speed is shown" in shown and "ms" not in shown


def test_a_gradient_that_forgets_its_upstream_fails():
    class Careless(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.square().sum()

        @staticmethod
        def backward(ctx, grad):
            return 2 * ctx.saved_tensors[0]

    case = toy_case()
    inputs = build(case, CPU)
    errors = check.errors_of(lambda x: Careless.apply(x["x"]), inputs, check.make_oracle(case, inputs))
    assert errors.loss < 1e-6 < 1 < errors.gradient


def test_another_provider_that_does_another_job_is_named_not_shown(fake_measure):
    other = provider("other", lambda x: x["x"].abs().sum())
    outcome = outcome_of([provider("fastkd"), provider("eager"), other], fake_measure)
    assert {row["provider"] for row in outcome.rows} == {"fastkd", "eager"}
    assert [absent.name for absent in outcome.absent] == ["other"] and "check" in outcome.absent[0].reason


def test_another_provider_that_takes_too_long_is_named_with_its_seconds(fake_measure):
    fake_measure.seconds["other"] = fake_measure.seconds["fastkd"] = run.PATIENCE + 10.5
    outcome = outcome_of([provider("fastkd"), provider("eager"), provider("other")], fake_measure)
    assert {row["provider"] for row in outcome.rows} == {"fastkd", "eager"}
    assert ("other", "one call takes 40 s (both)") in [(absent.name, absent.reason) for absent in outcome.absent]
    assert fake_measure.order.count("other") == 3  # once in each mode


def test_another_provider_that_crashes_is_named_with_its_error(fake_measure):
    def crash(x):
        raise ValueError("out of luck\nand more")

    outcome = outcome_of([provider("fastkd"), provider("other", crash)], fake_measure)
    assert outcome.absent == [Absent("other", "failed its check: ValueError: out of luck")]


def test_one_that_was_not_asked_for_is_named_as_such(fake_measure, monkeypatch):
    others = [provider("eager"), provider("other"), Absent("liger", "liger_kernel is not installed")]
    monkeypatch.setattr(run.baselines, "ours", lambda *_: [provider("fastkd")])
    monkeypatch.setattr(run.baselines, "others", lambda *_: others)
    fewer = outcome_of(None, fake_measure, "--mode", "both", "--others", "eager")
    assert [row["provider"] for row in fewer.rows] == ["fastkd", "eager"]
    assert fewer.absent == [Absent("other", "not asked for"), Absent("liger", "liger_kernel is not installed")]


def test_running_out_of_memory_is_a_result(fake_measure):
    def hungry(x):
        return square(x) + torch.empty(2**60, dtype=torch.uint8)[0] * 0

    outcome = outcome_of([provider("fastkd"), provider("eager", hungry)], fake_measure)
    assert {row["provider"] for row in outcome.rows} == {"fastkd"}
    assert outcome.absent == [Absent("eager", "out of memory")]


def test_what_counts_as_out_of_memory():
    said = (
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
        "CUDA out of memory. Tried 20 MiB",
    )
    assert all(map(machine.ran_out, (MemoryError(), *map(RuntimeError, said))))
    assert not machine.ran_out(RuntimeError("shapes differ"))


def test_a_case_that_dies_does_not_take_the_others_with_it(fake_measure, monkeypatch, capsys):
    def bench(case, *_):
        if case.kind == "reverse_kl":
            raise RuntimeError("CUDA out of memory. Tried to allocate 9 GiB")
        return run.Outcome(absent=[Absent("eager", "not today")])

    monkeypatch.setattr(run, "bench_case", bench)
    assert run.run_cases([toy_case(kind="reverse_kl"), toy_case()], run.parsed(["--device", "cpu"]), FACTS, None) == 1
    out = capsys.readouterr().out
    assert "reverse_kl-3x5-float32: no speed is shown, the check failed: out of memory" in out
    assert "eager (divergence): not today" in out


def test_half_precision_is_held_to_eager_and_one_percent():
    eager = check.Errors(loss=3e-3, gradient=5e-3)
    assert check.limits(torch.bfloat16, eager) == (3e-3, 1.25 * 5e-3)
    assert check.limits(torch.bfloat16, check.Errors(0.5, 0.5)) == (1e-2, 1e-2)
    assert check.limits(torch.float32, check.Errors(1e-8, 1e-8)) == (1e-6, 1e-5)
    assert check.limits(torch.float32, check.Errors(1e-3, 2e-3)) == (1e-3, 2e-3)


# The machine --------------------------------------------------------------------------------------------------------


def test_foreign_load_is_what_others_used(monkeypatch):
    """Two cores for ten seconds, of which we used eight."""
    times, clock = collections.namedtuple("times", "user system idle"), iter([0.0, 10.0])
    every, own = iter([times(100, 10, 5), times(112, 18, 5)]), iter([(1, 1, 0, 0, 9), (6, 2, 1, 1, 9)])
    monkeypatch.setattr(machine.psutil, "cpu_times", lambda: next(every))
    monkeypatch.setattr(machine.psutil, "Process", lambda: SimpleNamespace(cpu_times=lambda: next(own)))
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(clock))
    assert machine.LoadMeter().stop() == pytest.approx(1.2)
    assert machine.busy_reason(0.05, "before the run") == "" and "0.60 cores" in machine.busy_reason(
        0.6, "before the run"
    )


def test_openmp_threads_are_made_passive_once():
    calls = []
    execute = lambda *arguments: calls.append(arguments)  # noqa: E731
    machine.passive_threads(["-m", "x"], {"OMP_WAIT_POLICY": "passive"}, execute)
    machine.passive_threads(["-m", "x"], {machine.RESTARTED: "1"}, execute)
    assert calls == []
    machine.passive_threads(["-m", "x"], {"A": "b"}, execute)
    ((program, arguments, environment),) = calls
    assert (program, arguments[1:]) == (sys.executable, ["-m", "x"])
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE" and environment["A"] == "b"


def test_somebody_elses_repository_has_no_commit_of_ours(tmp_path, monkeypatch):
    """Installed into the virtual environment inside a project, as it is usual."""
    package = tmp_path / ".venv/lib/fastkd"
    package.mkdir(parents=True)
    subprocess.run(["git", "-C", str(tmp_path), "init", "-q"], check=True)
    monkeypatch.setattr(machine, "ROOT", package)
    assert not machine.is_checkout() and machine.facts(CPU)["commit"] == "unknown"
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.is_checkout()


@pytest.mark.parametrize(("uuid", "index"), [("abc", "GPU-abc"), ("", "1")])
def test_the_gpu_that_is_used_is_asked(uuid, index, monkeypatch):
    """Its clocks after the case: before any work, they would be those of a GPU that sleeps."""
    asked, answers = [], iter(["570.1, 945, 2619", "97"])
    monkeypatch.setattr(machine, "output_of", lambda *words: asked.append(words) or next(answers))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuid))
    device = torch.device("cuda", 1)
    assert machine.driver(device) == "570.1, 945, 2619" and machine.driver(CPU) == ""
    assert machine.gpu_busy_reason(device) == "the GPU was 97 % busy before the run"
    assert [words[:3] for words in asked] == [("nvidia-smi", "-i", index)] * 2


def test_clocks_are_those_after_the_case(fake_measure, monkeypatch):
    work, interleave = [], measure.interleave
    monkeypatch.setattr(measure, "interleave", lambda *arguments: work.append(1) or interleave(*arguments))
    monkeypatch.setattr(machine, "driver", lambda device: f"clock {len(work)}")
    found = [outcome_of([provider("fastkd")], fake_measure).rows for _ in "ab"]
    assert [{row["driver"] for row in rows} for rows in found] == [{"clock 3"}, {"clock 6"}]
