"""The README's figures are those of the committed CSV: all of them, none that was not measured, and the pictures too."""

import json
import re

import pytest
from bench_rows import rows_of, written
from fastkd.bench import plots, report, results_io
from fastkd.bench.cases import case as case_module
from fastkd.bench.evidence import readme, targets

from cases import ROOT
from fastkd.profile import results


def test_readme_and_pictures_say_what_the_csv_says():
    wrong = readme.stale(ROOT)
    assert not wrong, "\n".join((*wrong, "run `make readme`"))


@pytest.fixture
def checkout(tmp_path):
    """A README with markers, and the results of one device."""
    (tmp_path / "README.md").write_text(f"before\n\n{readme.BEGIN}\n{readme.END}\n\nafter\n")
    folder = tmp_path / "bench" / "results" / "box"
    curve = [row for v in (8, 64) for row in rows_of(case=f"forward_kl-4x{v}-float32", sweep=f"V={v}")]
    absent = {"forward_kl-4x8-float32": {"liger": "liger_kernel is not installed", "fastkd:cuda": "no GPU"}}
    written(folder, rows_of(goal="7x eager", case="forward_kl-5x31-float32"), curve, absent=absent)
    return tmp_path


def test_figures_are_written_between_the_markers(checkout):
    pytest.importorskip("matplotlib")
    assert readme.main(["--check"], checkout) == 1
    assert readme.main([], checkout) == 0 == readme.main(["--check"], checkout)
    text = (checkout / "README.md").read_text()
    assert text.startswith("before\n\n<!--") and text.endswith("-->\n\nafter\n")
    assert "| `divergence` | forward_kl 5×31 fp32 | 1 | **10×** [9.9, 10.1] | – | – | – | 50% | 20 / 20 |" in text
    assert "- liger (divergence): liger_kernel is not installed" in text and "no GPU" not in text
    names = sorted(path.name for path in (checkout / "bench/results/box").glob("*.png"))
    assert names == ["divergence_speedup.png", "divergence_sweep.png", "overview.png", "roofline.png"]
    assert all(name in text for name in names[1:])
    assert readme.main([], checkout) == 0 and (checkout / "README.md").read_text() == text  # again: the same


@pytest.mark.parametrize("change", ["csv", "readme", "picture"])
def test_drift_is_noticed(change, checkout, capsys):
    pytest.importorskip("matplotlib")
    readme.main([], checkout)
    csv, picture = (checkout / "bench/results/box" / name for name in ("divergence.csv", "overview.png"))
    if change == "csv":
        csv.write_text(csv.read_text().replace(",9.9,", ",9.8,"))
    elif change == "readme":
        (checkout / "README.md").write_text((checkout / "README.md").read_text().replace("**10×**", "**11×**"))
    else:
        picture.unlink()
    capsys.readouterr()
    assert readme.main(["--check"], checkout) == 1
    said = capsys.readouterr().out
    assert {"csv": "drawn from other rows", "readme": "README.md: its figures", "picture": "missing"}[change] in said


def test_a_device_without_results_has_no_row(checkout):
    (checkout / "bench/results/empty").mkdir()
    assert "empty" not in readme.text(checkout)
    (checkout / "bench/results/box/divergence.csv").unlink()
    assert "Nothing was measured yet" in readme.text(checkout)


def test_markers_are_asked_for(checkout):
    (checkout / "README.md").write_text("no markers")
    with pytest.raises(ValueError, match="expected exactly one line"):
        readme.stale(checkout)


def test_rows_slower_than_eager_are_named(checkout):
    folder = checkout / "bench/results/box"
    written(folder, rows_of(eager=0.5, case="jsd-5x31-float32"))
    found = readme.slower_than_eager(report.rows_of(folder))
    assert found == ["divergence jsd 5×31 fp32 both (0.50×)"]
    total = len(targets.listed(gpu=False))
    assert (
        "\nSlower than 0.95× eager: 1 of 4 rows measured (4 of 4 cases in one mode only); "
        f"{total} of {total} listed cases have none.\nThose are divergence jsd 5×31 fp32 both (0.50×).\n"
    ) in readme.text(checkout)


