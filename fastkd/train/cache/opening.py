"""Opening a cache: compared with the run that asks for it, made where it is not there, gone on with where it was interrupted."""

import contextlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from rich.progress import Progress
from safetensors import SafetensorError
from torch import Tensor

import fastkd
from fastkd import atomic_write, interruption
from fastkd.train.batch import TASKS
from fastkd.train.methods.base import Side
from fastkd.train.states import States

from . import identity, shards
from .contents import FEW_CLASSES, SPARSE, Contents, Options, check_asked, check_serves, needed, of_examples
from .logprobs import Records
from .shards import HEAD, INDEX, Reader

FORMAT = 1
SHARD_BYTES, MOST_EXAMPLES = 1 << 27, 4096
NEVER = ("embedding", "token_classification", "multi_label")


@dataclass(frozen=True)
class AbsentConfig:
    """What is asked of the configuration of a teacher that is not loaded."""

    vocab_size: int | None
    id2label: dict[int, str]

    @property
    def num_labels(self) -> int:
        return len(self.id2label)

    def get_text_config(self) -> "AbsentConfig":
        return self


@dataclass(frozen=True)
class Absent:
    """A teacher that is not loaded: as its cache describes it, or its configuration."""

    config: AbsentConfig
    side: Side

    @classmethod
    def of(cls, options: Options) -> "Absent":
        if options.from_logprobs and not (Path(options.folder) / INDEX).exists():
            if options.config is None:
                raise ValueError("from_logprobs: needs the teacher's configuration; pass it as config")
            text = options.config.get_text_config()
            return cls(
                AbsentConfig(text.vocab_size, dict(options.config.id2label)), Side.of_config(options.config, True)
            )
        told = _read_index(Path(options.folder))["teacher"]
        labels = {int(number): name for number, name in told["id2label"].items()}
        return cls(AbsentConfig(told["vocab_size"], labels), Side(**told["side"]))


@dataclass
class Teacher:
    """A teacher that runs. ask: from a batch of the collator to what the method ever reads of it; finish: see heads.find."""

    model: torch.nn.Module
    ask: Callable[[dict], States]
    collate: Callable[[list[dict]], dict]
    batch_size: int
    finish: tuple | None
    teacher_tokens: Tensor | None = None

    def examples(self, data, rows: list[int], contents: Contents) -> list[dict[str, Tensor]]:
        """What is kept of each of these rows of the data."""
        found: list = [None] * len(rows)
        examples = [data[row] for row in rows]
        order = sorted(range(len(rows)), key=lambda i: len(examples[i]["input_ids"]))  # hardly any padding
        for start in range(0, len(order), self.batch_size):
            interruption.check()
            chosen = order[start : start + self.batch_size]
            batch = self.collate([examples[i] for i in chosen])
            mask = batch.get("attention_mask")
            real = torch.ones_like(batch["input_ids"]) if mask is None else mask
            states = self.ask(batch)
            kept = contents.kept(states, real.to(self.model.device), [rows[i] for i in chosen], self.teacher_tokens)
            _check_said(kept, contents, [examples[i]["example_id"] for i in chosen])
            lengths = real.sum(1).tolist()
            for name, x in kept.items():
                for i, part in zip(chosen, x.split([1] * len(chosen) if of_examples(name) else lengths), strict=True):
                    found[i] = (found[i] or {}) | {name: part}
            for i, length in zip(chosen, lengths, strict=True):
                found[i] = (found[i] or {}) | {"lengths": torch.tensor([length], dtype=torch.int32)}
        return found

    def first(self, data) -> States:
        """What it says of the first example."""
        return self.ask(self.collate([data[0]]))

    def check_collator(self, data) -> None:
        examples = [data[i] for i in range(min(len(data), self.batch_size))]
        once, again = (self.collate(examples)["input_ids"] for _ in range(2))
        if once.shape != again.shape or not torch.equal(once, again):
            raise ValueError(
                "teacher_cache: the data collator changes the tokens at each call, as the one of masked language modelling does, "
                "so what the teacher says cannot be kept; hide the tokens once, in the data (tokenisation.hide_tokens), or leave "
                "the cache out"
            )


