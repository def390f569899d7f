"""From a name or a file to tokenised splits: columns checked, classes found, examples numbered."""

import csv
import gzip
import io
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from .batch import WORD_TASKS

SHIPPED = "movie-reviews"
FORMATS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
GLUE = {
    "cola": ("sentence", None), "sst2": ("sentence", None), "mrpc": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"), "stsb": ("sentence1", "sentence2"), "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"), "rte": ("sentence1", "sentence2"), "wnli": ("sentence1", "sentence2"),
}  # fmt: skip


@dataclass
class Corpus:
    """Splits before tokenising, and what they hold. names: the classes in the order of their numbers."""

    train: object
    validation: object
    text: str
    pair: str | None
    label: str | None
    names: list[str] | None = None
    glue: str | None = None
    test: object = None


def movie_reviews(split: str, task: str = "classification"):
    """The shipped snippets (data/movie_reviews.md): text and label, a class 0/1 or the mean rating."""
    from datasets import Dataset

    packed = Path(__file__).resolve().parent.parent / "data" / "movie_reviews.tsv.gz"
    with gzip.open(packed) as file:
        rows = list(csv.reader(io.TextIOWrapper(file, "utf-8", newline="\n"), delimiter="\t", quoting=csv.QUOTE_NONE))[
            1:
        ]
    kept = [(text, float(rating)) for _, where, rating, text in rows if where == split]
    if task == "classification":
        kept = [(text, int(rating > 0)) for text, rating in kept if rating != 0]
    texts, labels = zip(*kept, strict=True)
    return Dataset.from_dict({"text": list(texts), "label": list(labels)})


def load(options, task: str) -> Corpus:
    """`options` is arguments.DataArguments."""
    if options.train_file:
        train, validation = _file(options.train_file), _file(options.validation_file)
        text, pair, label = options.text_column, options.pair_column, options.label_column
    elif options.dataset == SHIPPED:
        kind = "regression" if task == "regression" else "classification"
        train, validation = movie_reviews("train", kind), movie_reviews("validation", kind)
        text, pair, label = "text", None, "label"
    elif options.dataset:
        train, validation, text, pair, label = _named(options)
    else:
        raise ValueError(
            f"dataset: name one ({SHIPPED!r} comes with fastkd, glue/sst2, any of the hub's) or give --train-file"
        )
    needs_label = task not in WORD_TASKS
    corpus = Corpus(train, validation, text, pair, label if needs_label else None, test=_file(options.test_file))
    corpus.glue = options.dataset.split("/")[1] if (options.dataset or "").startswith("glue/") else None
    _check_columns(corpus)
    if options.max_train_samples:
        corpus.train = corpus.train.select(range(min(options.max_train_samples, len(corpus.train))))
    if options.max_eval_samples and corpus.validation is not None:
        corpus.validation = corpus.validation.select(range(min(options.max_eval_samples, len(corpus.validation))))
    if task in ("classification", "cloze"):
        _number_classes(corpus)
        if options.dataset == SHIPPED:
            corpus.names = ["negative", "positive"]
    return corpus


def _file(path: str | None):
    from datasets import load_dataset

    if not path:
        return None
    suffix = Path(path).suffix
    if suffix not in FORMATS:
        raise ValueError(f"train_file, validation_file, test_file: {path} is none of {', '.join(FORMATS)}")
    if not Path(path).is_file():
        raise ValueError(f"train_file, validation_file, test_file: there is no file {path}")
    if Path(path).stat().st_size == 0:
        raise ValueError(f"train_file, validation_file, test_file: {path} is empty")
    options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if suffix == ".tsv" else {}
    try:
        return load_dataset(FORMATS[suffix], data_files=path, split="train", **options)
    except ValueError as error:
        if "corresponds to no data" in str(error):
            raise ValueError(f"train_file, validation_file, test_file: {path} has no rows") from error
        raise


def _named(options):
    from datasets import load_dataset

    name, _, subset = options.dataset.partition("/")
    if name == "glue" and subset not in GLUE:
        raise ValueError(f"dataset: GLUE has no task {subset!r}; it has {', '.join(GLUE)}")
    try:
        if name == "glue":
            splits = load_dataset("nyu-mll/glue", subset)
            text, pair = GLUE[subset]
            label = "label"
        else:
            splits = load_dataset(options.dataset, options.dataset_config)
            text, pair, label = options.text_column, options.pair_column, options.label_column
    except (ConnectionError, FileNotFoundError) as error:
        raise ValueError(
            f"dataset: {options.dataset} cannot be had here ({error}); give --train-file, or {SHIPPED!r}"
        ) from error
    validation = next((splits[s] for s in ("validation", "validation_matched", "test") if s in splits), None)
    return splits["train"], validation, text, pair, label


