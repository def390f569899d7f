"""Each script in examples/ runs as it is called on the command line, with tiny models and a few texts."""

import csv
import importlib.util
import json
import runpy
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import tiny
from cases import ROOT

transformers = pytest.importorskip("transformers")
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
MOODS, REST = ("good", "bad"), ("film", "plot", "actor", "music", "it was", "quite", "very", "the", "a slow", "a long")
TEXTS = [f"{REST[i % 5]} {REST[5 + i // 5 % 5]} {MOODS[i % 2]} {REST[i % 3]} {i % 7}" for i in range(24)]
# What each script is called with, besides --teacher and --output; {x} is a file or folder of the fixture `given`.
CALLS = {
    "own_loop.py": ("bert-classification", "--texts {texts} --steps 2 --batch_size 4 --relation_heads 4"),
    "classification_csv.py": ("bert-classification", "--train {names} --validation {names} --epochs 1"),
    "own_method.py": ("bert-classification", "--train {numbers} --epochs 1"),
    "causal_lm.py": ("gpt2-causal_lm", "--texts {texts} --steps 2"),
    "lora.py": ("gpt2-causal_lm", "--texts {texts} --student {teacher} --steps 2 --rank 2"),
    "smaller_vocabulary.py": ("bert-masked_lm", "--texts {texts} --steps 2 --size 0.9"),
    "trl_patch.py": ("gpt2-causal_lm", "--prompts {prompts} --student {teacher} --steps 1 --max_completion_length 4"),
}
NEEDS = {"lora.py": "peft", "trl_patch.py": "trl"}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Files of texts; teachers are made where they are asked for."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "texts.txt").write_text("\n".join(TEXTS))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    for name, labels in (("names", ("positive", "negative")), ("numbers", (0, 1))):
        with open(folder / f"{name}.csv", "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["text", "label"])
            rows.writerows([text, labels[i % 2]] for i, text in enumerate(TEXTS))
    return folder


def tokenizer(causal: bool):
    """Byte-level BPE for a decoder, WordPiece for an encoder."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    if causal:
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
        letters = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
        raw.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=320, special_tokens=special, **letters))
    else:
        raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        raw.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special))
        ends = [("[CLS]", 2), ("[SEP]", 3)]
        raw.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, **names, **({"eos_token": "[SEP]"} if causal else {})
    )


def teacher(folder, kind: str):
    target = folder / kind
    if not target.exists():
        family, task = kind.split("-")
        made = tokenizer(task == "causal_lm")
        model = tiny.model(family, task, vocab_size=len(made), pad_token_id=0)
        model.config.id2label, model.config.label2id = {0: "positive", 1: "negative"}, {"positive": 0, "negative": 1}
        model.save_pretrained(target)
        made.save_pretrained(target)
    return target


def run(monkeypatch, script, *options, cwd):
    """In this process, where transformers is imported already."""
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, options)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_script_runs(script, given, tmp_path, monkeypatch):
    if script.name in NEEDS and importlib.util.find_spec(NEEDS[script.name]) is None:
        pytest.skip(f"needs {NEEDS[script.name]}")
    kind, rest = CALLS[script.name]
    files = {file.stem: file for file in given.iterdir()} | {"teacher": teacher(given, kind)}
    options = "--teacher", files["teacher"], *rest.format_map(files).split(), "--output", tmp_path / "out"
    run(monkeypatch, script, *options, cwd=tmp_path)
    saved = [path for path in (tmp_path / "out").rglob("*.safetensors") if "checkpoint" not in path.parent.name]
    assert saved, "it saved no weights"


@pytest.mark.parametrize("script", NEEDS)
def test_a_missing_package_is_named(script, tmp_path, monkeypatch):
    """A package that is not a dependency: one sentence, not a traceback."""
    monkeypatch.setitem(sys.modules, NEEDS[script], None)
    with pytest.raises(SystemExit, match=f"examples/{script}: {NEEDS[script]} is not installed; pip install"):
        run(monkeypatch, ROOT / "examples" / script, cwd=tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_examples_are_short(script):
    assert len(script.read_text().splitlines()) <= 60
