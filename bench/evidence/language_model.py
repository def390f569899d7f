"""Does it distil a language model? A student of every third layer, trained alone and distilled, over paired seeds: the same
initialisation, the same order of the rows.

python -m fastkd.bench.evidence.language_model MODEL TEXT              # MODEL: a folder; TEXT: cut into rows, the last 128 held out
python -m fastkd.bench.evidence.language_model MODEL TEXT --summary    # the table and picture of what has been measured

The teacher runs once: a cache of its hidden states before the head, which is exact, serves every method and seed. A row of
language_model.csv is one run, appended when it ends; a run that has its row is not done again.
"""

import argparse
import dataclasses
import math
import pathlib
import tempfile
import time

import pandas as pd
import torch
from fastkd.bench import machine, plots
from fastkd.bench.evidence.quality import ALONE, paired

from fastkd import TopK, VocabMap
from fastkd.train import cache, tokenisation
from fastkd.train.student import from_layers
from fastkd.train.trainer import DistillTrainer

BATCH, HELD_OUT = 4, 128
TOP, NO_TAIL = ", the 64 most likely tokens", ", renormalised"  # what is known of the teacher's distribution
ALL_TOKENS = ", all of the teacher's tokens"  # GLMD without the renormalisation over the student's
TO_LAST = ", layers that end with the last"  # 2, 5, …, 29, elsewhere 0, 3, …, 27
PARTS = {", half of the vocabulary": 0.5, ", a quarter of the vocabulary": 0.25}  # the student's tokens
METHODS = (
    ALONE, "forward_kl:hard=1", "forward_kl", "skew_kl:hard=1", "reverse_kl:hard=1", "jsd:hard=1", "forward_kl:hard=1 + fcd",
    "forward_kl:hard=1" + TOP, "forward_kl:hard=1" + TOP + NO_TAIL, "glmd",
    ALONE + TO_LAST, "forward_kl:hard=1" + TO_LAST,
    *(method + part + all_tokens for part in PARTS for method, all_tokens in ((ALONE, ""), ("glmd", ""), ("glmd", ALL_TOKENS))),
)  # fmt: skip
RESULTS = machine.ROOT / "bench/results/quality/language_model.csv"


