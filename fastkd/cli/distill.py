"""`fastkd distill`: a teacher, a student, data, a method; a trained student and a report about it."""

import contextlib
import functools
import json
import logging
import os
import shutil
import statistics
from pathlib import Path

from fastkd.distributed import on_first_rank


def main(argv: list[str], command: str = "distill") -> int:
    import datasets
    from torch import distributed as dist
    from transformers.utils.logging import disable_progress_bar

    from fastkd.cli import arguments

    joined = dist.is_initialized()
    run = arguments.parse(argv, command)
    datasets.disable_progress_bars()
    disable_progress_bar()
    with contextlib.ExitStack() as stack:
        if run.args.process_index:  # one rank speaks
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            logging.getLogger("fastkd").setLevel(logging.ERROR)
        if run.args.seeds:
            several(run)
        elif finished(run):
            raise ValueError(
                f"output_dir: {run.args.output_dir} holds this run, and it is finished; choose another folder to run it again"
            )
        else:
            train(begun(run) if run.model.finetune_teacher else run)
    if dist.is_initialized() and not joined:
        dist.destroy_process_group()
    return 0


def finished(run) -> bool:
    """What the first rank finds in the output folder, before any rank writes there."""
    from fastkd.cli import arguments

    return on_first_rank(arguments.is_finished, run)


def several(run) -> None:
    """The run once per seed, each in a folder of its own, and what the seeds have in common."""
    from fastkd.train import report

    finished(run)
    shared = begun(run)
    rows: dict[str, list[dict]] = {}
    for seed in range(1, run.args.seeds + 1):
        options = {**shared.options, "seeds": None, "finetune_teacher": None, "teacher": shared.model.teacher}
        options |= {"seed": seed, "output_dir": str(Path(run.args.output_dir) / f"seed-{seed}")}
        for row in once(run.changed(**options)):
            rows.setdefault(row["name"], []).append(row)
    found, shown = {}, []
    for name, of in rows.items():
        found[name] = {key: spread([row[key] for row in of]) for key in ("metric", "test") if key in of[0]}
        shown.append(of[0] | {key: (value["mean"], value["sd"]) for key, value in found[name].items()})
    on_first_rank(_write_seeds, Path(run.args.output_dir) / "seeds.json", found)
    report.print_table(shown)


def _write_seeds(path: Path, found: dict) -> None:
    from fastkd import atomic_write

    with atomic_write.replacing(path) as scratch:
        scratch.write_text(json.dumps(found, indent=1))


def spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "sd": statistics.stdev(values) if len(values) > 1 else 0.0}


def once(run) -> list[dict]:
    """The rows of the run's report; a finished run is not done again."""
    from fastkd.cli import arguments

    if not finished(run):
        return train(run)
    print(f"{run.args.output_dir} is finished")
    return json.loads((Path(run.args.output_dir) / arguments.FINISHED / "report.json").read_text())["models"]


def begun(run):
    """The run, checked and saved, and its teacher fine-tuned where it asks for that."""
    from fastkd.cli import arguments

    if not on_first_rank((Path(run.args.output_dir) / arguments.RESOLVED).exists):
        prepare(run)
        on_first_rank(arguments.save, run)
    if run.model.finetune_teacher:
        of_teacher = run.of_teacher()
        once(of_teacher)
        run.model.teacher = str(Path(of_teacher.args.output_dir) / "model")
        run.model.finetune_teacher, run.model.teacher_revision = False, None
    return run


def prepare(run):
    """The trainer, with everything looked at that can be wrong; the teacher, the student, the tokenised test set, a sentence
    for the report and a summary of the data."""
    from fastkd.cli import models
    from fastkd.train import data, metrics, tokenisation
    from fastkd.train.trainer import DistillTrainer

    model_args, data_args, method_args, args, _ = run
    _check_options(run)
    _device(model_args.device, args)
    with args.main_process_first(desc="data"):  # the others then find them in the cache
        corpus = data.load(data_args, data_args.task, seed=args.seed, evaluates=args.eval_strategy != "no")
    if corpus.validation is None:
        args.eval_strategy = "no"
    kept, cached = models.cache_of(run)
    tokenizer, teacher, student, teacher_tokens = models.load(run, corpus, cached)
    for model in filter(None, (teacher, student)):
        tokenisation.check_length(model, tokenizer, data_args.max_length)
    check_space(student, args)
    with args.main_process_first(desc="tokens"):
        tokens, answers, summary = _tokens(corpus, tokenizer, data_args, kept is not None)
    args.label_names = ["labels"]
    args.prediction_loss_only = data_args.task in ("masked_lm", "causal_lm")
    distils = {} if run.method is None else {
        "method": method_args.method, "advance": method_args.advance, "teacher_dtype": model_args.teacher_dtype,
        "compile_teacher": model_args.compile_teacher, "shard_teacher": model_args.shard_teacher, "teacher_tokens": teacher_tokens,
        "teacher_cache": kept,
        **({"pooling": models.pooling(run)[0]} if data_args.task == "embedding" else {}),
    }  # fmt: skip
    trainer = DistillTrainer(
        student, teacher, task=data_args.task, answers=answers, args=args, **distils,
        max_skipped_steps=args.max_skipped_steps,
        train_dataset=tokens["train"], eval_dataset=tokens.get("validation"), processing_class=tokenizer,
        data_collator=tokenisation.collator(
            tokenizer, data_args.task, data_args.mlm_probability, data_args.pack, args.seed, kept is not None
        ),
        compute_metrics=metrics.of_task(data_args.task, corpus.glue, corpus.names),
    )  # fmt: skip
    lead = (
        "" if teacher_tokens is None else _coverage(teacher_tokens, trainer.teacher_config, tokenizer, tokens["train"])
    )
    if kept is not None:
        spared = ", and the teacher was not loaded" if cached else ""
        lead = f"{lead} The teacher's predictions came from a cache: {trainer.cache.summary()}{spared}.".strip()
    return trainer, teacher, student, tokens.get("test"), lead, "\n".join(summary)


