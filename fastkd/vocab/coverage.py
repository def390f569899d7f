"""How much of a corpus a smaller vocabulary covers: the counts, the report and its plot."""

import json
import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from fastkd.vocab.tokenizer import may_be_lost

MARKS = (0.80, 0.90, 0.95, 0.99)
_BATCH = 1000  # texts that a process takes at a time
_worker = None


def _start(path: str) -> None:
    global _worker
    from transformers import AutoTokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = AutoTokenizer.from_pretrained(path)


def _count(texts: list[str]) -> tuple[Tensor, int]:
    return _counts_of(texts, _worker), len(texts)


def _counts_of(texts: list[str], tokenizer) -> Tensor:
    ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return torch.bincount(torch.tensor([i for row in ids for i in row], dtype=torch.int64), minlength=len(tokenizer))


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch = []
    for text in texts:
        batch.append(text)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def count_corpus(texts: Iterable[str], tokenizer, *, workers: int = 1, path: str | None = None, advance=None) -> Tensor:
    """The number of occurrences of each token id in `texts`.

    Args:
        texts: The corpus, which is streamed.
        tokenizer: A Hugging Face tokenizer.
        workers: The number of processes.
        path: The tokenizer's folder, from which each process loads it, with workers > 1.
        advance: Called as advance(n) after every n texts.

    Returns:
        int64 [V].
    """
    counts = torch.zeros(len(tokenizer), dtype=torch.int64)
    advance = advance or (lambda n: None)
    if workers == 1:
        for batch in _batches(texts):
            counts += _counts_of(batch, tokenizer)
            advance(len(batch))
        return counts
    if path is None:
        raise ValueError("path: with workers > 1 each process loads the tokenizer itself; pass its folder")
    with multiprocessing.get_context("spawn").Pool(workers, _start, (path,)) as pool:
        running = deque()
        for batch in _batches(texts):
            running.append(pool.apply_async(_count, (batch,)))
            if len(running) > 2 * workers:  # do not read ahead of the counting
                counts += _collect(running, advance)
        while running:
            counts += _collect(running, advance)
    return counts


def _collect(running: deque, advance) -> Tensor:
    some, texts = running.popleft().get()
    advance(texts)
    return some


def coverage(counts: Tensor) -> Tensor:
    """float64 [V]: the fraction of the corpus that the k + 1 most frequent tokens cover, at position k."""
    ordered = counts.double().sort(descending=True).values
    return ordered.cumsum(0) / ordered.sum().clamp_min(1)


def report(vocab, counts: Tensor, tokenizer) -> dict:
    """What the map covers, how many tokens the marked fractions take, and how much may not be spelled with the kept tokens."""
    total, share = counts.sum().clamp_min(1), coverage(counts)
    sizes = {f"{mark:.0%}": int((share < mark - 1e-12).sum()) + 1 for mark in MARKS}
    return {
        "kept": len(vocab),
        "of": vocab.original_size,
        "tokens_counted": int(counts.sum()),
        "covered": float(counts[vocab.kept_ids].sum() / total),
        "never_seen": int((counts == 0).sum()),
        "may_be_lost": may_be_lost(vocab, counts, tokenizer),
        "sizes_for": sizes,
    }


def write_report(folder: Path, vocab, counts: Tensor, tokenizer) -> dict:
    """coverage.json, and coverage.png where matplotlib is installed."""
    found = report(vocab, counts, tokenizer)
    (folder / "coverage.json").write_text(json.dumps(found, indent=2) + "\n")
    try:
        import matplotlib
    except ImportError:
        return found
    matplotlib.use("Agg")
    from matplotlib import pyplot

    share = coverage(counts)
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(range(1, len(share) + 1), 100 * share)
    for mark, size in found["sizes_for"].items():
        axes.plot(size, 100 * float(share[size - 1]), "o", color="tab:gray")
        axes.annotate(
            f"{mark}: {size}", (size, 100 * float(share[size - 1])), xytext=(6, -12), textcoords="offset points"
        )
    axes.axvline(found["kept"], color="tab:red", label=f"kept: {found['kept']} tokens, {found['covered']:.2%}")
    axes.set(xlabel="tokens, most frequent first", ylabel="share of the corpus, %", ylim=(0, 102))
    axes.legend(loc="lower right")
    figure.savefig(folder / "coverage.png", dpi=150)
    pyplot.close(figure)
    return found
