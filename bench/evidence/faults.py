"""`python -m fastkd.bench.evidence.faults [steps]`: what the machinery against faults costs at BERT-base size, in CPU time.

Per step: the flags of the terms, and the question whether a signal has come. Per checkpoint: hashing, fsync and renaming,
beside what Trainer writes itself. `share`: of the step, with a checkpoint every 500 steps.
"""

import argparse
import contextlib
import tempfile
import time

import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, logging

from fastkd.train.checkpoints import Checkpoints
from fastkd.train.student import from_layers
from fastkd.train.trainer import DistillTrainer

EVERY = 500  # steps, Trainer's default


class Clock:
    """Seconds of wall and of CPU time of all threads, by name; nested ones are counted in the outer one too."""

    def __init__(self):
        self.wall, self.cpu, self.calls = {}, {}, {}

    @contextlib.contextmanager
    def __call__(self, name: str):
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.wall[name] = self.wall.get(name, 0.0) + time.perf_counter() - wall
            self.cpu[name] = self.cpu.get(name, 0.0) + time.process_time() - cpu
            self.calls[name] = self.calls.get(name, 0) + 1

    def watch(self, holder, method: str, name: str) -> None:
        plain = getattr(holder, method)

        def timed(*args, **kwargs):
            with self(name):
                return plain(*args, **kwargs)

        setattr(holder, method, timed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("steps", type=int, nargs="?", default=20)
    parser.add_argument("--method", default="bert_emd")
    steps, method = (options := parser.parse_args()).steps, options.method
    logging.set_verbosity_error()
    torch.manual_seed(0)
    teacher = BertForSequenceClassification(BertConfig())
    student = from_layers(teacher, list(range(12)))  # 12 of 12: a student of BERT-base size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (8 * steps, 128), generator=generator)
    columns = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist(), "labels": [0, 1] * 4 * steps}
    data = Dataset.from_dict(columns)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=8, save_steps=max(steps // 2, 1), report_to="none",
            disable_tqdm=True, logging_steps=10,
        )  # fmt: skip
        clock.watch(Trainer, "_save_checkpoint", "what Trainer writes")
        clock.watch(Checkpoints, "_save_checkpoint", "a checkpoint")
        trainer = DistillTrainer(student, teacher, method, args=args, train_dataset=data)
        for event in ("on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end", "see"):
            clock.watch(trainer.finite, event, "flags")
        clock.watch(trainer.interruptions, "on_step_end", "signals")
        with clock("training"):
            trainer.train()
    saves = clock.calls["a checkpoint"]
    for kind, seconds in (("CPU", clock.cpu), ("wall", clock.wall)):
        step = (seconds["training"] - seconds["a checkpoint"]) / steps
        each_step = (seconds["flags"] + seconds["signals"]) / steps
        written = seconds["what Trainer writes"] / saves
        added = seconds["a checkpoint"] / saves - written
        print(
            f"{kind}: a step {step:.3f} s, of it flags and signals {1e3 * each_step:.2f} ms ({each_step / step:.2%}); a "
            f"checkpoint: Trainer {written:.2f} s, and hashing, fsync and renaming {added:.2f} s; with one every {EVERY} steps "
            f"the machinery takes {(each_step + added / EVERY) / step:.2%} of the time, with Trainer's own writing "
            f"{(each_step + (written + added) / EVERY) / step:.2%}"
        )


if __name__ == "__main__":
    main()
