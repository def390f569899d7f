"""`fastkd profile`: what a distillation step takes, and where: ours beside a careful loop in PyTorch, other packages and the
authors' code. These providers take turns in one training run.

fastkd         DistillTrainer, without the logits where it can   loop    plain PyTorch, logits of the rows that count only
logits         the same with the logits of all tokens            trl     what trl's DistillationTrainer computes
authors        its losses as released with the papers            gkd     what trl's GKDTrainer computes
reference      its losses in plain PyTorch                       torchdistill, textbrewer   the loop with their kd loss

fastkd profile --from-config bert-base --method bert_emd          a model without weights: shapes are what takes time
fastkd profile --from-config gpt2 --method all --length 256       every method that makes sense for it
fastkd profile --teacher path/or/hub-id --method "fcd + kd"       a real one
fastkd profile --from-config bert-base:num_hidden_layers=4,hidden_size=256 --method kd --providers fastkd --compile
"""

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

LEAST = {"steps": 6, "batch": 1, "length": 2, "threads": 0}  # fewer than six steps have no 95 % interval


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser("fastkd profile", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    result.error = refuse
    add = result.add_argument
    source = result.add_mutually_exclusive_group(required=True)
    source.add_argument("--teacher", help="hub id or folder of a real model")
    source.add_argument("--from-config", help="bert-base, bert-large, roberta-large, gpt2, llama-1b, … or a config.json;\n"
                        "with changes: bert-base:num_hidden_layers=4")  # fmt: skip
    add("--student-layers", default="every:2", help="which of the teacher's layers the student keeps (every:2)")
    add("--method", default="kd", help="as for fastkd distill, several by comma, or 'all' that make sense (kd)")
    add("--task", default="", choices=("", "classification", "masked_lm", "causal_lm"),
        help="else what the method is usually trained on")  # fmt: skip
    add("--batch", type=int, default=8, help="examples per step (8)")
    add("--length", type=int, default=128, help="tokens per example (128)")
    add("--steps", type=int, default=10, help="timed steps of each provider, after two warm ones (10; at least 6)")
    add(
        "--providers",
        default="fastkd,logits,loop,authors",
        help="by comma; the first is what the others are held against",
    )
    add("--ways", help=argparse.SUPPRESS)
    add("--compile", action="store_true", help="torch.compile the student and, where it can be, the teacher")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"),
        help="the GPU where there is one; CUDA_VISIBLE_DEVICES says which")  # fmt: skip
    add("--dtype", default="", choices=("", "float32", "bfloat16"), help="bfloat16 is autocast; bfloat16 on a GPU")
    add("--threads", type=int, default=0, help="CPU threads; torch's default without it")
    add("--out", type=Path, default=Path("fastkd-profile"), help="<out>/<device>/profile.csv, profile.png and traces/")
    add("--force", action="store_true", help="measure on a busy machine: prints and traces, publishes no number")
    add("--no-trace", action="store_true", help="no Chrome trace (they are some megabytes each)")
    return result


def refuse(message: str):
    raise ValueError(message)


def parsed(argv: Sequence[str] | None = None) -> argparse.Namespace:
    arguments = parser().parse_args(argv)
    for name, least in LEAST.items():
        if getattr(arguments, name) < least:
            refuse(f"{name}: expected at least {least}, got {getattr(arguments, name)}")
    if arguments.ways:
        warnings.warn("--ways is now called --providers", FutureWarning, stacklevel=2)
        arguments.providers = arguments.ways
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """0: measured, and published unless told not to; 2: a mistake, or the machine was busy."""
    from fastkd.bench import machine
    from fastkd.profile import run

    arguments = run.checked(parsed(argv))
    machine.passive_threads(sys.orig_argv[1:])
    machine.quote_library_path()
    return run.run(arguments)