@dataclass
class Processes:
    """The processes that build and read a cache together. first: the others wait meanwhile."""

    rank: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None
    first: Callable[[], contextlib.AbstractContextManager] = field(default=contextlib.nullcontext)


def complete(folder) -> dict | None:
    """The index of a cache of which no file is missing; None where there is none, or an unfinished one."""
    if not (Path(folder) / INDEX).exists():
        return None
    reader = _reader(Path(folder), _read_index(Path(folder)), None)
    return None if reader.missing() else reader.index


def opened(
    options: Options, method, task: str, data, config, *, tokenizer=None, teacher_tokens=None, teacher: Teacher | None = None,
    processes: Processes | None = None,
) -> Reader:  # fmt: skip
    """The cache in options.folder, checked; made, or gone on with, where it is not complete.

    method: methods.Combined; config: the teacher's; teacher_tokens: see DistillTrainer; teacher: None where it is not loaded.
    """
    processes, folder = processes or Processes(), Path(options.folder)
    if task in NEVER:
        known = ", ".join(name for name in TASKS if name not in NEVER)
        raise ValueError(f"teacher_cache: is for the tasks {known}, got {task!r}; leave it out")
    tokens, classes = getattr(config.get_text_config(), "vocab_size", None), config.num_labels
    size = classes if task in FEW_CLASSES else tokens if teacher_tokens is None else len(teacher_tokens)
    side = next(iter(method.methods.values())).setup.teacher
    described = {"side": asdict(side), "vocab_size": tokens, "id2label": config.id2label}
    rows = _rows(data)
    _check_padding(method, data)
    source = Records(options.from_logprobs, data, size, options.top_k) if options.from_logprobs else teacher
    made_from = {
        "teacher": None if teacher is None else identity.hash_of_model(teacher.model), "files": options.files,
        "tokenizer": identity.hash_of_tokenizer(tokenizer), "data": identity.hash_of_data(data),
        "vocabulary": identity.hash_of_ids(teacher_tokens),
    }  # fmt: skip
    with processes.first():
        if processes.rank == 0 and folder.is_dir():
            shards.remove_scratch(folder)
        if not (folder / INDEX).exists() and source is not None:
            if processes.rank > 0:
                raise RuntimeError(f"teacher_cache: the first process made no cache in {folder}")
            atomic_write.check_empty(folder, "teacher_cache")
            contents = needed(method, task, options, size)
            index = {
                "format": FORMAT, "fastkd": fastkd.__version__, "examples": len(data), "tokens": sum(map(len, data["input_ids"])),
                "made_from": made_from, "teacher": described,
                **(_of_records(source, contents, method) if source is not teacher else _of_teacher(source, contents, data)),
            }  # fmt: skip
            examples = _checked_size(folder, source, index, data)
            index["examples_per_shard"] = options.examples_per_shard or examples
            with atomic_write.replacing(folder / INDEX) as scratch:
                scratch.write_text(json.dumps(index, indent=1))
        index = _read_index(folder)
        wrong = _differences(index, options, method, task, size, made_from)
        if wrong:
            raise ValueError(
                f"teacher_cache: {folder} is of another run: {'; '.join(wrong)}. Choose another folder, or delete "
                "it to make it anew"
            )
        reader = _reader(folder, index, rows)
        if teacher is not None and reader.contents.predictions == "hidden" and not (folder / HEAD).exists():
            parts = teacher.first(data).predictions
            parts = {"weight": parts.weight, "bias": parts.bias}
            tensors = {name: x.detach().cpu().contiguous().clone() for name, x in parts.items() if x is not None}
            shards.write(folder / HEAD, tensors, reader.key)
    _make_missing(reader, source, data, processes)
    processes.wait()
    reader.check(processes.rank, processes.count)
    return reader


