"""Several documents in a row, for causal language models: hardly any padding, and no token is cut away.

A row's `position_ids` start at 0 again with each document, also with the part of one that the row before had no room for.
From them transformers makes a causal mask that is block-diagonal, each token seeing its own document only, provided that the
model gets no attention_mask and keeps no cache. A document's first token is predicted from nothing, so it has no label.
"""

from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def is_packed(task: str, columns) -> bool:
    return task == "causal_lm" and "position_ids" in columns


def ended(ids: list[int], end: int | None) -> list[int]:
    """A document with the end-of-sequence token after it, where the tokenizer has one and did not put it there."""
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def pack(documents, length: int):
    """Rows of `length` tokens, the last one shorter: input_ids, position_ids, example_id."""
    from datasets import Dataset

    ids = documents["input_ids"][:]
    stream = np.fromiter(chain.from_iterable(ids), np.int64)
    in_document = np.concatenate([np.arange(len(x)) for x in ids])
    positions = np.minimum(in_document, np.arange(len(stream)) % length)
    starts = range(0, len(stream), length)
    columns = {"input_ids": stream, "position_ids": positions}
    rows = {name: [x[start : start + length] for start in starts] for name, x in columns.items()}
    return Dataset.from_dict({**rows, "example_id": range(len(starts))})


@dataclass
class Collator:
    """Pads packed rows. attention_mask says which tokens are real, for the loss; the models do not get it."""

    pad_id: int

    def __call__(self, examples: list[dict]) -> dict[str, Tensor]:
        ids, positions = ([torch.tensor(x[name]) for x in examples] for name in ("input_ids", "position_ids"))
        mask = pad_sequence([torch.ones_like(x) for x in ids], batch_first=True)
        ids = pad_sequence(ids, batch_first=True, padding_value=self.pad_id)
        positions = pad_sequence(positions, batch_first=True)  # each token of padding is a document of its own
        labels = ids.masked_fill(positions == 0, -100)
        batch = {"input_ids": ids, "position_ids": positions, "attention_mask": mask, "labels": labels}
        return batch | {"example_id": torch.tensor([x["example_id"] for x in examples])}


def model_inputs(inputs: dict[str, Tensor]) -> dict:
    """What a model is given of a packed batch."""
    return {name: x for name, x in inputs.items() if name != "attention_mask"} | {"use_cache": False}


@torch.no_grad()
def check_model(model, accepts: set[str]) -> None:
    """Raise where a model's logits of a document depend on the document before it, by more than rounding."""
    training, device = model.training, next(model.parameters()).device
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]], device=device)
    said = []
    model.eval()
    try:
        for first in (1, 2):
            ids = torch.where(torch.arange(7, device=device) < 4, first, 3)[None]
            inputs = model_inputs({"input_ids": ids, "position_ids": positions})
            said.append(model(**{name: x for name, x in inputs.items() if name in accepts}).logits[:, 4:])
    finally:
        model.train(training)
    allowed = 8 * torch.finfo(said[0].dtype).eps * said[0].abs().max()
    if not bool(((said[0] - said[1]).abs() <= allowed).all()):
        raise ValueError(
            f"pack: a {type(model).__name__} cannot distinguish the documents of a row by position_ids: its logits of one "
            "depend on the one before; leave --pack out"
        )
