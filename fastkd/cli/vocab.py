"""`fastkd vocab`: counts the tokens of a corpus, chooses a smaller vocabulary, and writes what a student with it needs."""

import argparse
import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="fastkd vocab", description=__doc__)
    p.add_argument("files", nargs="+", help="the corpus: .txt with a text per line, .csv, .tsv or .jsonl")
    p.add_argument("--tokenizer", help="folder or name of the teacher's fast tokenizer; default: --model's")
    p.add_argument("--model", help="folder or name of a model to shrink to the kept tokens as well")
    p.add_argument("--teacher", help="model whose embeddings define the nearest kept token; default: --model")
    p.add_argument(
        "--output", required=True, type=Path, help="a new or empty folder for the map, the report, tokenizer and model"
    )
    p.add_argument("--size", default="0.5", help="a fraction (0.5, 1.0) or a number of tokens (15000)")
    p.add_argument("--multiple-of", type=int, default=128, help="the size is rounded up to it")
    p.add_argument(
        "--method",
        choices=("decoder", "cosine", "euclidean", "unk"),
        help="what replaces a dropped token: the nearest kept one by dot product, cosine or distance, or the unknown token; "
        "default: decoder with a model, else unk",
    )
    p.add_argument(
        "--dropped",
        choices=("spelled", "stand_in"),
        default="spelled",
        help="how the tokenizer writes a dropped token: spelled with kept tokens (a plain tokenizer.json), or as its "
        "replacement (loaded with trust_remote_code=True)",
    )
    p.add_argument("--keep", nargs="*", default=[], metavar="WORD", help="words whose tokens are kept even if rare, such "
                   "as labels and verbalisers; special tokens are always kept")  # fmt: skip
    p.add_argument("--text-column", default="text", help="of a .csv, .tsv or .jsonl corpus")
    p.add_argument("--workers", type=int, default=1, help="processes that count")
    return p


def main(argv: list[str]) -> int:
    return run(parser().parse_args(argv))


def run(options) -> int:
    from transformers import AutoTokenizer

    from fastkd import atomic_write
    from fastkd.vocab import VocabMap
    from fastkd.vocab.coverage import write_report
    from fastkd.vocab.tokenizer import count_parts

    atomic_write.check_empty(options.output, "--output")
    source = options.tokenizer or options.model
    if source is None:
        raise ValueError("--tokenizer: name one, or a --model that has one")
    tokenizer = AutoTokenizer.from_pretrained(source)
    counts = count(options, tokenizer, source)
    model = None if options.model is None else load(options.model)
    teacher = load(options.teacher) if options.teacher else model
    embeddings = None if teacher is None else teacher.get_input_embeddings().weight.detach()[: len(tokenizer)]
    method = options.method or ("decoder" if embeddings is not None else "unk")
    padding = tokenizer.pad_token_id
    kept = always_kept(options.keep, tokenizer)
    if options.multiple_of > 0:  # else from_counts says it
        check_size(options, len(kept), len(counts))
    vocab = VocabMap.from_counts(
        count_parts(counts, tokenizer), size_of(options.size), multiple_of=options.multiple_of, always_keep=kept,
        in_place=[padding] if padding == 1 else [],  # RoBERTa and MPNet count positions from it, MPNet by number
        embeddings=None if method == "unk" else embeddings, method=method,
        unk_id=tokenizer.unk_token_id if method == "unk" else None,
    )  # fmt: skip
    with atomic_write.filling(options.output, "--output") as scratch:
        vocab.save(scratch)
        vocab.shrink_tokenizer(tokenizer, dropped=options.dropped).save_pretrained(scratch)
        if model is not None:
            vocab.shrink(model, inplace=True).save_pretrained(scratch)
        found = write_report(scratch, vocab, counts, tokenizer)
    sizes = ", ".join(f"{mark} {size}" for mark, size in found["sizes_for"].items())
    print(
        f"{found['kept']} of {found['of']} vocabulary entries cover {found['covered']:.2%} of {found['tokens_counted']} tokens"
    )
    if found["may_be_lost"] and options.dropped == "spelled":
        print(
            f"at most {found['may_be_lost']} of these tokens hold a character that no kept token spells; a larger --size "
            "keeps more of them"
        )
    print(f"vocabulary sizes that cover a fraction of the corpus: {sizes}")
    print(f"written to {options.output}: {', '.join(sorted(x.name for x in options.output.iterdir()))}")
    return 0


