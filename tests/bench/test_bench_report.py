"""What the bench publishes, and when: a quiet machine, a fixed schema, a page of figures and pictures. Nothing is timed."""

import csv

import pytest
import torch
from bench_fakes import CASE, FACTS, absent, outcome_of, provider, rows_of, square, toy_case, written
from fastkd.bench import machine, measure, plots, report, run
from fastkd.bench.baselines import Absent, Provider
from fastkd.bench.cases import STEMS, listed
from fastkd.bench.cases.case import Work
from fastkd.bench.evidence import performance

import fastkd
from fastkd import backends
from fastkd.profile import results

COLD = "cold (flushed)"
SCHEMA = """
    stem case kind shape dtype mode launch cache provider served_by by_eager gradient_in_forward rounds calls_per_sample
    median_ms minimum_ms p20_ms p80_ms median_low_ms median_high_ms
    times_ours_median times_ours_low times_ours_high times_ours_minimum
    floor_ms floor_bound floor_share gemms_ms flops bytes copy_gb_s gemm_gflop_s launches peak_extra_mib memory_method
    loss_error gradient_error eager_loss_error eager_gradient_error match goal label foreign_cores
    device threads cpu_capability driver torch cuda triton python commit dirty date absent
"""

# The CSV ------------------------------------------------------------------------------------------------------------


def test_the_schema_is_fixed(tmp_path, fake_measure):
    """People and scripts read these columns: renaming one is a decision, not an accident."""
    rows = outcome_of([provider("fastkd"), provider("eager")], fake_measure).rows
    (path,) = report.write(rows, tmp_path)
    with path.open() as handle:
        header, first = next(csv.reader(handle)), handle.readline()
    assert header == SCHEMA.split()
    assert first.startswith("divergence,forward_kl-3x5-float32,forward_kl,3x5,float32,forward,plain,")
    again = report.read(path)
    assert {type(row[name]) for row in again for name in ("rounds", "threads")} == {int}
    written, found = ([{name: report.as_text(x) for name, x in row.items()} for row in side] for side in (rows, again))
    assert written == found


def test_new_rows_replace_their_group_and_keep_the_rest(tmp_path, fake_measure):
    rows = outcome_of([provider("fastkd"), provider("eager"), provider("other")], fake_measure).rows
    report.write(rows, tmp_path)
    fewer = [{**row, "median_ms": 9.0} for row in rows if row["mode"] == "both" and row["provider"] != "other"]
    (path,) = report.write(fewer, tmp_path)
    both = [row for row in report.read(path) if row["mode"] == "both"]
    assert [row["provider"] for row in both] == ["fastkd", "eager"] and {row["median_ms"] for row in both} == {9.0}
    assert len([row for row in report.read(path) if row["mode"] == "forward"]) == 3


def test_on_a_gpu_rows_of_the_same_versions_stay_beside_new_ones(tmp_path):
    """There fastkd and one other are a run by themselves: the next command adds another pair."""
    gpu = {"memory_method": measure.Device.memory_method, "cuda": "13.0"}
    written(tmp_path, rows_of(**gpu))
    path = written(tmp_path, rows_of(other="compile", median_ms=2.0, **gpu))
    found = {row["provider"]: row["median_ms"] for row in report.read(path)}
    assert found == {"eager": 1.0, "fastkd": 2.0, "compile": 2.0}
    written(tmp_path, rows_of(other="authors", commit="later", **gpu))  # ratios to another fastkd do not
    assert {row["provider"] for row in report.read(path)} == {"fastkd", "authors"}


def test_a_passing_reason_does_not_stand_beside_rows(tmp_path):
    """Not asked for in this mode, measured in another; too large today, measured yesterday."""
    reasons = [absent("eager", report.NOT_ASKED), absent("compile", report.NOT_ASKED), absent(CASE, "left out: 12 GiB")]
    path = written(tmp_path, rows_of(), reasons)
    assert [row["provider"] for row in report.read(path)] == ["fastkd", "eager", "compile"]
    written(tmp_path, [absent("eager", "out of memory at 3 GiB")])  # a finding, whatever else there is
    assert [(row["provider"], row["absent"]) for row in report.read(path)][2:] == [("eager", "out of memory at 3 GiB")]
    written(tmp_path, rows_of(case="jsd-3x5-float32"))  # another case
    assert len(report.read(path)) == 5 and len(report.measured(report.read(path))) == 4


