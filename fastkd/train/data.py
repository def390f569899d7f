"""From a name or a file to splits of clean rows: columns and values checked, a part held out, classes numbered."""

import csv
import gzip
import io
from dataclasses import dataclass, field
from pathlib import Path

from .agreement import label_names
from .batch import LABEL_FREE_TASKS, LANGUAGE_TASKS, NAMED_TASKS

SPLITS = ("train", "validation", "test")
SHIPPED = "movie-reviews"
LISTED_TASKS = ("token_classification", "multi_label")  # a row has a list of labels
WORDS, TAGS = ("tokens", "words"), ("ner_tags", "tags", "labels", "label")  # columns of token_classification, as usual
FORMATS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
GLUE = {
    "cola": ("sentence", None), "sst2": ("sentence", None), "mrpc": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"), "stsb": ("sentence1", "sentence2"), "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"), "rte": ("sentence1", "sentence2"), "wnli": ("sentence1", "sentence2"),
}  # fmt: skip


@dataclass
class Corpus:
    """Splits before tokenising, and what they hold. label: None where the task or the data has none. found: the labels that
    there are, before rows are held out or left out. names: the classes in the order of their numbers. dropped: how many rows
    of each split had no text. held_out: whether the validation set is a part of what was given for training."""

    train: object
    validation: object
    text: str
    pair: str | None
    label: str | None
    found: list | None = None
    names: list[str] | None = None
    glue: str | None = None
    test: object = None
    dropped: dict[str, int] = field(default_factory=dict)
    held_out: bool = False

    def labelled(self) -> list[str]:
        """The splits that have labels."""
        found = {split: getattr(self, split) for split in SPLITS}
        return [split for split, rows in found.items() if rows is not None and self.label in rows.column_names]


def movie_reviews(split: str, task: str = "classification"):
    """The shipped snippets (data/movie_reviews.md): text and label, a class or the mean rating."""
    from datasets import ClassLabel, Dataset, Features, Value

    packed = Path(__file__).resolve().parent.parent / "data" / "movie_reviews.tsv.gz"
    with gzip.open(packed) as file:
        rows = list(csv.reader(io.TextIOWrapper(file, "utf-8", newline="\n"), delimiter="\t", quoting=csv.QUOTE_NONE))[
            1:
        ]
    kept = [(text, float(rating)) for _, where, rating, text in rows if where == split]
    label = Value("float64")
    if task == "classification":
        kept = [(text, int(rating > 0)) for text, rating in kept if rating != 0]
        label = ClassLabel(names=["negative", "positive"])
    texts, labels = zip(*kept, strict=True)
    features = Features({"text": Value("string"), "label": label})
    return Dataset.from_dict({"text": list(texts), "label": list(labels)}, features=features)


def load(options, task: str, *, seed: int = 42, evaluates: bool = True) -> Corpus:
    """`options` is arguments.DataArguments. evaluates: whether a validation set is needed; where none is given, 5 % of the
    training rows are held out, 2000 at most."""
    sources = {split: getattr(options, f"{split}_file") for split in SPLITS}
    if options.train_file:
        train, validation = (_file(f"{split}_file", sources[split]) for split in SPLITS[:2])
        text, pair, label = options.text_column, options.pair_column, options.label_column
    elif options.dataset == SHIPPED:
        kind = "regression" if task in ("regression", "embedding") else "classification"
        train, validation = movie_reviews("train", kind), movie_reviews("validation", kind)
        text, pair, label = "text", None, "label"
    elif options.dataset:
        train, validation, text, pair, label = _named(options)
    else:
        raise ValueError(
            f"dataset: name one ({SHIPPED!r} comes with fastkd, glue/sst2, any of the hub's) or give --train-file"
        )
    if task == "token_classification":
        text, label = _usual(train, "text", text, WORDS), _usual(train, "label", label, TAGS)
    if task in LANGUAGE_TASKS or (task == "embedding" and pair is None):
        label = None
    corpus = Corpus(train, validation, text, pair, label, test=_file("test_file", options.test_file))
    corpus.glue = options.dataset.split("/")[1] if (options.dataset or "").startswith("glue/") else None
    if corpus.label == "label" and not corpus.labelled():
        corpus.label = None  # no column was named: unlabelled text
    for split in SPLITS:
        if getattr(corpus, split) is not None:
            _clean(corpus, split, sources[split] or f"{options.dataset} ({split})", task)
    if task not in LABEL_FREE_TASKS and "validation" not in corpus.labelled():
        corpus.validation = None  # there is nothing to compare predictions with
    if task in (*NAMED_TASKS, "cloze") and corpus.labelled():
        corpus.found = sorted(set(_flat(getattr(corpus, corpus.labelled()[0])[corpus.label][:])))
    if evaluates and corpus.validation is None and (task in LABEL_FREE_TASKS or corpus.label):
        _hold_out(corpus, seed)
    for split, most in (("train", options.max_train_samples), ("validation", options.max_eval_samples)):
        rows = getattr(corpus, split)
        if most and rows is not None and most < len(rows):
            setattr(corpus, split, rows.shuffle(seed=seed).select(range(most)))
    return corpus


