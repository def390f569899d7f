"""The run of `fastkd profile`: a profile of each method, then its table, its rows in profile.csv, its trace and the picture."""

import argparse
import re
from pathlib import Path

import pandas as pd
import torch
from transformers.utils import logging

from fastkd import atomic_write, checks
from fastkd.bench import machine
from fastkd.train.methods import find, parse, refusal

from . import models, plots, results, session
from .implementations import PROVIDERS


def checked(arguments: argparse.Namespace) -> argparse.Namespace:
    """With the providers as a list and the device as one; mistakes are named before anything is built."""
    arguments.providers = arguments.providers.split(",")
    for provider in arguments.providers:
        checks.one_of("providers", provider, PROVIDERS)
    if len(set(arguments.providers)) < len(arguments.providers):
        raise ValueError(f"providers: each can be named once, got {','.join(arguments.providers)}")
    arguments.device = checks.device(arguments.device)
    arguments.model = arguments.teacher or arguments.from_config
    return arguments


def run(arguments: argparse.Namespace) -> int:
    """The exit status."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    causal = models.is_causal(models.config_for(arguments.model, bool(arguments.from_config)))
    setups = [setup_of(arguments, method, causal) for method in methods_of(arguments, causal)]
    folder = arguments.out / machine.device_name(arguments.device)
    atomic_write.probe(folder, "out")
    results.read(folder)  # refuses a table that is not ours before anything is measured
    if machine.is_busy(arguments.device, arguments.force):
        return 2
    everything, left_out, refused = [], [], []
    for setup in setups:
        try:
            rows, lacking = profile(arguments, setup, folder)
        except (ValueError, RuntimeError) as error:
            if len(setups) == 1:
                raise
            left_out.append(f"{setup['method']}: {(str(error).strip() or type(error).__name__).splitlines()[0]}")
            continue
        results.print_table(rows)
        print(*(f"  without {provider}: {why}\n" for provider, why in lacking.items()), sep="", end="")
        everything.append(rows)
        if reason := machine.busy_reason(rows["foreign_cores"].iloc[0], "while this was profiled", arguments.device):
            refused.append(f"{setup['method']}: {reason}")
        elif not arguments.force:
            results.write(rows, folder)
    if len(everything) > 1:
        results.print_summary(pd.concat(everything))
    if len(everything) > len(refused) and not arguments.force:
        print(f"\n{folder / 'profile.csv'}", plots.draw(folder))
    if everything and not arguments.no_trace:
        print(f"traces for Perfetto: {folder / 'traces'}")
    print(
        *(f"left out: {text}\n" for text in left_out), *(f"not published: {text}\n" for text in refused), sep="", end=""
    )
    failed = not everything or (left_out and arguments.method != "all")
    return 2 if failed or (refused and not arguments.force) else 0


def methods_of(arguments: argparse.Namespace, causal: bool) -> list[str]:
    """ "fcd,kd:alpha=0.5,weight=2,glmd" is three: after a comma stands a method, or an option of the one before."""
    if arguments.method == "all":
        return models.sensible_methods(causal)
    methods = re.split(r",(?![^:+,]*=)", arguments.method)
    for name, _ in (part for method in methods for part in parse(method)):
        find(name)
        if refused := refusal(name, causal, arguments.task or None):
            raise ValueError(f"method: {refused}")
    return list(dict.fromkeys(method.strip() for method in methods))


def setup_of(arguments: argparse.Namespace, method: str, causal: bool) -> dict:
    """The columns that tell one profile from another; a student that is not the usual half is told by the model."""
    layers = "" if arguments.student_layers == "every:2" else f", student {arguments.student_layers}"
    return {
        "model": arguments.model + layers, "method": method, "task": arguments.task or models.task_for(method, causal),
        "batch": arguments.batch, "length": arguments.length, "compiled": arguments.compile,
        "dtype": arguments.dtype or ("bfloat16" if arguments.device.type == "cuda" else "float32"),
    }  # fmt: skip


def profile(arguments: argparse.Namespace, setup: dict, folder: Path) -> tuple[pd.DataFrame, dict[str, str]]:
    """The rows of one method, and why some providers have none; models are made afresh, so that each starts alike."""
    task, device = setup["task"], arguments.device
    teacher, student = models.pair(arguments.model, bool(arguments.from_config), arguments.student_layers, task)
    data = models.tokens(teacher.config, task, arguments.batch, arguments.length)
    plan = session.Plan(tuple(arguments.providers), timed=arguments.steps)
    torch.manual_seed(0)
    steps, foreign, left_out = session.run(
        teacher, student, models.first_stage(setup["method"]), task, data, plan, batch=arguments.batch, device=device,
        half=setup["dtype"] == "bfloat16", compiled=arguments.compile,
        trace=None if arguments.no_trace else results.trace_of(folder, setup),
    )  # fmt: skip
    facts = {name: value for name, value in machine.facts(device).items() if name in results.COLUMNS}  # clocks at work
    return results.rows_of(steps, facts, {**setup, "foreign_cores": foreign}), left_out