def train(run) -> list[dict]:
    """From the options to a folder with a model and a report, whose rows it returns. A run that was stopped goes on from its
    last checkpoint, also where only the export or the report is left."""
    from fastkd import interruption
    from fastkd.train import checkpoints

    try:
        checkpoint, skipped = on_first_rank(checkpoints.newest, run.args.output_dir)
        for sentence in skipped:
            print(f"skipped: {sentence}")
        trainer, models, test, lead, maps = _trained(run, checkpoint)
        return _export(run, trainer, models, test, lead, maps)
    except (KeyboardInterrupt, interruption.Terminated) as stopped:
        raise type(stopped)(checkpoints.how_to_go_on(run.args.output_dir)) from None


def _trained(run, checkpoint):
    """The trainer after training, the models by name, the test set, a sentence for the report and the maps of transport."""
    from transformers import EarlyStoppingCallback

    from fastkd.cli import arguments
    from fastkd.train import agreement, checkpoints
    from fastkd.train.callbacks import AtEachCheckpoint, Watch, show_progress

    trainer, teacher, student, test, lead, summary = prepare(run)
    print(summary)
    if run.args.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(run.args.early_stopping_patience))
    watch, resolved = Watch(trainer), Path(run.args.output_dir) / arguments.RESOLVED
    trainer.add_callback(watch)
    trainer.add_callback(AtEachCheckpoint(lambda: resolved.exists() or arguments.save(run)))
    bar = show_progress(trainer, "distilling" if run.method else "fine-tuning")
    if teacher is not None and not (checkpoint or run.model.allow_weak_teacher):
        agreement.check_teacher(trainer)
    if checkpoint:
        print(f"resuming from {checkpoint}")
    on_first_rank(arguments.save, run)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        bar.on_train_end(trainer.args, trainer.state, trainer.control)
    if not checkpoints.is_finished(trainer):
        raise RuntimeError(
            f"training was stopped after step {trainer.state.global_step} of {trainer.state.max_steps}, so nothing is "
            f"exported; {checkpoints.how_to_go_on(run.args.output_dir)}"
        )
    name = "student" if run.method else "model"
    models = {name: student} if teacher is None else {"teacher": teacher, name: student}
    return trainer, models, test, lead, watch.maps


def _export(run, trainer, models, test, lead, maps) -> list[dict]:
    """The trained model, and last of all the report, whose folder says that the run is finished."""
    from safetensors import SafetensorError

    from fastkd.cli import arguments
    from fastkd.cli.models import save_pooling
    from fastkd.train import card, report

    folder, name = Path(run.args.output_dir), list(models)[-1]
    with _replacing_folder(run, folder / name) as scratch:
        try:
            trainer.save_model(str(scratch))
        except SafetensorError as error:
            raise RuntimeError(
                f"{name}: could not be written to {folder} ({error}); make room, and give the same command again"
            ) from error
        if run.data.task == "embedding" and not run.args.process_index:
            save_pooling(run, models[name], scratch)
        rows = report.measure(models, trainer, test=test)
        on_first_rank(card.write, scratch, run, rows)
    title = f"{run.method.method if run.method else 'fine-tuning'} · {run.data.dataset or run.data.train_file}"
    with _replacing_folder(run, folder / arguments.FINISHED) as scratch:
        write = functools.partial(
            report.write, scratch, title=title, lead=lead, rows=rows, histories={name: trainer.state.log_history}, maps=maps,
            config=run.options, where="test" if trainer.eval_dataset is None else "validation",
        )  # fmt: skip
        page = on_first_rank(write)
    report.print_table(rows)
    print(f"{name + ':':8} {folder / name}\nreport:  {folder / arguments.FINISHED / page.name}")
    return rows


