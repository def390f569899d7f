# ruff: noqa: F811 (files is a fixture)
"""`fastkd cache` and `fastkd distill --teacher_cache`: a teacher that is not loaded, and one that a server spoke for."""

import json

import pytest
import torch

pytest.importorskip("transformers")
from safetensors.torch import load_file
from test_distill_cli import files, flags, rows, save_pair  # noqa: F401
from transformers import AutoModelForCausalLM

from fastkd.cli import main
from fastkd.cli import models as loading
from fastkd.train.cache.shards import INDEX, shard_name


def texts(files, count=24):
    (files / "words.txt").write_text("\n".join(text for text, _ in rows(count)))
    return {"train_file": files / "words.txt", "validation_file": files / "words.txt", "task": "causal_lm"}


def saved_models(files, task="causal_lm", family="gpt2"):
    save_pair(files / "teacher", family, task)
    save_pair(files / "small", family, task, layers=2, seed=1)
    return {"student": files / "small", "student_layers": None}


def loaded(monkeypatch):
    """The sides whose weights were loaded since."""
    sides, load = [], loading._model
    monkeypatch.setattr(loading, "_model", lambda side, *args, **more: sides.append(side) or load(side, *args, **more))
    return sides


def student_of(folder):
    return load_file(folder / "student" / "model.safetensors")


def test_a_run_from_a_cache_is_the_run_without_it_and_loads_no_teacher(files, capsys, monkeypatch):
    """Batches of texts of one length, in another order in each epoch."""
    shared = {**texts(files), **saved_models(files), "method": "forward_kl"}
    kept = {"teacher_cache": files / "cache", "cache_shard": 10}
    assert main(["cache", *flags(files, **shared, **kept, output_dir=None)]) == 0, capsys.readouterr().err
    assert "the states before the head" in (said := capsys.readouterr().out) and "bytes per token" in said
    assert len(list((files / "cache").glob("shard-*"))) == 3
    sides = loaded(monkeypatch)
    assert main(["distill", *flags(files, **shared, **kept)]) == 0, capsys.readouterr().err
    assert sides == ["student"]
    record = json.loads((files / "run" / "report" / "report.json").read_text())
    assert [row["name"] for row in record["models"]] == ["student"]
    page = (files / "run" / "report" / "index.html").read_text()
    assert "came from a cache: the states before the head" in page and "the teacher was not loaded" in page
    assert main(["distill", *flags(files, **shared, output_dir=files / "live")]) == 0, capsys.readouterr().err
    live, ours = student_of(files / "live"), student_of(files / "run")
    for name in live:
        torch.testing.assert_close(ours[name], live[name], rtol=1e-4, atol=1e-6)
    save_pair(files / "teacher", "gpt2", "causal_lm", seed=5)
    assert main(["distill", *flags(files, **shared, **kept, output_dir=files / "other")]) == 2
    assert "it was made with another teacher" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "family", "method", "extra"),
    [
        ("classification", "bert", "kd", {}),
        ("masked_lm", "bert", "distilbert", {"top_k": 5}),
        ("causal_lm", "gpt2", "kd", {"samples": 6, "pack": True}),
    ],
)
def test_other_tasks_run_from_a_cache(task, family, method, extra, files, capsys):
    shared = {**(texts(files) if task != "classification" else {}), **saved_models(files, task, family), "task": task}
    options = {**shared, "method": method, "teacher_cache": files / "cache", **extra}
    assert main(["distill", *flags(files, **options)]) == 0, capsys.readouterr().err
    again = {**options, "output_dir": files / "again"}
    assert main(["distill", *flags(files, **again)]) == 0, capsys.readouterr().err
    first, second = student_of(files / "run"), student_of(files / "again")
    assert all(torch.equal(first[name], second[name]) for name in first)


def records(files, form: str, k: int = 6):
    """What a server says of the texts, at temperature 1."""
    from transformers import AutoTokenizer

    teacher = AutoModelForCausalLM.from_pretrained(files / "teacher").eval()
    tokenizer = AutoTokenizer.from_pretrained(files / "teacher")
    for text in (files / "words.txt").read_text().splitlines():
        ids = tokenizer(text, truncation=True, max_length=16)["input_ids"]
        with torch.no_grad():
            log_probs, tokens = teacher(torch.tensor([ids])).logits[0, :-1].log_softmax(-1).topk(k)
        if form == "trl":
            filled = [[*row, -float("inf")] for row in log_probs.tolist()]
            yield {"input_ids": ids, "logprobs": filled, "logprob_token_ids": [[*row, 0] for row in tokens.tolist()]}
        else:
            said = [
                {str(t): {"logprob": x, "rank": 1} for t, x in zip(*row, strict=True)}
                for row in zip(tokens.tolist(), log_probs.tolist(), strict=True)
            ]
            yield {"prompt_token_ids": ids, "prompt_logprobs": [None, *said]}