def _usual(rows, default: str, column: str, names: tuple[str, ...]) -> str:
    """The first of the usual names that there is, where no column was named."""
    found = [name for name in names if name in rows.column_names]
    return found[0] if column == default and found else column


def _flat(labels: list) -> list:
    """The labels of rows that have one each, or a list of them."""
    return [x for row in labels for x in row] if labels and isinstance(labels[0], list) else labels


def _file(option: str, path: str | None):
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    if not path:
        return None
    suffix = Path(path).suffix
    if suffix not in FORMATS:
        raise ValueError(f"{option}: {path} is none of {', '.join(FORMATS)}")
    if not Path(path).is_file():
        raise ValueError(f"{option}: there is no file {path}")
    if Path(path).stat().st_size == 0:
        raise ValueError(f"{option}: {path} is empty")
    if suffix != ".parquet":
        _check_utf8(option, path)
    options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if suffix == ".tsv" else {}
    if FORMATS[suffix] == "csv":  # "null", "None" and "NA" are texts and labels like others
        options |= {"keep_default_na": False, "na_values": [""]}
    try:
        return load_dataset(FORMATS[suffix], data_files=path, split="train", **options)
    except (DatasetGenerationError, ValueError) as error:
        if "corresponds to no data" in str(error):
            raise ValueError(f"{option}: {path} has no rows") from error
        while error.__cause__ is not None:
            error = error.__cause__
        why_not = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{option}: {path} cannot be read: {why_not}") from error


def _check_utf8(option: str, path: str) -> None:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{option}: {path} is not UTF-8: line {number} has the byte 0x{line[error.start]:02x}; convert it, for "
                    "example with iconv -f ISO-8859-1 -t UTF-8"
                ) from error


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


def _clean(corpus: Corpus, split: str, source: str, task: str) -> None:
    """Drop and count the rows without text; a value that is missing or of another type is refused by file, column and row."""
    rows = getattr(corpus, split)
    if len(rows) == 0:
        raise ValueError(f"dataset: {source} has no rows")
    needed = corpus.label in rows.column_names or corpus.label != "label" or "train" in corpus.labelled()
    label = corpus.label if needed else None
    asked = {"text_column": corpus.text, "pair_column": corpus.pair, "label_column": label}
    values = {}
    for option, column in asked.items():
        if column is None:
            continue
        if column not in rows.column_names:
            raise ValueError(
                f"{option}: {source} has no column {column!r}; it has {', '.join(map(repr, rows.column_names))}"
            )
        values[option] = rows[column][:]

    def refuse_if(wrong, option: str, what: str) -> None:
        row = next((i for i in kept if wrong(values[option][i])), None)
        if row is not None:
            raise ValueError(
                f"{option}: {source} has {what} in column {asked[option]!r}, row {row + 1} (the first row of data is 1): "
                f"{values[option][row]!r}; correct or remove the row, or name another column"
            )

    texts = values["text_column"]
    kept = range(len(rows))
    if task == "token_classification":
        words = lambda x: isinstance(x, list) and all(isinstance(word, str) for word in x)  # noqa: E731
        refuse_if(lambda x: x is not None and not words(x), "text_column", "no list of words")
    else:
        for option in [name for name in values if name != "label_column"]:
            refuse_if(lambda x: not isinstance(x, str | None), option, "no text")
    kept = [i for i in kept if texts[i] and (isinstance(texts[i], list) or not texts[i].isspace())]
    if not kept:
        raise ValueError(f"text_column: every row of column {corpus.text!r} of {source} is empty")
    if corpus.pair:
        refuse_if(lambda x: not x or x.isspace(), "pair_column", "an empty second text")
    if label:
        refuse_if(lambda x: x is None or x != x, "label_column", "no label")
        if task in ("regression", "embedding"):
            refuse_if(lambda x: not isinstance(x, int | float), "label_column", "no number")
        if task in LISTED_TASKS:
            refuse_if(lambda x: not isinstance(x, list) or None in x, "label_column", "no list of labels")
        elif isinstance(values["label_column"][kept[0]], list):
            raise ValueError(
                f"label_column: {source} has lists of labels in column {label!r}; choose --task multi_label or "
                "token_classification"
            )
        if task == "token_classification":
            _check_sizes(texts, values["label_column"], kept, source)
    corpus.dropped[split] = len(rows) - len(kept)
    if corpus.dropped[split]:
        setattr(corpus, split, rows.select(kept))