def _replacing_folder(run, folder: Path):
    """`atomic_write.replacing_folder` on the first rank; the others write nothing."""
    from fastkd import atomic_write

    return atomic_write.replacing_folder(folder) if not run.args.process_index else contextlib.nullcontext(folder)


def _coverage(teacher_tokens, config, tokenizer, tokens) -> str:
    """What a student with fewer tokens than the teacher of this configuration can say of its text."""
    from fastkd.train.agreement import unknown_share

    known = 1 - unknown_share(tokens, tokenizer.unk_token_id)
    every = config.get_text_config().vocab_size
    sizes = f"The student has {len(teacher_tokens):,} of the teacher's {every:,} tokens"
    return f"{sizes}; they cover {known:.1%} of the training text."


def _check_options(run) -> None:
    from fastkd import checks
    from fastkd.train import embedding
    from fastkd.train.batch import TASKS

    model_args, data_args = run.model, run.data
    if run.method is None and not model_args.student:
        raise ValueError("model: name one, a hub id or a folder with a model")
    if run.method is not None and not model_args.teacher:
        raise ValueError("teacher: name one, a hub id or a folder with a (fine-tuned) model")
    sources = [x for x in (model_args.student, model_args.student_layers, model_args.student_config) if x]
    if len(sources) != 1:
        raise ValueError(
            "student: give exactly one of --student, --student-layers (0,2,4 or every:2), --student-config"
        )
    if data_args.task not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {data_args.task!r}")
    if data_args.task == "embedding" and (run.method is None or model_args.finetune_teacher):
        raise ValueError(
            "task: embedding has no labels to fine-tune on; train the teacher with sentence-transformers, for example"
        )
    if data_args.pooling is not None:
        checks.one_of("pooling", data_args.pooling, tuple(embedding.POOLINGS))
    if model_args.teacher_cache is None and (model_args.top_k or model_args.samples or model_args.from_logprobs):
        raise ValueError("teacher_cache: top_k, samples and from_logprobs say what it holds; name its folder")
    if data_args.pack and data_args.task != "causal_lm":
        raise ValueError(f"pack: is for the task causal_lm, got {data_args.task!r}; leave it out")
    if data_args.task == "cloze":
        template = data_args.template or ""
        if "{text}" not in template or "{mask}" not in template or not data_args.answers:
            raise ValueError(
                "template, answers: cloze needs both, as in --template '{text} It was {mask}.' --answers bad,good"
            )


def _device(name: str, args) -> None:
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda was asked for, but torch finds no CUDA device here; use --device cpu")
    if name == "cpu" and args.device.type != "cpu":
        raise ValueError("device: for the CPU pass --use_cpu, which Trainer itself understands")


def check_space(student, args) -> None:
    """A checkpoint is the student, its optimizer's two moments, and what the method learned: four students are ample."""
    size = 4 * sum(p.numel() * p.element_size() for p in student.parameters())
    kept = (args.save_total_limit or 4) + 1
    free = shutil.disk_usage(_existing(args.output_dir)).free
    if args.save_strategy != "no" and free < size * kept:
        raise ValueError(
            f"output_dir: {kept} checkpoints need about {size * kept / 2**30:.1f} GiB, and {args.output_dir} has "
            f"{free / 2**30:.1f} GiB free; lower --save_total_limit, or choose another folder"
        )


def _existing(path: str) -> Path:
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def _tokens(corpus, tokenizer, data_args, once: bool = False):
    """once: masked_lm hides the same tokens in each epoch."""
    import torch

    from fastkd.train import data, tokenisation

    answers = None
    if data_args.task == "cloze":
        words = [word.strip() for word in data_args.answers.split(",")]
        if corpus.names and len(words) != len(corpus.names):
            raise ValueError(f"answers: {len(words)} words for {len(corpus.names)} classes ({', '.join(corpus.names)})")
        ids = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
        long = [word for word, pieces in zip(words, ids, strict=True) if len(pieces) != 1]
        if long:
            raise ValueError(f"answers: {', '.join(long)} is more than one token; choose words of the vocabulary")
        answers = torch.tensor([pieces[0] for pieces in ids])
    tokens, whole = {}, {}
    for split in data.SPLITS:
        rows = getattr(corpus, split)
        if rows is not None:
            options = (data_args.task, data_args.max_length, data_args.template, data_args.pack)
            tokens[split], whole[split] = tokenisation.tokenise(rows, corpus, tokenizer, *options)
            if once and data_args.task == "masked_lm":
                tokens[split] = tokenisation.hide_tokens(tokens[split], tokenizer, data_args.mlm_probability)
    return tokens, answers, tokenisation.summary(corpus, tokens, whole, data_args.max_length, data_args.task)