def _rows(data) -> dict[int, int] | None:
    """The place of each example_id in the data; None where they are 0, 1, 2, …"""
    if "example_id" not in getattr(data, "column_names", ()):
        raise ValueError(
            "teacher_cache: finds an example again by its number, and train_dataset has no column 'example_id'; add one with "
            "0, 1, 2, … to its length, or leave the cache out"
        )
    numbers = list(data["example_id"])
    rows = {number: row for row, number in enumerate(numbers)}
    if len(rows) != len(numbers):
        raise ValueError("teacher_cache: two examples of train_dataset have one example_id; number them 0, 1, 2, …")
    return None if numbers == list(range(len(numbers))) else rows


def _check_padding(method, data) -> None:
    """Raise where a method compares what a model makes of padding, which is not kept, and there is some."""
    names = [name for name, part in method.methods.items() if part.reads_padding]
    masks = data["attention_mask"] if "attention_mask" in data.column_names else []
    if names and (len(set(map(len, data["input_ids"]))) > 1 or any(0 in mask for mask in masks)):
        raise ValueError(
            f"teacher_cache: {', '.join(names)} compares attention at padding, too, which is not kept; make the rows of "
            "train_dataset equally long, without padding, or choose minilm or minilmv2, which leave padding out"
        )


def _contents(index: dict) -> Contents:
    told = index["contents"]
    return Contents(**{**told, "levels": tuple(told["levels"]), "layers": tuple(told["layers"])})


def _reader(folder: Path, index: dict, rows) -> Reader:
    return Reader(folder, index, identity.hash_of_index(index), _contents(index), rows)


def _read_index(folder: Path) -> dict:
    if not (folder / INDEX).exists():
        raise ValueError(
            f"teacher_cache: there is no cache in {folder}; name its folder, or give the teacher, and it is made there"
        )
    try:
        index = json.loads((folder / INDEX).read_text())
        known = index["format"] == FORMAT
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"teacher_cache: {folder / INDEX} is not the index of a cache; choose another folder"
        ) from error
    if not known:
        raise ValueError(
            f"teacher_cache: {folder} was written by fastkd {index.get('fastkd')}, in format {index['format']}, and this version "
            f"reads {FORMAT}; make it anew"
        )
    return index


def _of_teacher(teacher: Teacher, contents: Contents, data) -> dict:
    """What an index says of a cache of `contents` of this teacher."""
    if contents.predictions == "hidden" and teacher.finish is None:
        raise ValueError(
            "teacher_cache: keeps the states before the teacher's head, and this head cannot be run by itself (the log says why); "
            "leave compile_teacher out, or choose top_k or samples"
        )
    teacher.check_collator(data)
    states = teacher.first(data)
    return {
        "source": "teacher", "contents": asdict(contents), "computed": str(teacher.model.dtype).removeprefix("torch."),
        "finish": list(teacher.finish) if contents.predictions == "hidden" else None,
        "scales": {str(layer): states.qkv[layer].scale for layer in contents.layers},
        "tensors": _layout(teacher.examples(data, [0], contents)[0]),
    }  # fmt: skip


def _of_records(records: Records, contents: Contents, method) -> dict:
    """What an index says of a cache of log-probabilities."""
    if contents.levels or contents.layers or contents.predictions != "top_k" or contents.task != "causal_lm":
        raise ValueError(
            "from_logprobs: has the likeliest next tokens alone, for the task causal_lm; choose a method that reads nothing "
            f"else of the teacher, such as forward_kl (this one reads {contents.described()} for {contents.task})"
        )
    every = [name for name, part in method.methods.items() if part.every_position]
    if every:
        raise ValueError(
            f"from_logprobs: {', '.join(every)} also compares what follows the last token, which a server does not say; choose "
            "forward_kl or kd"
        )
    contents = replace(contents, count=records.k)
    return {
        "source": "log_probs", "contents": asdict(contents), "computed": "float32", "finish": None, "scales": {},
        "tensors": _layout(records.examples(records.data, [0], contents)[0]),
    }  # fmt: skip


