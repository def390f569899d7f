"""Cases at the shapes of real models, by name; `fastkd bench --shape bert-base,bert-large@16x512`.

A model stands for a teacher of that shape and a student of half its layers and half its width, with as many tokens as
`batch` × `length`, which `@16x512` changes.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator

import torch
from fastkd.bench.cases import STEMS
from fastkd.bench.cases.case import DTYPES, Case

from fastkd import checks


@dataclasses.dataclass(frozen=True)
class Shape:
    """A teacher and its student, and how many tokens a batch has."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    batch: int = 8
    length: int = 128


SHAPES = {
    "bert-base": Shape(12, 768, 12, 30522),
    "bert-large": Shape(24, 1024, 16, 30522),
    "roberta-large": Shape(24, 1024, 16, 50265),
    "gpt2": Shape(12, 768, 12, 50257, batch=4, length=256),
    "llama-1b": Shape(16, 2048, 32, 128256, batch=2, length=512),
    "llama-8b": Shape(32, 4096, 32, 128256, batch=1, length=1024),
    "qwen-vocab": Shape(28, 3584, 28, 151936, batch=1, length=1024),
}


def cases_of(label: str, shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    """Every hot path, as one step of distilling such a model asks for it."""
    layers, width = shape.layers // 2, shape.width // 2
    batch, length, d = shape.batch, shape.length, shape.width // shape.heads
    tokens = batch * length
    for stem, kind, *sizes in (
        ("divergence", "forward_kl", tokens, shape.vocabulary),
        ("linear_divergence", "forward_kl", tokens, shape.vocabulary, width, shape.width),
        ("gram", "fcd", batch, length, width, shape.width),
        ("relation", "self", batch, shape.heads, length, d, 3),
        ("layer_cost", "hidden", layers, shape.layers, batch, length, shape.width),
        ("layer_cost", "attention", layers, shape.layers, batch, shape.heads, length, d),
        ("transport", "exact", 2, layers, shape.layers),
        ("contrast", "info_nce", batch, 65536, 128),
        *([("contrast", "nce", batch, 4096, 128, 67349)] if dtype == torch.float32 else []),
    ):
        yield STEMS[stem].case(kind, *sizes, dtype=dtype, label=label)


def named(text: str) -> Shape:
    """ "bert-large" or "bert-large@16x512" (batch × length)."""
    name, at, size = text.partition("@")
    checks.one_of("shape", name, list(SHAPES))
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", size)
    if at and not match:
        raise ValueError(f"shape: expected {name}@BATCHxLENGTH, such as {name}@16x512, got {text!r}")
    changes = {"batch": int(match[1]), "length": int(match[2])} if match else {}
    return dataclasses.replace(SHAPES[name], **changes)


def select(texts: Iterable[str], dtype: str, device: torch.device, stems=(), name="") -> list[Case]:
    """The cases of the shapes that were asked for; bfloat16 on a GPU and float32 on a CPU, where no dtype is named."""
    wanted = DTYPES[dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    found = [case for text in texts for case in cases_of(text, named(text), wanted)]
    return [c for c in found if (not stems or c.stem in stems) and name in c.name]
