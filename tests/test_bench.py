"""The bench's own honesty: statistics, interleaving, refusals, floors, schema. Timers are faked; nothing is timed."""

import csv
import dataclasses
import math
import os
import sys

import pytest
import torch
from fastkd.bench import case as case_module
from fastkd.bench import check, intervals, machine, measure, plots, report, roofs, run
from fastkd.bench.case import Case, Work
from fastkd.bench.rivals import Absent, Provider

CPU = torch.device("cpu")


class FakeTimer:
    """Each provider takes a set time; the order of samples is kept."""

    def __init__(self, seconds):
        self.seconds, self.order = seconds, []

    def sample(self, task, number):
        self.order.append(task.provider)
        return self.seconds[task.provider]


def toy_case(**changes) -> Case:
    """sum(x²): its reference, gradient and floors are obvious."""
    fields = {
        "stem": "divergence", "kind": "toy", "shape": {"N": 3, "V": 5}, "dtype": torch.float32,
        "make": lambda case, generator: {"x": torch.randn(3, 5, generator=generator)},
        "ours": lambda x, backend: x["x"].square().sum(), "leaves": ("x",),
        "flops": Work(1e6, 2e6, 3e6), "bytes": Work(120.0, 60.0, 180.0),
    }  # fmt: skip
    return Case(**{**fields, **changes})


def square(x):
    return x["x"].square().sum()


def provider(name, call=square):
    return Provider(name, call, served_by="cpu" if name.startswith("fastkd") else "")


@pytest.fixture
def fake_measure(monkeypatch):
    """bench_case without timing: every sample takes a microsecond, eager's three."""
    timer = FakeTimer({"fastkd": 1e-6, "eager": 3e-6, "other": 2e-6, "roof": 1e-3, "gemm": 1e-3})
    timer.launch = "plain"
    monkeypatch.setattr(measure, "make_timer", lambda *_, **__: timer)
    monkeypatch.setattr(measure, "peak_memory", lambda task, device: (2**20, "fake"))
    return timer


def facts():
    return {
        "device": "box", "threads": 2, "cpu_capability": "x", "driver": "", "torch": "2", "cuda": "", "triton": "",
        "python": "3", "commit": "abc", "dirty": False, "date": "2026-01-01T00:00:00Z",
    }  # fmt: skip


def outcome_of(providers, timer, **changes):
    settings = run.Settings(CPU, rounds=6)
    return run.bench_case(toy_case(**changes), settings, roofs.Roofs(CPU, timer), facts(), providers)


# Statistics -------------------------------------------------------------------------------------------------------


def test_quantiles_interpolate_and_do_not_need_sorted_samples():
    assert intervals.quantile([4.0, 1.0, 3.0, 2.0, 5.0], 0.5) == 3.0
    assert intervals.quantile([2.0, 1.0], 0.2) == pytest.approx(1.2)
    assert intervals.quantile([7.0], 0.8) == 7.0


@pytest.mark.parametrize(("count", "dropped"), [(1, 0), (5, 0), (6, 0), (8, 0), (9, 1), (20, 5), (30, 9)])
def test_order_statistics_that_hold_the_median(count, dropped):
    assert intervals.rank(count) == dropped
    covered = [1 - 2 * sum(math.comb(count, i) for i in range(d + 1)) / 2**count for d in (dropped, dropped + 1)]
    assert covered[1] < 0.95 <= covered[0] or count < intervals.LEAST_SAMPLES


def test_the_interval_of_a_median_holds_it_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    samples = torch.rand(2000, 15, generator=generator).square()  # skewed; the median is 0.25
    inside = [low <= 0.25 <= high for low, high in map(intervals.median_interval, samples.tolist())]
    assert 0.95 < sum(inside) / len(inside) < 0.98  # 96.5 % by the binomial


