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
from fastkd.bench.cases import stems
from fastkd.bench.cases.case import Case
from fastkd.bench.cli_errors import one_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


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


def cases_of(name: str, shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    """Every hot path, as one step of distilling such a model asks for it."""
    layers, width = shape.student
    batch, length, tokens = shape.batch, shape.length, shape.batch * shape.length
    d = shape.width // shape.heads
    more = {"label": name}
    yield stems.divergence_case("forward_kl", tokens, shape.vocabulary, dtype, **more)
    yield stems.linear_case("forward_kl", tokens, shape.vocabulary, width, shape.width, dtype, **more)
    yield stems.gram_case("fcd", batch, length, width, shape.width, dtype, **more)
    yield stems.relation_case(batch, shape.heads, length, d, 3, dtype, **more)
    yield stems.layer_case(layers, shape.layers, batch, length, shape.width, dtype, **more)
    yield stems.attention_case(layers, shape.layers, batch, shape.heads, length, d, dtype, **more)
    yield stems.transport_case(2, layers, shape.layers, **more)
    yield stems.queue_case(batch, 65536, 128, dtype, **more)
    if dtype == torch.float32:
        yield stems.gather_case(batch, 4096, 128, 67349, **more)


# (stem, kind) -> (the sizes in the order of the builder, the builder); kind None stands for every kind of the stem
BUILDERS = {
    ("divergence", "top_k"): ("NVK", lambda kind, s, dtype: stems.top_k_case(*s, dtype, None)),
    ("divergence", "top_k_tail"): ("NVK", lambda kind, s, dtype: stems.top_k_case(*s, dtype, True)),
    ("divergence", None): ("NV", lambda kind, s, dtype: stems.divergence_case(kind, *s, dtype)),
    ("gram", None): (("B", "N", "Ds", "Dt"), lambda kind, s, dtype: stems.gram_case(kind, *s, dtype)),
    ("relation", None): ("BHLdR", lambda kind, s, dtype: stems.relation_case(*s, dtype)),
    ("layer_cost", "hidden"): ("NMBSD", lambda kind, s, dtype: stems.layer_case(*s, dtype)),
    ("layer_cost", "attention"): ("NMBHSd", lambda kind, s, dtype: stems.attention_case(*s, dtype)),
    ("transport", None): ("PNM", lambda kind, s, dtype: stems.transport_case(*s)),
    ("contrast", "info_nce"): ("BKD", lambda kind, s, dtype: stems.queue_case(*s, dtype)),
    ("contrast", "nce"): ("BKDn", lambda kind, s, dtype: stems.gather_case(*s)),
    ("contrast", "in_batch"): ("BD", lambda kind, s, dtype: stems.batch_case(*s, dtype)),
    ("contrast", "codir_step"): ("BKDnS", lambda kind, s, dtype: stems.step_case(*s, given=False)),
    ("contrast", "codir_step_given"): ("BKDnS", lambda kind, s, dtype: stems.step_case(*s, given=True)),
    ("linear_divergence", None): (("R", "V", "Ds", "Dt"), lambda kind, s, dtype: stems.linear_case(kind, *s, dtype)),
}
KINDS = {
    "divergence": (*stems.KINDS, "top_k", "top_k_tail"), "gram": ("fcd", "fcd_official", "token"),
    "relation": ("self",), "layer_cost": ("hidden", "attention"), "transport": ("exact",),
    "contrast": ("info_nce", "nce", "in_batch", "codir_step", "codir_step_given"),
    "linear_divergence": stems.KINDS,
}  # fmt: skip


def case_from(stem: str, entry: dict, where: str, dtype: torch.dtype) -> Case:
    """One case of a YAML file, every mistake named."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: {stem}: expected a case such as {{kind: {KINDS[stem][0]}, …}}, got {entry!r}")
    entry = dict(entry)
    kind = entry.pop("kind", KINDS[stem][0])
    one_of(f"{where}: kind of {stem}", kind, KINDS[stem])
    named = entry.pop("dtype", None)
    if named is not None:
        one_of(f"{where}: dtype of {stem}", named, DTYPES)
    axes, build = BUILDERS.get((stem, kind)) or BUILDERS[stem, None]
    if set(entry) != set(axes) or not all(type(size) is int and size > 0 for size in entry.values()):
        raise ValueError(f"{where}: {stem} {kind} takes the sizes {', '.join(axes)}, positive integers; got {entry}")
    return build(kind, [entry[axis] for axis in axes], DTYPES.get(named, dtype))


def read_yaml(path: pathlib.Path) -> dict:
    try:
        import yaml
    except ImportError as error:
        raise ValueError(f"{path}: reading YAML needs pyyaml (pip install 'fastkd[bench]')") from error
    if not path.is_file():
        raise ValueError(f"{path}: no such file; name a shape ({', '.join(SHAPES)}) or a YAML file that exists")
    try:
        found = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(found, dict) or not found or set(found) - {"models", "cases"}:
        raise ValueError(f"{path}: expected `models:`, `cases:` or both at the top, got {found!r:.80}")
    for part, under in (("models", "name: {layers: 12, …}"), ("cases", "stem: [{kind: …}, …]")):
        if not isinstance(found.setdefault(part, {}) or {}, dict):
            raise ValueError(f"{path}: {part}: expected lines of {under}, got {found[part]!r:.80}")
    return {part: entries or {} for part, entries in found.items()}


def from_yaml(path: pathlib.Path, dtype: torch.dtype) -> Iterator[Case]:
    found = read_yaml(path)
    for name, entry in found["models"].items():
        yield from cases_of(name, shape_of(f"{path}: model {name!r}", entry), dtype)
    for stem, entries in found["cases"].items():
        one_of(f"{path}: cases", stem, KINDS)
        if not isinstance(entries, list):
            raise ValueError(f"{path}: cases: expected a list under {stem}, got {entries!r}")
        for entry in entries:
            yield case_from(stem, entry, str(path), dtype)


def shape_of(where: str, entry: object) -> Shape:
    fields = [field.name for field in dataclasses.fields(Shape)]
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected {{layers: 12, …}}, got {entry!r}")
    for name in entry:
        one_of(where, name, fields)
    try:
        return Shape(**entry)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: {str(error).removeprefix('Shape.__init__() ')}; it takes {', '.join(fields)}"
        ) from error


def named(text: str) -> tuple[str, Shape]:
    """ "bert-large" or "bert-large@16x512" (batch × length)."""
    name, _, size = text.partition("@")
    one_of("shape", name, SHAPES, ", or a .yaml file")
    if not size:
        return name, SHAPES[name]
    match = re.fullmatch(r"(\d+)x(\d+)", size)
    if not match:
        raise ValueError(f"shape: expected {name}@BATCHxLENGTH, such as {name}@16x512, got {text!r}")
    changes = {"batch": int(match[1]), "length": int(match[2])}
    return text, shape_of(f"shape: {text}", {**dataclasses.asdict(SHAPES[name]), **changes})


def select(texts: Iterable[str], dtype: str, device: torch.device, stems=(), kind="", name="") -> list[Case]:
    """The cases of the shapes that were asked for; bfloat16 on a GPU and float32 on a CPU, where no dtype is named."""
    if dtype:
        one_of("dtype", dtype, DTYPES)
    wanted = DTYPES[dtype] if dtype else (torch.bfloat16 if device.type == "cuda" else torch.float32)
    found: list[Case] = []
    for text in texts:
        if text.endswith((".yaml", ".yml")):
            found += from_yaml(pathlib.Path(text), wanted)
        else:
            found += cases_of(*named(text), wanted)
    return [c for c in found if (not stems or c.stem in stems) and (not kind or c.kind == kind) and name in c.name]
