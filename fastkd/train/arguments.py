"""What a run is told, by flags or by --config run.yaml; flags win. Unknown keys are refused, the resolved run is saved."""

import argparse
import dataclasses
import difflib
import enum
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from .batch import TASKS
from .data import SHIPPED

RESOLVED = "run.yaml"
FINISHED = "report"


@dataclass
class ModelArguments:
    teacher: str | None = field(default=None, metadata={"help": "hub id or folder of the (fine-tuned) teacher"})
    student: str | None = field(default=None, metadata={"help": "hub id or folder of a student, or nothing: see below"})
    student_layers: str | None = field(
        default=None, metadata={"help": "make the student of the teacher's layers: 0,2,4 or every:2"}
    )
    student_config: str | None = field(
        default=None, metadata={"help": "make it smaller: hidden_size=192,… or a .json file"}
    )
    teacher_revision: str | None = field(default=None, metadata={"help": "the teacher's commit on the hub"})
    student_revision: str | None = field(default=None, metadata={"help": "the student's commit on the hub"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run code that comes with either model"})
    teacher_dtype: str = field(default="auto", metadata={"help": "auto: bfloat16 on a GPU that has it, else float32"})
    compile_teacher: bool = field(default=False, metadata={"help": "torch.compile the teacher's forward"})
    teacher_cache: str | None = field(
        default=None,
        metadata={"help": "keep the teacher's logits in this folder, computed once (methods of logits only)"},
    )
    allow_weak_teacher: bool = field(
        default=False, metadata={"help": "go on with a teacher that is no better than chance on the validation set"}
    )
    device: str = field(default="auto", metadata={"help": "auto, cpu or cuda"})


@dataclass
class DataArguments:
    dataset: str | None = field(default=None, metadata={"help": f"{SHIPPED} (shipped), glue/<task>, or a hub id"})
    dataset_config: str | None = field(default=None, metadata={"help": "the hub data set's configuration"})
    train_file: str | None = field(default=None, metadata={"help": ".csv .tsv .jsonl .parquet .txt"})
    validation_file: str | None = field(
        default=None, metadata={"help": "likewise; without one, 5 % of the training rows are held out"}
    )
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
    mlm_probability: float = field(default=0.15, metadata={"help": "share of words that masked_lm hides"})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "use only so many training rows, a random choice"}
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "likewise of the validation rows"})


@dataclass
class MethodArguments:
    method: str = field(default="kd", metadata={"help": "kd, bert_emd:beta=0.005, fcd + kd:weight=0.5 …"})
    advance: str = field(default="step", metadata={"help": "learned state moves once per 'step' or per 'micro' batch"})


@dataclass
class RunArguments(TrainingArguments):
    """Trainer's own arguments, with this house's defaults."""

    logging_steps: float = field(default=20, metadata={"help": "log every so many steps"})
    report_to: str = field(default="tensorboard", metadata={"help": "tensorboard, wandb, trackio, none"})
    eval_strategy: str = field(default="epoch", metadata={"help": "no, steps, epoch"})
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={
            "help": "order of the training rows; by length there is less padding",
            "choices": ["group_by_length", "random", "sequential", "batch_rebalance"],
        },
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "keep so many checkpoints"})


KINDS = (ModelArguments, DataArguments, MethodArguments, RunArguments)


class Run(NamedTuple):
    """A parsed run; `options` are those that differ from the defaults, as --config reads them back."""

    model: ModelArguments
    data: DataArguments
    method: MethodArguments
    args: RunArguments
    options: dict


def parse(argv: list[str]) -> Run:
    """From flags and, below them, --config."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    found, flags = first.parse_known_args(argv)
    epilog = "--config run.yaml holds any of these options by name; flags win over it"
    parser = HfArgumentParser(KINDS, prog="fastkd distill", allow_abbrev=False, epilog=epilog)
    usual = parser.parse_args_into_dataclasses([], look_for_args_file=False)
    if found.config:
        parser.set_defaults(**read_config(found.config))
    parsed = parser.parse_args_into_dataclasses(flags, look_for_args_file=False)
    if parsed[-1].output_dir in (None, usual[-1].output_dir):
        raise ValueError("output_dir: say where the run shall be kept")
    return Run(*parsed, _differing(parsed, usual))


def read_config(path: str) -> dict:
    if not Path(path).is_file():
        raise ValueError(f"config: there is no file {path}")
    try:
        options = yaml.safe_load(Path(path).read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"config: {path} is not plain YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(options, dict):
        raise ValueError(f"config: {path} must hold option: value lines, got a {type(options).__name__}")
    known = {f.name for kind in KINDS for f in dataclasses.fields(kind) if f.init}
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            raise ValueError(
                f"config: {path} has an unknown option {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")
            )
    return options


def _differing(parsed, usual) -> dict:
    found = {}
    for part, default in zip(parsed, usual, strict=True):
        for f in dataclasses.fields(part):
            value = _plain(getattr(part, f.name))
            if f.init and value != _plain(getattr(default, f.name)):
                found[f.name] = value
    return found


def _plain(value):
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value):
        return {key: _plain(x) for key, x in dataclasses.asdict(value).items()}
    if hasattr(value, "to_dict"):
        return _plain(value.to_dict())
    if isinstance(value, dict):
        return {str(key): _plain(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(x) for x in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def examine_folder(run: Run) -> str | None:
    """The checkpoint to resume from, None for a fresh folder; ValueError rather than touch anybody's results."""
    folder = Path(run.args.output_dir)
    if not folder.exists() or not any(folder.iterdir()):
        return None
    if not (folder / RESOLVED).exists():
        raise ValueError(f"output_dir: {folder} holds something that is not a run of fastkd; choose another folder")
    before = yaml.safe_load((folder / RESOLVED).read_text()) or {}
    differing = sorted(key for key in {*before, *run.options} if before.get(key) != run.options.get(key))
    if differing:
        raise ValueError(
            f"output_dir: {folder} holds another run ({', '.join(differing)} differ); choose another folder, or the same "
            "options"
        )
    if (folder / FINISHED).exists():
        raise ValueError(
            f"output_dir: {folder} holds this run, and it is finished; choose another folder to run it again"
        )
    return get_last_checkpoint(str(folder))


def save(run: Run) -> None:
    """The resolved run, beside its results; `--config run.yaml` repeats it."""
    folder = Path(run.args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESOLVED).write_text(yaml.safe_dump(run.options, sort_keys=True))