@pytest.mark.parametrize("form", ["trl", "vllm"])
def test_a_servers_log_probabilities_make_the_cache_of_the_live_teacher(form, files, capsys, monkeypatch):
    shared = {**texts(files), **saved_models(files), "method": "reverse_kl"}
    with open(files / "said.jsonl", "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records(files, form))
    sides = loaded(monkeypatch)
    served = {**shared, "teacher_cache": files / "served", "from_logprobs": files / "said.jsonl"}
    assert main(["cache", *flags(files, **served, output_dir=None)]) == 0, capsys.readouterr().err
    assert sides == ["student"] and "6 most likely tokens and their tail" in capsys.readouterr().out
    live = {**shared, "teacher_cache": files / "kept", "top_k": 6}
    assert main(["cache", *flags(files, **live, output_dir=None)]) == 0, capsys.readouterr().err
    ours, theirs = (load_file(files / name / shard_name(0)) for name in ("served", "kept"))
    ends = ours["lengths"].cumsum(0) - 1  # after the last token, of which no server speaks
    inside = torch.ones(len(ours["tail"]), dtype=torch.bool).index_fill(0, ends.long(), False)
    assert torch.equal(ours["lengths"], theirs["lengths"]) and inside.sum() > 50
    assert torch.equal(ours["indices"].int()[inside], theirs["indices"].int()[inside])
    for name in ("log_probs", "tail"):
        torch.testing.assert_close(ours[name][inside], theirs[name][inside], rtol=1e-4, atol=1e-4)
    assert main(["distill", *flags(files, **shared, teacher_cache=files / "served")]) == 0, capsys.readouterr().err


def without(name):
    return lambda lines: [{key: x for key, x in line.items() if key != name} for line in lines]


def first_changed(name, change):
    return lambda lines: [lines[0] | {name: change(lines[0][name])}, *lines[1:]]


MISTAKES = [
    (without("logprobs"), "line 1 is no record (KeyError: 'logprobs'); a record has input_ids"),
    (lambda lines: lines[:-2], "has no record of example 22, and of 1 others"),
    (lambda lines: [*lines, lines[0] | {"example_id": 3}], "the tokens are not those of example 3 in train_dataset"),
    (lambda lines: [*lines, lines[0] | {"example_id": 0}], "example 0 has a record already"),
    (lambda lines: [*lines, lines[0]], "line 25: train_dataset has no example 24"),
    (first_changed("input_ids", lambda x: x[:-1]), "line 1: the tokens are not those of example 0"),
    (lambda lines: [lines[0] | {"logprobs": lines[0]["logprobs"][1:], "logprob_token_ids": lines[0]["logprob_token_ids"][1:]}, *lines[1:]], "ask with a prompt length of 1"),
    (first_changed("logprobs", lambda x: [[0.5] * 7] * len(x)), "the probabilities sum to 11.541, more than 1; are they logits?"),
    (first_changed("logprob_token_ids", lambda x: [[3] * 7] * len(x)), "line 1, token 1: needs different ids from 0 to 20"),
    (first_changed("logprob_token_ids", lambda x: [[99, *row[1:]] for row in x]), "line 1, token 1: needs different ids from 0 to 20"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), MISTAKES)
def test_wrong_records_get_one_sentence(change, message, files):
    from datasets import Dataset

    from fastkd.train.cache.logprobs import Records

    texts(files)
    save_pair(files / "teacher", "gpt2", "causal_lm")
    lines = list(records(files, "trl"))
    data = Dataset.from_dict({"input_ids": [line["input_ids"] for line in lines], "example_id": range(len(lines))})
    (files / "said.jsonl").write_text("\n".join(json.dumps(line) for line in change(lines)))
    with pytest.raises(ValueError, match="from_logprobs: ") as caught:
        Records(str(files / "said.jsonl"), data, 21).k  # noqa: B018
    assert message in str(caught.value)


WRONG = [
    ({"top_k": 5}, "teacher_cache: top_k, samples and from_logprobs say what it holds; name its folder"),
    ({"teacher_cache": "cache", "from_logprobs": "no.jsonl"}, "from_logprobs: there is no file no.jsonl"),
    ({"teacher_cache": "cache", "from_logprobs": "words.txt", "method": "glmd"}, "glmd also compares what follows the last token"),
    ({"teacher_cache": "cache", "from_logprobs": "words.txt", "method": "fcd:share=1"}, "has the likeliest next tokens alone"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_mistakes_get_one_sentence(options, message, files, capsys):
    shared = {**texts(files), **saved_models(files), "method": "forward_kl"}
    options = {name: files / x if x in ("cache", "words.txt") else x for name, x in options.items()}
    assert main(["distill", *flags(files, **{**shared, **options})]) == 2
    assert message in capsys.readouterr().err
    assert not (files / "cache" / INDEX).exists()


def test_the_command_says_where_it_shall_be_kept(files, capsys):
    assert main(["cache", *flags(files, output_dir=None)]) == 2
    assert "fastkd cache: teacher_cache: say in which folder" in capsys.readouterr().err
