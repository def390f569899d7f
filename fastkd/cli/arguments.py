"""What a run is told, by flags or by --config run.yaml; flags win. Unknown keys are refused, the resolved run is saved."""

import argparse
import dataclasses
import difflib
import enum
import re
from pathlib import Path
from typing import NamedTuple

import yaml
from transformers import HfArgumentParser, TrainingArguments

from fastkd import atomic_write

from .options import DataArguments, FinetuneArguments, MethodArguments, ModelArguments, RunArguments

RESOLVED = "run.yaml"
FINISHED = "report"  # a folder that is renamed into its place when all else is done
JOINED = {"method": " + ", "student_layers": ",", "answers": ","}  # options that may be a list in YAML


KINDS = {
    "distill": (ModelArguments, DataArguments, MethodArguments, RunArguments),
    "cache": (ModelArguments, DataArguments, MethodArguments, RunArguments),
    "finetune": (FinetuneArguments, DataArguments, RunArguments),
}
# Trainer's options that --help shows, and what it says of them.
USUAL = {
    "output_dir": "folder of the run; the same command again resumes it",
    "num_train_epochs": "epochs", "max_steps": "steps, in place of epochs", "learning_rate": "peak learning rate of AdamW",
    "lr_scheduler_type": "linear, cosine, constant …", "warmup_steps": "steps, or below 1 a share of them",
    "weight_decay": "of AdamW", "per_device_train_batch_size": "rows per device and step",
    "gradient_accumulation_steps": "micro-batches per step", "per_device_eval_batch_size": "rows per device in evaluation",
    "eval_steps": "with --eval_strategy steps", "save_steps": "with --save_strategy steps",
    "metric_for_best_model": "loss, accuracy …", "bf16": "train in bfloat16 (autocast)",
    "gradient_checkpointing": "less memory, more time", "torch_compile": "compile the student", "seed": "the random seed",
    "use_cpu": "train on the CPU even where there is a GPU",
}  # fmt: skip
RARE = (
    "teacher_revision", "student_revision", "model_revision", "compile_teacher", "shard_teacher", "advance",
    "dataset_config", "max_skipped_steps", "cache_shard",
)  # fmt: skip


class Run(NamedTuple):
    """A parsed run; `options` are those that differ from the defaults, as --config reads them back. Without a method it is
    plain fine-tuning: there is no teacher, and the student is the model."""

    model: ModelArguments
    data: DataArguments
    method: MethodArguments | None
    args: RunArguments
    options: dict

    def changed(self, **changes) -> "Run":
        """The same run with other options; None stands for the default."""
        options = {key: value for key, value in (self.options | changes).items() if value is not None}
        return read(options, command="distill" if self.method else "finetune")

    def of_teacher(self) -> "Run":
        """The fine-tuning of the teacher, on the same data and with the same options of training."""
        shared = {f.name for kind in KINDS["finetune"] for f in dataclasses.fields(kind)} - {"seeds"}
        options = {key: value for key, value in self.options.items() if key in shared}
        names = {"model": self.model.teacher, "output_dir": str(Path(self.args.output_dir) / "teacher")}
        if self.model.teacher_revision:
            names["model_revision"] = self.model.teacher_revision
        return read({**options, **names}, command="finetune")


class _Help(argparse.HelpFormatter):
    """A line or two per option: one spelling, no placeholder, the default where there is one."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=34, width=118)

    def _format_action_invocation(self, action):
        return action.option_strings[0] if action.option_strings else super()._format_action_invocation(action)

    def _get_help_string(self, action):
        default = _plain(action.default)
        return action.help + ("" if default in (None, False, "", argparse.SUPPRESS, []) else " (default: %(default)s)")


class _Parser(HfArgumentParser):
    """Mistakes are one line, and the help has the options that a first user needs."""

    def __init__(self, command: str, whole: bool = False):
        usage = {
            "distill": "fastkd distill --teacher MODEL --student_layers every:2 --train_file train.csv --output_dir runs/first",
            "cache": "fastkd cache --teacher MODEL --student MODEL --train_file train.csv --teacher_cache cache",
            "finetune": "fastkd finetune --model MODEL --train_file train.csv --output_dir runs/teacher",
        }[command]
        super().__init__(
            KINDS[command],
            prog=f"fastkd {command}",
            usage=f"{usage} [options]",
            allow_abbrev=False,
            formatter_class=_Help,
        )
        self.add_argument("--help-all", "--help_all", action="help", help="also the options that are left out here")
        self.add_argument("--config", help="a YAML file that has any of these options by name; flags win over it")
        trainers = {f.name for f in dataclasses.fields(TrainingArguments)} - vars(RunArguments).keys()
        hidden = {*trainers, *RARE, *(["pooling"] if command == "finetune" else [])}  # no fine-tuning of embeddings
        for action in self._actions:
            if action.dest in USUAL:
                action.help = USUAL[action.dest]
            elif not whole and (action.dest in hidden or action.option_strings[0].startswith("--no_")):
                action.help = argparse.SUPPRESS

    def error(self, message: str):
        raise ValueError(re.sub(r"^argument (--\w+)\S*:", r"\1:", message))


def parse(argv: list[str], command: str = "distill") -> Run:
    """From flags and, below them, --config."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    found, flags = first.parse_known_args(argv)
    return read(read_config(found.config) if found.config else {}, flags, command)


