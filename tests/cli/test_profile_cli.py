"""The command line of `fastkd profile`: its files, what it refuses to overwrite, its error messages."""

import csv
import json

import pytest
import torch

import tiny  # noqa: F401  first: it tells transformers to stay offline

pytest.importorskip("transformers")

from fastkd.bench import machine
from test_profile import TINY, steps_of

from fastkd import cli as commands
from fastkd.cli import profile as command
from fastkd.profile import models, run, session, timeline


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # otherwise the process starts itself again
    monkeypatch.setattr(machine, "load_before", lambda: 0.0)
    monkeypatch.setattr(machine.LoadMeter, "stop", lambda self: 0.0)

    def call(*argv):
        code = commands.main(["profile", *argv, "--out", str(tmp_path)])
        streams = capsys.readouterr()
        return code, streams.out, streams.err, next(iter(tmp_path.iterdir()), None)

    return call


def test_the_command_writes_table_csv_json_picture_and_trace(cli):
    pytest.importorskip("matplotlib")
    asked = ("--from-config", TINY["bert"], "--batch", "4", "--length", "12", "--steps", "6", "--method", "kd,fcd")
    code, out, _, folder = cli(*asked)
    assert code == 0
    for said in (
        "loss: gram_correlation_loss",
        "tokens/s",
        "the parts add up to",
        "all methods",
        "without logits: heads",
    ):
        assert said in out
    rows = list(csv.DictReader((folder / "profile.csv").open()))
    steps = [row for row in rows if row["phase"] == "step"]
    assert [(row["method"], row["provider"]) for row in steps] == [
        (m, w) for m in ("kd", "fcd") for w in ("fastkd", "loop", "authors")
    ]
    for row in steps:
        assert float(row["share"]) == pytest.approx(1.0, abs=0.05) and 0 < float(row["loss_share"]) < 1
        assert float(row["tokens_per_second"]) == pytest.approx(48e3 / float(row["median_ms"]), rel=1e-3)
        assert float(row["extra_mib"]) > 0.1 and float(row["cpu_ms"]) > 0
    assert (folder / "profile.png").stat().st_size > 1000
    (trace, *_) = sorted((folder / "traces").iterdir())
    events: dict[str, list[tuple[float, float]]] = {}
    for event in json.loads(trace.read_text())["traceEvents"]:
        if event.get("cat") == "user_annotation":
            events.setdefault(event["name"], []).append((event["ts"], event["ts"] + event["dur"]))
    assert {"teacher forward", "student forward", "optimizer"} <= events.keys()
    for loss, student in zip(events["loss backward"], events["student backward"], strict=True):
        assert loss[0] < loss[1] <= student[0] < student[1]
    with pytest.warns(FutureWarning, match="--ways is now called --providers"):
        code, _, _, _ = cli(*asked[:-1], "kd", "--ways", "fastkd", "--no-trace")  # again: replaced, the rest kept
    again = [row for row in csv.DictReader((folder / "profile.csv").open()) if row["phase"] == "step"]
    assert code == 0 and [(row["method"], row["provider"]) for row in again] == [
        *(("fcd", w) for w in ("fastkd", "loop", "authors")),
        ("kd", "fastkd"),
    ]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--from-config", "bert-bas"), "there is no 'bert-bas'; did you mean bert-base?"),
        (("--from-config", "bert-base", "--length", "600"), "bert has 512 positions, so 600 tokens do not fit"),
        (("--from-config", "bert-base", "--steps", "3"), "steps: expected at least 6, got 3"),
        (("--from-config", "bert-base", "--batch", "0"), "batch: expected at least 1, got 0"),
        (("--from-config", "bert-base", "--providers", "liger"), "expected one of 'fastkd', 'logits', 'loop', 'authors'"),
        (("--from-config", "bert-base", "--providers", "loop,loop"), "each can be named once, got loop,loop"),
        (("--from-config", "bert-base", "--method", "jsd"), "jsd"),
        (("--from-config", "bert-base", "--method", "kd,kdd"), "method: there is no 'kdd'"),
        (("--from-config", "bert-base", "--task", "cloze"), "--task: invalid choice: 'cloze'"),
        (("--from-config", "bert-base", "--device", "gpu"), "--device: invalid choice: 'gpu'"),
        (("--from-config", "bert-base", "--student-layers", "0,9"), "9"),
        *((("--from-config", f"bert-base:{change}"), f"from-config: '{change}' is refused")
          for change in ("x", "layers=3", "to_dict=3", "num_hidden_layers=abc", "num_hidden_layers=2.5")),
        (("--from-config", "bert-base:hidden_act=rleu"), "rleu"),
        (("--from-config", "bert-base:hidden_size=15"), "15"),
        (("--teacher", "no/such-folder"), "--from-config needs none"),
    ],
)  # fmt: skip
def test_mistakes_are_named(argv, said, cli, monkeypatch):
    small = {
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 50,
    }
    monkeypatch.setitem(models.CONFIGS, "bert-base", ("bert", small))
    code, out, err, folder = cli(*argv)
    assert code == 2 and said in err and out == ""
    assert len(err.splitlines()) == 1 and err.startswith("fastkd profile: ")
    assert folder is None or not any(path.is_file() for path in folder.rglob("*"))


SHORT = ("--from-config", TINY["bert"], "--batch", "4", "--length", "12", "--steps", "6", "--providers", "fastkd")


