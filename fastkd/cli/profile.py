"""`fastkd profile`: where the time of a distillation step goes, as training runs it, ours beside the reference and the
authors' way.

fastkd profile --from-config bert-base --method bert_emd          a model without weights: shapes are what takes time
fastkd profile --from-config gpt2 --method all --length 256       every method that makes sense for it
fastkd profile --teacher path/or/hub-id --method "fcd + kd"       a real one
fastkd profile --from-config bert-base:num_hidden_layers=4,hidden_size=256 --method kd --ways fastkd --compile
"""

import argparse
import os
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
    add("--ways", default="fastkd,reference,authors", help="by comma; the first is what the others are held against")
    add("--compile", action="store_true", help="torch.compile the student and, where it can be, the teacher")
    add("--device", default="", help="cpu or cuda; the GPU where there is one")
    add("--dtype", default="", help="float32 or bfloat16 (autocast); bfloat16 on a GPU")
    add("--threads", type=int, default=0, help="CPU threads; torch's default without it")
    add("--out", type=Path, default=Path("fastkd-profile"), help="<out>/<device>/profile.csv, .json, .png and traces/")
    add("--no-trace", action="store_true", help="no Chrome trace (they are some megabytes each)")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    from fastkd.bench import machine

    arguments = parser().parse_args(argv)
    machine.passive_threads(sys.orig_argv[1:])
    try:
        return run(arguments)
    except (ValueError, RuntimeError, OSError) as error:
        if os.environ.get("FASTKD_TRACEBACK") == "1":
            raise
        print(f"fastkd profile: {error}", file=sys.stderr)
        return 2


def check(arguments) -> None:
    """Mistakes, before anything is built."""
    import torch

    from fastkd.profile.ways import WAYS

    ways = arguments.ways.split(",")
    if not set(ways) <= set(WAYS) or len(set(ways)) != len(ways):
        raise ValueError(f"ways: expected some of {', '.join(WAYS)}, got {arguments.ways!r}")
    if arguments.task not in ("", "classification", "masked_lm", "causal_lm"):
        raise ValueError(f"task: expected classification, masked_lm or causal_lm, got {arguments.task!r}")
    if arguments.steps < 6:
        raise ValueError(f"steps: six at least, since fewer have no 95 % interval, got {arguments.steps}")
    if arguments.batch < 1 or arguments.length < 2:
        raise ValueError(f"batch, length: expected at least 1×2, got {arguments.batch}×{arguments.length}")
    if arguments.dtype not in ("", "float32", "bfloat16"):
        raise ValueError(f"dtype: expected float32 or bfloat16, got {arguments.dtype!r}")
    if arguments.device not in ("", "cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {arguments.device!r}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda was asked for, but torch finds no CUDA device here; use --device cpu")


def run(arguments) -> int:
    import torch
    from transformers.utils import logging

    from fastkd.bench import machine
    from fastkd.profile import models, plots, results

    check(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    facts = {name: value for name, value in machine.facts(device).items() if name in results.COLUMNS}
    folder = arguments.out / facts["device"]
    name = arguments.teacher or arguments.from_config
    family = models.config_for(name, bool(arguments.from_config)).model_type
    failed, rows, everything = [], [], []
    for method in methods_of(arguments, family):
        try:
            rows = profile(arguments, method, name, device, facts, folder)
        except (ValueError, RuntimeError) as error:
            if arguments.method != "all":
                raise
            failed.append(f"{method}: {str(error).splitlines()[0]}")
            continue
        results.print_table(rows)
        results.write(rows, folder)
        everything += rows
    if len({row.method for row in everything}) > 1:
        results.print_summary(everything)
    drawn, reason = plots.draw(folder)
    print(f"\n{folder / 'profile.csv'}, profile.json", *(path.name for path in drawn), reason)
    for text in failed:
        print(f"left out: {text}")
    return 0 if rows else 1


def methods_of(arguments, family: str) -> list[str]:
    from fastkd.profile import models

    if arguments.method != "all":
        return arguments.method.split(",") if ":" not in arguments.method else [arguments.method]
    return models.sensible_methods(family)


def profile(arguments, method: str, name: str, device, facts: dict, folder: Path) -> list:
    """One method: models made afresh, so that each starts alike."""
    import torch

    from fastkd.bench import machine
    from fastkd.profile import models, results, session

    config = models.config_for(name, bool(arguments.from_config))
    task = arguments.task or models.task_for(method, config.model_type)
    teacher, student = models.pair(name, bool(arguments.from_config), arguments.student_layers, task)
    data = models.tokens(teacher.config, task, arguments.batch, arguments.length)
    half = arguments.dtype == "bfloat16" or (not arguments.dtype and device.type == "cuda")
    trace = None if arguments.no_trace else folder / "traces" / f"{machine.slug(f'{name} {method}')}.json"
    plan = session.Plan(tuple(arguments.ways.split(",")), timed=arguments.steps)
    meter = machine.LoadMeter()
    torch.manual_seed(0)
    steps = session.run(
        teacher, student, models.first_stage(method), task, data, plan, batch=arguments.batch, device=device, half=half,
        compiled=arguments.compile, trace=trace,
    )  # fmt: skip
    foreign = meter.stop()
    busy = machine.busy_reason(foreign, "while this was profiled")
    if busy:
        print(f"note: {busy}; the ways took turns, so their ratios suffer less than the times")
    setup = {
        "model": name if arguments.from_config else Path(name).name, "method": method, "task": task,
        "batch": arguments.batch, "length": arguments.length, "dtype": "bfloat16" if half else "float32",
        "compiled": arguments.compile, "foreign_cores": foreign,
    }  # fmt: skip
    return results.rows_of(steps, facts, setup)