def test_an_older_file_is_filled_up(tmp_path):
    path = written(tmp_path, rows_of())
    at = report.COLUMNS.index("label")
    cells = [line.split(",") for line in path.read_text().splitlines()]
    path.write_text("\n".join(",".join(row[:at] + row[at + 1 :]) for row in cells) + "\n")
    written(tmp_path, rows_of(case="jsd-3x5-float32"))
    assert [row["label"] for row in report.read(path)] == [""] * 4


def test_who_is_stopped_while_writing_still_has_the_old_file(tmp_path, monkeypatch):
    path = written(tmp_path, rows_of())
    before = path.read_bytes()
    monkeypatch.setattr(report.csv.DictWriter, "writerow", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        written(tmp_path, rows_of(eager=3.0))
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]


def test_reasons_come_once_and_those_of_one_case_name_it():
    rows = [absent("liger", "not installed", case) for case in "ab"] + [
        absent("eager", report.OOM, case) for case in "ab"
    ]
    assert report.absent(rows) == [
        "liger (divergence): not installed",
        "eager (divergence a, divergence b): out of memory",
    ]


@pytest.mark.parametrize(
    ("x", "text"), [(None, "–"), (0.0, "0"), (0.01234, "0.0123"), (12.345, "12.3"), (1234.5, "1234"), (1e-6, "1.0e-06")]
)
def test_numbers_are_readable(x, text):
    assert report.number(x) == text


def test_eager_rows_are_marked(fake_measure, capsys):
    served = Provider("fastkd", square, served_by="reference")
    outcome = outcome_of([served, provider("eager")], fake_measure)
    assert {row["provider"] for row in outcome.rows if row["by_eager"]} == {"fastkd"}
    run.show(toy_case(), outcome)
    assert "†" in capsys.readouterr().out


def test_the_table_fits_100_columns(capsys):
    long = {"launch": "graph", "median_ms": 12345.0, "loss_error": 1e-10, "served_by": "reference", "by_eager": True}
    rows = [row for mode in measure.MODES for row in rows_of(eager=123.4, other="torchdistill", mode=mode, **long)]
    report.print_table(rows, "divergence forward_kl")
    print(report.footnote(rows))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100 and sum("fastkd → reference †" in line for line in lines) == len(measure.MODES)


@pytest.mark.parametrize("early", [False, True])
def test_a_backward_that_only_rescales_is_compared_with_nothing(early, capsys):
    """Of which "485× eager" and "1616 % of floor" would say nothing."""
    fields = {"gradient_in_forward": early, "floor_share": 16.16, "median_ms": 2.0}
    rows = [row for mode in ("backward", "both") for row in rows_of(eager=485.0, mode=mode, **fields)]
    report.print_table(rows, "a case")
    print(report.footnote(rows))
    backward, both = capsys.readouterr().out.split("both", 1)
    assert "485" in both and "1616%" in both
    assert ("485" in backward, "‡" in backward, "‡ fastkd makes its gradient in the forward" in both) == (
        not early,
        early,
        early,
    )
    assert "–" in next(line for line in backward.splitlines() if "fastkd" in line) or not early


X = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
LOSSES = [
    (lambda x: fastkd.divergence(x, X), True),
    (lambda x: fastkd.divergence(x, X, backend="reference"), False),
    (lambda x: fastkd.divergence(x.bfloat16(), X), False),
    (lambda x: fastkd.FCDLoss()(x, X), True),
    (lambda x: fastkd.info_nce_loss(x[0], X[1], X[2]), True),
    (lambda x: fastkd.relation_kl_loss([(x[None], x[None])], [(X[None], X[None])]), True),
    (lambda x: fastkd.transport(x[0], torch.ones(4) / 4, torch.ones(8) / 8).value, True),
    (lambda x: fastkd.layer_costs([x], [X]).sum(), False),
    (lambda x: x.square().sum(), False),
]