def _check_sizes(words: list, labels: list, kept: list[int], source: str) -> None:
    for i in kept:
        if len(words[i]) != len(labels[i]):
            raise ValueError(
                f"label_column: {source} has {len(labels[i])} labels for {len(words[i])} words in row {i + 1} (the first row of "
                "data is 1); give each word one"
            )


def _hold_out(corpus: Corpus, seed: int) -> None:
    held = min(max(len(corpus.train) // 20, 1), 2000)
    if len(corpus.train) > held:
        parts = corpus.train.train_test_split(test_size=held, seed=seed)
        corpus.train, corpus.validation, corpus.held_out = parts["train"], parts["test"], True


def number_classes(corpus: Corpus, id2label: dict | None = None) -> None:
    """Labels -> 0 … C - 1: by the model's names of its outputs (`id2label`) where the labels are names, else in sorted order."""
    found, splits = corpus.found, corpus.labelled()
    if found is None:
        return
    if len(found) < 2 and splits[0] == "train":
        raise ValueError(
            f"label_column: every training row has the one label {found[0]!r}; nothing can be learned from it"
        )
    if any(isinstance(x, float) and not x.is_integer() for x in found):
        raise ValueError(
            f"label_column: {corpus.label!r} holds fractions; for a number to predict choose --task regression"
        )
    feature = getattr(corpus, splits[0]).features[corpus.label]
    names = getattr(getattr(feature, "feature", feature), "names", None)  # of a list of labels, or of a label
    if names is not None:
        found = list(range(len(names)))
    named = names is not None or isinstance(found[0], str)
    names = names or [str(int(x) if isinstance(x, float) else x) for x in found]
    order = range(len(names))
    theirs = None if id2label is None else label_names(id2label)
    if named and theirs is not None:
        ours, known = ([name.strip().lower() for name in both] for both in (names, theirs))
        if not set(ours) <= set(known):
            raise ValueError(
                f"label_column: the data's labels are {', '.join(names)}, and the teacher's are {', '.join(theirs)}; give "
                "each label one name, in the data or in the teacher's config.json (id2label and label2id)"
            )
        order, names = [known.index(name) for name in ours], theirs
    elif id2label is not None and len(id2label) != len(names):
        raise ValueError(
            f"teacher: has {len(id2label)} outputs, but the data has {len(names)} classes ({', '.join(names)}); fine-tune "
            "the teacher on this task first"
        )
    corpus.names, numbers = list(names), dict(zip(found, order, strict=True))
    for split in splits:
        rows = getattr(corpus, split)
        labels = rows[corpus.label][:]
        strange = sorted(set(_flat(labels)) - set(found), key=str)
        if strange:
            raise ValueError(f"label_column: the {split} set has {strange[0]!r}, which no training row has")
        labels = [[numbers[x] for x in row] if isinstance(row, list) else numbers[row] for row in labels]
        setattr(corpus, split, rows.remove_columns(corpus.label).add_column(corpus.label, labels))
