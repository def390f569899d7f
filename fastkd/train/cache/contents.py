"""What is kept of a teacher for a method and nothing else, and how it becomes the teacher's states again."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fastkd import functional
from fastkd.losses.glmd import GLMDLoss
from fastkd.losses.kd import PredictionLoss
from fastkd.train.heads import Headless, Sparse
from fastkd.train.states import QKV, States

FEW_CLASSES = ("classification", "regression")
SPARSE = ("top_k", "samples")
DTYPES = ("float32", "bfloat16", "int8")
LINEAR = ("forward_kl", "soft_ce")  # kinds whose gradient is linear in the teacher's probabilities
_ROWS_AT_ONCE = 256  # rows of logits over the vocabulary that are made at a time
_SEED = 20250316
_SCALE = ".scale"  # of int8: a row of states is this times its numbers, one float32 per row


@dataclass(frozen=True)
class Options:
    """Where a cache lies, and how its predictions are kept. None: as a cache that is there has it, or else the first choice.

    Args:
        folder: The folder of the cache.
        top_k: Keep the k most likely tokens of each position and the mass of all others.
        samples: Keep so many tokens drawn from the teacher's distribution at each position (an unbiased estimate of it); with
            top_k, drawn from the other tokens. With neither, the hidden states before the teacher's head are kept, and of few
            classes the logits.
        dtype: "float32" or "bfloat16", of states and log-probabilities; or "int8", of states and logits, with a scale for
            each row. None: the teacher's.
        examples_per_shard: How many examples a file holds. None: as many as take about 128 MB.
        from_logprobs: A file of log-probabilities that a server gave (JSON lines), in place of a teacher.
        config: With from_logprobs, the teacher's configuration.
        files: The hash of the teacher's checkpoint (identity.hash_of_files), where it was read from files.
    """

    folder: str | Path
    top_k: int | None = None
    samples: int | None = None
    dtype: str | None = None
    examples_per_shard: int | None = None
    from_logprobs: str | None = None
    config: object | None = None
    files: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "folder", Path(self.folder))
        for name in ("top_k", "samples", "examples_per_shard"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}: expected a number of at least 1, got {value!r}")
        if self.from_logprobs and self.samples:
            raise ValueError("samples: are drawn while a teacher runs, and from_logprobs replaces it; choose top_k")
        if self.samples and self.samples > 255:
            raise ValueError(f"samples: at most 255 of a position are kept, got {self.samples}; choose top_k for more")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"cache_dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.dtype == "int8" and (self.top_k or self.samples or self.from_logprobs):
            raise ValueError(
                "cache_dtype: int8 is for states and logits, got int8 for the predictions of few tokens; choose bfloat16"
            )

    @classmethod
    def of(cls, given) -> "Options":
        return given if isinstance(given, cls) else cls(given)


@dataclass(frozen=True)
class Contents:
    """predictions: "logits", "hidden" (the states before the head), "top_k", "samples", or None where no method reads any;
    count: k, or the number of samples; temperature: of the distribution that these two are taken from; others: how many samples
    of the other tokens stand for the tail of the top k. levels, layers: of
    hidden states, and of queries, keys and values. dtype: in which the states are kept. size: classes, or tokens."""

    task: str
    predictions: str | None
    count: int | None
    temperature: float | None
    levels: tuple[int, ...]
    layers: tuple[int, ...]
    dtype: str | None
    size: int
    others: int | None = None

    @torch.no_grad()
    def kept(
        self, states: States, real: Tensor, numbers: list[int], teacher_tokens: Tensor | None = None
    ) -> dict[str, Tensor]:
        """What the batch adds to its shard, on the CPU: a row for each real token, or of "logits" for each example. real:
        [B, S]; numbers: of the examples, by which their samples are drawn; teacher_tokens: the student's part of
        the vocabulary, over which top_k and samples are taken."""
        real = real.to(torch.bool)
        kept = {f"hidden.{level}": states.hidden[level][real] for level in self.levels}
        for layer in self.layers:
            found = states.qkv[layer]
            kept |= {f"{name}.{layer}": x.transpose(1, 2)[real] for name, x in zip("qkv", found[:3], strict=True)}
        if self.predictions == "hidden":
            kept["last"] = states.predictions.hidden[real]
        if self.dtype not in (None, "int8"):
            kept = {name: x.to(getattr(torch, self.dtype)) for name, x in kept.items()}
        if self.predictions == "logits":
            kept["logits"] = states.logits.float()
        if self.dtype == "int8":
            kept = dict(pair for name, x in kept.items() for pair in in_8_bits(name, x))
        if self.predictions in SPARSE:
            states = states if teacher_tokens is None else states.over(teacher_tokens)
            kept |= self._sparse(states.predictions, real, numbers)
        return {name: x.cpu().contiguous() for name, x in kept.items()}

    def _sparse(self, predictions: Tensor | Headless, real: Tensor, numbers: list[int]) -> dict[str, Tensor]:
        flat, lengths = predictions[real], real.sum(1).tolist()
        parts = []
        for number, rows in zip(numbers, _split(flat, lengths), strict=True):
            generator = torch.Generator(real.device).manual_seed(_SEED + number)
            for block in _blocks(rows):
                logits = (block.logits() if isinstance(block, Headless) else block).float() / self.temperature
                taken = (
                    likeliest(logits, self.count, self.others, generator)
                    if self.predictions == "top_k"
                    else drawn(logits, self.count, generator)
                )
                parts.append(taken)
        found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if self.predictions == "top_k" and self.dtype is not None:
            found["log_probs"] = found["log_probs"].to(getattr(torch, self.dtype))
        small = self.size <= 1 << 16
        return found | {"indices": found["indices"].to(torch.uint16 if small else torch.int32)}

    def states(
        self, kept: dict[str, Tensor], head: Headless | None, scales: dict[int, float], depth: int, dtype
    ) -> States:
        """The teacher's states of a batch, of padded tensors [B, S, …]. head: without its hidden states; depth: the teacher's
        number of layers; dtype: the one that it computes in."""
        kept = {name: from_8_bits(name, kept) for name in kept if not name.endswith(_SCALE)}
        levels = [kept[f"hidden.{i}"].to(dtype) if i in self.levels else None for i in range(depth + 1)]
        qkv = {
            layer: QKV(*(kept[f"{name}.{layer}"].to(dtype).transpose(1, 2) for name in "qkv"), scales[layer])
            for layer in self.layers
        }
        predictions = None
        if self.predictions == "logits":
            predictions = kept["logits"]
        elif self.predictions == "hidden":
            predictions = replace(head, hidden=kept["last"].to(dtype))
        elif self.predictions == "top_k":
            log_probs, tail = kept["log_probs"].float(), kept["tail"]
            if self.others:  # they share the mass of the tail
                of_samples = tail[..., None] + (kept["counts"].float() / self.others).log()
                log_probs, tail = torch.cat([log_probs, of_samples], -1), None
            predictions = Sparse(functional.TopK(kept["indices"].long(), log_probs, tail), self.size)
        elif self.predictions == "samples":
            log_probs = (kept["counts"].float() / self.count).log()  # -inf for a token that only fills the row
            predictions = Sparse(functional.TopK(kept["indices"].long(), log_probs), self.size)
        return States(predictions, tuple(levels) if self.levels else None, qkv or None)

    def described(self) -> str:
        """In a few words."""
        tail = f"{self.others} samples of the others" if self.others else "their tail"
        predictions = {
            None: [], "logits": ["logits"], "hidden": ["the states before the head"],
            "top_k": [f"{self.count} most likely tokens and {tail}"],
            "samples": [f"{self.count} samples"],
        }[self.predictions]  # fmt: skip
        levels = [f"hidden states of levels {', '.join(map(str, self.levels))}"] if self.levels else []
        layers = [f"q, k, v of layers {', '.join(map(str, self.layers))}"] if self.layers else []
        return "; ".join([*predictions, *levels, *layers])


def of_examples(name: str) -> bool:
    """Whether a tensor has a row for each example; the others have one for each token."""
    return name.startswith("logits")


def in_8_bits(name: str, x: Tensor) -> list[tuple[str, Tensor]]:
    """x [..., D] as whole numbers from -127 to 127 and, for each row, what they are multiplied by, [..., 1]."""
    scale = x.float().abs().amax(-1, keepdim=True) / 127
    return [
        (name, (x / scale.clamp_min(torch.finfo(torch.float32).tiny)).round().to(torch.int8)),
        (name + _SCALE, scale),
    ]


def from_8_bits(name: str, kept: dict[str, Tensor]) -> Tensor:
    return kept[name] * kept[name + _SCALE] if name + _SCALE in kept else kept[name]


def likeliest(
    logits: Tensor, k: int, others: int | None = None, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """The k most likely tokens of each row of logits [N, V], the log-mass of all others, and so many tokens drawn from these."""
    every = logits.log_softmax(-1)
    log_probs, indices = every.topk(k)
    rest = every.scatter(-1, indices, -torch.inf)
    tail = rest.logsumexp(-1)  # [N]
    found = {"indices": indices, "log_probs": log_probs, "tail": tail}
    if not others:
        return found
    more = drawn(rest.masked_fill(tail[:, None] == -torch.inf, 0), others, generator, indices)
    return found | {"indices": torch.cat([indices, more["indices"]], -1), "counts": more["counts"]}


def drawn(
    logits: Tensor, count: int, generator: torch.Generator | None, without: Tensor | None = None
) -> dict[str, Tensor]:
    """`count` tokens drawn from each row of logits [N, V], as different tokens and how often each came; 0 fills the row. without:
    [N, k], tokens that must not be among them."""
    tokens = torch.multinomial(logits.softmax(-1), count, replacement=True, generator=generator)
    often = torch.zeros_like(logits).scatter_add_(-1, tokens, torch.ones_like(tokens, dtype=logits.dtype))
    columns = logits.shape[-1]
    if without is not None:
        often, columns = often.scatter_(-1, without, -1), columns - without.shape[-1]
    counts, indices = often.topk(min(count, columns))
    return {"indices": indices, "counts": counts.to(torch.uint8)}


def needed(method, task: str, options: Options, size: int) -> Contents:
    """What `method` (methods.Combined) reads of the teacher at any time, kept as `options` say."""
    form, count, temperature, others = None, None, None, None
    if method.predicts("teacher"):
        count = options.top_k or options.samples
        form = "top_k" if options.top_k else "samples" if options.samples else "hidden"
        if options.from_logprobs and form != "samples":
            form = "top_k"
        if task in FEW_CLASSES:
            form = "logits"
        if count and form not in SPARSE:
            raise ValueError(
                f"top_k, samples: are for a vocabulary, and {task} keeps all of its few outputs; leave them out"
            )
        if form in SPARSE:
            if task == "cloze":
                raise ValueError(
                    "top_k, samples: the answers of cloze need not be among the tokens that are kept; leave them out, and "
                    "the states before the head are kept"
                )
            temperature = _temperature(method, form, bool(options.samples))
            if count and form == "top_k":
                count, others = min(count, size), options.samples if count < size else None
    elif options.top_k or options.samples:
        raise ValueError("top_k, samples: this method reads no predictions of the teacher; leave them out")
    levels, layers = method.levels("teacher"), method.attention("teacher")
    return Contents(task, form, count, temperature, tuple(levels), tuple(layers), options.dtype, size, others)


def check_serves(found: Contents, needs: Contents) -> list[str]:
    """In which ways a cache of `found` does not have what a run needs; `needs` in the form of `found`."""
    wrong = []
    if needs.predictions is not None and found.predictions is None:
        wrong.append("it keeps no predictions, which this method reads")
    for what, ours, theirs in (("level", needs.levels, found.levels), ("attention layer", needs.layers, found.layers)):
        missing = sorted(set(ours) - set(theirs))
        if missing:
            wrong.append(f"it keeps no {what} {', '.join(map(str, missing))}, which this method reads")
    if found.size != needs.size:
        wrong.append(f"its predictions have {found.size} classes or tokens, this run's {needs.size}")
    if needs.temperature is not None and found.temperature != needs.temperature:
        wrong.append(f"its temperature is {found.temperature:g}, this method's {needs.temperature:g}")
    return wrong


def check_asked(found: Contents, options: Options, computed: str) -> list[str]:
    """In which ways a cache differs from what `options` ask for by name. computed: the dtype of its teacher."""
    wrong = []
    for name in SPARSE:
        asked, has = getattr(options, name), found.count if found.predictions == name else None
        has = found.others if name == "samples" and found.predictions == "top_k" else has
        asked = min(asked, found.size) if asked is not None and name == "top_k" else asked
        if asked is not None and asked != has:
            wrong.append(f"its {name} is {has}, this run's {asked} (it keeps {found.described()})")
    if options.dtype is not None and options.dtype != (found.dtype or computed):
        wrong.append(f"its cache_dtype is {found.dtype or computed}, this run's {options.dtype}")
    return wrong


def _temperature(method, form: str, samples: bool) -> float:
    """The one temperature at which the method compares predictions; log-probabilities of few tokens have no other."""
    losses = [x for x in method.modules() if isinstance(x, PredictionLoss | GLMDLoss) and getattr(x, "soft", 1)]
    if any(isinstance(x, GLMDLoss) and (x.top_n is not None or x.mse) for x in losses):
        raise ValueError(
            f"{form}: glmd with top_n or mse reads all logits of the teacher; leave it out, and the states before its head are kept"
        )
    kinds = {x.divergence.get("kind", "forward_kl") for x in losses if isinstance(x, PredictionLoss)}
    if samples and not kinds <= set(LINEAR):
        raise ValueError(
            f"samples: are an unbiased estimate for {' and '.join(LINEAR)} alone, and the method compares by "
            f"{', '.join(sorted(kinds - set(LINEAR)))}; choose top_k"
        )
    found = {float(x.temperature if isinstance(x, GLMDLoss) else x.divergence.get("temperature", 1.0)) for x in losses}
    if len(found) > 1:
        raise ValueError(
            f"{form}: is kept at one temperature, and the method has {', '.join(f'{x:g}' for x in sorted(found))}; give its parts "
            "one temperature, or leave it out, and the states before the head are kept"
        )
    return found.pop() if found else 1.0


def _split(rows: Tensor | Headless, lengths: list[int]):
    start = 0
    for length in lengths:
        yield rows[start : start + length]
        start += length


def _blocks(rows: Tensor | Headless):
    for start in range(0, max(rows.shape[0], 1), _ROWS_AT_ONCE):  # an example may have no token
        yield rows[start : start + _ROWS_AT_ONCE]