def _layout(example: dict[str, Tensor]) -> dict:
    return {name: [str(x.dtype), list(x.shape[1:])] for name, x in example.items() if name != "lengths"}


def _checked_size(folder: Path, source, index: dict, data) -> int:
    """How many examples take about 128 MB, after a look at the room that there is."""
    first = source.examples(data, [0], _contents(index))[0]
    per_token = sum(x.numel() * x.element_size() for x in first.values()) / max(int(first["lengths"]), 1)
    wanted, free = per_token * index["tokens"], shutil.disk_usage(folder).free
    if wanted > free:
        raise ValueError(
            f"teacher_cache: it would take about {wanted / 1e9:,.1f} GB, {per_token:,.0f} bytes per token, and {folder} has "
            f"{free / 1e9:,.1f} GB free; choose another folder, top_k, samples, or cache_dtype int8 or bfloat16"
        )
    return min(max(int(SHARD_BYTES * len(data) / max(wanted, 1)), 1), MOST_EXAMPLES)


def _differences(index: dict, options: Options, method, task: str, size: int, made_from: dict) -> list[str]:
    """What a cache was made from otherwise than this run would make it, in words."""
    then, found, wrong = index["made_from"], _contents(index), []
    for name, now in made_from.items():
        if name == "files" and None not in (made_from["teacher"], then["teacher"]):
            continue  # the weights themselves were compared
        if now != then[name] and (name == "vocabulary" or None not in (now, then[name])):
            what = {"files": "teacher", "data": "data (the tokens of train_dataset differ)"}.get(name, name)
            wrong.append(f"it was made with another {what}")
    if found.task != task:
        return [*wrong, f"its task is {found.task}, this run's {task}"]
    wrong += check_asked(found, options, index["computed"])
    form = {found.predictions: found.count} if found.predictions in SPARSE and method.predicts("teacher") else {}
    form |= {"samples": found.others} if "top_k" in form else {}
    return wrong + check_serves(found, needed(method, task, Options(options.folder, **form), size))


def _make_missing(reader: Reader, source, data, processes: Processes) -> None:
    """The shards that are missing; each process makes those of its rank."""
    missing = reader.missing()
    if not missing:
        return
    kind = "log_probs" if isinstance(source, Records) else "teacher"
    if source is None or reader.index["source"] != kind:
        raise ValueError(
            f"teacher_cache: {missing[0]} is missing in {reader.folder}, as are {len(missing) - 1} other files; give what the "
            "cache was made from, the teacher or the log-probabilities, and they are made"
        )
    mine = [
        i for i in range(reader.shards) if shards.shard_name(i) in missing and i % processes.count == processes.rank
    ]
    with Progress(disable=processes.rank > 0) as bar:
        job = bar.add_task("asking the teacher", total=len(mine))
        for number in mine:
            start = number * reader.size_of_shard
            rows = list(range(start, min(start + reader.size_of_shard, reader.index["examples"])))
            examples = source.examples(data, rows, reader.contents)
            path = reader.folder / shards.shard_name(number)
            try:
                shards.write(path, {name: torch.cat([x[name] for x in examples]) for name in examples[0]}, reader.key)
            except (OSError, SafetensorError) as error:
                raise RuntimeError(
                    f"teacher_cache: {path} could not be written ({error}); make room, and the same command goes on from here"
                ) from error
            bar.advance(job)


def _check_said(kept: dict[str, Tensor], contents: Contents, numbers: list[int]) -> None:
    for name, x in kept.items():
        if not bool(shards.plausible(name, x, contents).all()):
            raise ValueError(
                f"teacher: what it says of one of the examples {', '.join(map(str, numbers))} is not finite ({name}); look at its "
                "weights, and at teacher_dtype"
            )
