"""Where the bench writes: what is not ours stays, what is ours is whole, and it is looked at before anything is measured."""

import json
import os

import pytest
from bench_fakes import outcome_of, provider, toy_case
from bench_rows import rows_of, written
from fastkd.bench import machine, report, results_io, run
from fastkd.bench.baselines import Absent

STEM = "divergence"


def test_a_new_folder_and_one_of_ours_are_fine(tmp_path):
    results_io.probe(tmp_path / "new" / "box", [STEM])
    assert not list(tmp_path.iterdir()), "looking leaves nothing behind"
    written(tmp_path, rows_of())
    results_io.probe(tmp_path, [STEM, "gram"])


def older(folder):
    """A file from before the column `label`."""
    path = folder / f"{STEM}.csv"
    at = report.COLUMNS.index("label")
    cells = [line.split(",") for line in path.read_text().splitlines()]
    path.write_text("\n".join(",".join(row[:at] + row[at + 1 :]) for row in cells) + "\n")


def test_an_older_file_of_ours_is_filled_up(tmp_path):
    written(tmp_path, rows_of(case="old-3x5-float32"))
    older(tmp_path)
    results_io.probe(tmp_path, [STEM])
    written(tmp_path, rows_of())
    assert [row["label"] for row in report.read_rows(tmp_path / f"{STEM}.csv")] == [""] * 4


def column(folder, name, cell):
    path = folder / f"{STEM}.csv"
    head, *lines = path.read_text().splitlines()
    path.write_text("\n".join([f"{head},{name}", *(f"{line},{cell}" for line in lines)]) + "\n")


WRONG = {
    "its columns are model, way": lambda x: (x / f"{STEM}.csv").write_text("model,way\nbert,ours\n"),
    "it has more columns, which would be lost: remark": lambda x: column(x, "remark", "mine"),
    "some without a name": lambda x: (x / f"{STEM}.csv").write_text((x / f"{STEM}.csv").read_text()[:-1] + ",mine\n"),
    "which would be lost, since divergence.csv is gone": lambda x: (x / f"{STEM}.csv").unlink(),
    "not a CSV file": lambda x: (x / f"{STEM}.csv").write_bytes((x / f"{STEM}.csv").read_bytes() + b"\xff\xfe"),
    "not JSON": lambda x: (x / f"{STEM}.json").write_text('{"format": 1, "rows": [{"stem"'),
    "expected a list under `rows`": lambda x: (x / f"{STEM}.json").write_text('{"mine": 1}'),
    f"its stem is not {STEM}": lambda x: (x / f"{STEM}.json").write_text('{"rows": []}'),
    "a picture that was not drawn from rows": lambda x: (x / f"{STEM}_sweep.png").write_bytes(b"\x89PNG mine"),
}


@pytest.mark.parametrize("said", WRONG)
def test_what_is_not_ours_is_named_before_anything_is_measured(said, tmp_path, monkeypatch, capsys):
    folder = tmp_path / machine.device_name(run.torch.device("cpu"))
    written(folder, rows_of())
    WRONG[said](folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(run, "run_cases", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(machine, "load_before", lambda: 0.0)
    monkeypatch.setattr(machine, "passive_threads", lambda *_: None)
    assert run.main([STEM, "--device", "cpu", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert said in error and "move it away, or name another folder with --out" in error
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("inside", ["", "deeper"])
def test_a_file_is_no_folder(inside, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(machine, "passive_threads", lambda *_: None)
    (tmp_path / "out").write_text("mine")
    assert run.main([STEM, "--device", "cpu", "--out", str(tmp_path / "out" / inside)]) == 2
    assert f"out: {tmp_path / 'out'} is a file; name a folder" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="cannot be written to; name another folder with --out"):
        results_io.probe(tmp_path / "new", [STEM])


@pytest.mark.parametrize("broken", ["write", "replace"])
def test_who_is_stopped_while_writing_still_has_the_old_file(broken, tmp_path, monkeypatch):
    path = written(tmp_path, rows_of())
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}

    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(*((type(path), "write_text") if broken == "write" else (os, "replace")), full)
    for write in (lambda: report.write_csv(rows_of(eager=3.0), tmp_path), lambda: results_io.write(tmp_path, STEM, {})):
        with pytest.raises(OSError, match="no space"):
            write()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before


def test_a_disk_that_is_full_ends_the_run_with_a_sentence(tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(machine, "load_before", lambda: 0.0)
    monkeypatch.setattr(machine, "passive_threads", lambda *_: None)
    monkeypatch.setattr(run, "run_cases", full)
    assert run.main([STEM, "--device", "cpu", "--out", str(tmp_path)]) == 2
    assert "fastkd bench: no space left on device" in capsys.readouterr().err


# Reasons ----------------------------------------------------------------------------------------------------------


def test_a_case_that_was_left_out_is_stored_with_its_reason(tmp_path, fake_measure, monkeypatch):
    monkeypatch.setattr(machine, "available_bytes", lambda device: 1)
    case = toy_case()
    outcome = outcome_of([provider("fastkd")], fake_measure)
    monkeypatch.setattr(run, "bench_case", lambda *_: outcome)
    assert run.run_cases([case], run.Settings(run.torch.device("cpu")), {}, tmp_path, publishing=True) == 0
    (reason,) = results_io.absent_of(tmp_path / f"{STEM}.json")[case.name].values()
    assert "left out: it needs about" in reason and not (tmp_path / f"{STEM}.csv").exists()
    assert run.run_cases([case], run.Settings(run.torch.device("cpu")), {}, tmp_path / "x", publishing=False) == 0
    assert not (tmp_path / "x").exists()


def test_a_passing_reason_does_not_stand_beside_rows(tmp_path, fake_measure):
    """Not asked for in this mode, measured in another; too large today, measured yesterday."""
    path = written(tmp_path, rows_of())
    case = "toy-3x5-float32"
    reasons = {"eager": results_io.NOT_ASKED, "compile": results_io.NOT_ASKED, case: "left out: 12 GiB"}
    results_io.write(tmp_path, STEM, {case: reasons})
    assert results_io.absent_of(path) == {case: {"compile": results_io.NOT_ASKED}}
    results_io.write(tmp_path, STEM, {case: {"eager": "out of memory at 3 GiB"}})  # a finding, whatever else there is
    assert results_io.absent_of(path) == {case: {"eager": "out of memory at 3 GiB"}}


def test_reasons_are_published_with_the_rows(tmp_path, fake_measure):
    outcome = outcome_of([provider("fastkd")], fake_measure)
    outcome.absent.append(Absent("eager", results_io.NOT_ASKED))
    outcome.foreign = 0.0
    assert run.publish(toy_case(), outcome, tmp_path) == ""
    stored = json.loads((tmp_path / f"{STEM}.json").read_text())
    assert stored["absent"] == {"toy-3x5-float32": {"eager": "not asked for"}} and len(stored["rows"]) == 3
