"""The files of a cache: written whole or not at all, checked once when a cache is opened, read by the rows of a batch."""

import os
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastkd import atomic_write
from fastkd.train.heads import Finish, Headless
from fastkd.train.states import States

from .contents import Contents, of_examples
from .identity import hash_of_tensors

INDEX, HEAD = "index.json", "head.safetensors"
BATCH_KEY = "teacher_cache"  # under which a batch bears the rows of its examples
_OPEN = 8  # shards that are mapped at a time
_AT_ONCE = 1 << 24  # numbers that are looked at together


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def write(path: Path, tensors: dict[str, Tensor], key: str) -> None:
    """key: hash_of_index of the cache that the file belongs to."""
    about = {"cache": key, "file": path.name, "hash": hash_of_tensors(tensors, key + path.name)}
    with atomic_write.replacing(path) as scratch:
        save_file(tensors, scratch, metadata=about)


def remove_scratch(folder: Path) -> None:
    """What processes that were killed had begun to write."""
    for path in folder.glob(".*-*"):
        owner = path.name[1:].split("-")[0]
        try:
            os.kill(int(owner), 0)
        except ProcessLookupError:
            path.unlink(missing_ok=True)
        except (ValueError, PermissionError):  # not ours, or alive
            continue


def read(path: Path, key: str) -> dict[str, Tensor]:
    """All of a file, mapped into memory, after its hash was compared."""
    try:
        with safe_open(path, "pt") as file:
            about, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"teacher_cache: {path} is damaged ({error}); delete it and make it again") from error
    if about.get("cache") != key or about.get("file") != path.name:
        raise ValueError(
            f"teacher_cache: {path} belongs to another cache, or to another place in this one; delete it and make it again"
        )
    if about.get("hash") != hash_of_tensors(tensors, key + path.name):
        raise ValueError(f"teacher_cache: {path} is damaged, its hash differs; delete it and make it again")
    return tensors


