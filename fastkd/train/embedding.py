"""Sentence embeddings: how the states of the tokens become one vector, how far two models' vectors are from each other, and
the files by which sentence-transformers finds the same vector."""

import json
from pathlib import Path

import torch
from torch import Tensor

from fastkd import functional, reductions
from fastkd.losses.embedding import EmbeddingLoss

POOLINGS = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken"}  # as sentence-transformers calls them


def pool(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """[B, D] of token states [B, S, D]: the "mean" of the real tokens, the first one ("cls"), or the "last" one."""
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    if pooling == "mean":
        return reductions.masked_mean(hidden, mask, 1)
    return reductions.end_token(hidden, mask, "first" if pooling == "cls" else "last")


def distance(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - the cosine of the embeddings [B, D] of both models; where their widths differ, 1 - the correlation of the
    similarities that each finds within the batch."""
    if student.shape[-1] == teacher.shape[-1]:
        return EmbeddingLoss()(student, teacher)
    return functional.gram_correlation_loss(student[None], teacher[None])


def read_pooling(read, asked: str | None = None) -> tuple[str, bool]:
    """How a model's states are pooled, as `asked`, else as its sentence-transformers files say, else "mean"; and whether these
    normalise the result. read: the path of a file of the model by its name, or None."""
    found = read("1_Pooling/config.json")
    if found is None:
        return asked or "mean", False
    config = json.loads(Path(found).read_text())
    chosen = [name for name, theirs in POOLINGS.items() if config.get(f"pooling_mode_{theirs}")]
    named = config.get("pooling_mode")  # since version 5.2 one name, before that a flag for each
    chosen = chosen or [name for name, theirs in POOLINGS.items() if named in (name, theirs)]
    if asked is None and len(chosen) != 1:
        raise ValueError(
            f"pooling: the teacher's, {config}, is none of {', '.join(POOLINGS)}; choose one of them with --pooling"
        )
    modules = read("modules.json")
    return asked or chosen[0], modules is not None and "Normalize" in Path(modules).read_text()


def write_pooling(folder, pooling: str, normalises: bool, width: int, length: int) -> None:
    """Beside a saved model, so that SentenceTransformer(folder) gives its embeddings."""
    names = ["Transformer", "Pooling", *(["Normalize"] if normalises else [])]
    paths = ["", *(f"{i}_{name}" for i, name in enumerate(names) if i)]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (name, path) in enumerate(zip(names, paths, strict=True))
    ]
    config = {"word_embedding_dimension": width}
    config |= {f"pooling_mode_{theirs}": name == pooling for name, theirs in POOLINGS.items()}
    files = {
        "modules.json": modules, "1_Pooling/config.json": config, "sentence_bert_config.json": {"max_seq_length": length},
    }  # fmt: skip
    for path in paths[1:]:
        (Path(folder) / path).mkdir(exist_ok=True)
    for name, content in files.items():
        (Path(folder) / name).write_text(json.dumps(content, indent=1))
