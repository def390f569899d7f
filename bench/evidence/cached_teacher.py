"""What a teacher's cache saves and costs, beside the teacher itself.

python bench/evidence/cached_teacher.py MODEL TEXT            # a step: its time, and the error of its loss and gradient
python bench/evidence/cached_teacher.py MODEL TEXT --train    # the student's perplexity, also of single forms by name

MODEL is the folder of a causal language model; the student is every second of its layers. TEXT is cut into rows, of which the
last 64 are held out. A row of cached_teacher.csv is one run, appended when it ends; the newest ones are printed.
"""

import argparse
import math
import pathlib
import statistics
import tempfile
import time
from dataclasses import replace

import pandas as pd
import torch
from fastkd.bench import machine
from fastkd.bench.evidence.language_model import rows_of
from torch.nn.utils import parameters_to_vector

from fastkd.train import cache, tokenisation
from fastkd.train.student import from_layers
from fastkd.train.trainer import DistillTrainer

BATCH, HELD_OUT, ROUNDS = 4, 64, 4
LIVE, NO_TAIL = "none: the teacher runs", "top_k 64, bfloat16, without its tail"
BOTH = "top_k 64, bfloat16, samples 12"
FORMS = {  # options of the cache
    LIVE: None, "hidden states": {}, "hidden states, bfloat16": {"dtype": "bfloat16"}, "hidden states, int8": {"dtype": "int8"},
    "top_k 64": {"top_k": 64}, "top_k 64, bfloat16": {"top_k": 64, "dtype": "bfloat16"},
    NO_TAIL: {"top_k": 64, "dtype": "bfloat16"}, BOTH: {"top_k": 64, "samples": 12, "dtype": "bfloat16"},
    "samples 12": {"samples": 12},
}  # fmt: skip
TRAINED = (LIVE, "top_k 64, bfloat16", BOTH, "samples 12", NO_TAIL)
RESULTS = pathlib.Path(__file__).parents[2] / "bench/results/cached_teacher.csv"
COLUMNS = {
    "bytes": ",.0f", "seconds": ".2f", "cpu_seconds": ".2f", "times": ".2f", "loss_error": ".1e", "gradient_error": ".1e",
    "perplexity": ",.1f",
}  # fmt: skip


class Runs:
    def __init__(self, model: str, text: str, length: int, work: str):
        from transformers import AutoModelForCausalLM

        self.work, (self.tokenizer, self.rows) = work, rows_of(model, text, length)
        self.teacher = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)

    def trainer(self, form: str, student, steps: int) -> DistillTrainer:
        from transformers import TrainingArguments

        args = TrainingArguments(
            f"{self.work}/run", max_steps=steps, per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH,
            learning_rate=5e-4, warmup_steps=0.1, train_sampling_strategy="sequential", prediction_loss_only=True, use_cpu=True,
            save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=10,
        )  # fmt: skip
        options, first = FORMS[form], len(self.rows) - HELD_OUT
        made = DistillTrainer(
            student, self.teacher, "forward_kl", task="causal_lm", args=args, train_dataset=self.rows.select(range(steps * BATCH)),
            eval_dataset=self.rows.select(range(first, len(self.rows))), processing_class=self.tokenizer,
            data_collator=tokenisation.collator(self.tokenizer, "causal_lm"),
            teacher_cache=None if options is None else cache.Options(f"{self.work}/{steps} {sorted(options.items())}", **options),
        )  # fmt: skip
        if form == NO_TAIL:
            whole = made.cache.states
            made.cache.states = lambda batch: without_tail(whole(batch))
        return made

    def trained(self, form: str, steps: int) -> dict:
        trainer = self.trainer(form, from_layers(self.teacher, "every:2"), steps)
        trainer.train()
        of_teacher = trainer.evaluate_other(self.teacher)["eval_loss"] if form == LIVE else math.nan
        of_student = trainer.evaluate()["eval_loss"]
        return {"steps": steps, "perplexity": math.exp(of_student), "teacher": math.exp(of_teacher)}

    def stepped(self) -> dict[str, dict]:
        """The forms take turns; afterwards each makes the loss and the gradient of one batch of the same student."""
        student = from_layers(self.teacher, "every:2")
        trainers = {form: self.trainer(form, student, ROUNDS + 2) for form in FORMS}
        batches = {form: iter(trainer.get_train_dataloader()) for form, trainer in trainers.items()}
        optimizer = torch.optim.AdamW(student.parameters(), 5e-5)
        wall, cpu = {form: [] for form in FORMS}, {form: [] for form in FORMS}
        found, exact = {}, None
        for _ in range(ROUNDS + 1):  # the first is not counted
            for form, trainer in trainers.items():
                begin, begin_cpu = time.perf_counter(), time.process_time()
                trainer.training_step(student, next(batches[form]))
                optimizer.step()
                optimizer.zero_grad()
                wall[form].append(time.perf_counter() - begin)
                cpu[form].append(time.process_time() - begin_cpu)
        for form, trainer in trainers.items():
            loss = trainer.training_step(student, next(batches[form])).item()
            gradient = parameters_to_vector(p.grad for p in student.parameters()).double()
            optimizer.zero_grad()
            exact = exact or (loss, gradient)
            times = statistics.median(a / b for a, b in zip(wall[LIVE][1:], wall[form][1:], strict=True))
            found[form] = {
                "seconds": statistics.median(wall[form][1:]), "cpu_seconds": statistics.median(cpu[form][1:]), "times": times,
                "loss_error": abs(loss / exact[0] - 1),
                "gradient_error": float((gradient - exact[1]).norm() / exact[1].norm()),
            }  # fmt: skip
            if trainer.cache:
                files = trainer.cache.folder.glob("shard-*")
                found[form]["bytes"] = sum(path.stat().st_size for path in files) / trainer.cache.index["tokens"]
        return found


def without_tail(states):
    sparse = states.predictions
    return replace(states, predictions=replace(sparse, topk=sparse.topk._replace(tail=None)))


def table(rows: pd.DataFrame) -> str:
    lines = [f"| kept | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for form, row in rows.groupby("form").last().reindex(FORMS).iterrows():
        cells = ["–" if pd.isna(row.get(name)) else format(row[name], how) for name, how in COLUMNS.items()]
        lines.append(f"| {form} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name in ("model", "text"):
        parser.add_argument(name)
    parser.add_argument("--train", nargs="*", choices=TRAINED)
    for name, number in (("--steps", 100), ("--length", 128)):
        parser.add_argument(name, type=int, default=number)
    options, rows = parser.parse_args(), pd.read_csv(RESULTS) if RESULTS.exists() else pd.DataFrame()
    facts = machine.facts(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as work:
        runs = Runs(options.model, options.text, options.length, work)
        trained = ((form, runs.trained(form, options.steps)) for form in options.train or TRAINED)
        for form, found in runs.stepped().items() if options.train is None else trained:
            about = {name: facts[name] for name in ("device", "torch", "commit", "date")}
            row = pd.DataFrame([{"form": form, "length": options.length, **found, **about}])
            rows = pd.concat([rows, row], ignore_index=True)
            rows.to_csv(RESULTS, index=False, float_format="%.6g")
    print(table(rows))


if __name__ == "__main__":
    main()
