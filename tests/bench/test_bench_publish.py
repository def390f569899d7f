"""What the bench publishes, and when: a quiet machine, a fixed schema, tables and plots. Timers are faked; nothing is timed."""

import csv
import dataclasses
import sys

import pytest
from bench_fakes import outcome_of, provider, square, toy_case
from fastkd.bench import machine, plots, report, run
from fastkd.bench.baselines import Provider
from fastkd.bench.cases.case import Work


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
    in_pieces = toy_case(bytes=Work(2**30, 0, 0), oracle=lambda inputs: inputs["student"].sum())
    assert machine.too_large(in_pieces, 6 * 2**30) == "" and "about 6 GiB" in machine.too_large(in_pieces, 5 * 2**30)
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
