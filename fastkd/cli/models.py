"""The models that a run names: found, loaded, and refused in one sentence where they cannot serve."""

from fastkd.train import agreement, cache, data, embedding, student
from fastkd.train.batch import NAMED_TASKS
from fastkd.train.cache import identity
from fastkd.train.methods import Side


def load(run, corpus, cached: bool = False):
    """tokenizer, teacher (None in fine-tuning), student, and teacher_tokens (see agreement.teacher_tokens). cached: a cache
    speaks for the teacher, which is then None."""
    from transformers import AutoConfig, AutoTokenizer

    options, task = run.model, run.data.task
    remote = {"trust_remote_code": options.trust_remote_code}
    name, revision = (
        (options.teacher, options.teacher_revision) if run.method else (options.student, options.student_revision)
    )
    fresh = not run.method or options.finetune_teacher
    if fresh:  # its outputs are the data's classes
        data.number_classes(corpus)
    head = _head(task, corpus.names) if fresh else {}
    model = None
    if not (cached and options.student):  # else a student would be made of it
        model = _model("teacher" if run.method else "model", name, revision, task, remote, new_head=fresh, **head)
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, **remote)
    if task == "token_classification":
        tokenizer = _for_words(tokenizer, name, revision, remote)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = AutoConfig.from_pretrained(name, revision=revision, **remote) if model is None else model.config
    config.pad_token_id = tokenizer.pad_token_id
    if not run.method:
        return tokenizer, None, model, None
    teacher_tokens = None
    if options.student_layers:
        made = student.from_layers(model, options.student_layers)
    elif options.student_config:
        made = student.from_config(model, options.student_config)
    else:
        own = AutoTokenizer.from_pretrained(options.student, revision=options.student_revision, **remote)
        teacher_tokens = agreement.teacher_tokens(own, tokenizer)
        tokenizer = tokenizer if teacher_tokens is None else own  # the data bear the student's ids
        labels = {"num_labels": config.num_labels} if task in (*NAMED_TASKS, "regression") else {}
        made = _model("student", options.student, options.student_revision, task, remote, new_head=True, **labels)
        made.config.pad_token_id = tokenizer.pad_token_id
        if labels and agreement.label_names(made.config.id2label) is None:
            made.config.id2label = config.id2label
            made.config.label2id = {name: i for i, name in config.id2label.items()}
    if task in (*NAMED_TASKS, "cloze") and not fresh:
        data.number_classes(corpus, None if task == "cloze" else made.config.id2label)
    return tokenizer, None if cached else model, made, teacher_tokens


def cache_of(run) -> tuple[cache.Options | None, bool]:
    """The options of the run's cache, and whether it speaks for the teacher, whose weights are then not loaded."""
    from transformers import AutoConfig

    options = run.model
    if not run.method or options.finetune_teacher or options.teacher_cache is None:
        return None, False
    config = None
    if options.from_logprobs:
        remote = {"trust_remote_code": options.trust_remote_code}
        config = AutoConfig.from_pretrained(options.teacher, revision=options.teacher_revision, **remote)
    files = identity.hash_of_files(options.teacher, options.teacher_revision)
    told = cache.complete(options.teacher_cache)
    asked = {"top_k": options.top_k, "samples": options.samples, "dtype": options.cache_dtype}
    kept = cache.Options(
        options.teacher_cache, **asked, examples_per_shard=options.cache_shard, from_logprobs=options.from_logprobs,
        config=config, files=files,
    )  # fmt: skip
    served = told is not None and told["source"] == "log_probs"
    comparable = told is not None and (
        files is None or told["made_from"]["files"] is not None
    )  # else the weights are hashed
    return kept, bool(options.from_logprobs) or served or comparable


def _head(task: str, names: list[str] | None) -> dict:
    """The configuration of a head for these classes, or for a number."""
    if task == "regression":
        return {"num_labels": 1, "ignore_mismatched_sizes": True}
    if task not in NAMED_TASKS:
        return {}
    if names is None:
        raise ValueError("label_column: fine-tuning needs labels, and the training set has none")
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    several = {"problem_type": "multi_label_classification"} if task == "multi_label" else {}
    return {"num_labels": len(names), "ignore_mismatched_sizes": True, **labels, **several}


def _for_words(tokenizer, name: str, revision, remote: dict):
    """The tokenizer as it takes lists of words."""
    from transformers import AutoTokenizer

    if not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer: that of {name} ({type(tokenizer).__name__}) does not say which word a token is of; token_classification "
            "needs a fast one"
        )
    if getattr(tokenizer, "add_prefix_space", True):
        return tokenizer
    return AutoTokenizer.from_pretrained(name, revision=revision, add_prefix_space=True, **remote)


def pooling(run) -> tuple[str, bool]:
    """How the run pools token states, and whether sentence-transformers is to normalise them, as it does for the teacher."""
    from transformers.utils import cached_file

    quiet = dict.fromkeys(("missing_entries", "gated_repo", "connection_errors"), False)
    quiet = {f"_raise_exceptions_for_{name}": value for name, value in quiet.items()}
    return embedding.read_pooling(
        lambda name: cached_file(run.model.teacher, name, revision=run.model.teacher_revision, **quiet),
        run.data.pooling,
    )


def save_pooling(run, made, folder) -> None:
    """Beside the saved student, what sentence-transformers needs to know of it."""
    embedding.write_pooling(folder, *pooling(run), made.config.get_text_config().hidden_size, run.data.max_length)


def _model(side: str, name: str, revision, task: str, remote: dict, *, new_head: bool, **extra):
    """new_head: one whose weights are not in the checkpoint may be new, since it is trained."""
    from transformers import AutoConfig

    try:
        kind = AutoConfig.from_pretrained(name, revision=revision, **remote)
        if kind.is_encoder_decoder:
            raise ValueError(
                f"{side}: {name} ({kind.model_type}) is an encoder-decoder, and fastkd trains encoders and decoders"
            )
        model, found = student.AUTO[task].from_pretrained(
            name, revision=revision, output_loading_info=True, **remote, **extra
        )
    except OSError as error:
        raise ValueError(
            f"{name} is neither a folder with a model nor a model that the hub gives here: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise ValueError(f"{side}: {name} ({kind.model_type}) has no model for the task {task}") from error
    if task == "causal_lm" and not Side.of(model).causal:
        raise ValueError(
            f"{side}: {name} ({kind.model_type}) is an encoder, whose tokens see the tokens that causal_lm asks for; choose "
            "--task masked_lm, or a decoder"
        )
    missing = sorted(found["missing_keys"])
    if missing and not new_head and task != "embedding":  # where a pooler may be missing, which nobody reads
        raise ValueError(
            f"{side}: {name} has no trained head for {task} ({', '.join(missing)} are not in it); train it with "
            f"`fastkd finetune --model {name}` on the same data, or pass --finetune_teacher"
        )
    return model
