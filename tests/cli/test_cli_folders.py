"""A command never overwrites anything: not a teacher, nor an earlier result, nor somebody else's file."""

import itertools
import json
import os
import re

import pytest
import torch

import tiny  # noqa: F401  first: it tells transformers to stay offline
from fastkd import atomic_write

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("datasets")

from fastkd.cli import demo, main
from fastkd.train import plots, report

ROWS = [
    {"name": name, "metric_name": "accuracy", "metric": quality, "parameters": n, "bytes": 4 * n, "latency": 1.0, "all": {}}
    for name, quality, n in (("teacher", 0.9, 200), ("student", 0.8, 100))
]  # fmt: skip
HISTORY = {"student": [{"step": i, "loss": 1.0 / i} for i in (1, 2)]}
WHOLE = {"title": "t", "rows": ROWS, "histories": HISTORY, "maps": [], "config": {}}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_report_is_complete_and_replaces_no_file(tmp_path):
    page = report.write(tmp_path / "report", **WHOLE)
    before = contents(tmp_path)
    assert page.name in before and {"report.json", "comparison.png"} <= before.keys()
    assert json.loads(before["report.json"])["title"] == "t" and b"data:image/png" in before["index.html"]
    with pytest.raises(ValueError, match=r"report: .* holds comparison.png, .* nothing is written over"):
        report.write(tmp_path / "report", **{**WHOLE, "title": "another"})
    assert contents(tmp_path) == before


def test_a_report_keeps_the_models(tmp_path):
    class Saved:
        def save_pretrained(self, folder):
            folder.mkdir(exist_ok=True)
            (folder / "x").write_text("kept")

    report.write(tmp_path / "report", **WHOLE, models=dict.fromkeys(("teacher", "student"), (Saved(), Saved())))
    assert (tmp_path / "report/teacher/x").exists() and (tmp_path / "report/student/x").exists()


def test_a_gain_within_its_standard_error_is_not_shown(tmp_path):
    alone = torch.tensor([1, 0, 1, 0] * 100) == 1
    better, same = alone.clone(), alone.clone()
    better[1:121:2] = True  # 60 of 400 rows are mended, and none is spoilt
    same[[1, 3, 0]] = ~same[[1, 3, 0]]  # 2 are mended, 1 is spoilt
    gain = report.paired_gain(alone, better)
    assert gain == pytest.approx((15.0, 196 * (0.15 * 0.85 * 400 / 399) ** 0.5 / 20))
    assert "+15.0 points" in report.verdict(gain, 400) and "a gain beyond the noise" in report.verdict(gain, 400)
    within = report.paired_gain(alone, same)
    assert "within the noise" in report.verdict(within, 400)
    for shown, class_ in ((gain, "card warm"), (within, "card ")):
        rows = [*ROWS, {**ROWS[1], "gain": shown}]
        page = report.write(tmp_path / class_.strip().replace(" ", "-"), **{**WHOLE, "rows": rows}).read_text()
        assert f"<div class='{class_}'><b>{shown[0]:+.1f} ± {shown[1]:.1f}</b>" in page


def test_the_page_says_what_its_pictures_show(tmp_path):
    """The alternative text is not the heading, and a table has what is taken for what."""
    rows = [ROWS[0], {**ROWS[1], "confusion": (["good", "b<d"], [[30, 4], [2, 1064]])}]
    history = {"student": [{"step": i, "loss": 1.0, "term/kd/soft": 1 / i, "weight/kd/soft": 1.0} for i in (1, 2, 4)]}
    page = report.write(tmp_path / "report", **{**WHOLE, "rows": rows, "histories": history}).read_text()
    headings, shown = re.findall("<h2>(.*?)</h2><div class=wide><img", page), re.findall("<img alt='(.*?)'", page)
    assert len(headings) == len(shown) == 3 and not set(headings) & set(shown)
    assert "kd/soft 1 to 0.25" in shown[-1]
    table = page.split("label \\ prediction")[1].split("</table>")[0]
    assert re.findall(r">([\d,]+)(?=<|$)", table) == ["30", "4", "2", "1,064"] and "b&lt;d" in table


def test_no_two_names_lie_on_one_another(tmp_path, monkeypatch):
    """Models of one size and nearly one accuracy, as a student alone and distilled are."""
    names = ("teacher", "student alone", "student distilled")
    rows = [{**ROWS[1], "name": name, "metric": 0.8 + i / 1000} for i, name in enumerate(names)]
    figures = []
    monkeypatch.setattr(plots, "_saved", lambda figure, path: figures.append(figure))
    plots.tradeoff(rows, "accuracy", tmp_path / "x.png")
    (figure,) = figures
    figure.canvas.draw()  # places the texts
    named = [*figure.legends[0].get_texts(), *(text for axis in figure.axes for text in axis.texts)]
    assert [text.get_text() for text in named] == [*names]
    boxes = [text.get_window_extent() for text in named]
    assert not [(a, b) for a, b in itertools.combinations(boxes, 2) if a.overlaps(b)]


def test_a_second_report_gets_its_own_folder(tmp_path):
    (tmp_path / "report-3").mkdir()
    for name in ("report", "report-2", "report-3", "report-4"):
        assert atomic_write.next_empty(tmp_path / "report") == tmp_path / name
        report.write(tmp_path / name, **WHOLE)


def test_a_failed_report_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_page", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.write(tmp_path / "report", **WHOLE)
    assert contents(tmp_path) == {} and report.draw(tmp_path, ROWS, HISTORY, [], "test")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--output", "mine"], "--output: mine holds index.html, and nothing is written over; choose a new folder"),
        (["--output", "mine/index.html"], "--output: mine/index.html is no folder to write to (File exists)"),
        (["--method", "kdd"], "there is no 'kdd'"),
        (["--method", "glmd"], "glmd makes no sense for the task classification"),
        (["--student-steps", "0"], "--student-steps: expected at least 1, got 0"),
    ],
)
def test_the_demo_refuses_before_it_trains(argv, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "Texts", lambda: pytest.fail("it began to work"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "index.html").write_text("my page")
    assert main(["demo", *argv]) == 2
    assert said in capsys.readouterr().err
    assert contents(tmp_path / "mine") == {"index.html": b"my page"}


def test_a_file_created_meanwhile_is_kept(tmp_path):
    def fill():
        with atomic_write.filling(tmp_path / "new", "--output") as scratch:
            (scratch / "b").write_text("ours")
            (tmp_path / "new" / "b").write_text("theirs")

    with pytest.raises(ValueError, match="has got a b meanwhile"):
        fill()
    assert contents(tmp_path) == {"b": b"theirs"}


def test_a_file_is_replaced_atomically(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("old")

    def write(text, fails=0):
        with atomic_write.replacing(path) as scratch:
            scratch.write_text(text[:2] if fails else text)
            assert path.read_text() == "old" and 1 / (1 - fails)

    with pytest.raises(ZeroDivisionError):
        write("new", fails=1)
    assert contents(tmp_path) == {"x.csv": b"old"}
    write("new")
    assert contents(tmp_path) == {"x.csv": b"new"}


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(ValueError, match=r"out: .* is no folder to write to"):
        atomic_write.probe(tmp_path / "locked" / "x", "out")
