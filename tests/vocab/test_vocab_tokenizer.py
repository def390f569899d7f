"""A shrunk tokenizer: the new ids of VocabMap.encode where all tokens are kept, kept pieces or stand-ins elsewhere, before
and after save and load."""

import gzip
import itertools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastkd
from cases import randn
from fastkd import VocabMap
from fastkd.vocab import METHODS
from fastkd.vocab.coverage import count_corpus
from fastkd.vocab.tokenizer import count_parts, may_be_lost

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
TEXTS = [
    "the small brown fox jumps over the lazy dog while the other dogs watch the foxes jumping",
    "a student learns from the teacher what the teacher has learned from many other students",
    "counting words is the first step and keeping the frequent words is the second step",
] * 3  # fmt: skip
RARE = "zebra quizzes vex"


def reviews():
    """Some of the packaged movie reviews."""
    with gzip.open(Path(fastkd.__file__).parent / "data" / "movie_reviews.tsv.gz", "rt", encoding="utf-8") as lines:
        return [line.rstrip("\n").split("\t")[-1] for line in itertools.islice(lines, 1, 1500)]


def trained(kind, texts=(*TEXTS, RARE), words=None):
    """A tokenizer of this kind over these texts, and its special tokens."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    models, trainers, pre = tokenizers.models, tokenizers.trainers, tokenizers.pre_tokenizers
    if kind == "WordPiece":
        own, trainer = (
            models.WordPiece(unk_token="[UNK]"),
            trainers.WordPieceTrainer(vocab_size=words or 400, special_tokens=special),
        )
        backend = tokenizers.Tokenizer(own)
        backend.pre_tokenizer, backend.decoder = pre.BertPreTokenizer(), tokenizers.decoders.WordPiece()
    elif kind == "BPE":
        backend = tokenizers.Tokenizer(models.BPE())
        alphabet = pre.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=words or 700, special_tokens=special, initial_alphabet=alphabet)
        backend.pre_tokenizer, backend.decoder = pre.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    else:
        backend = tokenizers.Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(vocab_size=words or 120, special_tokens=special, unk_token="[UNK]")
        backend.pre_tokenizer, backend.decoder = pre.Metaspace(), tokenizers.decoders.Metaspace()
    backend.train_from_iterator(list(texts), trainer)
    ends = [(word, backend.token_to_id(word)) for word in ("[CLS]", "[SEP]")]
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **names)


def compressed(kind, method="unk"):
    """(tokenizer, VocabMap that keeps the tokens of TEXTS, all single letters and special tokens)."""
    tokenizer = trained(kind)
    size = len(tokenizer)
    counts = torch.zeros(size, dtype=torch.int64)
    for text in TEXTS:
        for i in tokenizer(text)["input_ids"]:
            counts[i] += 1
    counts = count_parts(counts, tokenizer)
    letters = [i for word, i in tokenizer.get_vocab().items() if len(word.removeprefix("##")) == 1]
    keep = sorted({*letters, *tokenizer.all_special_ids})
    wanted = len(set(keep) | {i for i in range(size) if counts[i] > 0})
    assert wanted < size
    nearest = {"unk_id": tokenizer.unk_token_id} if method == "unk" else {"embeddings": randn(size, 8, seed=3)}
    return tokenizer, VocabMap.from_counts(counts, wanted, multiple_of=1, always_keep=keep, method=method, **nearest)


every_kind = pytest.mark.parametrize("kind", ["WordPiece", "BPE", "Unigram"])


@every_kind
def test_kept_tokens_get_their_new_ids_after_save_and_load(kind, tmp_path):
    tokenizer, vocab = compressed(kind)
    small = vocab.shrink_tokenizer(tokenizer)
    small.save_pretrained(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    for new in (small, loaded, transformers.AutoTokenizer.from_pretrained(tmp_path / "again")):
        assert len(new) == len(vocab)
        for text in TEXTS:
            old = tokenizer(text)["input_ids"]
            assert new(text)["input_ids"] == vocab.encode(old)
            assert new.decode(new(text)["input_ids"]) == tokenizer.decode(old)
        for name in ("pad_token_id", "unk_token_id", "cls_token_id", "sep_token_id"):
            assert getattr(new, name) == vocab.encode(getattr(tokenizer, name))
        assert new.model_max_length == 64 and new([*TEXTS[:2]], padding=True)["input_ids"][0][-1] < len(vocab)


@every_kind
def test_dropped_tokens_are_spelled_with_kept_ones(kind):
    tokenizer, vocab = compressed(kind)
    small = vocab.shrink_tokenizer(tokenizer)
    old, new = (x(RARE, add_special_tokens=False)["input_ids"] for x in (tokenizer, small))
    assert not all(vocab.kept[old]) and max(new) < len(vocab)
    assert small.decode(new) == tokenizer.decode(old)


@every_kind
@pytest.mark.parametrize("size", [0.5, 0.25, 0.1])
def test_nothing_of_the_counted_text_is_lost(kind, size):
    """Each character has a piece of its own among the kept ones, and the reviews come back as they were."""
    texts = reviews()
    tokenizer = trained(kind, texts, 3000)
    counts = count_corpus(texts, tokenizer)
    special = tokenizer.all_special_ids
    vocab = VocabMap.from_counts(count_parts(counts, tokenizer), size, multiple_of=1, always_keep=special)
    small = vocab.shrink_tokenizer(tokenizer)
    assert may_be_lost(vocab, counts, tokenizer) == 0
    old, new = (x(texts, add_special_tokens=False)["input_ids"] for x in (tokenizer, small))
    assert not any(small.unk_token_id in ids for ids in new)
    assert small.batch_decode(new) == tokenizer.batch_decode(old)


def test_what_is_lost_is_counted():
    texts = reviews()
    tokenizer = trained("WordPiece", texts, 3000)
    counts = count_corpus(texts, tokenizer)
    vocab = VocabMap.from_counts(counts, 0.1, multiple_of=1, always_keep=tokenizer.all_special_ids)
    ids = vocab.shrink_tokenizer(tokenizer)(texts, add_special_tokens=False)["input_ids"]
    lost = sum(row.count(vocab.encode(tokenizer.unk_token_id)) for row in ids)
    assert 0 < lost <= may_be_lost(vocab, counts, tokenizer) < counts.sum()


# Loads what stands in folders, without fastkd, saves it, loads that, and says what all of them make of some texts.
ELSEWHERE = """
import json, sys
from transformers import AutoTokenizer
folders, texts = json.loads(sys.argv[1]), json.loads(sys.argv[2])
for folder in folders:
    first = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    first.save_pretrained(folder + "/again")
    second = AutoTokenizer.from_pretrained(folder + "/again", trust_remote_code=True)
    print(json.dumps([[x(texts)["input_ids"], x.batch_decode(x(texts)["input_ids"]), len(x)] for x in (first, second)]))
