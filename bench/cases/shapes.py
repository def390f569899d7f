"""Cases at the shapes of real models, by name or from a YAML file; `fastkd bench --shape bert-base,my.yaml`.

A model stands for a teacher of that shape and a student of half its layers and half its width, with as many tokens as
`batch` × `length`, which `bert-large@16x512` changes. A YAML file describes models, or single cases, or both:

    models:
      my-model: {layers: 24, width: 1024, heads: 16, vocabulary: 50000, batch: 4, length: 512, student_width: 512}
    cases:
      divergence: [{kind: jsd, N: 512, V: 30522, dtype: bfloat16}]
      gram: [{kind: fcd, B: 8, N: 128, Ds: 384, Dt: 768}]
"""

import dataclasses
import pathlib
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
    student_layers: int = 0  # 0: half the teacher's
    student_width: int = 0

    def __post_init__(self):
        for name, size in dataclasses.asdict(self).items():
            least = 0 if name.startswith("student") else 1
            if type(size) is not int or size < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {size!r}")
        if self.width % self.heads:
            raise ValueError(f"heads must divide the width, got {self.heads} heads of a width of {self.width}")

    @property
    def student(self) -> tuple[int, int]:
        return self.student_layers or max(1, self.layers // 2), self.student_width or self.width // 2


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
    layers, width = shape.student
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


def case_from(stem: str, entry: dict, where: str, dtype: torch.dtype) -> Case:
    """One case of a YAML file, every mistake named."""
    kinds = STEMS[stem].AXES
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: {stem}: expected a case such as {{kind: {next(iter(kinds))}, …}}, got {entry!r}")
    sizes = dict(entry)
    kind, named = sizes.pop("kind", next(iter(kinds))), sizes.pop("dtype", str(dtype).removeprefix("torch."))
    checks.one_of(f"{where}: kind of {stem}", kind, list(kinds))
    checks.one_of(f"{where}: dtype of {stem}", named, list(DTYPES))
    if sizes.keys() != kinds[kind].keys() or not all(type(size) is int and size > 0 for size in sizes.values()):
        raise ValueError(
            f"{where}: {stem} {kind} takes the sizes {', '.join(kinds[kind])}, positive integers; got {sizes}"
        )
    return STEMS[stem].case(kind, *(sizes[axis] for axis in kinds[kind]), dtype=DTYPES[named])


def from_yaml(path: pathlib.Path, dtype: torch.dtype) -> Iterator[Case]:
    import yaml  # of fastkd[bench]

    try:
        found = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file; name a shape ({', '.join(SHAPES)}) or a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    parts = [found.get(part) or {} for part in ("models", "cases")] if isinstance(found, dict) else []
    if not parts or set(found) - {"models", "cases"} or not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"{path}: expected `models:` with lines of name: {{layers: 12, …}}, `cases:` with lines of "
                         f"stem: [{{kind: …}}, …], or both; got {found!r:.80}")  # fmt: skip
    for name, entry in parts[0].items():
        yield from cases_of(name, shape_of(f"{path}: model {name!r}", entry), dtype)
    for stem, entries in parts[1].items():
        checks.one_of(f"{path}: cases", stem, list(STEMS))
        if not isinstance(entries, list):
            raise ValueError(f"{path}: cases: expected a list under {stem}, got {entries!r}")
        yield from (case_from(stem, entry, str(path), dtype) for entry in entries)


def shape_of(where: str, entry: object) -> Shape:
    fields = ", ".join(field.name for field in dataclasses.fields(Shape))
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected {{layers: 12, …}}, got {entry!r}")
    try:
        return Shape(**entry)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {str(error).removeprefix('Shape.__init__() ')}; it takes {fields}") from error


def named(text: str) -> Shape:
    """ "bert-large" or "bert-large@16x512" (batch × length)."""
    name, at, size = text.partition("@")
    checks.one_of("shape", name, [*SHAPES, "a .yaml file"])
    match = re.fullmatch(r"(\d+)x(\d+)", size)
    if at and not match:
        raise ValueError(f"shape: expected {name}@BATCHxLENGTH, such as {name}@16x512, got {text!r}")
    changes = {"batch": int(match[1]), "length": int(match[2])} if match else {}
    return shape_of(f"shape: {text}", {**dataclasses.asdict(SHAPES[name]), **changes})


def select(texts: Iterable[str], dtype: str, device: torch.device, stems=(), kind="", name="") -> list[Case]:
    """The cases of the shapes that were asked for; bfloat16 on a GPU and float32 on a CPU, where no dtype is named."""
    wanted = DTYPES[dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    found: list[Case] = []
    for text in texts:
        yaml = text.endswith((".yaml", ".yml"))
        found += from_yaml(pathlib.Path(text), wanted) if yaml else cases_of(text, named(text), wanted)
    return [c for c in found if (not stems or c.stem in stems) and (not kind or c.kind == kind) and name in c.name]
