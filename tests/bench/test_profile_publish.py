"""What a profile leaves behind: every setup is kept, every way is watched, and nobody else's file is touched."""

import dataclasses
import json

import pytest
from fastkd.bench import report
from fastkd.bench.evidence import performance

import tiny  # noqa: F401  first: it tells transformers to stay offline

pytest.importorskip("matplotlib")

from fastkd.profile import plots, publish, results

SETUP = {"model": "tiny", "method": "kd", "task": "classification", "batch": 4, "length": 64, "dtype": "float32",
         "compiled": False}  # fmt: skip
PHASES = (*(phase for phase in results.ORDER if phase != "loss"), "loss: divergence", results.STEP)


def rows(**changes) -> list[results.Row]:
    """Two ways of one setup; every phase takes a millisecond."""
    blank = dict.fromkeys(field.name for field in dataclasses.fields(results.Row))
    texts = {"device": "box", "torch": "2", "date": "2026-01-01", "threads": 2, "dirty": False, "steps": 6}
    return [
        results.Row(**{
            **blank, **texts, **SETUP, "way": way, "phase": phase, "median_ms": 8.0 if phase == "step" else 1.0, "share": 1.0,
            "low_ms": 1.0, "high_ms": 9.0, "times_ours": 1.0, "times_ours_low": 1.0, "times_ours_high": 1.0,
            "loss_share": 0.25, "tokens_per_second": 1234.0, "examples_per_second": 5.0, **changes,
        })
        for way in ("fastkd", "authors") for phase in PHASES
    ]  # fmt: skip


SETUPS = [
    {}, {"length": 512}, {"batch": 8}, {"dtype": "bfloat16"}, {"compiled": True}, {"task": "masked_lm"},
    {"method": "fcd"}, {"model": "tiny, student 0,1"},
]  # fmt: skip


def test_every_setup_stands_for_itself(tmp_path):
    """In the CSV, in the picture, in the table of docs/performance.md, and with a trace of its own."""
    folder = tmp_path / "box"
    for changes in (*SETUPS, *SETUPS):  # the second time replaces the first
        publish.write(rows(**changes), folder)
    kept = report.read_rows(folder / "profile.csv")
    assert len(kept) == len(SETUPS) * len(rows())
    assert len({publish.trace_of(folder, {**SETUP, **changes}) for changes in SETUPS}) == len(SETUPS)
    table = [line for line in performance.training_steps(folder, "box") if line.startswith("| tiny")]
    assert (
        len(set(table)) == len(table) == len(SETUPS)
        and "| tiny 4×512 fp32 | `kd` | 8 (25%) | 8 (25%) | 1,234 |" in table
    )


def test_every_setup_has_bars_of_its_own(tmp_path, monkeypatch):
    bars, seen = plots.bar, []
    monkeypatch.setattr(
        plots, "bar", lambda axes, place, parts, *more: (seen.append(len(parts)), bars(axes, place, parts, *more))
    )
    for changes in SETUPS:
        publish.write(rows(**changes), tmp_path)
    (path,), reason = plots.draw(tmp_path)
    assert seen == [len(PHASES)] * 2 * len(SETUPS) and not reason and path.exists()
    keys = [tuple(row[name] for name in results.KEY) for row in report.read_rows(tmp_path / "profile.csv")]
    panels = {plots.panel_of(key): {k for k in keys if plots.panel_of(k) == plots.panel_of(key)} for key in keys}
    for there in panels.values():
        assert len(set(plots.labels_of(there).values())) == len(there)


def test_an_older_table_is_carried_on(tmp_path):
    """Without the driver's column, as they were once written."""
    publish.write(rows(), tmp_path)
    path = tmp_path / "profile.csv"
    lines = [line.split(",") for line in path.read_text().splitlines()]
    at = lines[0].index("driver")
    path.write_text("\n".join(",".join(line[:at] + line[at + 1 :]) for line in lines) + "\n")
    publish.check(tmp_path, [])
    publish.write(rows(length=512, driver="550, 1980"), tmp_path)
    assert {row["driver"] for row in report.read_rows(path)} == {"", "550, 1980"}


FOREIGN = {
    "profile.csv": ("name,amount\nbread,3\n", ",".join((*results.COLUMNS, "my note")) + "\n", "", "\x89PNG"),
    "profile.json": ('{"mine": 1}', "", '{"format": 1, "rows": "mine"}'),
    "traces/a.json": ('{"traceEvents": []}',),
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in FOREIGN.items() for text in texts])
def test_a_strangers_file_is_refused(name, text, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match=r"out: .* is not written over; move it, or choose another --out") as error:
        publish.check(tmp_path, [tmp_path / "traces" / "a.json"])
    assert str(path) in str(error.value)


def test_a_table_that_was_cut_off_is_not_read_as_ours(tmp_path):
    publish.write(rows(), tmp_path)
    publish.check(tmp_path, [])
    path = tmp_path / "profile.csv"
    path.write_text(path.read_text()[:-60])
    with pytest.raises(ValueError, match=r"profile.csv is not as"):
        publish.check(tmp_path, [])


def test_what_fails_half_way_leaves_the_old_one(tmp_path, monkeypatch):
    publish.write(rows(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(publish.csv.DictWriter, "writerows", lambda *_: 1 / 0)
    monkeypatch.setattr(plots, "stacked", lambda *_: 1 / 0)
    for fails in (lambda: publish.write(rows(length=512), tmp_path), lambda: plots.draw(tmp_path)):
        with pytest.raises(ZeroDivisionError):
            fails()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    json.loads(before["profile.json"])


def test_every_way_is_held_against_the_clock():
    said = results.sums({"fastkd": 0.999, "reference": 1.0, "authors": 0.9})
    assert "fastkd 99.9%, reference 100.0%, authors 90.0%; authors: TOO FAR OFF" in said
    assert "TOO FAR" not in results.sums({"fastkd": 0.96, "authors": 1.04})
