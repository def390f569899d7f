"""A cache of another teacher, tokenizer, data, task or form, a damaged one, and what cannot be kept: each refused by name."""

import pytest
import torch
from safetensors.torch import load_file

import tiny

pytest.importorskip("transformers")
from test_methods import pair
from test_teacher_cache import build

from fastkd.train import cache
from fastkd.train.cache import shards
from fastkd.train.cache.shards import INDEX, shard_name


def rewrite(path, key, **changed):
    """A shard with other contents and a hash that fits them."""
    shards.write(path, {**load_file(path), **changed}, key)


def flip_a_bit(path, key):
    found = bytearray(path.read_bytes())
    found[-5] ^= 8
    path.write_bytes(found)


def another_teacher():
    other, _ = pair("gpt2", "causal_lm")
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    return other


class Tokenizer:
    def __init__(self, *tokens):
        self.tokens = tokens

    def get_vocab(self):
        return {token: i for i, token in enumerate(self.tokens)}


WRONG_RUNS = {
    "teacher": ({"teacher": another_teacher}, "it was made with another teacher"),
    "tokenizer": ({"processing_class": lambda: Tokenizer("b", "a")}, "it was made with another tokenizer"),
    "data": ({"data": lambda: tiny.dataset("causal_lm", rows=12, seed=1)}, r"another data \(the tokens"),
    "more data": ({"data": lambda: tiny.dataset("causal_lm", rows=13)}, r"another data \(the tokens"),
    "k": ({"top_k": 5}, "its top_k is 7, this run's 5"),
    "samples": ({"samples": 5}, "its samples is None, this run's 5 .it keeps 7 most likely tokens"),
    "dtype": ({"dtype": "bfloat16"}, "its cache_dtype is float32, this run's bfloat16"),
    "temperature": ({"method": "forward_kl:temperature=3"}, "its temperature is 1, this method's 3"),
    "method": ({"method": "fcd:share=1"}, "it keeps no level 4, which this method reads"),
}


@pytest.mark.parametrize("what", WRONG_RUNS)
def test_a_cache_of_another_run_is_refused_by_name(what, tmp_path):
    changes, message = WRONG_RUNS[what]
    tokenizer = Tokenizer("a", "b")
    refused = {"method": "forward_kl", "processing_class": tokenizer}
    kept = cache.Options(tmp_path / "cache", top_k=7, examples_per_shard=5)
    made = build(tmp_path, kept, **refused)
    before = {path.name: path.read_bytes() for path in kept.folder.iterdir()}
    asked = {name: changes[name] for name in ("top_k", "samples", "dtype") if name in changes}
    others = {name: x() if callable(x) else x for name, x in changes.items() if name not in asked}
    with pytest.raises(ValueError, match=f"teacher_cache: .* is of another run: .*{message}"):
        build(tmp_path, cache.Options(kept.folder, **asked), **{**refused, **others})
    assert {path.name: path.read_bytes() for path in kept.folder.iterdir()} == before
    assert made.cache.missing() == []


def test_a_cache_of_another_task_is_refused(tmp_path):
    build(tmp_path, tmp_path / "cache")
    data = tiny.dataset("classification", rows=12)
    with pytest.raises(ValueError, match="its task is causal_lm, this run's classification"):
        build(tmp_path, tmp_path / "cache", "kd", task="classification", data=data)