def _check_columns(corpus: Corpus) -> None:
    for split, rows in (("training", corpus.train), ("validation", corpus.validation), ("test", corpus.test)):
        if rows is None:
            continue
        if len(rows) == 0:
            raise ValueError(f"dataset: the {split} set has no rows")
        asked = {"text_column": corpus.text, "pair_column": corpus.pair, "label_column": corpus.label}
        for option, column in asked.items():
            if column is not None and column not in rows.column_names:
                raise ValueError(
                    f"{option}: the {split} set has no column {column!r}; it has {', '.join(map(repr, rows.column_names))}"
                )


def _number_classes(corpus: Corpus) -> None:
    """Names or numbers -> 0 … C - 1, in sorted order; ClassLabel features already are."""
    feature = corpus.train.features[corpus.label]
    if hasattr(feature, "names"):
        corpus.names = list(feature.names)
    found = sorted(set(corpus.train[corpus.label][:]))
    if len(found) < 2:
        raise ValueError(
            f"label_column: every training row has the one label {found[0]!r}; nothing can be learned from it"
        )
    if hasattr(feature, "names"):
        return
    if all(isinstance(x, float) and not x.is_integer() for x in found):
        raise ValueError(
            f"label_column: {corpus.label!r} holds fractions; for a number to predict choose --task regression"
        )
    corpus.names = [str(name) for name in found]
    if found == list(range(len(found))):
        return
    numbers = {name: number for number, name in enumerate(found)}
    for split in ("train", "validation", "test"):
        rows = getattr(corpus, split)
        if rows is None:
            continue
        labels = rows[corpus.label][:]
        strange = sorted(set(labels) - set(found), key=str)
        if strange:
            raise ValueError(f"label_column: the {split} set has {strange[0]!r}, which no training row has")
        renumbered = rows.remove_columns(corpus.label).add_column(corpus.label, [numbers[x] for x in labels])
        setattr(corpus, split, renumbered)


def check_length(model, tokenizer, length: int) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return
    for module in model.modules():  # positions may start after the padding's
        if isinstance(module, nn.Embedding) and module.num_embeddings == limit and module.padding_idx is not None:
            limit -= module.padding_idx + 1
            break
    if length > limit:
        raise ValueError(
            f"max_length: {length} tokens are asked for, but the {type(model).__name__} has {limit} positions"
        )


def tokenise(rows, corpus: Corpus, tokenizer, task: str, length: int, template: str | None = None):
    """Columns input_ids, attention_mask, (token_type_ids,) example_id, and labels where a row has one."""

    def encode(batch, numbers):
        texts = batch[corpus.text]
        if task == "cloze":
            texts = [template.format(text=text, mask=tokenizer.mask_token) for text in texts]
        pairs = [batch[corpus.pair]] if corpus.pair else []
        encoded = dict(tokenizer(texts, *pairs, truncation=True, max_length=length))
        encoded["example_id"] = numbers
        if task == "cloze":
            encoded["blank"] = [_blank(ids, tokenizer.mask_token_id) for ids in encoded["input_ids"]]
        if task == "regression":
            encoded["labels"] = [float(x) for x in batch[corpus.label]]
        elif task in ("classification", "cloze"):
            encoded["labels"] = batch[corpus.label]
        return encoded

    rows = rows.filter(lambda batch: [bool(x and x.strip()) for x in batch[corpus.text]], batched=True)
    if len(rows) == 0:
        raise ValueError(f"text_column: every row of {corpus.text!r} is empty")
    return rows.map(encode, batched=True, with_indices=True, remove_columns=rows.column_names)


def _blank(ids: list[int], mask_id: int) -> int:
    if mask_id not in ids:
        raise ValueError(
            "template: its {mask} fell to truncation for a long text; put it before {text}, or raise --max-length"
        )
    return ids.index(mask_id)


def collator(tokenizer, task: str, mlm_probability: float = 0.15):
    from transformers import DataCollatorForLanguageModeling, DataCollatorWithPadding

    if task == "masked_lm":
        return DataCollatorForLanguageModeling(tokenizer, mlm_probability=mlm_probability)
    if task == "causal_lm":
        return DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return DataCollatorWithPadding(tokenizer)


def metrics(task: str, glue: str | None = None):
    """compute_metrics for Trainer: the task's own, or that of the GLUE task; None for language modelling (perplexity)."""
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    if task in WORD_TASKS:
        return None

    def of_numbers(outcome) -> dict[str, float]:
        predicted, wanted = outcome.predictions.squeeze(-1), outcome.label_ids
        pearson, spearman = pearsonr(predicted, wanted)[0], spearmanr(predicted, wanted)[0]
        return {
            "mse": float(((predicted - wanted) ** 2).mean()),
            "pearson": float(pearson),
            "spearman": float(spearman),
        }

    def of_classes(outcome) -> dict[str, float]:
        predicted, wanted = outcome.predictions.argmax(-1), outcome.label_ids
        found = {"accuracy": float(accuracy_score(wanted, predicted))}
        if glue == "cola":
            found["matthews"] = float(matthews_corrcoef(wanted, predicted))
        if glue in ("mrpc", "qqp"):
            found["f1"] = float(f1_score(wanted, predicted))
        return found

    return of_numbers if task == "regression" else of_classes
