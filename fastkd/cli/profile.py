"""`fastkd profile`: what a distillation step takes, and where: ours beside a careful loop in PyTorch, other packages and the
authors' way; the ways take turns in one training run.

fastkd         DistillTrainer, without the logits where it can   loop    plain PyTorch, logits of the rows that count only
logits         the same with the logits of all tokens            trl     what trl's DistillationTrainer computes
authors        its losses as released with the papers            gkd     what trl's GKDTrainer computes
reference      its losses in plain PyTorch                       torchdistill, textbrewer   the loop with their kd loss

fastkd profile --from-config bert-base --method bert_emd          a model without weights: shapes are what takes time
fastkd profile --from-config gpt2 --method all --length 256       every method that makes sense for it
fastkd profile --teacher path/or/hub-id --method "fcd + kd"       a real one
fastkd profile --from-config bert-base:num_hidden_layers=4,hidden_size=256 --method kd --ways fastkd --compile
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        "fastkd profile", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = result.add_argument
    source = result.add_mutually_exclusive_group(required=True)
    source.add_argument("--teacher", help="hub id or folder of a real model")
    source.add_argument("--from-config", help="bert-base, bert-large, roberta-large, gpt2, llama-1b, … or a config.json;\n"
                        "with changes: bert-base:num_hidden_layers=4")  # fmt: skip
    add("--student-layers", default="every:2", help="which of the teacher's layers the student keeps (every:2)")
    add("--method", default="kd", help="as for fastkd distill, several by comma, or 'all' that make sense (kd)")
    add("--task", default="", help="classification, masked_lm or causal_lm; else what the method is usually trained on")
    add("--batch", type=int, default=8, help="examples per step (8)")
    add("--length", type=int, default=128, help="tokens per example (128)")
    add("--steps", type=int, default=10, help="timed steps of each way, after two warm ones (10; at least 6)")
    add("--ways", default="fastkd,logits,loop,authors", help="by comma; the first is what the others are held against")
    add("--compile", action="store_true", help="torch.compile the student and, where it can be, the teacher")
    add("--device", default="", help="cpu or cuda; the GPU where there is one")
    add("--dtype", default="", help="float32 or bfloat16 (autocast); bfloat16 on a GPU")
    add("--threads", type=int, default=0, help="CPU threads; torch's default without it")
    add("--out", type=Path, default=Path("fastkd-profile"), help="<out>/<device>/profile.csv, profile.png and traces/")
    add("--force", action="store_true", help="measure on a busy machine: prints and traces, publishes no number")
    add("--no-trace", action="store_true", help="no Chrome trace (they are some megabytes each)")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """0: measured, and published unless told not to; 2: a mistake, or the machine was busy."""
    from fastkd.bench import machine

    arguments = parser().parse_args(argv)
    try:
        check(arguments)
        machine.passive_threads(sys.orig_argv[1:])
        machine.quote_library_path()
        return run(arguments)
    except (ValueError, RuntimeError, OSError) as error:
        if os.environ.get("FASTKD_TRACEBACK") == "1":
            raise
        print(f"fastkd profile: {first_line(error)}", file=sys.stderr)
        return 2


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check(arguments) -> None:
    """Mistakes, before anything is built."""
    import torch

    from fastkd.profile.implementations import WAYS

    ways = arguments.ways.split(",")
    if not set(ways) <= set(WAYS) or len(set(ways)) != len(ways):
        raise ValueError(f"ways: expected some of {', '.join(WAYS)}, got {arguments.ways!r}")
    if arguments.task not in ("", "classification", "masked_lm", "causal_lm"):
        raise ValueError(f"task: expected classification, masked_lm or causal_lm, got {arguments.task!r}")
    if arguments.steps < 6:
        raise ValueError(f"steps: six at least, since fewer have no 95 % interval, got {arguments.steps}")
    if arguments.batch < 1 or arguments.length < 2:
        raise ValueError(f"batch, length: expected at least 1×2, got {arguments.batch}×{arguments.length}")
    if arguments.threads < 0:
        raise ValueError(f"threads: expected at least 1, or 0 for torch's default, got {arguments.threads}")
    if arguments.dtype not in ("", "float32", "bfloat16"):
        raise ValueError(f"dtype: expected float32 or bfloat16, got {arguments.dtype!r}")
    if arguments.device not in ("", "cpu", "cuda"):
        hint = "; CUDA_VISIBLE_DEVICES says which GPU" if arguments.device.startswith("cuda:") else ""
        raise ValueError(f"device: expected cpu or cuda, got {arguments.device!r}{hint}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda was asked for, but torch finds no CUDA device here; use --device cpu")


def run(arguments) -> int:
    import pandas as pd
    import torch
    from transformers.utils import logging

    from fastkd import atomic_write
    from fastkd.bench import machine
    from fastkd.profile import models, plots, results

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    causal = models.is_causal(models.config_for(name_of(arguments), bool(arguments.from_config)))
    setups = [setup_of(arguments, method, causal, device) for method in methods_of(arguments, causal)]
    folder = arguments.out / machine.device_name(device)
    atomic_write.probe(folder, "out")
    results.read(folder)  # refuses a table that is not ours before anything is measured
    if busy(device, arguments.force):
        return 2
    everything, left_out, refused = [], [], []
    for setup in setups:
        try:
            rows, lacking = profile(arguments, setup, device, folder)
        except (ValueError, RuntimeError) as error:
            if len(setups) == 1:
                raise
            left_out.append(f"{setup['method']}: {first_line(error)}")
            continue
        results.print_table(rows)
        print(*(f"  without {way}: {why}\n" for way, why in lacking.items()), sep="", end="")
        everything.append(rows)
        reason = machine.busy_reason(rows["foreign_cores"].iloc[0], "while this was profiled")
        if not reason and not arguments.force:
            results.write(rows, folder)
        refused += [f"{setup['method']}: {reason}"] if reason else []
    if len(everything) > 1:
        results.print_summary(pd.concat(everything))
    if len(refused) < len(setups) - len(left_out) and not arguments.force:
        drawn, reason = plots.draw(folder)
        print(f"\n{folder / 'profile.csv'}", *(path.name for path in drawn), reason)
    if everything and not arguments.no_trace:
        print(f"traces for Perfetto: {folder / 'traces'}")
    for text in (*(f"left out: {text}" for text in left_out), *(f"not published: {text}" for text in refused)):
        print(text)
    failed = not everything or (left_out and arguments.method != "all")
    return 2 if failed or (refused and not arguments.force) else 0


def busy(device, force: bool) -> bool:
    """Whether somebody else computes here, so that nothing is measured; it is said in any case."""
    from fastkd.bench import machine

    reason = machine.busy_reason(machine.load_before(), "before the run")
    reason = reason or (machine.gpu_busy_reason() if device.type == "cuda" else "")
    if reason:
        print(f"{reason}. " + ("Measuring anyway (--force); no number is published." if force else
              "Wait, or pass --force to see numbers that are not published."))  # fmt: skip
    return bool(reason) and not force


def name_of(arguments) -> str:
    return arguments.teacher or arguments.from_config


def methods_of(arguments, causal: bool) -> list[str]:
    """ "fcd,kd:alpha=0.5,weight=2,glmd" is three: after a comma stands a method, or an option of the one before."""
    from fastkd.profile import models
    from fastkd.train.methods import find, parse, refusal

    if arguments.method == "all":
        return models.sensible_methods(causal)
    methods = re.split(r",(?![^:+,]*=)", arguments.method)
    for method in methods:
        for name, _ in parse(method):
            find(name)
            refused = refusal(name, causal, arguments.task or None)
            if refused:
                raise ValueError(f"method: {refused}")
    return list(dict.fromkeys(method.strip() for method in methods))


def setup_of(arguments, method: str, causal: bool, device) -> dict:
    """The columns that tell one profile from another; a student that is not the usual half is told by the model."""
    from fastkd.profile import models

    usual = parser().get_default("student_layers")
    layers = "" if arguments.student_layers == usual else f", student {arguments.student_layers}"
    half = arguments.dtype == "bfloat16" or (not arguments.dtype and device.type == "cuda")
    return {
        "model": name_of(arguments) + layers, "method": method, "task": arguments.task or models.task_for(method, causal),
        "batch": arguments.batch, "length": arguments.length, "dtype": "bfloat16" if half else "float32",
        "compiled": arguments.compile,
    }  # fmt: skip


def profile(arguments, setup: dict, device, folder: Path):
    """The rows of one method, and why some ways have none; models are made afresh, so that each starts alike."""
    import torch

    from fastkd.bench import machine
    from fastkd.profile import models, results, session

    name, task = name_of(arguments), setup["task"]
    teacher, student = models.pair(name, bool(arguments.from_config), arguments.student_layers, task)
    data = models.tokens(teacher.config, task, arguments.batch, arguments.length)
    plan = session.Plan(tuple(arguments.ways.split(",")), timed=arguments.steps)
    torch.manual_seed(0)
    steps, foreign, left_out = session.run(
        teacher, student, models.first_stage(setup["method"]), task, data, plan, batch=arguments.batch, device=device,
        half=setup["dtype"] == "bfloat16", compiled=arguments.compile,
        trace=None if arguments.no_trace else results.trace_of(folder, setup),
    )  # fmt: skip
    facts = {name: value for name, value in machine.facts(device).items() if name in results.COLUMNS}  # clocks at work
    return results.rows_of(steps, facts, {**setup, "foreign_cores": foreign}), left_out
