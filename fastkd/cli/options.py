"""The options of a run: of the models, the data, the method, and of Trainer with this package's defaults."""

import os
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from fastkd.train.batch import TASKS
from fastkd.train.data import SHIPPED

INTERVALS = ("no", "steps", "epoch")


@dataclass
class ModelArguments:
    _argument_group_name = "models"

    teacher: str | None = field(default=None, metadata={"help": "hub id or folder of the (fine-tuned) teacher"})
    student: str | None = field(
        default=None, metadata={"help": "hub id or folder of a student; or make one of the teacher:"}
    )
    student_layers: str | None = field(
        default=None, metadata={"help": "make the student of the teacher's layers: 0,2,4 or every:2"}
    )
    student_config: str | None = field(
        default=None, metadata={"help": "make it smaller: hidden_size=192,… or a .json file"}
    )
    finetune_teacher: bool = field(
        default=False, metadata={"help": "first train the teacher on this data, into <output_dir>/teacher"}
    )
    teacher_revision: str | None = field(default=None, metadata={"help": "the teacher's commit on the hub"})
    student_revision: str | None = field(default=None, metadata={"help": "the student's commit on the hub"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run code that comes with either model"})
    teacher_dtype: str = field(default="auto", metadata={"help": "auto: bfloat16 on a GPU that has it, else float32"})
    compile_teacher: bool = field(default=False, metadata={"help": "torch.compile the teacher's forward"})
    shard_teacher: bool = field(default=False, metadata={"help": "divide the teacher's layers among the processes"})
    teacher_cache: str | None = field(
        default=None, metadata={"help": "keep what the teacher predicts in this folder, or use it"}
    )
    top_k: int | None = field(default=None, metadata={"help": "cache the k most likely tokens and the others' mass"})
    samples: int | None = field(
        default=None, metadata={"help": "cache so many tokens drawn from its distribution; with top_k, from the others"}
    )
    cache_dtype: str | None = field(
        default=None, metadata={"help": "float32, bfloat16 or int8; otherwise the teacher's"}
    )
    cache_shard: int | None = field(default=None, metadata={"help": "examples per file; otherwise for about 128 MB"})
    from_logprobs: str | None = field(default=None, metadata={"help": "make the cache of a server's log-probabilities"})
    allow_weak_teacher: bool = field(
        default=False, metadata={"help": "go on with a teacher that is no better than chance on the validation set"}
    )
    device: str = field(default="auto", metadata={"help": "auto, cpu or cuda"})


@dataclass
class FinetuneArguments:
    """What `fastkd finetune` has in place of ModelArguments and MethodArguments."""

    _argument_group_name = "model"

    model: str | None = field(default=None, metadata={"help": "hub id or folder of the model to train"})
    model_revision: str | None = field(default=None, metadata={"help": "the model's commit on the hub"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run code that comes with the model"})
    device: str = field(default="auto", metadata={"help": "auto, cpu or cuda"})


@dataclass
class DataArguments:
    _argument_group_name = "data"

    dataset: str | None = field(default=None, metadata={"help": f"{SHIPPED} (shipped), glue/<task>, or a hub id"})
    dataset_config: str | None = field(default=None, metadata={"help": "the hub data set's configuration"})
    train_file: str | None = field(default=None, metadata={"help": ".csv .tsv .jsonl .parquet .txt"})
    validation_file: str | None = field(
        default=None, metadata={"help": "likewise; without one, 5 %% of the training rows are held out"}
    )
    test_file: str | None = field(default=None, metadata={"help": "likewise; evaluated once, at the end"})
    text_column: str = field(default="text", metadata={"help": "the column with the text"})
    pair_column: str | None = field(default=None, metadata={"help": "the column with the second text, if there is one"})
    label_column: str = field(default="label", metadata={"help": "the column with the label, if there is one"})
    task: str = field(default="classification", metadata={"help": ", ".join(TASKS)})
    max_length: int = field(default=128, metadata={"help": "tokens per example; longer ones are cut"})
    pack: bool = field(
        default=False,
        metadata={"help": "causal_lm: rows of max_length tokens that hold several documents; nothing is cut"},
    )
    template: str | None = field(default=None, metadata={"help": "cloze: for example '{text} It was {mask}.'"})
    answers: str | None = field(default=None, metadata={"help": "cloze: one word per class, for example 'bad,good'"})
    pooling: str | None = field(
        default=None,
        metadata={"help": "embedding: mean, cls or last (token); by default as the teacher does it, or mean"},
    )
    mlm_probability: float = field(default=0.15, metadata={"help": "fraction of the tokens that masked_lm hides"})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "use only so many training rows, a random choice"}
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "likewise of the validation rows"})


@dataclass
class MethodArguments:
    _argument_group_name = "method"

    method: str = field(
        default="kd", metadata={"help": "kd, bert_emd:beta=0.005, 'fcd + kd:weight=0.5' …; `fastkd methods` lists them"}
    )
    advance: str = field(default="step", metadata={"help": "learned state moves once per 'step' or per 'micro' batch"})


@dataclass
class RunArguments(TrainingArguments):
    """Trainer's own arguments, with this house's defaults."""

    _argument_group_name = "training (options of transformers' TrainingArguments; --help-all has all of them)"

    logging_steps: float = field(default=20, metadata={"help": "log every so many steps"})
    report_to: str = field(default="tensorboard", metadata={"help": "tensorboard, wandb, trackio, none"})
    eval_strategy: str = field(
        default="epoch", metadata={"help": "evaluate every epoch, every --eval_steps, or never", "choices": INTERVALS}
    )
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={
            "help": "order of the training rows; by length there is less padding",
            "choices": ["group_by_length", "random", "sequential", "batch_rebalance"],
        },
    )
    save_strategy: str = field(
        default="steps",
        metadata={
            "help": "save checkpoints every --save_steps, every epoch, or never",
            "choices": (*INTERVALS, "best"),
        },
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "keep so many checkpoints"})
    seeds: int | None = field(
        default=None,
        metadata={"help": "runs with the seeds 1 to N, into <output_dir>/seed-1 …; their mean and deviation"},
    )
    max_skipped_steps: int = field(
        default=10,
        metadata={
            "help": "end the run after so many steps in a row whose loss or gradient is not finite; fewer are skipped"
        },
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "stop after so many evaluations without a better --metric_for_best_model (loss), and keep the best"
        },
    )

    def __post_init__(self):
        for name in ("seeds", "early_stopping_patience", "max_skipped_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.early_stopping_patience:
            if self.eval_strategy == "no":
                raise ValueError("early_stopping_patience: needs evaluations; choose --eval_strategy epoch or steps")
            self.load_best_model_at_end = True  # a checkpoint at each evaluation, so that the best one is there
            self.save_strategy, self.save_steps = self.eval_strategy, self.eval_steps or self.logging_steps
        _several_on_cpus()
        super().__post_init__()
        if self.resume_from_checkpoint:
            raise ValueError(
                "resume_from_checkpoint: a run resumes by itself, from the last checkpoint of its output_dir, when the same "
                "command is given again; leave it out"
            )
        if self.enable_jit_checkpoint:
            raise ValueError("enable_jit_checkpoint: SIGTERM and Ctrl-C save a checkpoint without it; leave it out")
        if self.do_predict:
            raise ValueError("do_predict: leave it out; --test_file is evaluated at the end")
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor: the losses of fastkd have none, got {self.label_smoothing_factor}; leave it out"
            )


def _several_on_cpus() -> None:
    """Where torchrun starts processes on a machine without GPUs, accelerate lets each train alone, unless it is told."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
