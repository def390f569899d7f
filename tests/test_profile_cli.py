"""`fastkd profile` as it is called: what it writes, what it refuses to write over, and what it says of mistakes."""

import csv
import json

import pytest
import torch

import tiny  # noqa: F401  first: it tells transformers to stay offline

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from fastkd.cli import profile as command
from fastkd.profile import models, plots, ways
from test_profile import TINY


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # otherwise the process starts itself again

    def call(*argv):
        code = command.main([*argv, "--out", str(tmp_path)])
        streams = capsys.readouterr()
        return code, streams.out, streams.err, next(iter(tmp_path.iterdir()), None)

    return call


def test_the_command_writes_table_csv_json_picture_and_trace(cli):
    pytest.importorskip("matplotlib")
    asked = ("--from-config", TINY["bert"], "--batch", "4", "--length", "12", "--steps", "6", "--method", "kd,fcd")
    code, out, _, folder = cli(*asked)
    assert code == 0
    for said in ("loss: gram_correlation_loss", "tokens/s", "the parts add up to", "all methods"):
        assert said in out
    rows = list(csv.DictReader((folder / "profile.csv").open()))
    steps = [row for row in rows if row["phase"] == "step"]
    assert [(row["method"], row["way"]) for row in steps] == [(m, w) for m in ("kd", "fcd") for w in ways.WAYS]
    for row in steps:
        assert float(row["share"]) == pytest.approx(1.0, abs=0.05) and 0 < float(row["loss_share"]) < 1
        assert float(row["tokens_per_second"]) == pytest.approx(48e3 / float(row["median_ms"]), rel=1e-3)
        assert float(row["peak_mib"]) > 10
    assert json.loads((folder / "profile.json").read_text())["rows"] == rows
    assert plots.plots.digest_of(rows).encode() in (folder / "profile.png").read_bytes()
    (trace, *_) = sorted((folder / "traces").iterdir())
    events: dict[str, list[tuple[float, float]]] = {}
    for event in json.loads(trace.read_text())["traceEvents"]:
        if event.get("cat") == "user_annotation":
            events.setdefault(event["name"], []).append((event["ts"], event["ts"] + event["dur"]))
    assert {"teacher forward", "student forward", "optimizer"} <= events.keys()
    for loss, student in zip(events["loss backward"], events["student backward"], strict=True):
        assert loss[0] < loss[1] <= student[0] < student[1]
    code, _, _, _ = cli(*asked[:-1], "kd", "--ways", "fastkd", "--no-trace")  # again: replaced, the rest kept
    again = [row for row in csv.DictReader((folder / "profile.csv").open()) if row["phase"] == "step"]
    assert code == 0 and [(row["method"], row["way"]) for row in again] == [
        *(("fcd", w) for w in ways.WAYS),
        ("kd", "fastkd"),
    ]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--from-config", "bert-bas"), "there is no 'bert-bas'; did you mean bert-base?"),
        (("--from-config", "bert-base:layers=3"), "BertConfig has no 'layers'"),
        (("--from-config", "bert-base:x"), "expected option=value after bert-base:"),
        (("--from-config", "bert-base", "--length", "600"), "bert has 512 positions, so 600 tokens do not fit"),
        (("--from-config", "bert-base", "--steps", "3"), "six at least"),
        (("--from-config", "bert-base", "--ways", "liger"), "expected some of fastkd, reference, authors"),
        (("--from-config", "bert-base", "--method", "jsd"), "jsd"),
        (("--from-config", "bert-base", "--task", "cloze"), "expected classification, masked_lm or causal_lm"),
        (("--from-config", "bert-base", "--batch", "0"), "expected at least 1×2"),
        (("--teacher", "no/such-folder"), "--from-config needs none"),
    ],
)
def test_mistakes_are_named(argv, said, cli, monkeypatch):
    small = {
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 50,
    }
    monkeypatch.setitem(models.CONFIGS, "bert-base", ("bert", small))
    code, _, err, _ = cli(*argv)
    assert code == 2 and said in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there(cli):
    code, _, err, _ = cli("--from-config", "bert-base", "--device", "cuda")
    assert code == 2 and "torch finds no CUDA device here" in err


@pytest.mark.long
def test_with_torch_compile(cli):
    asked = ("--from-config", TINY["bert"], "--batch", "4", "--length", "12", "--steps", "6", "--compile", "--no-trace")
    code, out, _, folder = cli(*asked)
    assert code == 0 and "compiled" in out
    rows = list(csv.DictReader((folder / "profile.csv").open()))
    assert {row["compiled"] for row in rows} == {"True"}
    assert {"student backward", "loss backward"} <= {row["phase"] for row in rows}
