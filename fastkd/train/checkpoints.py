"""Checkpoints that are there whole or not at all, and a resumed run that goes on as the undisturbed one would have.

A checkpoint is written into a folder beside its place, brought to the disk, and renamed; its manifest, with the size and the
SHA-256 of every file, is written last. One whose files do not agree with its manifest is never resumed from.
"""

import contextlib
import hashlib
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import SaveStrategy
from transformers.utils import logging

from fastkd import atomic_write, interruption

MANIFEST, STATE, STAGING = "manifest.json", "trainer_state.json", ".saving"
NAME = re.compile(r"checkpoint-(\d+)")
NOT_WRITTEN = re.compile("PytorchStreamWriter|inline_container")  # how torch.save says it, as a RuntimeError
logger = logging.get_logger(__name__)


class Complete(str):
    """The path of a checkpoint that was verified."""


def write_manifest(folder: Path, resumable: bool) -> None:
    """resumable: whether the folder has all that training goes on from, not the weights alone."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(4) as pool:
        hashes = list(pool.map(_sha256, files))
    entries = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, hashes, strict=True)
    }
    atomic_write.sync(folder)
    with atomic_write.replacing(folder / MANIFEST) as scratch:
        scratch.write_text(json.dumps({"resumable": resumable, "files": entries}, indent=1))


def problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint, as the end of a sentence; None for one that can be resumed from."""
    if not (folder / MANIFEST).is_file():
        return f"has no {MANIFEST}, so it was not written completely"
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        resumable, files = (
            manifest["resumable"],
            {name: (x["bytes"], x["sha256"]) for name, x in manifest["files"].items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"has a damaged {MANIFEST}"
    if not resumable:
        return "has the weights alone (save_only_model), so nothing goes on from it"
    for name, (size, _) in files.items():
        if not (folder / name).is_file():
            return f"has no {name}"
        if (found := (folder / name).stat().st_size) != size:
            return f"has {found:,} bytes of {name} instead of {size:,}"
    with ThreadPoolExecutor(4) as pool:
        hashes = pool.map(_sha256, [folder / name for name in files])
    for (name, (_, digest)), found in zip(files.items(), hashes, strict=True):
        if found != digest:
            return f"has a {name} that is not what was written: its checksum differs"
    return None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def step_of(folder: Path) -> int:
    return int(NAME.fullmatch(folder.name)[1])


def found(output_dir) -> list[Path]:
    """The folders that are named as checkpoints, the newest first."""
    output_dir = Path(output_dir)
    folders = [path for path in output_dir.iterdir() if path.is_dir()] if output_dir.is_dir() else []
    return sorted((path for path in folders if NAME.fullmatch(path.name)), key=step_of, reverse=True)


def last(output_dir) -> Path | None:
    """The newest checkpoint that was written completely; its files are not looked at again."""
    return next((folder for folder in found(output_dir) if (folder / MANIFEST).is_file()), None)


def how_to_go_on(output_dir) -> str:
    """What a person who stopped a run can do."""
    checkpoint = last(output_dir)
    if checkpoint:
        return f"the same command goes on from {checkpoint}"
    return f"{output_dir} has no checkpoint yet, so the same command starts anew"


def newest(output_dir) -> tuple[Complete | None, list[str]]:
    """The newest checkpoint that can be resumed from, None where there is no checkpoint, and why newer ones were skipped;
    ValueError where all of them are damaged, rather than to start anew without a word."""
    skipped = []
    for folder in found(output_dir):
        wrong = problem(folder)
        if wrong is None:
            return Complete(folder), skipped
        skipped.append(f"{folder} {wrong}")
    if skipped:
        raise ValueError(
            f"output_dir: none of its checkpoints can be resumed from: {'; '.join(skipped)}. Delete them to start anew, or "
            "choose another folder"
        )
    return None, skipped


def resumed(output_dir) -> Complete | None:
    """`newest`, with a warning for each that was skipped."""
    checkpoint, skipped = newest(output_dir)
    for sentence in skipped:
        logger.warning(f"skipped: {sentence}")
    return checkpoint


def rotate(output_dir: Path, limit: int | None, kept: set[Path]) -> None:
    """Delete old checkpoints until `limit` are left: incomplete ones first, then those of the earliest steps, none of `kept`."""
    folders = found(output_dir)
    others = [folder for folder in folders if folder not in kept]
    others.sort(key=lambda folder: ((folder / MANIFEST).is_file(), step_of(folder)))
    surplus = len(folders) - limit if limit and limit > 0 else 0
    for folder in others[: max(surplus, 0)]:
        shutil.rmtree(folder, ignore_errors=True)


def not_finite(tensors: dict[str, Tensor]) -> list[str]:
    """The names of those with NaN or infinite entries; one look at the device."""
    flags = {name: x.detach().isfinite().all() for name, x in tensors.items() if x.is_floating_point()}
    if not flags:
        return []
    return [name for name, finite in zip(flags, torch.stack(list(flags.values())).tolist(), strict=True) if not finite]


class Checkpoints:
    """What DistillTrainer does differently from Trainer when it saves, resumes, and is told to stop."""

    _staging: Path | None = None
    _pushed = False

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """Trainer.train. resume_from_checkpoint=True takes the newest checkpoint that is complete, and names those that it
        skips; a named one that is damaged is a ValueError. After SIGTERM or Ctrl-C the step is finished, a checkpoint saved,
        and SystemExit(143) or KeyboardInterrupt raised."""
        checkpoint = resume_from_checkpoint or None
        if checkpoint is True:
            checkpoint = resumed(self.args.output_dir)
            if checkpoint is None:
                raise ValueError(f"resume_from_checkpoint: {self.args.output_dir} has no checkpoint; leave it out")
        elif checkpoint is not None and not isinstance(checkpoint, Complete):
            wrong = problem(Path(checkpoint))
            if wrong is not None:
                raise ValueError(
                    f"resume_from_checkpoint: {checkpoint} {wrong}; name another one, or True for the newest"
                )
        self._resumed_from, self._saved_at = checkpoint, None
        self._had_folder = Path(self.args.output_dir).exists()
        with interruption.deferred():
            result = super().train(checkpoint, *args, **kwargs)
            if self.interruptions.stopped:
                interruption.stop(f"resume_from_checkpoint=True goes on from {last(self.args.output_dir)}")
        return result

    def _get_output_dir(self, trial):
        """Trainer's, or while a checkpoint is written the folder beside its place."""
        run_dir = super()._get_output_dir(trial)
        return run_dir if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model, trial):
        run_dir = Path(super()._get_output_dir(trial))
        step = self.state.global_step
        place, scratch = run_dir / f"checkpoint-{step}", run_dir / STAGING / f"checkpoint-{step}"
        try:
            if self.args.should_save:
                if self._had_folder and not run_dir.exists():
                    logger.warning(
                        f"output_dir: {run_dir} is gone, and what it held; it is made anew for checkpoint-{step}"
                    )
                shutil.rmtree(run_dir / STAGING, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            self._staging, self._pushed = run_dir / STAGING, False
            super()._save_checkpoint(model, trial)
            self._staging = None
            self._note_best(run_dir)
            self.accelerator.wait_for_everyone()  # the others have written their random states
            if self.args.should_save:
                self.state.save_to_json(str(scratch / STATE))  # the best checkpoint by the name that it gets
                write_manifest(scratch, not self.args.save_only_model)
                atomic_write.rename(scratch, place)
        except (OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not NOT_WRITTEN.search(str(error)):
                raise
            raise RuntimeError(_not_written(place, error, last(run_dir))) from error
        finally:
            self._staging = None
            if self.args.should_save:
                shutil.rmtree(run_dir / STAGING, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._saved_at, self._had_folder = step, True
        if self._pushed:
            super()._push_from_checkpoint(str(place))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate(run_dir, self.args.save_total_limit, {place, *([Path(best)] if best else [])})

    def _push_from_checkpoint(self, checkpoint_folder):
        self._pushed = True  # when it has its place

    def _note_best(self, run_dir: Path) -> None:
        best = self.state.best_global_step
        if best and self.args.save_strategy != SaveStrategy.NO:
            folder = run_dir / f"checkpoint-{best}"
            if best == self.state.global_step or folder.exists():
                self.state.best_model_checkpoint = str(folder)

    def evaluate(self, *args, **kwargs):
        """Trainer.evaluate; the random numbers of training are the same with and without it."""
        with torch.random.fork_rng(devices=[]):
            return super().evaluate(*args, **kwargs)

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, *args, **kwargs):
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        except EvaluationStopped:
            self.control.should_training_stop = True
            if self._saved_at != self.state.global_step:
                self._save_checkpoint(model, trial)
                self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _run_epoch(self, *args, **kwargs):
        if not self.control.should_training_stop:  # the run had made all of its steps
            super()._run_epoch(*args, **kwargs)


class EvaluationStopped(Exception):
    """Raised between two batches of an evaluation; the trainer saves, and then obeys the signal."""


class Interruptions(TrainerCallback):
    """Ends the training of `trainer` after the step in which a signal comes, with a checkpoint; an evaluation that is due
    then is left to the run that goes on. `.stopped` says that it was so."""

    def __init__(self, trainer):
        self.trainer, self.stopped = trainer, False
        self._told: torch.Tensor | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.stopped, self._told = False, None

    def on_step_end(self, args, state, control, **kwargs):
        if self._agreed():
            self.stopped = control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_save(self, args, state, control, **kwargs):
        if args.world_size == 1 and interruption.requested():  # the signal came while the checkpoint was written
            self.stopped = control.should_training_stop = True

    def on_prediction_step(self, args, state, control, **kwargs):
        if self.trainer.is_in_train and self._agreed():
            self.stopped = True
            raise EvaluationStopped

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stopped:
            control.should_evaluate = control.should_save = control.should_log = False

    def _agreed(self) -> bool:
        """Whether any rank was told to stop; the same answer on all of them, since a rank alone would wait for ever."""
        args = self.trainer.args
        if args.world_size == 1:
            return interruption.requested()
        told = torch.full((1,), float(interruption.requested()), device=args.device)
        dist.all_reduce(told, dist.ReduceOp.MAX)
        if args.device.type != "cpu":  # the answer of the call before has arrived: no wait for the device's queue
            told, self._told = self._told, told
        if told is None or not told.item():
            return False
        interruption.note()
        return True


class Continuation(TrainerCallback):
    """Puts a resumed run where the undisturbed one was: early stopping has counted as far, an evaluation that the checkpoint
    came before is made, and a run that had ended makes no further step."""

    def __init__(self, trainer: Checkpoints):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        if trainer._resumed_from is None:
            return
        stopping = [x for x in trainer.callback_handler.callbacks if isinstance(x, EarlyStoppingCallback)]
        saved = state.stateful_callbacks.get("EarlyStoppingCallback")
        if len(stopping) == 1 and isinstance(saved, dict):
            stopping[0].early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]
        control.should_training_stop = state.global_step >= state.max_steps
        if trainer.eval_dataset is not None and evaluation_is_due(args, state):
            try:
                metrics = trainer._evaluate(None, None)
            except EvaluationStopped:
                control.should_training_stop = True
                return
            trainer._determine_best_metric(metrics=metrics, trial=None)
            trainer._note_best(Path(args.output_dir))
        if any(x.early_stopping_patience_counter >= x.early_stopping_patience for x in stopping):
            control.should_training_stop = True


def evaluation_is_due(args, state: TrainerState) -> bool:
    """Whether the step that a checkpoint ends with is one to evaluate after, and was not."""
    if any(entry.get("step") == state.global_step and any(key.startswith("eval_") for key in entry)
           for entry in state.log_history):  # fmt: skip
        return False
    ended = state.global_step >= state.max_steps
    if args.eval_strategy == "steps":
        return args.eval_delay <= state.global_step and (ended or state.global_step % state.eval_steps == 0)
    return (
        args.eval_strategy == "epoch" and args.eval_delay <= state.epoch and (ended or float(state.epoch).is_integer())
    )


def is_finished(trainer) -> bool:
    """Whether training made all of its steps, or was ended by early stopping, and not by anything else."""
    stopping = [x for x in trainer.callback_handler.callbacks if isinstance(x, EarlyStoppingCallback)]
    early = any(x.early_stopping_patience_counter >= x.early_stopping_patience for x in stopping)
    return trainer.state.global_step >= trainer.state.max_steps or early


def _not_written(place: Path, error: Exception, kept: Path | None) -> str:
    free = None
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(place.parent).free
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
    room = "" if free is None else f", {free / 2**30:.1f} GiB free"
    intact = f"{kept} is intact" if kept else "there is no earlier one"
    return (
        f"checkpoint: {place.name} could not be written to {place.parent} ({reason}{room}); {intact}. Make room, or make the "
        "folder writable, and give the same command again"
    )