def test_reasons_of_one_case_name_it_and_the_others_come_once(checkout):
    folder = checkout / "bench/results/box"
    of_one, of_all = "failed its check: a gradient is off by 2.0e-02, allowed 1.0e-02", "liger_kernel is not installed"
    absent = {f"jsd-{n}x31-float32": {"eager": of_one, "liger": of_all} for n in (5, 7)}
    written(folder, rows_of(), absent=absent)
    found = readme.absent(folder)
    assert [line for line in found if "liger" in line] == [f"liger (divergence): {of_all}"]
    assert f"eager (divergence jsd 5×31 fp32, divergence jsd 7×31 fp32): {of_one}" in found


def test_a_target_about_all_rows_says_of_how_many(tmp_path):
    """Listed: every case of a CPU, its claims and the curves' far ends; not those of a GPU."""
    known = next(case for case in case_module.select(["gram"]) if case.goal)
    fields = {"stem": "gram", "case": known.name}
    written(tmp_path, rows_of(**fields), rows_of(mode="forward", **fields), rows_of(case="unknown-3x5-float32"))
    everything, on_gpu = targets.listed(gpu=False), targets.listed(gpu=True)
    assert {("gram", "fcd_anisotropic-16x128x768x768-bfloat16")} < everything < on_gpu
    assert {("relation", "self-1x12x16384x64x1-float32")} < everything  # --scale
    (line,) = [line for line in targets.table(report.rows_of(tmp_path), tmp_path) if line.startswith("| C6 |")]
    n = len(everything)
    assert f"of 3 rows measured (1 of 2 cases in one mode only); {n - 1} of {n} listed cases have none" in line


# One cache state, and nothing of anybody else's -------------------------------------------------------------------

COLD = {"cache": "cold (flushed)", "case": "forward_kl-5x31-float32"}


@pytest.mark.parametrize("order", [1, -1])
def test_cold_and_warm_are_never_mixed(order, checkout):
    folder = checkout / "bench/results/box"
    pairs = [rows_of(eager=3.3, **COLD), rows_of(case=COLD["case"])][::order]
    written(folder, *pairs)
    assert "| **10×** [9.9, 10.1] |" in readme.text(checkout) and "**3.3×**" not in readme.text(checkout)
    case = targets.LINEAR16.split(" ")[1]
    pairs = [rows_of(stem="linear_divergence", eager=eager, **{**COLD, "case": case, "cache": cache})
             for eager, cache in ((1.5, COLD["cache"]), (3.5, "as the previous provider left it"))][::order]  # fmt: skip
    found = targets.Rows([results_io.typed(vars(row)) for pair in pairs for row in pair])
    assert found.over(targets.LINEAR16, "eager") == 3.5 and found.worst() == 1.5


def test_a_case_that_was_measured_cold_only_is_shown_so(checkout):
    folder = checkout / "bench/results/box"
    written(folder, rows_of(eager=0.5, **{**COLD, "case": "jsd-5x31-float32"}))
    assert "| **0.50×** [0.495, 0.505] |" in readme.text(checkout)
    assert readme.slower_than_eager(report.rows_of(folder)) == ["divergence jsd 5×31 fp32 both cold (0.50×)"]


def test_what_somebody_else_put_there_stays(checkout, capsys):
    pytest.importorskip("matplotlib")
    folder = checkout / "bench/results/box"
    for name in ("flame.png", "notes.csv", "notes.json"):
        (folder / name).write_bytes(b"mine\xff")
    assert readme.main([], checkout) == 0 == readme.main(["--check"], checkout)
    assert all((folder / name).read_bytes() == b"mine\xff" for name in ("flame.png", "notes.csv", "notes.json"))
    (folder / "overview.png").write_bytes(b"mine")
    assert readme.main([], checkout) == 2 and (folder / "overview.png").read_bytes() == b"mine"
    assert "overview.png: not a result of `fastkd bench` (a picture" in capsys.readouterr().err


def test_a_json_that_differs_from_its_csv_is_noticed_and_rewritten(checkout, capsys):
    pytest.importorskip("matplotlib")
    readme.main([], checkout)
    path = checkout / "bench/results/box/divergence.json"
    before = path.read_text()
    path.write_text(before.replace('"median_ms": 1.0', '"median_ms": 0.5'))
    assert readme.main(["--check"], checkout) == 1
    assert "divergence.json: its rows are not those of the CSV" in capsys.readouterr().out
    assert readme.main([], checkout) == 0 and path.read_text() == before
    path.write_text(before[:99])
    assert readme.main([], checkout) == 2 and len(path.read_text()) == 99
    assert "divergence.json: not a result of `fastkd bench` (not JSON" in capsys.readouterr().err