def test_a_ratio_is_sure_where_slow_moments_hit_both():
    mood = (1 + torch.rand(30, generator=torch.Generator().manual_seed(1))).tolist()  # a machine between 1x and 2x
    paired = intervals.ratio_interval([3 * x for x in mood], mood)
    assert paired == (pytest.approx(3.0), pytest.approx(3.0))
    low, high = intervals.ratio_interval([3 * x for x in mood], mood[::-1])
    assert low < 2.9 < 3.1 < high
    assert intervals.ratio_interval([3 * x for x in mood], mood[::-1]) == (low, high)  # the same draws every time


def test_summary_is_in_milliseconds_per_call():
    timing = measure.summarise([0.004, 0.001, 0.002, 0.003, 0.100], number=8)
    assert (timing.rounds, timing.number) == (5, 8)
    assert timing.median == pytest.approx(3.0) and timing.minimum == pytest.approx(1.0)
    assert timing.p20 == pytest.approx(1.8) and timing.p80 == pytest.approx(23.2)
    assert (timing.low, timing.high) == (pytest.approx(1.0), pytest.approx(100.0))


@pytest.mark.parametrize(("seconds", "calls"), [(1.0, 1), (1e-3, 1), (1e-4, 10), (1e-9, 64), (0.0, 64)])
def test_short_calls_are_repeated_within_a_sample(seconds, calls):
    assert measure.calls_per_sample(seconds) == calls


def test_providers_are_interleaved():
    timer = FakeTimer({"a": 1e-2, "b": 2e-2, "c": 3e-2})
    tasks = [measure.Task(name, lambda _: None) for name in "abc"]
    timings = measure.interleave(tasks, timer, rounds=6, budget=1e9)
    assert "".join(timer.order) == "abc" + "abc" * 6  # one calibration each, then A B C A B C …
    assert timings["b"].median == pytest.approx(20.0) and timings["b"].rounds == 6


def test_a_budget_ends_the_rounds_but_not_before_six():
    ticks = iter(range(0, 400, 4))
    tasks = [measure.Task("a", lambda _: None)]
    timings = measure.interleave(tasks, FakeTimer({"a": 1.0}), rounds=30, budget=3.0, clock=lambda: next(ticks))
    assert timings["a"].rounds == 6  # five cannot give a 95 % interval


def test_preparation_and_flush_are_not_timed():
    now = [0.0]

    def spend(seconds):
        now[0] += seconds

    timer = measure.WallTimer(flush=lambda: spend(100.0), clock=lambda: now[0])
    task = measure.Task("a", lambda state: spend(state), prepare=lambda: spend(10.0) or 2.0)
    assert timer.sample(task, 3) == pytest.approx(2.0)


def test_cuda_events_enclose_the_call_and_the_flush_comes_before():
    log = []

    class Event:
        def record(self):
            log.append("event")

        def elapsed_time(self, end):
            return 4.0

    timer = measure.EventTimer(lambda: log.append("flush"), Event, lambda: log.append("synchronize"))
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
    eager = next(row for row in outcome.rows if (row.provider, row.mode) == ("eager", "both"))
    assert eager.times_ours_median == pytest.approx(3.0) and eager.times_ours_minimum == pytest.approx(3.0)
    assert eager.peak_extra_mib == 1.0 and eager.match and eager.loss_error < 1e-6


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
    inputs = case_module.build(case, CPU)
    errors = check.errors_of(lambda x: Careless.apply(x["x"]), inputs, check.make_oracle(case, inputs))
    assert errors.loss < 1e-6 < 1 < errors.gradient


def test_a_rival_that_does_another_job_is_named_not_shown(fake_measure):
    other = provider("other", lambda x: x["x"].abs().sum())
    outcome = outcome_of([provider("fastkd"), provider("eager"), other], fake_measure)
    assert {row.provider for row in outcome.rows} == {"fastkd", "eager"}
    assert [absent.name for absent in outcome.absent] == ["other"] and "check" in outcome.absent[0].reason


def test_a_rival_that_crashes_is_named_with_its_error(fake_measure):
    def crash(x):
        raise ValueError("out of luck\nand more")

    outcome = outcome_of([provider("fastkd"), provider("other", crash)], fake_measure)
    assert outcome.absent == [Absent("other", "failed its check: ValueError: out of luck")]