assert "fastkd" not in sys.modules
"""


@pytest.fixture(scope="module")
def stand_in_folders(tmp_path_factory):
    """Of each kind and method: (tokenizer, VocabMap, folder)."""
    made = {}
    for kind in ("WordPiece", "BPE", "Unigram"):
        for method in METHODS:
            tokenizer, vocab = compressed(kind, method)
            folder = tmp_path_factory.mktemp(f"{kind}_{method}")
            vocab.shrink_tokenizer(tokenizer, dropped="stand_in").save_pretrained(folder)
            made[kind, method] = tokenizer, vocab, folder
    return made


@every_kind
@pytest.mark.parametrize("method", METHODS)
def test_stand_ins_are_what_encode_makes_of_the_old_ids(kind, method, stand_in_folders):
    tokenizer, vocab, folder = stand_in_folders[kind, method]
    texts = [*TEXTS[:3], RARE]
    wanted = [vocab.encode(tokenizer(text)["input_ids"]) for text in texts]
    assert not all(vocab.kept[tokenizer(RARE)["input_ids"]])
    new = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    for x in (vocab.shrink_tokenizer(tokenizer, dropped="stand_in"), new, pickle.loads(pickle.dumps(new))):
        assert [x(text)["input_ids"] for text in texts] == x(texts)["input_ids"] == wanted
        kept = [tokenizer.decode(vocab.kept_ids[ids].tolist()) for ids in wanted]
        assert [x.decode(ids) for ids in wanted] == kept  # a stand-in is decoded as itself
        for word, old in tokenizer.get_vocab().items():
            assert x.convert_tokens_to_ids(word) == vocab.encode(old)
    # Without our class: kept pieces instead, never an id that is none.
    plain = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert plain(texts)["input_ids"] == vocab.shrink_tokenizer(tokenizer)(texts)["input_ids"] != wanted


def test_stand_ins_are_loaded_without_us(stand_in_folders, tmp_path):
    made = [stand_in_folders[kind, "cosine"] for kind in ("WordPiece", "BPE", "Unigram")]
    texts = [*TEXTS[:3], RARE]
    env = {**os.environ, "PYTHONPATH": "", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", ELSEWHERE, json.dumps([str(x[2]) for x in made]), json.dumps(texts)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    for (tokenizer, vocab, _), line in zip(made, done.stdout.splitlines()[-3:], strict=True):
        wanted = [vocab.encode(tokenizer(text)["input_ids"]) for text in texts]
        decoded = [tokenizer.decode(vocab.kept_ids[ids].tolist()) for ids in wanted]
        assert json.loads(line) == [[wanted, decoded, len(vocab)]] * 2


def test_stand_ins_with_every_option_of_a_call():
    tokenizer, vocab = compressed("BPE", "decoder")
    new = vocab.shrink_tokenizer(tokenizer, dropped="stand_in")
    for side in ("right", "left"):
        tokenizer.padding_side = tokenizer.truncation_side = new.padding_side = new.truncation_side = side
        for text in (RARE, [RARE, TEXTS[0]], "", [RARE]):
            for options in ({"padding": True}, {"padding": "max_length", "max_length": 9, "truncation": True},
                            {"truncation": True, "max_length": 7, "stride": 2, "return_overflowing_tokens": True},
                            {"return_offsets_mapping": True, "return_special_tokens_mask": True},
                            {"add_special_tokens": False}, {"text_pair": text}):  # fmt: skip
                old, found = tokenizer(text, **options), new(text, **options)
                assert found.keys() == old.keys()
                ids = old["input_ids"]
                many = bool(ids) and isinstance(ids[0], list)
                wanted = [vocab.encode(row) for row in ids] if many else vocab.encode(ids)
                assert dict(found) == {**old, "input_ids": wanted}
                assert found.word_ids(0) == old.word_ids(0)
            old, found = (x(text, padding=True, return_tensors="pt") for x in (tokenizer, new))
            assert torch.equal(found["input_ids"], vocab.encode(old["input_ids"].long()))
            assert torch.equal(found["attention_mask"], old["attention_mask"])
    words = [["the", RARE], ["dog"]]
    ids = [vocab.encode(row) for row in tokenizer(words, is_split_into_words=True)["input_ids"]]
    assert new(words, is_split_into_words=True)["input_ids"] == ids
    padded = new.pad({"input_ids": [ids[0], ids[0][:2]]})["input_ids"]
    assert vocab.encode(tokenizer.pad_token_id) in padded[1]
    with pytest.raises(ValueError, match="before"):
        new.add_tokens(["something new"])


def test_mistakes():
    tokenizer, _ = compressed("BPE")
    words = tokenizer.get_vocab()
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    part = next(left for left, _ in merges if len(left) > 2)
    with pytest.raises(ValueError, match="always_keep"):
        VocabMap([i for i in range(len(words)) if i != tokenizer.cls_token_id], len(words)).shrink_tokenizer(tokenizer)
    with pytest.raises(ValueError, match="count_parts"):
        VocabMap([i for word, i in words.items() if word != part], len(words)).shrink_tokenizer(tokenizer)
    with pytest.raises(ValueError, match="dropped"):
        VocabMap(range(len(words)), len(words)).shrink_tokenizer(tokenizer, dropped="lost")
    kept = compressed("WordPiece")[1].kept_ids
    with pytest.raises(ValueError, match="replacement"):
        VocabMap(kept, 400).shrink_tokenizer(trained("WordPiece"), dropped="stand_in")
    with pytest.raises(ValueError, match="fast tokenizer"):
        VocabMap([0], 1).shrink_tokenizer(object())