def test_a_picture_knows_what_ran_out_of_memory(checkout, capsys):
    pytest.importorskip("matplotlib")
    readme.main([], checkout)
    folder = checkout / "bench/results/box"
    results_io.write(folder, "divergence", {"forward_kl-4x64-float32": {"eager": "out of memory at 11 GiB"}})
    readme.main(["--check"], checkout)
    assert "divergence_sweep.png: drawn from other rows" in capsys.readouterr().out
    assert readme.main([], checkout) == 0


def test_a_stale_picture_of_a_profile_is_drawn_again(checkout):
    pytest.importorskip("matplotlib")
    folder = checkout / "bench/results/box"
    fields = dict.fromkeys(results.COLUMNS, "1") | {
        "model": "tiny",
        "method": "kd",
        "way": "fastkd",
        "compiled": "False",
    }
    fields |= {"date": "2026-01-01T00:00:00Z", "device": "box", "loss_share": "0.25"}
    for median in ("10", "20"):
        rows = [{**fields, "phase": phase, "median_ms": median} for phase in ("student forward", "step")]
        lines = [",".join(results.COLUMNS), *(",".join(row[name] for name in results.COLUMNS) for row in rows)]
        (folder / "profile.csv").write_text("\n".join(lines) + "\n")
        assert readme.main(["--check"], checkout) == 1
        assert readme.main([], checkout) == 0 and (folder / "profile.png").exists()


def test_targets_read_rows_and_nothing_else(tmp_path):
    """Each target names rows that a bench writes: the case exists, and a missed one shows its reason."""
    written(tmp_path, rows_of(eager=3.5, stem="linear_divergence", case=targets.LINEAR16.split(" ")[1], gemms_ms=0.5))
    rows = report.rows_of(tmp_path)
    lines = "\n".join(targets.table(rows, tmp_path))
    assert "| C1 | linear KL bf16, loss and gradients, over eager | 3.5× | ≥ 3× | ≥ 4× | met |" in lines
    assert "| C1 | … of its four bare GEMMs | 2× | ≤ 1.25× | – | missed: no reason given yet |" in lines
    assert "| C2 | FCD bf16 over eager | – | ≥ 7× | – | not measured |" in lines
    (tmp_path / "why.json").write_text(json.dumps({"C1": "the tile spills; a smaller one would do"}))
    assert "missed: the tile spills; a smaller one would do" in "\n".join(targets.table(rows, tmp_path))
    assert targets.table([], tmp_path) == []


def test_cases_of_the_cpu_targets_exist():
    there = {f"{case.stem} {case.name}" for case in case_module.select()}
    names = [targets.LINEAR16, targets.LINEAR32, targets.FCD16, targets.FCD32, targets.LAYERS, targets.QUEUE32,
             targets.QUEUE16, targets.GATHER, targets.BATCH]  # fmt: skip
    assert not set(names) - there


def test_a_picture_carries_the_digest_of_its_rows(checkout):
    pytest.importorskip("matplotlib")
    folder = checkout / "bench/results/box"
    readme.draw(folder)
    digest = plots.digest_of(report.rows_of(folder))
    assert re.fullmatch("[0-9a-f]{16}", digest) and digest.encode() in (folder / "overview.png").read_bytes()


def test_other_files_in_a_device_folder_are_not_taken_for_results(checkout):
    """A profile, a log of make gpu, reasons: none of them is a stem."""
    folder = checkout / "bench/results/box"
    step = {"model": "tiny", "method": "kd", "task": "classification", "phase": "step", "loss_share": "0.25"}
    ways = [{**step, "way": "fastkd", "median_ms": "10", "tokens_per_second": "1234"},
            {**step, "way": "authors", "median_ms": "20", "tokens_per_second": "617"}]  # fmt: skip
    header = list(ways[0])
    lines = [",".join(header), *(",".join(row[name] for name in header) for row in ways)]
    (folder / "profile.csv").write_text("\n".join(lines) + "\n")
    for name in ("profile.json", "why.json", "make_gpu.log.json"):
        (folder / name).write_text("{}")
    text = readme.text(checkout)
    assert "| tiny | `kd` | 10 (25%) | 20 (25%) | 1,234 |" in text and "| model | method | fastkd | authors |" in text
    (checkout / "bench/results/only").mkdir()
    (folder / "profile.csv").rename(checkout / "bench/results/only/profile.csv")
    assert "### only" not in readme.text(checkout)