@pytest.mark.skipif(backends.UNAVAILABLE["cpu"] is not None, reason=f"C++ kernels: {backends.UNAVAILABLE['cpu']}")
@pytest.mark.parametrize(("loss", "early"), LOSSES)
def test_which_losses_make_their_gradient_in_the_forward(loss, early):
    assert measure.gradient_in_forward(loss(X.clone().requires_grad_()) * 2) == early


# When it is published -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("foreign", "code", "said"), [(0.6, 2, "0.60 cores while this case"), (0.01, 0, "published in")]
)
def test_nothing_is_published_on_a_busy_machine(foreign, code, said, tmp_path, fake_measure, monkeypatch, capsys):
    outcome = outcome_of([provider("fastkd"), Absent("eager", report.NOT_ASKED)], fake_measure)
    outcome.foreign = foreign
    monkeypatch.setattr(run, "bench_case", lambda *_: outcome)
    monkeypatch.setattr(plots, "draw", lambda folder: "")
    assert run.run_cases([toy_case()], run.parsed(["--device", "cpu"]), FACTS, tmp_path) == code
    assert said in capsys.readouterr().out and (tmp_path / "divergence.csv").exists() == (code == 0)
    assert code or report.read(tmp_path)[-1]["absent"] == report.NOT_ASKED


@pytest.mark.parametrize(
    ("load", "flags", "code", "publishing"),
    [
        (1.5, [], 2, None), (1.5, ["--force"], 0, False), (0.0, [], 0, True), (0.0, ["--no-publish"], 0, False),
        (0.0, ["--quick"], 0, False), (0.0, ["--quick", "--out", "there"], 0, True),
    ],
)  # fmt: skip
def test_what_is_published(load, flags, code, publishing, monkeypatch, tmp_path):
    seen = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setattr(machine, "load_before", lambda: load)
    monkeypatch.setattr(run, "run_cases", lambda *arguments: seen.append(arguments[-1] is not None) or 0)
    assert run.run(run.parsed(["divergence", "--device", "cpu", *flags])) == code
    assert seen == ([] if publishing is None else [publishing])


def test_beside_a_gpu_the_host_may_be_busy(monkeypatch):
    monkeypatch.setattr(machine, "load_before", lambda: 1.5)
    monkeypatch.setattr(machine, "gpu_busy_reason", lambda device: "")
    gpu = torch.device("cuda")
    assert not machine.is_busy(gpu, force=False) and machine.is_busy(torch.device("cpu"), force=False)
    assert machine.busy_reason(1.5, "meanwhile", gpu) == "" and "1.50 cores" in machine.busy_reason(1.5, "meanwhile")


def test_a_case_that_does_not_fit_is_left_out_by_name(fake_measure, monkeypatch, tmp_path):
    large = {"bytes": Work(2**30, 0, 0)}
    assert machine.too_large(toy_case(**large), 12 * 2**30) == ""
    assert "needs about 12 GiB" in machine.too_large(toy_case(**large), 11 * 2**30)
    assert "about 6 GiB" in machine.too_large(toy_case(**large, oracle=square), 5 * 2**30)
    monkeypatch.setattr(machine, "available_bytes", lambda device: 1)
    monkeypatch.setattr(plots, "draw", lambda folder: "")
    assert run.run_cases([toy_case()], run.parsed(["--device", "cpu"]), FACTS, tmp_path) == 0
    (row,) = report.read(tmp_path)
    assert row["provider"] == CASE and row["absent"].startswith("left out: it needs about")


# Pictures and the page ------------------------------------------------------------------------------------------------


def test_a_case_shows_one_cache_state_and_one_mode():
    """A cold run beside a warm one doubles no bar, and its ratio does not stand over the other's interval."""
    pairs = (
        rows_of(eager=10.0), rows_of(eager=3.0, cache=COLD), rows_of(eager=7.0, mode="forward"),
        rows_of(eager=2.0, case="cold-3x5-float32", cache=COLD), rows_of(eager=5.0, launch="graph"),
        rows_of(eager=4.0, case="there-3x5-float32", mode="forward"), rows_of(eager=6.0, stem="gram", cache=COLD),
    )  # fmt: skip
    found = [row["times_ours_median"] for row in plots.headline([row for pair in pairs for row in pair])]
    assert found == [1, 10, 1, 2, 1, 4, 1, 6]


