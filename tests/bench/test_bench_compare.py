"""JSON beside the CSV, and `fastkd bench --compare`: what counts as a regression, and what cannot be compared."""

import json
from pathlib import Path

import pytest
from bench_rows import rows_of, written
from fastkd.bench import compare, compare_commits, machine, report, results_io, run


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
    out = capsys.readouterr().out
    assert "1 more were measured in one of the two only" in out and "divergence gone both plain" in out


def test_transport_is_held_against_the_authors_way(tmp_path):
    """Where PyTorch has no rival, the loop over POT is the anchor."""
    rows = [results_io.typed({k: report.as_text(v) for k, v in vars(row).items()}) for row in rows_of(rival="authors")]
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


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.json", None, "none.json: no such file"),
        ("bad.json", "[1]", "bad.json: not a result of `fastkd bench`"),
        ("bad.json", '{"rows": 5}', "expected a list under `rows`"),
        ("bad.json", '{"rows": [{}]}', "row 1 has no stem, case"),
        ("bad.json", '{"rows": [5]}', "row 1 has no stem, case"),
        ("bad.json", '{"rows": [{"stem"', "bad.json: not a result of `fastkd bench` (not JSON"),
        ("bad.json", '{"rows": []}', "bad.json: no results here"),
        ("bad.csv", "model,way\nbert,ours\n", "bad.csv: not a result of `fastkd bench` (row 1 has no stem"),
        ("plot.png", b"\x89PNG\xff", "plot.png: not a result of `fastkd bench` (not JSON"),
        ("plot.csv", b"\x89PNG\xff", "plot.csv: not a CSV file"),
    ],
)
def test_mistakes_are_named(name, content, said, tmp_path, capsys):
    good, bad = written(tmp_path / "a", rows_of()), tmp_path / name
    if content is not None:
        bad.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert run.main(["--compare", str(good), str(bad)]) == 2
    assert said in capsys.readouterr().err


def test_a_field_that_is_no_number_is_named(tmp_path, capsys):
    good = written(tmp_path, rows_of())
    bad = tmp_path / "bad.json"
    bad.write_text(good.read_text().replace('"median_ms": 1.0', '"median_ms": "fast"'))
    assert run.main(["--compare", str(good), str(bad)]) == 2
    assert "row 1: its median_ms is 'fast'" in capsys.readouterr().err


def test_a_folder_of_devices_names_them(tmp_path, capsys):
    written(tmp_path / "results" / "box", rows_of())
    assert run.main(["--compare", str(tmp_path / "results"), str(tmp_path / "results")]) == 2
    assert f"no results here; name one of its devices: {tmp_path / 'results' / 'box'}" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert run.main(["--compare", str(tmp_path / "empty"), str(tmp_path / "results")]) == 2
    assert "empty: no results here" in capsys.readouterr().err


def test_json_says_what_the_csv_says_with_types(tmp_path):
    path = written(tmp_path, rows_of(), absent={"toy-3x5-float32": {"liger": "liger_kernel is not installed"}})
    first, second = json.loads(path.read_text())["rows"]
    assert first == vars(rows_of()[0]) and second["times_ours_low"] == pytest.approx(9.9)
    assert results_io.read(path) == results_io.read(tmp_path / "divergence.csv") == results_io.read(tmp_path)
    assert results_io.absent_of(path) == {"toy-3x5-float32": {"liger": "liger_kernel is not installed"}}
    results_io.write(tmp_path, "divergence", {"other": {"pot": "not installed"}})
    assert set(results_io.absent_of(path)) == {"toy-3x5-float32", "other"}
    results_io.write(tmp_path, "divergence", {"other": {}})  # it ran this time
    assert set(results_io.absent_of(path)) == {"toy-3x5-float32"}


def test_missing_rivals_are_named_once_with_their_stems():
    absent = [("gram", "liger", "no"), ("gram", "liger", "no"), ("relation", "liger", "no"), ("gram", "pot", "other")]
    assert results_io.summary(absent) == ["liger (gram, relation): no", "pot (gram): other"]


