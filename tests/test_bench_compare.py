"""JSON beside the CSV, and `fastkd bench --compare`: what counts as a regression, and what cannot be compared."""

import json
from pathlib import Path

import pytest
from fastkd.bench import against, archive, compare, machine, report, run

from bench_rows import rows_of, written


@pytest.mark.parametrize(
    ("after", "code", "said"),
    [
        ({"eager": 10.0}, 0, "nothing got worse"),
        ({"eager": 9.7}, 0, "nothing got worse"),  # significant, but within the tolerance
        ({"eager": 8.0}, 1, "SLOWER divergence toy-3x5-float32 both: 20% of the lead over eager is gone"),
        ({"eager": 8.0, "spread": 0.3}, 0, "cannot tell"),  # the interval holds 1: not a finding
        ({"eager": 13.0}, 0, "faster"),
        ({"memory": 30.0}, 1, "MORE MEMORY divergence toy-3x5-float32 both: 20 to 30 MiB"),
        ({"memory": 23.0}, 0, "nothing got worse"),
        ({"device": "other box"}, 2, "devices differ"),
        ({"case": "another"}, 2, "nothing to compare"),
        ({"rival": "cdist"}, 2, "nothing to compare"),
    ],
)
def test_what_is_a_regression(after, code, said, tmp_path, capsys):
    a, b = written(tmp_path / "a", rows_of()), written(tmp_path / "b", rows_of(**after))
    assert run.main(["--compare", str(a), str(b)]) == code
    assert said in capsys.readouterr().out


def test_tolerance_and_folders(tmp_path, capsys):
    written(tmp_path / "a", rows_of(), rows_of(case="gone"))
    written(tmp_path / "b", rows_of(eager=9.7))
    folders = ["--compare", str(tmp_path / "a"), str(tmp_path / "b")]
    assert run.main([*folders, "--tolerance", "0.02"]) == 1
    assert "1 more were measured in one of the two only" in capsys.readouterr().out


def test_transport_is_held_against_the_authors_way(tmp_path):
    """Where PyTorch has no rival, the loop over POT is the anchor."""
    rows = [archive.typed({k: report.as_text(v) for k, v in vars(row).items()}) for row in rows_of(rival="authors")]
    (change,), alone = compare.changes(rows, rows)
    assert (change.anchor, change.ratio, change.verdict(0.05), alone) == ("authors", 1.0, "same", [])


def test_rows_without_an_interval_are_compared_but_never_convict(tmp_path, capsys):
    a, b = written(tmp_path / "a", rows_of()), written(tmp_path / "b", rows_of(eager=5.0))
    for path in (a, b):
        data = json.loads(path.read_text())
        for row in data["rows"]:
            row["times_ours_low"] = None
        path.write_text(json.dumps(data))
    assert run.main(["--compare", str(a), str(b)]) == 0
    assert "no interval" in capsys.readouterr().out


def test_mistakes_are_named(tmp_path, capsys):
    good, bad = written(tmp_path / "a", rows_of()), tmp_path / "bad.json"
    bad.write_text("[1]")
    assert run.main(["--compare", str(good), str(tmp_path / "none.json")]) == 2
    assert "none.json: no such file" in capsys.readouterr().err
    assert run.main(["--compare", str(good), str(bad)]) == 2
    assert "not a result of `fastkd bench`" in capsys.readouterr().err


def test_json_says_what_the_csv_says_with_types(tmp_path):
    path = written(tmp_path, rows_of(), absent={"toy-3x5-float32": {"liger": "liger_kernel is not installed"}})
    first, second = json.loads(path.read_text())["rows"]
    assert first == vars(rows_of()[0]) and second["times_ours_low"] == pytest.approx(9.9)
    assert archive.read(path) == archive.read(tmp_path / "divergence.csv") == archive.read(tmp_path)
    assert archive.absent_of(path) == {"toy-3x5-float32": {"liger": "liger_kernel is not installed"}}
    archive.write(tmp_path, "divergence", {"other": {"pot": "not installed"}})
    assert set(archive.absent_of(path)) == {"toy-3x5-float32", "other"}
    archive.write(tmp_path, "divergence", {"other": {}})  # it ran this time
    assert set(archive.absent_of(path)) == {"toy-3x5-float32"}


def test_missing_rivals_are_named_once_with_their_stems():
    absent = [("gram", "liger", "no"), ("gram", "liger", "no"), ("relation", "liger", "no"), ("gram", "pot", "other")]
    assert archive.summary(absent) == ["liger (gram, relation): no", "pot (gram): other"]


# Against another commit -------------------------------------------------------------------------------------------


class Shell:
    """Instead of git, the build and the bench: notes what was called where, and publishes what each side would have."""

    def __init__(self, before=10.0, after=10.0, failing="never"):
        self.calls, self.eager, self.failing = [], [before, after], failing

    def __call__(self, command, folder):
        self.calls.append((command, folder))
        if self.failing in command:
            return 1
        if "--out" in command:
            out = Path(command[command.index("--out") + 1]) / "box"
            written(out, rows_of(eager=self.eager[0 if out.parent.name == "before" else 1]))
        return 0


@pytest.mark.skipif(not machine.git("rev-parse", "HEAD"), reason="not a git checkout")
@pytest.mark.parametrize(("after", "code"), [(10.0, 0), (8.0, 1)])
def test_another_commit_is_built_measured_and_taken_away_again(after, code, capsys):
    shell = Shell(after=after)
    argv = ["gram", "--against", "HEAD", "--mode", "both", "--out=x"]
    assert against.against("HEAD", argv, 0.05, shell) == code
    (add, _), (build, there), (before, where), (remove, _), (bench, here) = shell.calls
    assert add[:3] == ["git", "worktree", "add"] and add[-1] == machine.git("rev-parse", "HEAD")
    assert build[-2:] == ["build_ext", "--inplace"] and there == where != here == machine.ROOT
    assert remove[:4] == ["git", "worktree", "remove", "--force"] and not there.exists()
    assert before[3:6] == bench[3:6] == ["gram", "--mode", "both"]


@pytest.mark.skipif(not machine.git("rev-parse", "HEAD"), reason="not a git checkout")
def test_a_side_that_fails_is_named(capsys):
    with pytest.raises(RuntimeError, match="against: HEAD does not build here"):
        against.against("HEAD", [], 0.05, shell := Shell(failing="build_ext"))
    assert shell.calls[-1][0][:3] == ["git", "worktree", "remove"]  # cleaned up all the same
    assert against.against("HEAD", [], 0.05, Shell(failing="--out")) == 2
    assert "published nothing" in capsys.readouterr().out
    assert run.main(["--against", "no-such-branch"]) == 2
    assert "'no-such-branch' names no commit" in capsys.readouterr().err