def test_half_precision_is_held_to_eager_and_one_percent():
    eager = check.Errors(loss=3e-3, gradient=5e-3)
    assert check.limits(torch.bfloat16, eager) == (3e-3, 1.25 * 5e-3)
    assert check.limits(torch.bfloat16, check.Errors(0.5, 0.5)) == (1e-2, 1e-2)
    assert check.limits(torch.float32, check.Errors(1e-8, 1e-8)) == (1e-6, 1e-5)
    assert check.limits(torch.float32, check.Errors(1e-3, 2e-3)) == (1e-3, 2e-3)


def test_nothing_is_published_on_a_busy_machine(tmp_path, fake_measure):
    outcome = outcome_of([provider("fastkd"), provider("eager")], fake_measure)
    for foreign, expected in ((0.6, "0.60 cores"), (None, "unknown")):
        outcome.foreign = foreign
        assert expected in run.publish(toy_case(), outcome, tmp_path)
        assert not list(tmp_path.iterdir())
    outcome.foreign = 0.01
    assert run.publish(toy_case(), outcome, tmp_path) == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["divergence.csv", "divergence.json"]


@pytest.mark.parametrize(("flags", "code", "publishing"), [([], 2, None), (["--force"], 0, False)])
def test_a_machine_that_is_busy_before_the_run(flags, code, publishing, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(machine, "load_before", lambda: 1.5)
    monkeypatch.setattr(run, "run_cases", lambda *arguments: seen.append(arguments[-1]) or 0)
    assert run.run(run.parser().parse_args(["divergence", *flags])) == code
    assert "1.50 cores" in capsys.readouterr().out
    assert seen == ([] if publishing is None else [publishing])


@pytest.mark.parametrize(
    ("flags", "publishing"),
    [([], True), (["--no-publish"], False), (["--quick"], False), (["--quick", "--out", "x"], True)],
)
def test_what_is_published_on_a_quiet_machine(flags, publishing, monkeypatch):
    seen = []
    monkeypatch.setattr(machine, "load_before", lambda: 0.0)
    monkeypatch.setattr(run, "run_cases", lambda *arguments: seen.append(arguments[-1]) or 0)
    assert run.run(run.parser().parse_args(["divergence", *flags])) == 0
    assert seen == [publishing]


def test_a_case_that_does_not_fit_is_left_out_by_name(fake_measure, monkeypatch):
    assert machine.too_large(toy_case(bytes=Work(2**30, 0, 0)), 12 * 2**30) == ""
    assert "needs about 12 GiB" in machine.too_large(toy_case(bytes=Work(2**30, 0, 0)), 11 * 2**30)
    monkeypatch.setattr(machine, "available_bytes", lambda device: 1)
    outcome = outcome_of([provider("fastkd")], fake_measure)
    assert outcome.rows == [] and outcome.refused == "" and "left out" in outcome.absent[0].reason


# Load -------------------------------------------------------------------------------------------------------------


def test_foreign_load_is_what_others_used():
    assert machine.foreign_share(busy=3.0, own=1.9, wall=2.0) == pytest.approx(0.55)
    assert machine.foreign_share(busy=1.0, own=1.2, wall=2.0) == 0.0
    readings = {"busy": iter([10.0, 13.0]), "own": iter([1.0, 2.0]), "clock": iter([0.0, 4.0])}
    meter = machine.LoadMeter(**{name: (lambda it=it: next(it)) for name, it in readings.items()})
    assert meter.stop() == pytest.approx(0.5)


def test_an_unreadable_load_is_not_a_quiet_machine():
    def unreadable():
        raise OSError

    assert machine.LoadMeter(busy=unreadable).stop() is None
    assert "unknown" in machine.busy_reason(None, "before the run")
    assert machine.busy_reason(0.05, "before the run") == ""


def test_openmp_threads_are_made_passive_once():
    calls = []

    def execute(*arguments):
        calls.append(arguments)

    machine.passive_threads(["-m", "x"], {"OMP_WAIT_POLICY": "passive"}, execute)
    machine.passive_threads(["-m", "x"], {machine.RESTARTED: "1"}, execute)
    assert calls == []
    machine.passive_threads(["-m", "x"], {"A": "b"}, execute)
    (program, arguments, environment), *_ = calls
    assert (program, arguments[1:]) == (sys.executable, ["-m", "x"])
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE" and environment["A"] == "b"


SCHEMA = """
    stem case kind shape dtype mode launch cache provider served_by by_eager rounds calls_per_sample
    median_ms minimum_ms p20_ms p80_ms median_low_ms median_high_ms
    times_ours_median times_ours_low times_ours_high times_ours_minimum
    floor_ms floor_bound floor_share gemms_ms flops bytes copy_gb_s gemm_gflop_s launches peak_extra_mib memory_method
    loss_error gradient_error eager_loss_error eager_gradient_error match sweep goal label foreign_cores
    device threads cpu_capability driver torch cuda triton python commit dirty date
"""

# The CSV, the table, the plots ------------------------------------------------------------------------------------


def test_the_schema_is_fixed(tmp_path, fake_measure):
    """People and scripts read these columns: renaming one is a decision, not an accident."""
    outcome = outcome_of([provider("fastkd"), provider("eager")], fake_measure)
    (path,) = report.write_csv(outcome.rows, tmp_path)
    with path.open() as handle:
        header, first = next(csv.reader(handle)), handle.readline()
    assert header == SCHEMA.split()
    assert first.startswith("divergence,toy-3x5-float32,toy,3x5,float32,forward,plain,")


def test_new_rows_replace_their_group_and_keep_the_rest(tmp_path, fake_measure):
    rows = outcome_of([provider("fastkd"), provider("eager"), provider("other")], fake_measure).rows
    report.write_csv(rows, tmp_path)
    fewer = [dataclasses.replace(row, median_ms=9.0) for row in rows if row.mode == "both" and row.provider != "other"]
    (path,) = report.write_csv(fewer, tmp_path)
    stored = report.read_rows(path)
    both = [row for row in stored if row["mode"] == "both"]
    assert [row["provider"] for row in both] == ["fastkd", "eager"] and {row["median_ms"] for row in both} == {"9"}
    assert len([row for row in stored if row["mode"] == "forward"]) == 3


def test_eager_rows_are_marked(fake_measure, capsys):
    served = Provider("fastkd", square, served_by="reference")
    outcome = outcome_of([served, provider("eager")], fake_measure)
    assert {row.provider for row in outcome.rows if row.by_eager} == {"fastkd"}
    run.show(toy_case(), outcome)
    assert "†" in capsys.readouterr().out


def test_the_plain_table_is_aligned(fake_measure):
    rows = outcome_of([provider("fastkd"), provider("eager")], fake_measure).rows
    text = report.plain_table([report.line(row) for row in rows], "title").splitlines()
    assert text[0] == "title" and len(text) == 3 + len(rows)
    assert len({len(row) for row in text[3:]}) == 1


@pytest.mark.parametrize(
    ("x", "text"), [(None, "–"), (0.0, "0"), (0.01234, "0.0123"), (12.345, "12.3"), (1234.5, "1234"), (1e-6, "1.0e-06")]
)
def test_numbers_are_readable(x, text):
    assert report.number(x) == text


def test_plots_are_drawn_from_the_csv(tmp_path, fake_measure):
    pytest.importorskip("matplotlib")
    rows = outcome_of([provider("fastkd"), provider("eager")], fake_measure).rows
    swept = [dataclasses.replace(row, case=f"toy-3x{v}-float32", sweep=f"V={v}") for v in (8, 64) for row in rows]
    report.write_csv([*rows, *swept], tmp_path)
    paths, reason = plots.draw(report.read_rows(tmp_path / "divergence.csv"), "divergence", tmp_path)
    assert reason == "" and [path.name for path in paths] == ["divergence_speedup.png", "divergence_sweep.png"]
    alone, _ = plots.draw([{name: report.as_text(getattr(row, name)) for name in report.COLUMNS} for row in rows],
                          "divergence", tmp_path)  # fmt: skip
    assert [path.name for path in alone] == ["divergence_speedup.png"]