def test_every_setup_has_its_own_trace(cli, monkeypatch):
    facts, run, said = machine.facts, session.run, []
    clocks = "550.54, 1980, 2619"
    monkeypatch.setattr(
        machine, "facts", lambda device: (said.append("clocks"), {**facts(device), "driver": clocks})[1]
    )
    monkeypatch.setattr(session, "run", lambda *args, **options: (said.append("steps"), run(*args, **options))[1])
    assert cli(*SHORT)[0] == 0
    code, _, _, folder = cli(*SHORT, "--length", "16", "--student-layers", "0")
    rows = [row for row in csv.DictReader((folder / "profile.csv").open()) if row["phase"] == "step"]
    assert code == 0 and [row["length"] for row in rows] == ["12", "16"]
    assert {row["driver"] for row in rows} == {clocks} and said == ["steps", "clocks"] * 2  # as they are at work
    assert [row["model"] for row in rows] == [TINY["bert"], f"{TINY['bert']}, student 0"]
    assert len([*(folder / "traces").iterdir()]) == 2
    assert cli(*SHORT)[0] == 0 and len([*(folder / "traces").iterdir()]) == 2  # ours is replaced


def test_the_output_folder_is_checked_before_anything_is_measured(tmp_path, cli, monkeypatch, capsys):
    monkeypatch.setattr(run, "profile", lambda *_: pytest.fail("it began to work"))
    (tmp_path / "file").write_text("mine")
    for out, said in (
        ("file", "is no folder to write to"),
        ("there", "profile.csv is no table of `fastkd profile`"),
    ):
        folder = tmp_path / out / machine.device_name(torch.device("cpu"))
        if out == "there":
            folder.mkdir(parents=True)
            (folder / "profile.csv").write_text("name,amount\nbread,3\n")
        assert commands.main(["profile", *SHORT, "--out", str(tmp_path / out)]) == 2
        assert said in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine" and (
        folder / "profile.csv"
    ).read_text() == "name,amount\nbread,3\n"


def test_results_of_a_busy_machine_are_not_published(cli, monkeypatch):
    monkeypatch.setattr(machine, "load_before", lambda: 1.5)
    code, out, _, folder = cli(*SHORT, "--no-trace")
    assert code == 2 and "other processes used 1.50 cores before the run" in out and "pass --force" in out
    assert "tokens/s" not in out and not [*folder.iterdir()]
    code, out, _, folder = cli(*SHORT, "--no-trace", "--force")
    assert code == 0 and "tokens/s" in out and not [*folder.iterdir()]
    monkeypatch.setattr(machine, "load_before", lambda: 0.0)
    monkeypatch.setattr(machine.LoadMeter, "stop", lambda self: 0.7)
    code, out, _, folder = cli(*SHORT, "--no-trace")
    assert code == 2 and "not published: kd: other processes used 0.70 cores while this was profiled" in out
    assert not [*folder.iterdir()]


def test_other_processes_are_watched_during_the_timed_steps_only(monkeypatch):
    """What compiles before them is ours, though in other processes."""
    said = []

    class Meter:
        def __init__(self):
            said.append("start")

        def stop(self):
            said.append("stop")
            return 0.5

    begin = timeline.Timeline.begin_step
    monkeypatch.setattr(machine, "LoadMeter", Meter)
    monkeypatch.setattr(
        timeline.Timeline, "begin_step", lambda self, provider, mode: (said.append(mode), begin(self, provider, mode))
    )
    plan = session.Plan(providers=("fastkd",), warm=1, timed=2, memory=1, trace=0)
    steps_of("kd", plan=plan)
    assert said == ["warm", "start", "time", "time", "stop", "memory"]


@pytest.mark.parametrize(
    ("text", "methods"),
    [
        ("kd", ["kd"]),
        ("kd,fcd", ["kd", "fcd"]),
        ("kd:alpha=0.5,weight=2,fcd", ["kd:alpha=0.5,weight=2", "fcd"]),
        ("kd, fcd:share=0.5, kd + fcd:share=1.0,weight=2 + bert_emd, kd", ["kd", "fcd:share=0.5",
                                                                           "kd + fcd:share=1.0,weight=2 + bert_emd"]),
    ],
)  # fmt: skip
def test_methods_by_comma(text, methods):
    options = command.parser().parse_args(["--from-config", "bert-base", "--method", text])
    assert run.methods_of(options, "bert") == methods


def test_all_methods_that_make_sense(cli, monkeypatch):
    """One that fails is named at the end, the others are kept."""
    profile = run.profile

    def some(arguments, setup, *more):
        if setup["method"] == "kd":
            raise RuntimeError("out of memory\nat length")
        return profile(arguments, setup, *more)

    monkeypatch.setattr(run, "profile", some)
    monkeypatch.setattr(models, "sensible_methods", lambda causal: ["fcd", "kd"])
    code, out, _, folder = cli(*SHORT, "--method", "all", "--no-trace")
    assert code == 0 and out.endswith("left out: kd: out of memory\n")
    assert cli(*SHORT, "--method", "fcd,kd", "--no-trace")[0] == 2  # it was asked for by name
    assert {row["method"] for row in csv.DictReader((folder / "profile.csv").open())} == {"fcd"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_gpu_is_named(cli):
    code, _, err, _ = cli("--from-config", "bert-base", "--device", "cuda")
    assert code == 2 and "device: 'cuda' cannot be used here" in err


@pytest.mark.long
def test_with_torch_compile(cli):
    asked = ("--from-config", TINY["bert"], "--batch", "4", "--length", "12", "--steps", "6", "--compile", "--no-trace")
    code, out, _, folder = cli(*asked)
    assert code == 0 and "compiled" in out
    rows = list(csv.DictReader((folder / "profile.csv").open()))
    assert {row["compiled"] for row in rows} == {"True"}
    assert {"student backward", "loss backward"} <= {row["phase"] for row in rows}