def rows_of(model: str, text: str, length: int):
    from datasets import Dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    ids = torch.tensor(tokenizer(pathlib.Path(text).read_text(), verbose=False)["input_ids"])
    ids = ids[: len(ids) // length * length].view(-1, length)
    return tokenizer, Dataset.from_dict({"input_ids": ids.tolist(), "example_id": range(len(ids))})


def smaller(student, teacher, tokenizer, rows, part: float, collate):
    """The student with the most frequent tokens of the rows, which takes the teacher's ids; its VocabMap; and a collator that
    leaves out the labels that the student does not have."""
    counts = torch.tensor(rows["input_ids"][:]).flatten().bincount(minlength=teacher.config.vocab_size)
    vocab = VocabMap.from_counts(
        counts, part, always_keep=tokenizer.all_special_ids, embeddings=teacher.get_input_embeddings().weight
    )
    student = vocab.shrink(student)
    student.config.vocab_size = teacher.config.vocab_size  # of the ids that it takes
    student.get_input_embeddings().register_forward_pre_hook(lambda module, ids: (vocab.encode(ids[0]),))

    def own_labels(examples):
        batch = collate(examples)
        own = vocab.encode(batch["labels"])
        return {**batch, "labels": own.masked_fill(vocab.kept_ids[own.clamp_min(0)] != batch["labels"], -100)}

    return student, vocab, own_labels


def renormalised(states):
    """The teacher's most likely tokens as if there were no others."""
    top = states.predictions.topk
    alone = TopK(top.indices, top.log_probs.log_softmax(-1))
    return dataclasses.replace(states, predictions=dataclasses.replace(states.predictions, topk=alone))


def trainer(options, teacher, tokenizer, rows, name: str, seed: int, work: str) -> DistillTrainer:
    from transformers import TrainingArguments, set_seed

    set_seed(seed)
    args = TrainingArguments(
        f"{work}/run", max_steps=options.steps, per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH, seed=seed,
        learning_rate=options.rate, warmup_steps=0.1, save_strategy="no", logging_strategy="no", report_to="none",
        disable_tqdm=True, prediction_loss_only=True,
    )  # fmt: skip
    method = name.split(", ")[0]
    first, distils = len(rows) - HELD_OUT, method != ALONE
    train_rows = rows.select(range(min(first, options.rows)))
    layers = range(2 if TO_LAST in name else 0, teacher.config.num_hidden_layers, 3)
    student, collate, vocab = from_layers(teacher, list(layers)), tokenisation.collator(tokenizer, "causal_lm"), None
    part = next((part for start, part in PARTS.items() if start in name), None)
    if part is not None:
        student, vocab, collate = smaller(student, teacher, tokenizer, train_rows, part, collate)
    folder = f"{work}/cache {method}" if "fcd" in method else f"{work}/cache"  # with states of a layer
    kept = cache.Options(f"{work}/top", top_k=64) if TOP in name else cache.Options(folder)
    made = DistillTrainer(
        student, teacher if distils else None, method if distils else None, task="causal_lm", args=args,
        train_dataset=train_rows, eval_dataset=rows.select(range(first, len(rows))), processing_class=tokenizer,
        data_collator=collate, teacher_cache=kept if distils else None,
    )  # fmt: skip
    if vocab is not None and distils:
        loss = made.method.methods["glmd"].loss
        loss.vocab, loss.teacher_tokens = vocab, "all" if ALL_TOKENS in name else "kept"
    if NO_TAIL in name:
        states = made.cache.states
        made.cache.states = lambda kept: renormalised(states(kept))
    return made


def main() -> None:
    from transformers import AutoModelForCausalLM

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    for name, number in (("--seeds", 5), ("--steps", 150), ("--rows", 600), ("--length", 128), ("--rate", 5e-4)):
        parser.add_argument(name, type=type(number), default=number)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--summary", action="store_true")
    options = parser.parse_args()
    rows = pd.read_csv(RESULTS) if RESULTS.exists() else pd.DataFrame(columns=["method", "seed"])
    facts = machine.facts(torch.device("cpu"))
    if not options.summary:
        teacher = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        tokenizer, data = rows_of(options.model, options.text, options.length)
        with tempfile.TemporaryDirectory() as work:
            of_teacher = math.nan
            for seed in range(1, options.seeds + 1):
                for method in options.methods:
                    if len(rows[(rows.method == method) & (rows.seed == seed)]):
                        continue
                    made = trainer(options, teacher, tokenizer, data, method, seed, work)
                    start = time.perf_counter()
                    made.train()
                    seconds = time.perf_counter() - start
                    whole = not any(part in method for part in PARTS)  # else labels are numbers of the student's tokens
                    if math.isnan(of_teacher) and whole:
                        of_teacher = math.exp(made.evaluate_other(teacher)["eval_loss"])
                    found = {"method": method, "seed": seed, "perplexity": math.exp(made.evaluate()["eval_loss"])}
                    found |= {
                        "teacher": of_teacher if whole else math.nan,
                        "steps": options.steps,
                        "rows": options.rows,
                        "seconds": round(seconds, 1),
                    }
                    found |= {name: facts[name] for name in ("device", "torch", "commit", "date")}
                    rows = pd.concat([rows, pd.DataFrame([found])], ignore_index=True)
                    rows.to_csv(RESULTS, index=False, float_format="%.6g")
                    print(found, flush=True)
    print("| method | seeds | perplexity | log-perplexity less alone from the same start (95 %) |\n|---|---|---|---|")
    every = rows.pivot(index="seed", columns="method", values="perplexity").map(math.log)[list(rows.method.unique())]
    for method in every.columns:
        alone = ALONE + next((start for start in (*PARTS, TO_LAST) if start in method), "")
        known = alone != method and alone in every
        gain = paired(every[method] - every[alone], ".3f") if known else "–"
        print(f"| `{method}` | {every[method].count()} | {math.exp(every[method].mean()):.1f} | {gain} |")
    of_teacher = rows.groupby("method", sort=False).teacher.first()
    shown = of_teacher.dropna().index  # on a smaller vocabulary the perplexities are those of other tokens
    lines = [(method, list(every[method].dropna().map(math.exp)), of_teacher[method]) for method in shown]
    plots.scores(lines, "A language model's students", "perplexity", rows.to_dict("records"),
                 RESULTS.with_suffix(".png"))  # fmt: skip


if __name__ == "__main__":
    main()
