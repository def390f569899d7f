"""A shrunk tokenizer: the new ids of VocabMap.encode where all words are kept, kept pieces elsewhere, through save and load."""

import json

import pytest
import torch

from fastkd import VocabMap
from fastkd.vocab_tokenizer import count_parts

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
TEXTS = [
    "the small brown fox jumps over the lazy dog while the other dogs watch the foxes jumping",
    "a student learns from the teacher what the teacher has learned from many other students",
    "counting words is the first step and keeping the frequent words is the second step",
] * 3  # fmt: skip
RARE = "zebra quizzes vex"


def trained(kind):
    """A tokenizer of this kind over TEXTS and RARE, and its special words."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    models, trainers, pre = tokenizers.models, tokenizers.trainers, tokenizers.pre_tokenizers
    if kind == "WordPiece":
        own, trainer = (
            models.WordPiece(unk_token="[UNK]"),
            trainers.WordPieceTrainer(vocab_size=400, special_tokens=special),
        )
        backend = tokenizers.Tokenizer(own)
        backend.pre_tokenizer, backend.decoder = pre.BertPreTokenizer(), tokenizers.decoders.WordPiece()
    elif kind == "BPE":
        backend = tokenizers.Tokenizer(models.BPE())
        alphabet = pre.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, initial_alphabet=alphabet)
        backend.pre_tokenizer, backend.decoder = pre.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    else:
        backend = tokenizers.Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="[UNK]")
        backend.pre_tokenizer, backend.decoder = pre.Metaspace(), tokenizers.decoders.Metaspace()
    backend.train_from_iterator([*TEXTS, RARE], trainer)
    ends = [(word, backend.token_to_id(word)) for word in ("[CLS]", "[SEP]")]
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **names)


def compressed(kind):
    """(tokenizer, VocabMap that keeps the words of TEXTS, all single letters and special words)."""
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
    return tokenizer, VocabMap.from_counts(
        counts, wanted, multiple_of=1, always_keep=keep, unk_id=tokenizer.unk_token_id
    )


every_kind = pytest.mark.parametrize("kind", ["WordPiece", "BPE", "Unigram"])


@every_kind
def test_kept_words_get_their_new_ids_through_save_and_load(kind, tmp_path):
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
def test_dropped_words_are_spelled_with_kept_ones(kind):
    tokenizer, vocab = compressed(kind)
    small = vocab.shrink_tokenizer(tokenizer)
    old, new = (x(RARE, add_special_tokens=False)["input_ids"] for x in (tokenizer, small))
    assert not all(vocab.kept[old]) and max(new) < len(vocab)
    assert small.decode(new) == tokenizer.decode(old)


def test_mistakes():
    tokenizer, _ = compressed("BPE")
    words = tokenizer.get_vocab()
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    part = next(left for left, _ in merges if len(left) > 2)
    with pytest.raises(ValueError, match="always_keep"):
        VocabMap([i for i in range(len(words)) if i != tokenizer.cls_token_id], len(words)).shrink_tokenizer(tokenizer)
    with pytest.raises(ValueError, match="count_parts"):
        VocabMap([i for word, i in words.items() if word != part], len(words)).shrink_tokenizer(tokenizer)
    with pytest.raises(ValueError, match="fast tokenizer"):
        VocabMap([0], 1).shrink_tokenizer(object())