def load(name: str):
    """With its output layer, where the checkpoint has one."""
    import transformers

    configuration = transformers.AutoConfig.from_pretrained(name)
    architecture = (getattr(configuration, "architectures", None) or [None])[0]
    found = getattr(transformers, architecture or "AutoModel", transformers.AutoModel)
    return found.from_pretrained(name)


def size_of(text: str) -> int | float:
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        raise ValueError(f"--size: expected a fraction such as 0.5 or a number of tokens, got {text!r}") from None


def check_size(options, least: int, total: int) -> None:
    """Raise where the size has no room for what is always kept."""
    size, multiple = size_of(options.size), options.multiple_of
    asked = -(-(int(size * total) if isinstance(size, float) else size) // multiple) * multiple
    if asked < min(least, total):
        raise ValueError(
            f"--size: {options.size} keeps {asked:,} of {total:,} tokens, and special tokens, single characters and --keep "
            f"alone are {least:,}; choose --size {math.ceil(100 * least / total) / 100:g} or more"
        )


def always_kept(words: list[str], tokenizer) -> list[int]:
    """Ids of special and added tokens, of single characters and bytes, and of the tokens of `words`."""
    ids = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ids |= {i for token, i in tokenizer.get_vocab().items() if len(token.removeprefix("##")) == 1}
    backend = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if backend.get("byte_fallback"):
        ids |= {i for token, i in tokenizer.get_vocab().items() if token.startswith("<0x") and len(token) == 6}
    for word in words:
        ids |= {*tokenizer(word, add_special_tokens=False)["input_ids"]}
        ids |= {*tokenizer(" " + word, add_special_tokens=False)["input_ids"]}
    return sorted(ids)


def count(options, tokenizer, source):
    from fastkd.vocab.coverage import count_corpus

    if options.workers < 1:
        raise ValueError(f"--workers: expected at least 1, got {options.workers}")
    size = sum(Path(file).stat().st_size for file in options.files)
    read = [0]
    texts = _texts(options.files, options.text_column, read)
    try:
        from rich.progress import Progress
    except ImportError:
        return count_corpus(texts, tokenizer, workers=options.workers, path=source)
    with Progress() as progress:
        bar = progress.add_task("counting", total=size)
        return count_corpus(
            texts, tokenizer, workers=options.workers, path=source,
            advance=lambda n: progress.update(bar, completed=read[0]),
        )  # fmt: skip


def _texts(files: list[str], column: str, read: list[int]) -> Iterator[str]:
    """One text at a time; read[0] counts the bytes read."""
    for file in files:
        kind = Path(file).suffix
        if kind not in (".txt", ".csv", ".tsv", ".jsonl"):
            raise ValueError(f"files: expected .txt, .csv, .tsv or .jsonl, got {file}")
        lines = _lines(file, read)
        for text in lines if kind == ".txt" else _column(_rows(lines, kind), column, file):
            if text.strip():
                yield text.strip()


def _column(rows: Iterator[dict], column: str, file: str) -> Iterator[str]:
    for row in rows:
        if column not in row:
            raise ValueError(f"--text-column: {file} has no column {column!r}, it has {', '.join(map(str, row))}")
        yield row[column] or ""


def _rows(lines: Iterator[str], kind: str) -> Iterator[dict]:
    if kind == ".jsonl":
        return map(json.loads, filter(str.strip, lines))
    options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == ".tsv" else {}
    return csv.DictReader(lines, **options)


def _lines(file: str, read: list[int]) -> Iterator[str]:
    with open(file, "rb") as lines:
        for line in lines:
            read[0] += len(line)
            yield line.decode("utf-8", errors="replace")
