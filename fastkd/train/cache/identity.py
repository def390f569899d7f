"""Hashes of what a cache is made from: a teacher, a tokenizer, the data."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

READ = (
    "input_ids",
    "token_type_ids",
    "attention_mask",
    "position_ids",
    "example_id",
)  # what the teacher's rows depend on
_CHUNK = 1 << 22


def hash_of_tensors(tensors: dict[str, torch.Tensor], beginning: str = "") -> str:
    """Of every tensor: its name, dtype, shape and bytes."""
    digest = hashlib.blake2b(beginning.encode(), digest_size=16)
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def hash_of_model(model) -> str:
    return hash_of_tensors(getattr(model, "_orig_mod", model).state_dict())  # as it was before torch.compile


def hash_of_files(name: str, revision: str | None = None) -> str | None:
    """Of the weights of a checkpoint, a folder or a hub id, without loading them; None where they are not on this machine."""
    from transformers.utils import cached_file

    folder = Path(name)
    if not folder.is_dir():
        found = cached_file(name, "config.json", revision=revision, _raise_exceptions_for_missing_entries=False)
        if found is None:
            return None
        folder = Path(found).parent
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest() if files else None


def hash_of_tokenizer(tokenizer) -> str | None:
    """Of its tokens and their ids; None where there is no tokenizer."""
    if not hasattr(tokenizer, "get_vocab"):
        return None
    return _hash_of_text(json.dumps(sorted(tokenizer.get_vocab().items())))


def hash_of_data(data) -> str:
    """Of what the teacher reads: the tokens of every example, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for name in [name for name in READ if name in data.column_names]:
        digest.update(name.encode())
        for row in data[name]:
            numbers = np.atleast_1d(np.asarray(row, np.int64))
            digest.update(len(numbers).to_bytes(8, "little") + numbers.tobytes())
    return digest.hexdigest()


def hash_of_ids(ids: torch.Tensor | None) -> str | None:
    return None if ids is None else _hash_of_text(str(ids.tolist()))


def hash_of_index(index: dict) -> str:
    return _hash_of_text(json.dumps(index, sort_keys=True))


def _hash_of_text(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