DAMAGE = {
    "missing": (lambda path, key: path.unlink(), r"shard-00001.safetensors is missing"),
    "a flipped bit": (flip_a_bit, "is damaged, its hash differs"),
    "cut short": (lambda path, key: path.write_bytes(path.read_bytes()[:-9]), "is damaged"),
    "no shard at all": (lambda path, key: path.write_bytes(b"nothing of the kind"), "is damaged"),
    "of another place": (
        lambda path, key: path.write_bytes(path.with_name(shard_name(0)).read_bytes()),
        "to another place",
    ),
    "of another cache": (lambda path, key: rewrite(path, "another"), "belongs to another cache"),
    "ids out of range": (
        lambda path, key: rewrite(path, key, indices=load_file(path)["indices"].int().add(60).to(torch.uint16)),
        "values in 'indices' that no",
    ),
    "a probability above 1": (
        lambda path, key: rewrite(path, key, log_probs=load_file(path)["log_probs"].neg()),
        "values in 'log_probs' that no",
    ),
    "not a number": (
        lambda path, key: rewrite(path, key, tail=load_file(path)["tail"] * torch.nan),
        "values in 'tail' that no",
    ),
    "other lengths": (
        lambda path, key: rewrite(path, key, lengths=load_file(path)["lengths"] + 1),
        "not one row for each of its tokens",
    ),
    "another dtype": (
        lambda path, key: rewrite(path, key, tail=load_file(path)["tail"].double()),
        "does not hold what the index says",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_refused_before_training(damage, tmp_path):
    spoil, message = DAMAGE[damage]
    kept = cache.Options(tmp_path / "cache", top_k=7, examples_per_shard=5)
    made = build(tmp_path, kept)
    spoil(kept.folder / shard_name(1), made.cache.key)
    with pytest.raises(ValueError, match=f"teacher_cache: .*{message}"):
        build(tmp_path, kept, teacher=None)


REFUSED = [
    ({"from_logprobs": "said.jsonl", "samples": 3}, {}, "samples: are drawn while a teacher runs"),
    (
        {"top_k": 5, "samples": 3},
        {"method": "jsd"},
        "samples: are an unbiased estimate for forward_kl and soft_ce alone",
    ),
    ({"top_k": 0}, {}, "top_k: expected a number of at least 1, got 0"),
    ({"dtype": "float64"}, {}, "cache_dtype: expected one of float32, bfloat16, int8, got 'float64'"),
    (
        {"dtype": "int8", "top_k": 5},
        {},
        "cache_dtype: int8 is for states and logits, got int8 for the predictions of few",
    ),
    ({"samples": 12}, {"method": "reverse_kl"}, "samples: are an unbiased estimate for forward_kl and soft_ce alone"),
    ({"top_k": 5}, {"method": "forward_kl + kd"}, "top_k: is kept at one temperature, and the method has 1, 2"),
    ({"top_k": 5}, {"method": "glmd:top_n=3"}, "top_k: glmd with top_n or mse reads all logits"),
    ({"top_k": 5}, {"method": "fcd:share=1"}, "this method reads no predictions of the teacher"),
    ({"top_k": 5}, {"method": "kd", "task": "classification"}, "are for a vocabulary, and classification keeps all"),
    ({}, {"method": "tinybert"}, "tinybert compares attention at padding, too, which is not kept"),
    ({}, {"without": "example_id"}, "train_dataset has no column 'example_id'; add one"),
    ({}, {"twice": True}, "two examples of train_dataset have one example_id"),
    ({}, {"teacher": None}, "there is no cache in .*; name its folder, or give the teacher"),
]


@pytest.mark.parametrize(("options", "changes", "message"), REFUSED)
def test_what_cannot_be_kept_is_refused(options, changes, message, tmp_path):
    changes = dict(changes)
    data = tiny.dataset(changes.get("task", "causal_lm"), rows=12)
    if changes.pop("without", None):
        data = data.remove_columns("example_id")
    if changes.pop("twice", None):
        data = data.remove_columns("example_id").add_column("example_id", [0] * 12)
    with pytest.raises(ValueError, match=message):
        build(tmp_path, cache.Options(tmp_path / "cache", **options), data=data, **changes)
    assert not (tmp_path / "cache" / INDEX).exists()


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"teacher_cache: .* holds letter\.txt, and nothing is written over"):
        build(tmp_path, tmp_path / "mine")
    (tmp_path / "mine" / INDEX).write_text("{}")
    with pytest.raises(ValueError, match="is not the index of a cache"):
        build(tmp_path, tmp_path / "mine")


def test_tokens_that_are_hidden_anew_each_time_are_refused(tmp_path):
    calls = []

    def hiding(examples):
        calls.append(1)
        batch = {name: torch.tensor([x[name] for x in examples]) for name in examples[0]}
        return batch | {"input_ids": batch["input_ids"].roll(len(calls), 1)}

    with pytest.raises(ValueError, match="the data collator changes the tokens at each call"):
        build(tmp_path, tmp_path / "cache", data_collator=hiding)


def test_a_collator_that_cuts_later_is_refused(tmp_path):
    build(tmp_path, tmp_path / "cache")

    def cutting(examples):
        return {name: torch.tensor([x[name] for x in examples])[..., :4] for name in examples[0]}

    with pytest.raises(ValueError, match=r"example \d+ has \d+ tokens in the cache and 4 in the batch"):
        build(tmp_path, tmp_path / "cache", teacher=None, data_collator=cutting).train()


def test_a_teacher_that_says_nan_is_refused(tmp_path):
    teacher, _ = pair("gpt2", "causal_lm")
    with torch.no_grad():
        teacher.transformer.ln_f.bias[3] = torch.nan
    with pytest.raises(ValueError, match=r"teacher: what it says of one of the examples 0 is not finite \(hidden.4\)"):
        build(tmp_path, tmp_path / "cache", "fcd:share=1", teacher=teacher)