def read(options: dict, flags: list[str] = (), command: str = "distill") -> Run:
    """From options by name, as a configuration has them, and flags, which win."""
    parser = _Parser(command, whole="--help-all" in flags or "--help_all" in flags)
    usual = parser.parse_args_into_dataclasses([], look_for_args_file=False)
    _refuse_unknown(options, {action.dest for action in parser._actions}, "config: there is no option ")
    known = [name for action in parser._actions for name in action.option_strings]
    _refuse_unknown(
        [x.split("=")[0] for x in parser.parse_known_args(flags)[1] if x.startswith("--")], known, "there is no "
    )
    given = []
    for action in parser._actions:
        if action.dest in options and action.option_strings[0] == f"--{action.dest}":
            given += _flag(action, options[action.dest], parser)
    *parsed, rest = parser.parse_args_into_dataclasses([*given, *flags], True, look_for_args_file=False)
    if rest:
        raise ValueError(
            f"{rest[0]}: belongs to no option; put values with blanks in quotes, as in --method 'fcd + kd'"
        )
    *parsed, _ = parsed  # --config
    *usual, _ = usual
    if command == "cache":
        if parsed[0].teacher_cache is None:
            raise ValueError("teacher_cache: say in which folder the cache shall be kept")
        parsed[-1].output_dir, parsed[-1].save_strategy = parsed[0].teacher_cache, "no"
    elif parsed[-1].output_dir in (None, usual[-1].output_dir):
        raise ValueError("output_dir: say where the run shall be kept")
    options = _differing(parsed, usual)
    if command != "finetune":
        return Run(*parsed, options)
    model, data, args = parsed
    as_student = {"student": model.model, "student_revision": model.model_revision}
    return Run(
        ModelArguments(**as_student, trust_remote_code=model.trust_remote_code, device=model.device),
        data,
        None,
        args,
        options,
    )


def _refuse_unknown(names, known, beginning: str) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else "; --help-all lists all options"
            raise ValueError(f"{beginning}{name!r}{hint}")


def _flag(action: argparse.Action, value, parser) -> list[str]:
    """What YAML made of an option's value, as it would be written on the command line, where it is checked."""
    name = action.option_strings[0]
    if isinstance(value, list) and action.dest in JOINED:
        value = JOINED[action.dest].join(map(str, value))
    if value is None or isinstance(value, (dict, list)):
        parser.set_defaults(**{action.dest: value})
        return []
    if value is False and action.nargs != "?":  # YAML reads a bare no, as in eval_strategy: no, so
        value = "no"
    return [f"{name}={value}"]


def read_config(path: str) -> dict:
    if not Path(path).is_file():
        raise ValueError(f"config: there is no file {path}")
    try:
        options = yaml.safe_load(Path(path).read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"config: {path} is not plain YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(options, dict):
        raise ValueError(f"config: {path} must hold option: value lines, got a {type(options).__name__}")
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


def is_finished(run: Run) -> bool:
    """Whether the run in this folder is finished; ValueError rather than touch anybody's results."""
    folder, cache = Path(run.args.output_dir), run.model.teacher_cache
    begun = [Path(cache)] if cache else []  # may have been made before the run itself
    begun += folder.glob(f".*-{RESOLVED}")
    if not folder.exists() or {path.resolve() for path in folder.iterdir()} <= {path.resolve() for path in begun}:
        return False
    if not (folder / RESOLVED).exists():
        raise ValueError(f"output_dir: {folder} holds something that is not a run of fastkd; choose another folder")
    before = read_config(str(folder / RESOLVED))
    differing = sorted(key for key in {*before, *run.options} if before.get(key) != run.options.get(key))
    if differing:
        raise ValueError(
            f"output_dir: {folder} holds another run ({', '.join(differing)} differ); choose another folder, or the same "
            "options"
        )
    return (folder / FINISHED / "report.json").exists()


def save(run: Run) -> None:
    """The resolved run, beside its results; `--config run.yaml` repeats it."""
    folder = Path(run.args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write.replacing(folder / RESOLVED) as scratch:
        scratch.write_text(yaml.safe_dump(run.options, sort_keys=True))
