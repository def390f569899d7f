"""`fastkd vocab`, from files to a folder that plain transformers loads; the counts and the coverage behind it."""

import csv
import json
import re

import pytest
import torch
from test_vocab_tokenizer import RARE, TEXTS, trained

from fastkd import VocabMap
from fastkd.cli import main
from fastkd.cli.vocab import _texts
from fastkd.vocab import coverage as coverage_module
from fastkd.vocab.coverage import count_corpus, coverage, report

transformers = pytest.importorskip("transformers")


@pytest.fixture
def teacher(tmp_path):
    """A folder with a tokenizer and a small masked language model over its vocabulary."""
    tokenizer = trained("WordPiece")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def corpus(folder):
    (folder / "a.txt").write_text("\n".join(TEXTS[:1]) + "\n\n")
    with open(folder / "b.csv", "w", newline="") as file:
        csv.writer(file).writerows([["id", "text"], [0, TEXTS[1]], [1, ""]])
    (folder / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[2:]))
    return [str(folder / name) for name in ("a.txt", "b.csv", "c.jsonl")]


@pytest.mark.parametrize("workers", [1, 2])
def test_from_a_corpus_to_a_student(teacher, tmp_path, workers, capsys):
    files, out = corpus(tmp_path), tmp_path / "small"
    options = ["--model", str(teacher), "--output", str(out), "--size", "104", "--multiple-of", "8", "--keep", "zebra"]
    assert main(["vocab", *files, *options, "--workers", str(workers)]) == 0
    assert "104 of" in capsys.readouterr().out
    old, new = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (teacher, out))
    vocab = VocabMap.load(out)
    assert len(vocab) == len(new) == 104
    assert vocab.kept[old("zebra", add_special_tokens=False)["input_ids"]].all()
    big, small = (transformers.AutoModelForMaskedLM.from_pretrained(folder) for folder in (teacher, out))
    kept = [text for text in TEXTS[:3] if vocab.kept[old(text)["input_ids"]].all()]
    assert kept
    for text in kept:
        ids = torch.tensor([new(text)["input_ids"]])
        assert ids[0].tolist() == vocab.encode(old(text)["input_ids"])
        wanted = vocab.slice_logits(big(input_ids=torch.tensor([old(text)["input_ids"]])).logits)
        torch.testing.assert_close(small(input_ids=ids).logits, wanted)
    found = json.loads((out / "coverage.json").read_text())
    counts = count_corpus(TEXTS, old)
    assert found == report(vocab, counts, old) and found["tokens_counted"] == int(counts.sum())
    assert (out / "coverage.png").stat().st_size > 1000


def test_without_a_model_the_unknown_token_replaces_dropped_tokens(teacher, tmp_path):
    out = tmp_path / "small"
    assert main(["vocab", *corpus(tmp_path), "--tokenizer", str(teacher), "--output", str(out), "--size", "0.7"]) == 0
    vocab, old = VocabMap.load(out), transformers.AutoTokenizer.from_pretrained(teacher)
    dropped = (~vocab.kept).nonzero()[:, 0]
    assert len(dropped) and (vocab.kept_ids[vocab.position_of[dropped]] == old.unk_token_id).all()


def test_stand_ins_in_the_tokenizer(teacher, tmp_path):
    out = tmp_path / "small"
    options = [
        "--model",
        str(teacher),
        "--output",
        str(out),
        "--size",
        "96",
        "--multiple-of",
        "8",
        "--dropped",
        "stand_in",
    ]
    assert main(["vocab", *corpus(tmp_path), *options]) == 0
    vocab, old = VocabMap.load(out), transformers.AutoTokenizer.from_pretrained(teacher)
    new = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    spelled = transformers.AutoTokenizer.from_pretrained(out)  # the model's configuration is there
    texts = [*TEXTS, RARE]
    assert new(texts)["input_ids"] == [vocab.encode(ids) for ids in old(texts)["input_ids"]]
    assert spelled(texts)["input_ids"] == vocab.shrink_tokenizer(old)(texts)["input_ids"] != new(texts)["input_ids"]


