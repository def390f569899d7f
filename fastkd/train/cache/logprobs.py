"""Log-probabilities that a server gave, one JSON record per line and example, as the shards of a cache.

A record has the tokens of an example and, for each token but the first, the likeliest tokens in its place with their
log-probabilities, in the form of either server:

    {"input_ids": [5, 8, 2], "logprob_token_ids": [[8, 3], [2, 9]], "logprobs": [[-0.1, -3.2], [-0.4, -1.7]]}      TRL
    {"prompt_token_ids": [5, 8, 2], "prompt_logprobs": [null, {"8": {"logprob": -0.1}, …}, {"2": …}]}              vLLM

The record of line i is of the example i, unless it has an "example_id".
"""

import json
import math
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from .contents import Contents

_ROUNDING = 1e-3  # by which probabilities may sum to more than 1


class Records:
    """A file of records beside the data that they are of; it is never whole in memory."""

    def __init__(self, path: str, data, size: int, top_k: int | None = None):
        if not Path(path).is_file():
            raise ValueError(f"from_logprobs: there is no file {path}")
        self.path, self.data, self.size, self.top_k = path, data, size, top_k

    @cached_property
    def starts(self) -> dict[int, int]:
        """Where in the file the record of each example begins; all records are looked at."""
        starts, fewest = {}, self.size
        known = {number: row for row, number in enumerate(self.data["example_id"])}
        with open(self.path, "rb") as file:
            line, start = 0, 0
            while text := file.readline():
                line += 1
                if text.strip():
                    number, positions = self._parsed(text, line, known)
                    if number in starts:
                        raise ValueError(
                            f"from_logprobs: {self.path}, line {line}: example {number} has a record already"
                        )
                    starts[number] = start
                    fewest = min([fewest, *(len(ids) for ids, _ in positions)])
                start = file.tell()
        missing = [number for number in known if number not in starts]
        if missing:
            raise ValueError(
                f"from_logprobs: {self.path} has no record of example {missing[0]}, and of {len(missing) - 1} others; ask the "
                "server for every row of train_dataset"
            )
        if self.top_k is not None and fewest < self.top_k:
            raise ValueError(f"top_k: {self.path} has positions with {fewest} tokens, got top_k={self.top_k}")
        self._fewest = fewest
        return starts

    @property
    def k(self) -> int:
        """How many tokens every position has."""
        return self.top_k or (self.starts and self._fewest)

    def examples(self, data, rows: list[int], contents: Contents) -> list[dict[str, Tensor]]:
        """What is kept of each of these rows of the data."""
        found, known = [], {data[row]["example_id"]: row for row in rows}
        with open(self.path, "rb") as file:
            for number in known:
                file.seek(self.starts[number])
                _, positions = self._parsed(file.readline(), None, known)
                found.append(self._tensors(positions, contents))
        return found

    def _tensors(self, positions: list[tuple[list[int], list[float]]], contents: Contents) -> dict[str, Tensor]:
        k = contents.count
        ids = [row[:k] for row, _ in positions] + [list(range(k))]  # after the last token nothing is asked
        log_probs = [row[:k] for _, row in positions] + [[-math.log(k)] * k]
        exact = torch.tensor(log_probs, dtype=torch.float64)
        rest = -torch.expm1(exact.logsumexp(-1).clamp(max=0))  # what is missing
        stored = torch.float32 if contents.dtype is None else getattr(torch, contents.dtype)
        return {
            "indices": torch.tensor(ids).to(torch.uint16 if contents.size <= 1 << 16 else torch.int32),
            "log_probs": exact.to(stored), "tail": rest.log().float(),
            "lengths": torch.tensor([len(ids)], dtype=torch.int32),
        }  # fmt: skip

    def _parsed(self, text: bytes, line: int | None, known: dict[int, int]):
        """example_id, and of each token but the first the likeliest ones, likeliest first, with their log-probabilities."""
        where = f"from_logprobs: {self.path}, line {line}"
        try:
            record = json.loads(text)
            number = record.get("example_id", None if line is None else line - 1)
            vllm = "prompt_logprobs" in record
            ids = record["prompt_token_ids" if vllm else "input_ids"]
            positions = _of_vllm(record["prompt_logprobs"]) if vllm else _of_trl(record)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{where} is no record ({type(error).__name__}: {error}); a record has input_ids, logprob_token_ids and logprobs, "
                "or prompt_token_ids and prompt_logprobs"
            ) from error
        if line is None:  # looked at before
            return number, positions
        if number not in known:
            raise ValueError(f"{where}: train_dataset has no example {number}")
        if list(self.data[known[number]]["input_ids"]) != list(ids):
            raise ValueError(
                f"{where}: the tokens are not those of example {number} in train_dataset; send the server its input_ids"
            )
        if len(positions) != len(ids) - 1:
            raise ValueError(
                f"{where}: {len(ids)} tokens need {len(ids) - 1} rows of log-probabilities, all but the first's, got "
                f"{len(positions)}; ask with a prompt length of 1"
            )
        for place, (tokens, log_probs) in enumerate(positions, 1):
            wrong = len(set(tokens)) != len(tokens) or any(not 0 <= x < self.size for x in tokens)
            if wrong or not tokens or len(tokens) != len(log_probs):
                raise ValueError(
                    f"{where}, token {place}: needs different ids from 0 to {self.size - 1}, each with a log-probability"
                )
            mass = sum(map(math.exp, log_probs))
            if not mass <= 1 + _ROUNDING:
                raise ValueError(
                    f"{where}, token {place}: the probabilities sum to {mass:g}, more than 1; are they logits?"
                )
        return number, positions


def _of_trl(record: dict):
    return [
        _sorted(zip(*row, strict=True)) for row in zip(record["logprob_token_ids"], record["logprobs"], strict=True)
    ]


def _of_vllm(rows: list):
    return [_sorted((int(token), entry["logprob"]) for token, entry in row.items()) for row in rows[1:]]


def _sorted(pairs) -> tuple[list[int], list[float]]:
    """Without the -inf that fill a row."""
    kept = sorted(((x, token) for token, x in pairs if x is not None and x != -math.inf), reverse=True)
    return [token for _, token in kept], [x for x, _ in kept]
