"""The table of sizes at which PyTorch's operations and kernels take turns on a CPU, and how it is measured."""

import json
import re

import pytest
import torch
from bench_fakes import FakeTimer
from fastkd.bench import calibrate, machine, measure

from fastkd import backends, thresholds
from fastkd.cli import main as fastkd
from fastkd.thresholds import ALWAYS, KERNELS, NEVER, PYTORCH, TABLE, UP_TO

needs_cpu = pytest.mark.skipif(backends.UNAVAILABLE["cpu"] is not None, reason=f"C++: {backends.UNAVAILABLE['cpu']}")


@pytest.fixture(autouse=True)
def a_user_without_a_table(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTKD_THRESHOLDS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = dict(UP_TO)
    yield
    UP_TO.update(before)


def test_shipped_forced_and_from_a_file(monkeypatch, tmp_path):
    index = thresholds.INSTRUCTION_SETS.index(thresholds.INSTRUCTION_SET)
    shipped, source = thresholds.load()
    assert shipped == {name: row.shipped[index] for name, row in TABLE.items()} and source.startswith("shipped")
    for way in (KERNELS, PYTORCH):
        monkeypatch.setenv("FASTKD_THRESHOLDS", way)
        UP_TO.update(thresholds.load()[0])
        assert {thresholds.serves(name, size) for name in TABLE for size in (1, 1 << 40)} == {way}
    other = tmp_path / "other.json"
    other.write_text('{"in_batch": 7, "gone": 3}')
    monkeypatch.setenv("FASTKD_THRESHOLDS", str(other))
    assert thresholds.load()[0] == {**shipped, "in_batch": 7}


@pytest.mark.parametrize("text", ["", "7", '{"in_batch": "few"}', '{"in_batch": null}', None])
def test_a_file_that_is_none_is_named(monkeypatch, tmp_path, text):
    path = tmp_path / "kernel"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv("FASTKD_THRESHOLDS", str(path))
    with pytest.raises(ValueError, match=f"FASTKD_THRESHOLDS: {re.escape(str(path))} is no table.*; set"):
        thresholds.load()


def test_a_damaged_file_of_the_cache_is_named_and_left_alone():
    thresholds.file().parent.mkdir()
    thresholds.file().write_text("{")
    with pytest.warns(RuntimeWarning, match=f"{re.escape(str(thresholds.file()))} is no table.*delete it"):
        table, source = thresholds.load()
    assert source.startswith("shipped") and "in_batch" in table and thresholds.file().exists()


def test_a_user_without_a_home_has_the_shipped_table(monkeypatch):
    """`import fastkd` reads the table, so looking for the file must not fail."""

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(thresholds.Path, "home", no_home)
    monkeypatch.setattr(thresholds.Path, "exists", lambda _: pytest.fail("raises where it may not look"))
    monkeypatch.setenv("HOME", "/nowhere")
    assert thresholds.load()[1].startswith("shipped")


@pytest.mark.parametrize(
    ("small", "large", "expected"),
    [
        ([1, 1, 1, 1], [2, 2, 2, 2], ALWAYS),
        ([2, 2, 2, 2], [1, 1, 1, 1], NEVER),
        ([1, 2, 4, 8], [2, 3, 3, 3], 20),
        ([1, 3.1, 2, 8], [2, 3, 3, 3], 30),  # the second is noise
        ([1, 1], [1, 1], NEVER),
    ],
)
def test_the_cut_loses_least_time(small, large, expected):
    assert calibrate.cut((10, 20, 30, 40)[: len(small)], small, large) == expected


@needs_cpu
@pytest.mark.parametrize("name", TABLE)
def test_a_case_counts_as_auto_does_and_both_ways_agree(name, monkeypatch):
    make, exponents = calibrate.CASES[name]
    size, said, found = 2 ** exponents[1], [], []
    serves = thresholds.serves
    monkeypatch.setattr(thresholds, "serves", lambda *args: said.append((*args[:2], serves(*args))) or said[-1][-1])
    call, leaves = make(size)
    for way in (KERNELS, PYTORCH):
        UP_TO.update(thresholds.forced(way))
        loss = call()
        found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    assert (name, size, KERNELS) in said and (name, size, PYTORCH) in said
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*found, strict=True))


@needs_cpu
def test_calibrate_writes_what_auto_and_doctor_then_read(monkeypatch, capsys):
    monkeypatch.setattr(machine, "passive_threads", lambda *_: None)
    monkeypatch.setattr(machine, "is_busy", lambda *_: False)
    monkeypatch.setattr(measure, "make_timer", lambda *_, **__: FakeTimer({KERNELS: 1e-3, PYTORCH: 2e-3}))
    before = dict(UP_TO)
    assert fastkd(["bench", "--calibrate", "--no-publish"]) == 0
    assert not thresholds.file().exists() and "written" not in capsys.readouterr().out
    UP_TO.update(before)
    assert fastkd(["bench", "--calibrate"]) == 0
    written = json.loads(thresholds.file().read_text())
    assert written == thresholds.forced(KERNELS)
    table, source = thresholds.load()
    assert table == written and str(thresholds.file()) in source
    monkeypatch.setattr(thresholds, "SOURCE", source)
    assert fastkd(["doctor"]) == 0
    said = capsys.readouterr().out
    assert source in said and re.search(r"info_nce_loss whose negatives are the batch +-> kernels\n", said)


@needs_cpu
def test_a_busy_machine_measures_nothing(monkeypatch):
    monkeypatch.setattr(machine, "passive_threads", lambda *_: None)
    monkeypatch.setattr(machine, "is_busy", lambda *_: True)
    assert fastkd(["bench", "--calibrate"]) == 2 and not thresholds.file().exists()