def test_counts_are_those_of_the_tokenizer():
    tokenizer = trained("BPE")
    counts = count_corpus([*TEXTS, RARE], tokenizer)
    ids = [i for text in [*TEXTS, RARE] for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert torch.equal(counts, torch.bincount(torch.tensor(ids), minlength=len(tokenizer)))


def test_coverage_and_the_reported_sizes():
    counts = torch.tensor([1, 0, 80, 10, 5, 4])
    assert torch.allclose(coverage(counts), torch.tensor([0.8, 0.9, 0.95, 0.99, 1, 1], dtype=torch.float64))
    found = report(VocabMap([2, 3], 6), counts, trained("WordPiece"))
    assert found["sizes_for"] == {"80%": 1, "90%": 2, "95%": 3, "99%": 4}
    assert found["covered"] == pytest.approx(0.9) and found["never_seen"] == 1


def test_tables_are_read_by_column(tmp_path):
    """The same texts as .txt, .csv (quoted), .tsv and .jsonl."""
    texts, read = [*TEXTS[:2], 'she said "zebra, vex"'], [0]
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"review": text}) for text in texts))
    (tmp_path / "c.tsv").write_text(
        "id\treview\n" + "\n".join(f"{i}\t{text}" for i, text in enumerate(texts)) + "\n9\t\n"
    )
    with open(tmp_path / "d.csv", "w", newline="") as file:
        csv.writer(file).writerows([["review"], *([text] for text in texts)])
    files = sorted(str(path) for path in tmp_path.iterdir())
    assert [*_texts(files, "review", read)] == texts * 4
    assert read[0] == sum(path.stat().st_size for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"--text-column: .*d.csv has no column 'text', it has review"):
        next(_texts(files[-1:], "text", read))


def test_a_size_too_small_for_what_is_always_kept(teacher, tmp_path, capsys):
    arguments = [
        *corpus(tmp_path),
        "--tokenizer",
        str(teacher),
        "--output",
        str(tmp_path / "out"),
        "--multiple-of",
        "1",
    ]
    assert main(["vocab", *arguments, "--size", "0.01"]) == 2
    said = capsys.readouterr().err
    found = re.search(
        r"--size: 0.01 keeps (\d+) of (\d+) tokens, .* alone are (\d+); choose --size (\S+) or more", said
    )
    asked, total, least, enough = map(float, found.groups())
    assert asked == int(0.01 * total) < least and "always_keep" not in said
    assert main(["vocab", *arguments, "--size", str(enough)]) == 0


@pytest.mark.parametrize(("change", "named"), [(["--size", "half"], "--size"), (["--workers", "0"], "--workers")])
def test_mistakes(teacher, tmp_path, change, named, capsys):
    arguments = [*corpus(tmp_path), "--tokenizer", str(teacher), "--output", str(tmp_path / "out")]
    assert main(["vocab", *arguments, *change]) == 2
    assert named in capsys.readouterr().err
    assert main(["vocab", *arguments[1:2], str(tmp_path / "d.xlsx"), *arguments[2:]]) == 2


@pytest.mark.parametrize("source", ["--model", "--tokenizer", "--teacher"])
def test_the_teacher_is_never_overwritten(source, teacher, tmp_path, monkeypatch, capsys):
    """Under any name: as it was given, by another path, through a link."""
    (tmp_path / "link").symlink_to(teacher)
    monkeypatch.chdir(tmp_path)
    before = {path.name: path.read_bytes() for path in teacher.iterdir()}
    named = [*corpus(tmp_path), source, str(teacher)] + (["--model", str(teacher)] if source == "--teacher" else [])
    for output in (str(teacher), "teacher", "link"):
        assert main(["vocab", *named, "--output", output]) == 2
        said = capsys.readouterr().err
        assert f"--output: {output} holds " in said and "choose a new folder" in said
    assert {path.name: path.read_bytes() for path in teacher.iterdir()} == before


def test_files_in_the_output_folder_are_kept(teacher, tmp_path, capsys):
    out = tmp_path / "small"
    out.mkdir()
    call = ["vocab", *corpus(tmp_path), "--tokenizer", str(teacher), "--output", str(out)]
    assert main(call) == 0  # an empty one is fine
    written = {path.name: path.read_bytes() for path in out.iterdir()}
    assert {"coverage.json", "tokenizer.json"} <= written.keys()
    assert main([*call, "--size", "0.7"]) == 2 and "holds" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == written


def test_a_failed_run_leaves_no_folder(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(coverage_module, "write_report", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["vocab", *corpus(tmp_path), "--tokenizer", str(teacher), "--output", str(tmp_path / "small")])
    assert list((tmp_path / "small").iterdir()) == []
