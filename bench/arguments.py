"""The arguments of `fastkd bench`, and the one place where they are checked: before anything is built or measured."""

import argparse
import pathlib

import torch
from fastkd.bench import (
    baselines,
    cli_errors,
    machine,
    measure,
)
from fastkd.bench.cases import case as case_module
from fastkd.bench.cases import shapes
from fastkd.bench.cli_errors import within
from fastkd.bench.intervals import LEAST_SAMPLES

FEW = "; fewer samples have no 95 % interval"


def parser(description: str = "") -> argparse.ArgumentParser:
    result = cli_errors.Parser("fastkd bench", description=description, formatter_class=argparse.RawTextHelpFormatter)
    add = result.add_argument
    add("stems", nargs="*", metavar="stem", help="divergence, gram, …; all without one")
    add("--shape", default="", help=f"by comma: {', '.join(shapes.SHAPES)}, each @BATCHxLENGTH, or .yaml files")
    add("--scale", action="store_true", help="only the curves, to their far ends: 16k tokens, 256k words, 1M negatives")
    add("--kind", default="", help="only this kind, such as forward_kl")
    add("--case", default="", help="only cases whose name contains this, such as 512x30522")
    add("--dtype", default="", help="float32, bfloat16, float64")
    add("--mode", default="", choices=("", *measure.MODES), help="one mode instead of forward, backward and both")
    add(
        "--rivals",
        default="",
        help="only these, by comma: eager,compile,authors,…; the others are stored as not asked for",
    )
    add("--backends", default="", help="'reference' also times our reference where a kernel serves")
    add("--quick", action="store_true", help="the small cases, few rounds; printed, never published")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:1")
    add("--threads", type=within(int, 1), help="CPU threads; torch's default without it")
    add("--cold", action="store_true", help="CPU: evict the caches before every sample (a GPU is always cold)")
    add("--rounds", type=within(int, LEAST_SAMPLES, why=FEW), help="interleaved rounds (30, quick 10)")
    add("--budget", type=within(float, 0), help="seconds for the rounds of one mode (20, quick 3)")
    memory = "CPU: GiB a call may add; more is out of memory (--scale: half of what is free)"
    add("--memory", type=within(float, 0.01), help=memory)
    add("--out", type=pathlib.Path, default=None, help="instead of bench/results")
    add("--no-publish", action="store_true", help="print only")
    add("--force", action="store_true", help="measure on a busy machine: prints, never publishes")
    add("--tolerance", type=within(float, 0, 1), default=0.05, help="of a comparison: a smaller loss is none (0.05)")
    add = result.add_mutually_exclusive_group().add_argument
    add("--list", action="store_true", help="name the cases and stop")
    add("--compare", nargs=2, type=pathlib.Path, metavar=("BEFORE", "AFTER"), help="two .json, .csv or result folders")
    add("--against", default="", metavar="REF", help="measure the same at another commit too, then compare")
    return result


def words(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def kinds_of(stems: list[str]) -> list[str]:
    """Every kind that a case or a YAML file of these stems can have."""
    tables = (case_module.REGISTRY, case_module.CLAIMS, case_module.ON_GPU, case_module.SCALE)
    cases = (case for table in tables for stem in stems if stem in table for case in table[stem]())
    return list(
        dict.fromkeys([*(kind for stem in stems for kind in shapes.KINDS[stem]), *(case.kind for case in cases)])
    )


def check(arguments: argparse.Namespace) -> None:
    """Names that are none, a device that is not here, and options that make each other pointless."""
    for stem in arguments.stems:
        cli_errors.one_of("stem", stem, case_module.REGISTRY)
    if arguments.kind:
        cli_errors.one_of("kind", arguments.kind, kinds_of(arguments.stems or list(case_module.REGISTRY)))
    if arguments.dtype:
        cli_errors.one_of("dtype", arguments.dtype, shapes.DTYPES)
    for name in words(arguments.rivals):
        cli_errors.one_of("rivals", name, baselines.names())
    for name in words(arguments.backends):
        cli_errors.one_of("backends", name, ("reference",), "; every other one that runs here is timed anyway")
    if arguments.against and (arguments.force or arguments.no_publish):
        raise ValueError(
            "against: --force and --no-publish publish nothing, so nothing could be compared; leave them out"
        )
    machine.device_of(arguments.device, ("cpu", "cuda"), here=not arguments.list)
