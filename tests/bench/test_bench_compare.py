"""`fastkd bench --compare` and `--against`: what counts as a regression, and what cannot be compared."""

from pathlib import Path

import pytest
from bench_fakes import CASE, rows_of, written
from fastkd.bench import compare, machine, run

from fastkd.cli import main as fastkd


@pytest.mark.parametrize(
    ("after", "code", "said"),
    [
        ({"eager": 10.0}, 0, "nothing got worse"),
        ({"eager": 9.7}, 0, "nothing got worse"),  # significant, but within the tolerance
        ({"eager": 8.0}, 1, f"SLOWER divergence {CASE} both: 20% of the lead over eager is gone"),
        ({"eager": 8.0, "spread": 0.3}, 0, "cannot tell"),  # the interval holds 1: not a finding
        ({"eager": 13.0}, 0, "faster"),
        ({"memory": 30.0}, 1, f"MORE MEMORY divergence {CASE} both: 20 to 30 MiB"),
        ({"memory": 23.0}, 0, "nothing got worse"),
        ({"device": "other box"}, 2, "devices differ"),
        ({"case": "another"}, 2, f"divergence {CASE} both plain as the previous provider left it: before only"),
        ({"other": "cdist"}, 2, "nothing to compare"),
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
    out = capsys.readouterr().out
    assert "1 cannot be compared" in out and "divergence gone both plain" in out


def test_transport_is_held_against_the_authors_way():
    """Where PyTorch has none, the loop over POT is the anchor."""
    rows = rows_of(other="authors")
    ((change,), alone) = compare.changes(rows, rows)
    assert (change.before["provider"], change.ratio, change.verdict(0.05), alone) == ("authors", 1.0, "same", [])


def test_rows_without_an_interval_are_compared_but_never_convict(tmp_path, capsys):
    before, after = rows_of(), rows_of(eager=5.0)
    after[1]["times_ours_low"] = None
    a, b = written(tmp_path / "a", before), written(tmp_path / "b", after)
    assert run.main(["--compare", str(a), str(b)]) == 0
    assert "no interval" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.csv", None, "none.csv: no results here; name a <stem>.csv of `fastkd bench`"),
        ("empty.csv", b"stem,case\n", "empty.csv: no results here"),
        ("bad.csv", b"model,method\nbert,kd\n", "bad.csv: not a result of `fastkd bench` (a row has no stem"),
        ("plot.csv", b"\x89PNG\xff", "plot.csv: not a CSV file"),
    ],
)
def test_mistakes_are_named(name, content, said, tmp_path, capsys):
    good, bad = written(tmp_path / "a", rows_of()), tmp_path / name
    if content is not None:
        bad.write_bytes(content)
    assert fastkd(["bench", "--compare", str(good), str(bad)]) == 2
    assert said in capsys.readouterr().err


def test_a_field_that_is_no_number_is_named(tmp_path, capsys):
    path = written(tmp_path, rows_of())
    path.write_text(path.read_text().replace(",1e+06,", ",fast,"))
    assert fastkd(["bench", "--compare", str(path), str(path)]) == 2
    assert "not a result of `fastkd bench` (its flops is 'fast')" in capsys.readouterr().err


# Against another commit -----------------------------------------------------------------------------------------------


class Shell:
    """Instead of git, the build and the bench: notes what was called where, and publishes what each side would have."""

    def __init__(self, before=10.0, after=10.0, failing="never", lost="", status=1):
        self.calls, self.builds, self.eager, self.failing = [], [], {"before": before, "after": after}, failing
        self.lost, self.status = lost, status  # this side's bench ends with the status, a case short

    def __call__(self, command, folder, **environment):
        self.calls.append((command, folder))
        self.builds += [environment.get("FASTKD_BUILD")] if "build_ext" in command else []
        if self.failing in command:
            return 1
        if "--out" in command:
            out = Path(command[command.index("--out") + 1])
            more = [] if out.name == self.lost else [rows_of(case="forward_kl-9x9-float32")]
            written(out / "box", rows_of(eager=self.eager[out.name]), *more)
            return self.status if out.name == self.lost else 0
        return 0


CHECKOUT = pytest.mark.skipif(not machine.is_checkout(), reason="not a git checkout")


@CHECKOUT
@pytest.mark.parametrize(("after", "code"), [(10.0, 0), (8.0, 1)])
def test_another_commit_is_built_measured_and_taken_away_again(after, code):
    shell = Shell(after=after)
    argv = ["gram", "--against", "HEAD", "--mode", "both", "--out=x"]
    assert compare.against("HEAD", argv, 0.05, shell) == code
    (add, _), (build, there), (again, root), (before, where), (remove, _), (bench, here) = shell.calls
    assert add[:3] == ["git", "worktree", "add"] and add[-1] == machine.git("rev-parse", "HEAD")
    assert (
        build == again and build[-2:] == ["build_ext", "--inplace"] and there == where != here == root == machine.ROOT
    )
    assert set(shell.builds) <= {"cpu", "cuda"}, "a build that may fail quietly would be measured as eager"
    assert remove[:4] == ["git", "worktree", "remove", "--force"] and not there.exists()
    assert before[4:7] == bench[4:7] == ["gram", "--mode", "both"]


@CHECKOUT
def test_a_side_that_fails_is_named(capsys):
    with pytest.raises(RuntimeError, match=r"against: HEAD .* does not build here"):
        compare.against("HEAD", [], 0.05, shell := Shell(failing="build_ext"))
    assert shell.calls[-1][0][:3] == ["git", "worktree", "remove"]  # cleaned up all the same
    assert compare.against("HEAD", [], 0.05, Shell(failing="--out")) == 2
    assert "published nothing" in capsys.readouterr().out
    assert fastkd(["bench", "--against", "no-such-branch"]) == 2
    assert "'no-such-branch' names no commit" in capsys.readouterr().err


@CHECKOUT
@pytest.mark.parametrize(("side", "said"), [("after", "this one"), ("before", "HEAD")])
@pytest.mark.parametrize(("status", "code"), [(1, 1), (2, 2), (-9, 2)])
def test_a_side_that_is_short_of_a_case_does_not_pass(side, said, status, code, capsys):
    assert compare.against("HEAD", [], 0.05, Shell(lost=side, status=status)) == code
    out = capsys.readouterr().out
    assert "nothing got worse" in out and f"the bench of {said} ended with {status}" in out
    other = {"after": "before", "before": "after"}[side]
    assert f"divergence forward_kl-9x9-float32 both plain as the previous provider left it: {other} only" in out


def test_both_sides_are_asked_the_same():
    asked = ["gram", "--against", "main", "--shape", "gpt2", "--out", "x", "--against=main"]
    assert compare.of_both_sides(asked) == ["gram", "--shape", "gpt2"]


def test_an_installed_copy_has_no_other_commit(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert fastkd(["bench", "--against", "HEAD"]) == 2
    assert "is no checkout of fastkd" in capsys.readouterr().err
