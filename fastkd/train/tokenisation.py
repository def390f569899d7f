"""From clean rows to tokens: what is cut is counted, the collators of each task, and what a run says of its data."""

import hashlib
from collections import Counter

import numpy as np
import torch
from torch import nn
from transformers import DataCollatorForLanguageModeling, DataCollatorForTokenClassification, DataCollatorWithPadding

from . import packing
from .data import Corpus


def check_length(model, tokenizer, length: int) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return
    for module in model.modules():  # positions may start after the padding's
        if isinstance(module, nn.Embedding) and module.num_embeddings == limit and module.padding_idx is not None:
            limit -= module.padding_idx + 1
            break
    if length > limit:
        raise ValueError(
            f"max_length: {length} tokens are asked for, but the {type(model).__name__} has {limit} positions"
        )


def tokenise(rows, corpus: Corpus, tokenizer, task: str, length: int, template: str | None = None, pack: bool = False):
    """Columns input_ids, attention_mask, (token_type_ids,) example_id, and labels where a row has one; and how many tokens
    each text has before it is cut. pack: see packing.pack."""
    labelled = corpus.label in rows.column_names
    how = {"verbose": False, "is_split_into_words": task == "token_classification"}

    def encode(batch, numbers):
        texts = batch[corpus.text]
        if task == "cloze":
            texts = [template.format(text=text, mask=tokenizer.mask_token) for text in texts]
        columns = [texts, batch[corpus.pair]] if corpus.pair else [texts]
        if task == "embedding":  # each text has an embedding of its own; the texts of a pair follow one another
            numbers = [len(columns) * i + side for i in numbers for side in range(len(columns))]
            columns = [[text for row in zip(*columns, strict=True) for text in row]]
        made = tokenizer(*columns, truncation=not pack, max_length=None if pack else length, **how)
        encoded = dict(made)
        if pack:
            return {"input_ids": [packing.ended(ids, tokenizer.eos_token_id) for ids in encoded["input_ids"]]}
        encoded["whole"] = [len(ids) for ids in encoded["input_ids"]]
        full = [i for i, tokens in enumerate(encoded["whole"]) if tokens == length]  # perhaps these were cut
        if full:
            uncut = tokenizer(*([column[i] for i in full] for column in columns), truncation=False, **how)
            for i, ids in zip(full, uncut["input_ids"], strict=True):
                encoded["whole"][i] = len(ids)
        encoded["example_id"] = numbers
        if task == "cloze":
            encoded["blank"] = [_blank(ids, tokenizer.mask_token_id) for ids in encoded["input_ids"]]
        if labelled:
            labels = batch[corpus.label]
            if task == "token_classification":
                labels = [_on_first_pieces(made.word_ids(i), row) for i, row in enumerate(labels)]
            elif task == "multi_label":
                labels = [[int(i in row) for i in range(len(corpus.names))] for row in labels]
            elif task in ("regression", "embedding"):
                labels = [float(x) for x in labels for _ in range(len(numbers) // len(labels))]
            encoded["labels"] = labels
        return encoded

    rows = rows.map(encode, batched=True, with_indices=True, remove_columns=rows.column_names)
    if pack:
        return packing.pack(rows, length), [len(ids) for ids in rows["input_ids"]]
    return rows.remove_columns("whole"), rows["whole"][:]


def _on_first_pieces(words: list[int | None], labels: list[int]) -> list[int]:
    """The label of each word on the first of its tokens, -100 on all others. words: which word each token belongs to."""
    return [
        -100 if word is None or word == before else labels[word]
        for before, word in zip([None, *words], words, strict=False)
    ]


def _blank(ids: list[int], mask_id: int) -> int:
    if mask_id not in ids:
        raise ValueError(
            "template: its {mask} fell to truncation for a long text; put it before {text}, or raise --max-length"
        )
    return ids.index(mask_id)


def hide_tokens(rows, tokenizer, mlm_probability: float = 0.15):
    """The tokens that masked_lm hides, chosen once: input_ids with them hidden, and labels."""
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=mlm_probability, seed=42)

    def hide(ids):
        batch = collate([{"input_ids": ids}])
        return {name: batch[name][0].tolist() for name in ("input_ids", "labels")}

    return rows.map(hide, input_columns="input_ids", load_from_cache_file=False)


class Masking(DataCollatorForLanguageModeling):
    """transformers' own, whose masks depend on the seed and the batch's tokens alone: a resumed run masks as the undisturbed
    one, and teacher and student are evaluated on the same masks."""

    def __init__(self, tokenizer, mlm_probability: float, seed: int):
        super().__init__(tokenizer, mlm_probability=mlm_probability)
        self.mask_seed = seed

    def torch_call(self, examples):
        rows = repr([self.mask_seed, *(list(example["input_ids"]) for example in examples)])
        digest = hashlib.blake2b(rows.encode(), digest_size=8).digest()
        self.generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        return super().torch_call(examples)


def collator(
    tokenizer, task: str, mlm_probability: float = 0.15, pack: bool = False, seed: int = 0, once: bool = False
):
    """seed: of the masks of masked_lm. once: the tokens that it hides are hidden in the data (hide_tokens)."""
    if pack:
        return packing.Collator(tokenizer.pad_token_id)
    if task == "masked_lm" and once:
        return DataCollatorForTokenClassification(tokenizer)
    if task == "masked_lm":
        return Masking(tokenizer, mlm_probability, seed)
    if task == "causal_lm":
        return DataCollatorForLanguageModeling(tokenizer, mlm=False)
    if task == "token_classification":
        return DataCollatorForTokenClassification(tokenizer)
    return DataCollatorWithPadding(tokenizer)


def _counts(labels: list, task: str) -> Counter:
    """How often each class is a label of the training set."""
    if task == "multi_label":
        return Counter(dict(enumerate(np.sum(labels, 0).tolist())))
    return Counter(np.hstack(labels).tolist())


def summary(corpus: Corpus, tokens: dict, whole: dict[str, list[int]], length: int, task: str) -> list[str]:
    """What a run is about to train on, in a few lines. tokens, whole: what `tokenise` returned, by split."""
    sizes = [f"{len(whole[split]):,} {split}" for split in whole]
    held = ", held out of the training set (--eval_strategy no keeps them in it)" if corpus.held_out else ""
    lines = [f"rows: {' and '.join(sizes)}{held}"]
    dropped = sum(corpus.dropped.values())
    if dropped:
        lines.append(f"dropped: {dropped:,} rows without text")
    if corpus.names and "labels" in tokens["train"].column_names:
        counts = _counts(tokens["train"]["labels"][:], task)
        lines.append("classes: " + ", ".join(f"{name} {counts[i]:,}" for i, name in enumerate(corpus.names)))
    if corpus.label is None and corpus.names is None and "validation" not in tokens:
        lines.append("labels: none, so there is no evaluation")
    every = np.concatenate(list(whole.values()))
    median, most = np.percentile(every, [50, 95])
    lines.append(f"tokens of a text: median {median:.0f}, 95 % have at most {most:.0f}, the longest {every.max():,}")
    if "position_ids" in tokens["train"].column_names:
        lines.append(f"packed: {len(tokens['train']):,} training rows of {length} tokens, nothing is cut")
    elif (every > length).any():
        lost = np.maximum(every - length, 0).sum()
        lines.append(
            f"cut: {(every > length).sum():,} of {len(every):,} texts to --max_length {length}; {lost:,} of {every.sum():,} "
            f"tokens ({lost / every.sum():.1%}) are lost"
        )
    return lines