def test_the_overview_takes_every_kind_before_a_second_of_one():
    fields = {"goal": "x", "stem": "gram"}
    pairs = [rows_of(case=f"fcd-{i}x5-float32", kind="fcd", **fields) for i in range(5)]
    pairs += [rows_of(case=f"{kind}-9x5-float32", kind=kind, **fields) for kind in "ab"]
    pairs += [rows_of(kind="no goal", stem="gram")]
    found = plots.leading([row for pair in pairs for row in pair])
    assert found == [("gram", f"{name}-float32") for name in ("fcd-0x5", "fcd-1x5", "a-9x5", "b-9x5")]


@pytest.fixture
def checkout(tmp_path):
    """The results of one device."""
    pytest.importorskip("matplotlib")
    (tmp_path / "docs").mkdir()
    reasons = [absent("liger", "liger_kernel is not installed"), absent("fastkd:cuda", "no GPU")]
    known = next(case for case in listed("divergence") if case.goals)
    rows = rows_of(eager=3.5, case=known.name, goal=known.goal), rows_of(eager=0.5), reasons
    written(tmp_path / "bench/results/box", *rows)
    (tmp_path / "bench/results/empty").mkdir()
    return tmp_path


def test_the_page_is_written_from_the_csv(checkout):
    folder = checkout / "bench/results/box"
    (folder / "why.json").write_text('{"divergence forward_kl-512x30522-float32": "the tile spills"}')
    step = dict.fromkeys(results.COLUMNS, "1") | {
        "model": "tiny",
        "method": "kd",
        "task": "classification",
        "phase": "step",
    }
    step |= {"compiled": "False", "dtype": "float32", "loss_share": "0.25", "date": "2026-01-01"}
    steps = [
        {**step, "provider": "fastkd", "median_ms": "10", "tokens_per_second": "1234"},
        {**step, "provider": "authors", "extra_mib": ""},
    ]
    steps += [{**row, "phase": "student forward"} for row in steps]
    lines = [",".join(results.COLUMNS), *(",".join(row[name] for name in results.COLUMNS) for row in steps)]
    (folder / "profile.csv").write_text("\n".join(lines) + "\n")
    assert performance.main(checkout) == 0
    text = (checkout / "docs/performance.md").read_text()
    for line in (
        "| `divergence` | forward_kl 512×30522 fp32 | 1 | **3.5×** [3.46, 3.54] | – | – | – | 50% | 20 / 20 | 1e-08 / 1e-08 |",
        "| `divergence` | forward_kl 512×30522 fp32 | eager | ≥ 7 | 3.5 | missed: the tile spills |",
        "| `divergence` | forward_kl 512×30522 fp32 | compile | ≥ 2.5 | – | not measured |",
        "- liger (divergence): liger_kernel is not installed",
        "| tiny 1×1 fp32 | `kd` | 10 / 1 / 1 | 1 / 1 / – | 1,234 |",
    ):
        assert line in text.splitlines()
    count = sum(len(listed(stem)) for stem in STEMS)
    slow = f"Slower than 0.95× eager: 1 of 2 rows measured; {count - 1} of {count} listed cases have none."
    assert f"{slow} divergence forward_kl 3×5 fp32 both plain, as the previous provider left it (0.50×).\n" in text
    assert "## empty" not in text and "<details>" not in text
    pictures = {path.name for path in folder.glob("*.png")}
    assert pictures == {"overview.png", "profile.png"}
    assert all(f"../bench/results/box/{name}" in text for name in pictures)


def test_every_goal_can_be_looked_up():
    ours = dict.fromkeys(report.TYPES, 2.0)
    for case in (case for stem in STEMS for case in listed(stem, gpu=True)):
        for what in case.goals:
            there = {"fastkd": ours, "eager": {**ours, "peak_extra_mib": 8.0, "gradient_error": 8.0}, what: ours}
            expected = {"gemms": 1.0, "memory": 0.25 if what != "eager" else 1.0, "error": 0.25}.get(what, 2.0)
            assert performance.reached(what, {**there, "fastkd": ours}) == expected, (case.name, what)
