"""`fastkd distill`: a teacher, a student, data, a method; a trained student and a report about it."""

import os
import shutil
import sys
from pathlib import Path


def main(argv: list[str]) -> int:
    try:
        return run(argv)
    except (ValueError, RuntimeError, OSError) as error:
        if os.environ.get("FASTKD_TRACEBACK") == "1":
            raise
        print(f"fastkd distill: {error}", file=sys.stderr)
        return 1


def run(argv: list[str]) -> int:
    """Everything that can be wrong is looked at before training starts."""
    import datasets
    from transformers.utils import logging

    from fastkd.train import agreement, arguments, data, report, tokenisation
    from fastkd.train.callbacks import Watch, show_progress
    from fastkd.train.trainer import DistillTrainer

    whole = arguments.parse(argv)
    model_args, data_args, method_args, args, options = whole
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    _check_options(model_args, data_args)
    _device(model_args.device, args)
    checkpoint = arguments.examine_folder(whole)
    evaluates = args.eval_strategy != "no"
    corpus = data.load(data_args, data_args.task, seed=args.seed, evaluates=evaluates)
    if corpus.validation is None:
        args.eval_strategy = "no"
    tokenizer, teacher, student, words = load_models(model_args, data_args.task, corpus)
    for model in (teacher, student):
        tokenisation.check_length(model, tokenizer, data_args.max_length)
    check_space(student, args)
    tokens, answers = _tokens(corpus, tokenizer, data_args)
    args.label_names = ["labels"]
    args.prediction_loss_only = data_args.task in ("masked_lm", "causal_lm")
    trainer = DistillTrainer(
        student, teacher, method_args.method, task=data_args.task, answers=answers, advance=method_args.advance,
        teacher_dtype=model_args.teacher_dtype, compile_teacher=model_args.compile_teacher,
        teacher_cache=model_args.teacher_cache, words=words, args=args,
        train_dataset=tokens["train"], eval_dataset=tokens.get("validation"), processing_class=tokenizer,
        data_collator=tokenisation.collator(tokenizer, data_args.task, data_args.mlm_probability, data_args.pack),
        compute_metrics=data.metrics(data_args.task, corpus.glue),
    )  # fmt: skip
    watch = Watch(trainer)
    trainer.add_callback(watch)
    show_progress(trainer, "distilling")
    if not model_args.allow_weak_teacher:
        agreement.check_teacher(trainer)
    if checkpoint:
        print(f"resuming from {checkpoint}")
    arguments.save(whole)
    trainer.train(resume_from_checkpoint=checkpoint)
    exported = Path(args.output_dir) / "student"
    trainer.save_model(str(exported))
    rows = report.measure({"teacher": teacher, "student": student}, trainer)
    source = data_args.dataset or data_args.train_file
    page = report.write(
        Path(args.output_dir) / arguments.FINISHED, title=f"{method_args.method} · {source}",
        lead=_coverage(words, teacher, tokenizer, tokens["train"]),
        rows=rows, histories={"student": trainer.state.log_history}, maps=watch.maps, config=options,
    )  # fmt: skip
    print(f"student: {exported}\nreport:  {page}")
    return 0


def _coverage(words, teacher, tokenizer, tokens) -> str:
    """What a student with fewer words can say of its text; "" where it has all of the teacher's."""
    from fastkd.train.agreement import unknown_share

    if words is None:
        return ""
    known = 1 - unknown_share(tokens, tokenizer.unk_token_id)
    every = teacher.config.get_text_config().vocab_size
    return (
        f"The student has {len(words):,} of the teacher's {every:,} words; they cover {known:.1%} of the training text."
    )


def _check_options(model_args, data_args) -> None:
    from fastkd.train.batch import TASKS

    if not model_args.teacher:
        raise ValueError("teacher: name one, a hub id or a folder with a (fine-tuned) model")
    sources = [x for x in (model_args.student, model_args.student_layers, model_args.student_config) if x]
    if len(sources) != 1:
        raise ValueError(
            "student: give exactly one of --student, --student-layers (0,2,4 or every:2), --student-config"
        )
    if data_args.task not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {data_args.task!r}")
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


def load_models(model_args, task: str, corpus):
    from transformers import AutoTokenizer

    from fastkd.train import agreement, data, student

    kind = student.AUTO[task]
    options = {"trust_remote_code": model_args.trust_remote_code, "attn_implementation": "sdpa"}

    def load(name, revision, **extra):
        try:
            return kind.from_pretrained(name, revision=revision, **options, **extra)
        except OSError as error:
            raise ValueError(
                f"{name} is neither a folder with a model nor a model that the hub gives here: {_first_line(error)}"
            ) from error

    teacher = load(model_args.teacher, model_args.teacher_revision)
    tokenizer = AutoTokenizer.from_pretrained(model_args.teacher, revision=model_args.teacher_revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    teacher.config.pad_token_id = tokenizer.pad_token_id
    words = None
    if model_args.student_layers:
        made = student.from_layers(teacher, model_args.student_layers)
    elif model_args.student_config:
        made = student.from_config(teacher, model_args.student_config)
    else:
        own = AutoTokenizer.from_pretrained(model_args.student, revision=model_args.student_revision)
        words = agreement.teacher_words(own, tokenizer)
        tokenizer = tokenizer if words is None else own  # the data bear the student's ids
        labels = {"num_labels": teacher.config.num_labels} if task in ("classification", "regression") else {}
        made = load(model_args.student, model_args.student_revision, **labels)
        made.config.pad_token_id = tokenizer.pad_token_id
        if labels and agreement.label_names(made.config.id2label) is None:
            made.config.id2label = teacher.config.id2label
            made.config.label2id = {name: i for i, name in teacher.config.id2label.items()}
    if task in ("classification", "cloze"):
        data.number_classes(corpus, made.config.id2label if task == "classification" else None)
    return tokenizer, teacher, made, words


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


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


def _tokens(corpus, tokenizer, data_args):
    import torch

    from fastkd.train import tokenisation

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
    for split in ("train", "validation"):
        rows = getattr(corpus, split)
        if rows is not None:
            options = (data_args.task, data_args.max_length, data_args.template, data_args.pack)
            tokens[split], whole[split] = tokenisation.tokenise(rows, corpus, tokenizer, *options)
    print("\n".join(tokenisation.summary(corpus, tokens, whole, data_args.max_length)))
    return tokens, answers