@dataclass
class Reader:
    """An open cache. It may be copied into the processes of a data loader, each of which maps the files for itself.

    index: what index.json holds; rows: the place of each example_id, or None where they are 0, 1, 2, …"""

    folder: Path
    index: dict
    key: str
    contents: Contents
    rows: dict[int, int] | None = None
    head: Headless | None = None
    _files: OrderedDict = field(default_factory=OrderedDict, repr=False)

    @property
    def size_of_shard(self) -> int:
        return self.index["examples_per_shard"]

    @property
    def shards(self) -> int:
        return -(-self.index["examples"] // self.size_of_shard)

    def missing(self) -> list[str]:
        """The names of the files that are not there."""
        names = [HEAD] * (self.contents.predictions == "hidden") + [shard_name(i) for i in range(self.shards)]
        return [name for name in names if not (self.folder / name).exists()]

    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.iterdir() if path.is_file())

    def summary(self) -> str:
        tokens = max(self.index["tokens"], 1)
        return (
            f"{self.contents.described()}; {self.bytes() / 1e6:,.1f} MB for {self.index['examples']:,} examples, "
            f"{self.bytes() / tokens:,.0f} bytes per token"
        )

    def check(self, rank: int = 0, ranks: int = 1) -> None:
        """Raise ValueError where a file is damaged, or holds what no teacher says. Each rank looks at its part."""
        if self.contents.predictions == "hidden":
            self.load_head("cpu")
        mine = range(rank, self.shards, ranks)
        for number in track(mine, description="checking the cache", transient=True, disable=rank > 0 or len(mine) < 2):
            self._check_shard(number)

    def _check_shard(self, number: int) -> None:
        path = self.folder / shard_name(number)
        tensors = read(path, self.key)
        examples = min(self.size_of_shard, self.index["examples"] - number * self.size_of_shard)
        lengths = tensors.pop("lengths", torch.empty(0))
        found = {name: [str(x.dtype), list(x.shape[1:])] for name, x in tensors.items()}
        if found != self.index["tensors"] or list(lengths.shape) != [examples]:
            raise ValueError(f"teacher_cache: {path} does not hold what the index says; delete it and make it again")
        counted = {name: examples if of_examples(name) else int(lengths.sum()) for name in tensors}
        if any(len(x) != counted[name] for name, x in tensors.items()) or (lengths < 0).any():
            raise ValueError(
                f"teacher_cache: {path} has not one row for each of its tokens; delete it and make it again"
            )
        for name, x in tensors.items():
            for part in x.flatten().split(_AT_ONCE):
                if not bool(plausible(name, part, self.contents).all()):
                    raise ValueError(
                        f"teacher_cache: {path} has values in {name!r} that no teacher says; delete it and make it again"
                    )

    def load_head(self, device) -> None:
        tensors = read(self.folder / HEAD, self.key)
        weight, bias = (x if x is None else x.to(device) for x in (tensors["weight"], tensors.get("bias")))
        self.head = Headless(weight[:0], weight, bias, Finish(*self.index["finish"]))

    def batch(self, example_ids: list[int], real: Tensor) -> dict[str, Tensor]:
        """The rows of these examples, padded where `real` [B, S] has a 0, on the CPU."""
        found = [self._example(number) for number in example_ids]
        real = real.to("cpu", torch.bool)
        lengths = real.sum(1).tolist()
        for number, (length, _), expected in zip(example_ids, found, lengths, strict=True):
            if length != expected:
                raise ValueError(
                    f"teacher_cache: example {number} has {length} tokens in the cache and {expected} in the batch; the data "
                    "collator must neither cut nor add tokens"
                )
        batch = {}
        for name in found[0][1]:
            rows = [tensors[name] for _, tensors in found]
            if of_examples(name):
                batch[name] = torch.cat(rows)
            else:
                flat = torch.cat(rows)
                batch[name] = flat.new_full((*real.shape, *flat.shape[1:]), int(name == "counts"))
                batch[name][real] = flat
        return batch

    def states(self, batch: dict[str, Tensor]) -> States:
        """What the teacher says of a batch, of tensors on its device."""
        if self.contents.predictions == "hidden" and self.head.weight.device != next(iter(batch.values())).device:
            self.load_head(next(iter(batch.values())).device)
        scales = {int(layer): scale for layer, scale in self.index["scales"].items()}
        depth, dtype = self.index["teacher"]["side"]["layers"], getattr(torch, self.index["computed"])
        return self.contents.states(batch, self.head, scales, depth, dtype)

    def _example(self, number: int) -> tuple[int, dict[str, Tensor]]:
        """Its number of tokens, and its rows."""
        row = number if self.rows is None else self.rows[number]
        file, starts = self._file(row // self.size_of_shard)
        place = row % self.size_of_shard
        start, end = starts[place], starts[place + 1]
        slices = {
            name: slice(place, place + 1) if of_examples(name) else slice(start, end) for name in self.index["tensors"]
        }
        tensors = {name: file.get_slice(name)[rows] for name, rows in slices.items()}
        if "indices" in tensors:
            tensors["indices"] = tensors["indices"].int()  # torch computes little with uint16
        return end - start, tensors

    def _file(self, shard: int):
        if shard not in self._files:
            if len(self._files) >= _OPEN:
                self._files.popitem(last=False)
            file = safe_open(self.folder / shard_name(shard), "pt")
            lengths = file.get_tensor("lengths")
            self._files[shard] = file, [0, *lengths.cumsum(0).tolist()]
        self._files.move_to_end(shard)
        return self._files[shard]

    def __getstate__(self):
        return self.__dict__ | {"_files": OrderedDict()}


def plausible(name: str, x: Tensor, contents: Contents) -> Tensor:
    if name == "indices":
        return (x.long() >= 0) & (x.long() < contents.size)
    if name == "counts":
        return x <= (contents.others or contents.count)
    if name in ("log_probs", "tail"):
        return x <= 1e-3  # -inf: no mass
    return x.isfinite()


@dataclass
class Collator:
    """Another collator's batches, with what the teacher says of their examples."""

    plain: object
    reader: Reader

    def __call__(self, examples: list[dict]) -> dict:
        batch = self.plain(examples)
        mask = batch.get("attention_mask")
        mask = torch.ones_like(batch["input_ids"]) if mask is None else mask
        batch[BATCH_KEY] = self.reader.batch([int(x["example_id"]) for x in examples], mask)
        return batch