# Against another commit -------------------------------------------------------------------------------------------


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
            more = [] if out.name == self.lost else [rows_of(case="toy-9x9-float32")]
            written(out / "box", rows_of(eager=self.eager[out.name]), *more)
            return self.status if out.name == self.lost else 0
        return 0


CHECKOUT = pytest.mark.skipif(not machine.is_checkout(), reason="not a git checkout")


@CHECKOUT
@pytest.mark.parametrize(("after", "code"), [(10.0, 0), (8.0, 1)])
def test_another_commit_is_built_measured_and_taken_away_again(after, code, capsys):
    shell = Shell(after=after)
    argv = ["gram", "--against", "HEAD", "--mode", "both", "--out=x"]
    assert compare_commits.against("HEAD", argv, 0.05, shell) == code
    (add, _), (build, there), (again, root), (before, where), (remove, _), (bench, here) = shell.calls
    assert add[:3] == ["git", "worktree", "add"] and add[-1] == machine.git("rev-parse", "HEAD")
    assert (
        build == again and build[-2:] == ["build_ext", "--inplace"] and there == where != here == root == machine.ROOT
    )
    assert set(shell.builds) <= {"cpu", "cuda"}, "a build that may fail quietly would be measured as eager"
    assert remove[:4] == ["git", "worktree", "remove", "--force"] and not there.exists()
    assert before[3:6] == bench[3:6] == ["gram", "--mode", "both"]


@CHECKOUT
def test_a_side_that_fails_is_named(capsys):
    with pytest.raises(RuntimeError, match=r"against: HEAD .* does not build here"):
        compare_commits.against("HEAD", [], 0.05, shell := Shell(failing="build_ext"))
    assert shell.calls[-1][0][:3] == ["git", "worktree", "remove"]  # cleaned up all the same
    assert compare_commits.against("HEAD", [], 0.05, Shell(failing="--out")) == 2
    assert "published nothing" in capsys.readouterr().out
    assert run.main(["--against", "no-such-branch"]) == 2
    assert "'no-such-branch' names no commit" in capsys.readouterr().err


@CHECKOUT
@pytest.mark.parametrize(("side", "said"), [("after", "this one"), ("before", "HEAD")])
@pytest.mark.parametrize(("status", "code"), [(1, 1), (2, 2), (-9, 2)])
def test_a_side_that_is_short_of_a_case_does_not_pass(side, said, status, code, capsys):
    assert compare_commits.against("HEAD", [], 0.05, Shell(lost=side, status=status)) == code
    out = capsys.readouterr().out
    assert "nothing got worse" in out and f"the bench of {said} ended with {status}" in out
    other = {"after": "before", "before": "after"}[side]
    assert f"divergence toy-9x9-float32 both plain as the previous provider left it: {other} only" in out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--aga", "HEAD"], "unrecognized arguments: --aga"),  # it would reach the children, and there again
        (["--against", "HEAD", "--no-publish"], "publish nothing, so nothing could be compared"),
        (["--against", "HEAD", "--force"], "publish nothing, so nothing could be compared"),
        (["--against", "HEAD", "--list"], "not allowed with argument"),
    ],
)
def test_what_cannot_be_compared_is_said_before_it_is_measured(argv, said, monkeypatch, capsys):
    monkeypatch.setattr(compare_commits, "against", lambda *_: pytest.fail("measured"))
    assert run.main(argv) == 2
    assert said in capsys.readouterr().err


def test_a_yaml_file_is_found_from_the_other_checkout_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("models: {}")
    mine = str(tmp_path / "mine.yaml")
    assert compare_commits.without(["--shape", "gpt2,mine.yaml", "--out", "x"]) == ["--shape", f"gpt2,{mine}"]
    assert compare_commits.without(["--shape=mine.yaml", "--against=main"]) == [f"--shape={mine}"]


def test_an_installed_copy_has_no_other_commit(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert run.main(["--against", "HEAD"]) == 2
    assert "is no checkout of fastkd" in capsys.readouterr().err
