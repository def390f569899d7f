"""`fastkd bench [stem …]`: check, then measure, then publish; in that order or not at all.

fastkd bench                           every case; table, CSV and plots under bench/results/<device>/
fastkd bench divergence --quick        a few small cases, printed only
fastkd bench gram --case fcd- --dtype bfloat16 --mode both --no-publish
fastkd bench --shape llama-1b          every stem at the shapes of a model; also bert-large@16x512
fastkd bench --compare A.csv B.csv     what got slower, by ratios measured within each run; 1 if anything did
fastkd bench --calibrate               up to which sizes PyTorch or kernels are faster on this machine, kept for "auto"
fastkd bench gram --against main       the same cases at another commit, built in a worktree, then compared
"""

import argparse
import dataclasses
import functools
import gc
import pathlib
import sys
from collections.abc import Callable, Sequence

import torch
from fastkd.bench import baselines, calibrate, cases, check, compare, machine, measure, plots, report
from fastkd.bench.baselines import Absent, Provider
from fastkd.bench.cases import shapes
from fastkd.bench.cases.case import DTYPES, Case, Inputs, build
from fastkd.bench.report import OOM
from fastkd.bench.roofline import Roofline

from fastkd import atomic_write, checks

SERVED_BY_EAGER = ("reference", "eager")
PATIENCE = 30.0  # seconds that another provider's call may take; eight of a slower one would say no more
LEAST = {"threads": 1, "rounds": measure.LEAST_SAMPLES, "budget": 0, "tolerance": 0}


# The arguments: the one place where they are checked, before anything is built or measured -------------------------


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser("fastkd bench", "fastkd bench [stem …] [options]", __doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    add = result.add_argument
    add("stems", nargs="*", metavar="stem", help="divergence, gram, …; all without one")
    add("--shape", default="", help=f"by comma: {', '.join(shapes.SHAPES)}, each @BATCHxLENGTH")
    add("--case", default="", help="only cases whose name contains this, such as forward_kl-512x30522")
    add("--dtype", default="", choices=("", *DTYPES), help="only this dtype")
    add("--target", default="", help="only cases that stand for these targets on a GPU, by comma: G1,G6; no pictures")
    add("--mode", action="append", choices=measure.MODES, help="this mode only; more than once for several")
    add("--launch", choices=("plain", "graph"), help="GPU: launched one by one or replayed only, instead of both")
    add("--others", default="", help="only these baselines and peers, by comma (quick: eager,authors)")
    add("--quick", action="store_true", help="the small cases, few rounds; printed, never published")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:1")
    add("--threads", type=int, help="CPU threads; torch's default without it")
    add("--cold", action="store_true", help="CPU: evict the caches before every sample (a GPU is always cold)")
    add("--rounds", type=int, help="interleaved rounds (30, quick 10)")
    add("--budget", type=float, help="seconds for the rounds of one mode (20, quick 3)")
    add("--out", type=pathlib.Path, default=None, help="instead of bench/results")
    add("--no-publish", action="store_true", help="print only")
    add("--force", action="store_true", help="measure on a busy machine: prints, never publishes")
    add("--tolerance", type=float, default=0.05, help="of a comparison: a smaller loss is none (0.05)")
    add = result.add_mutually_exclusive_group().add_argument
    add("--list", action="store_true", help="name the cases and stop")
    add("--calibrate", action="store_true", help="measure the sizes that `fastkd doctor` prints")
    add("--compare", nargs=2, type=pathlib.Path, metavar=("BEFORE", "AFTER"), help="two .csv or result folders")
    add("--against", default="", metavar="REF", help="measure the same at another commit too, then compare")
    return result


def parsed(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Names that are none, a device that is not here, and options that make each other pointless are ValueErrors; what was
    not asked for is filled in."""
    asked = parser().parse_args(argv)
    for stem in asked.stems:
        checks.one_of("stem", stem, list(cases.STEMS))
    for name in filter(None, asked.others.split(",")):
        checks.one_of("others", name, baselines.names())
    for name, least in LEAST.items():
        value = getattr(asked, name)
        if value is not None and not least <= value < float("inf"):
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    if asked.against and (asked.force or asked.no_publish):
        raise ValueError(
            "against: compares what is published, and --force and --no-publish publish nothing; leave them out"
        )
    if asked.calibrate:
        asked.device = "cpu"
    asked.device = checks.device(asked.device, ("cpu", "cuda"), here=not asked.list)
    asked.others = asked.others or ("eager,authors" if asked.quick else "")  # compiling takes longer than all else
    asked.rounds = asked.rounds or (10 if asked.quick else 30)
    asked.budget = (3.0 if asked.quick else 20.0) if asked.budget is None else asked.budget
    return asked


def chosen_cases(asked: argparse.Namespace) -> list[Case]:
    """At least one, or a ValueError."""
    if asked.shape:
        found = shapes.select(asked.shape.split(","), asked.dtype, asked.device, asked.stems, asked.case)
    else:
        of = asked.target.split(",") if asked.target else ()
        found = cases.select(asked.stems, asked.case, asked.dtype, asked.quick, asked.device.type == "cuda", of)
    if not found:
        filters = ("stems", "shape", "case", "dtype", "quick", "target")
        named = ", ".join(f"{name}={getattr(asked, name)!r}" for name in filters if getattr(asked, name))
        raise ValueError(f"no case matches all of {named}; leave one out, or see --list")
    return found


# One case -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Outcome:
    """What became of one case."""

    rows: list[report.Row] = dataclasses.field(default_factory=list)
    absent: list[Absent] = dataclasses.field(default_factory=list)  # providers without a row, with their reasons
    refused: str = ""  # why no speed of this case is shown at all
    foreign: float = 0.0  # cores that others used meanwhile


def problem_of(error: Exception) -> str:
    if machine.ran_out(error):
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return OOM
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def checked(case: Case, providers: Sequence, inputs: Inputs, oracle: check.Oracle) -> tuple[dict, list, str]:
    """(provider -> errors) of those that compute the right thing, the others as Absent, and why all are refused."""
    passed, absent, eager = {}, [], None
    for provider in sorted(providers, key=lambda p: p.name != "eager"):  # eager first: it sets limits
        try:
            errors = check.errors_of(provider.call, inputs, oracle)
            if provider.ours:
                problem = check.verdict(errors, check.limits(case.dtype, eager))
            else:
                problem = check.verdict_on_other(provider, case, inputs, oracle, errors)
        except Exception as error:
            errors, problem = None, problem_of(error)
        if problem and provider.ours:
            return {}, absent, f"{provider.name}: {problem}"
        if problem:
            reason = problem if problem.startswith(OOM) else f"failed its check: {problem}"
            absent.append(Absent(provider.name, reason))
            continue
        passed[provider] = errors
        eager = errors if provider.name == "eager" else eager
    return {provider: passed[provider] for provider in providers if provider in passed}, absent, ""


def tasks_of(providers: Sequence[Provider], mode: str, inputs: Inputs, launch: str) -> tuple[list, list]:
    """The tasks of one mode, and the providers that cannot be captured in a CUDA graph."""
    make, tasks, absent = measure.make_task if launch == "plain" else measure.capture_task, [], []
    for provider in providers:
        try:
            tasks.append(make(provider.name, mode, lambda call=provider.call: call(inputs), inputs.leaves))
        except Exception as error:
            reason = f"cannot be captured in a CUDA graph: {str(error).strip().splitlines()[0]}"
            absent.append(Absent(f"{provider.name} ({mode}, graph)", reason))
    return tasks, absent


def measure_mode(case, mode, launch, passed, inputs, asked, roofline, gemms) -> tuple[list[report.Row], list[Absent]]:
    """Peak memory, then interleaved time, of every provider that passed; the measured columns of its rows."""
    device, timer = asked.device, measure.make_timer(asked.device, asked.cold)
    tasks, absent = tasks_of(list(passed), mode, inputs, launch)
    if not tasks:
        return [], absent
    plain, _ = tasks_of(list(passed), mode, inputs, "plain")
    first = {task.provider: timer.sample(task, 1) for task in plain}  # warm-up: compilation and allocator
    slow = [name for name in first if first[name] > PATIENCE and not name.startswith("fastkd")]
    absent += [Absent(name, f"one call takes {first[name]:.0f} s ({mode})") for name in slow]
    tasks, plain = ([task for task in some if task.provider not in slow] for some in (tasks, plain))
    memory = {task.provider: measure.peak_memory(task, device) for task in plain}
    counted = [task for task in plain if task.provider in ("fastkd", "eager") and launch == "plain"]
    launches = {task.provider: measure.count_launches(task, device) for task in counted}
    timings = measure.interleave(tasks, timer, asked.rounds, asked.budget)
    early = any(p.name == "fastkd" and measure.gradient_in_forward(p.call(inputs)) for p in passed)
    roofline.again(case, mode)
    seconds, bound = roofline.floor_of(case, mode)
    own, moved, rows = timings.get("fastkd"), case.bytes.of(mode), []
    cache = "cold (flushed)" if asked.cold or device.type == "cuda" else "as the previous provider left it"
    for provider in (p for p in passed if p.name in timings):
        time, (peak, method) = timings[provider.name], memory[provider.name]
        low, high = measure.ratio_interval(time.samples, own.samples) if own else (None, None)
        rows.append({
            "mode": mode, "launch": launch, "cache": cache, "provider": provider.name,
            "served_by": provider.served_by, "by_eager": provider.served_by in SERVED_BY_EAGER, "gradient_in_forward": early,
            **time.columns(),
            "times_ours_median": time.median / own.median if own else None, "times_ours_low": low, "times_ours_high": high,
            "times_ours_minimum": min(time.samples) / min(own.samples) if own else None,
            "floor_ms": 1e3 * seconds, "floor_bound": bound, "floor_share": 1e3 * seconds / time.median,
            "gemms_ms": 1e3 * gemms[mode] if gemms.get(mode) else None, "flops": case.flops.of(mode), "bytes": moved,
            "copy_gb_s": roofline.copy_rate(moved) / 1e9, "gemm_gflop_s": roofline.gemm_rate(case.dtype) / 1e9,
            "launches": launches.get(provider.name), "peak_extra_mib": None if peak is None else peak / 2**20,
            "memory_method": method, "loss_error": passed[provider].loss, "gradient_error": passed[provider].gradient,
            "match": True,
        })  # fmt: skip
    return rows, absent


def providers_of(case: Case, inputs: Inputs, asked: argparse.Namespace) -> list[Provider | Absent]:
    """Ours and all others; what is absent anyway keeps its own reason."""
    others = baselines.others(case, asked.device)
    if asked.others:
        kept = lambda p: isinstance(p, Absent) or p.name in asked.others.split(",")  # noqa: E731
        others = [p if kept(p) else Absent(p.name, report.NOT_ASKED) for p in others]
    return [*baselines.ours(case, inputs), *others]


def groups_of(providers: Sequence[Provider], asked: argparse.Namespace) -> list[list[Provider]]:
    """Who takes turns. On a CPU everyone; on a GPU fastkd and one other, in the order asked for: a lent one may be taken away
    at any time, so each is measured and published before the next one compiles."""
    ours, others = [p for p in providers if p.ours], [p for p in providers if not p.ours]
    if asked.device.type != "cuda" or not others:
        return [list(providers)]
    order = asked.others.split(",")
    return [[*ours, other] for other in sorted(others, key=lambda p: order.index(p.name) if p.name in order else 0)]


def bench_case(case: Case, asked: argparse.Namespace, roofline: Roofline, facts: dict, providers: Sequence | None = None,
               keep: Callable = lambda outcome, new: None) -> Outcome:  # fmt: skip
    """Check first; a case whose check fails has no speed. keep(outcome so far, new rows): after each group."""
    left_out = machine.too_large(case, machine.available_bytes(asked.device))
    if left_out:
        return Outcome(absent=[Absent(case.name, left_out)])
    inputs, outcome = build(case, asked.device), Outcome()
    everyone = providers_of(case, inputs, asked) if providers is None else providers
    outcome.absent = [p for p in everyone if isinstance(p, Absent)]
    oracle, gemms, passed = check.make_oracle(case, inputs), None, {}
    launches = [asked.launch] if asked.launch else ["plain", "graph"] if asked.device.type == "cuda" else ["plain"]
    for group in groups_of([p for p in everyone if isinstance(p, Provider)], asked):
        new, failed, outcome.refused = checked(case, [p for p in group if p not in passed], inputs, oracle)
        outcome.absent += failed
        if outcome.refused:
            return outcome
        passed |= new
        gemms, meter = roofline.gemms_of(case) if gemms is None else gemms, machine.LoadMeter()
        measured: list = []
        for mode in (m for m in case.modes if not asked.mode or m in asked.mode):
            for launch in launches:
                turns = {p: errors for p, errors in passed.items() if p in group}
                rows, absent = measure_mode(case, mode, launch, turns, inputs, asked, roofline, gemms)
                measured += rows
                outcome.absent += [x for x in absent if x not in outcome.absent]
        outcome.foreign = max(outcome.foreign, foreign := meter.stop())
        eager = next((errors for provider, errors in passed.items() if provider.name == "eager"), None)
        common = {
            **of_case(case), "eager_loss_error": eager.loss if eager else None,
            "eager_gradient_error": eager.gradient if eager else None, "foreign_cores": foreign, **facts,
            "driver": machine.driver(asked.device), "absent": "",  # the clocks of a GPU that has just worked
        }  # fmt: skip
        known = {place(row) for row in outcome.rows}
        outcome.rows += (rows := [{**row, **common} for row in measured if place(row) not in known])
        keep(outcome, rows)
    outcome.rows.sort(key=lambda row: place(row)[:2])
    return outcome


def place(row: report.Row) -> tuple:
    return measure.MODES.index(row["mode"]), row["launch"] == "graph", row["provider"]


def of_case(case: Case) -> report.Row:
    return {
        "stem": case.stem, "case": case.name, "kind": case.kind, "shape": case.shape_text, "dtype": case.dtype_text,
        "goal": case.goal, "label": case.label,
    }  # fmt: skip


def absent_rows(case: Case, absent: Sequence[Absent], facts: dict) -> list[report.Row]:
    """Of the others: why an implementation of ours does not run here, `fastkd doctor` says."""
    absent = [x for x in absent if not x.name.startswith("fastkd")]
    empty = {name: "" if kind is str else None for name, kind in report.TYPES.items()}
    return [{**empty, **of_case(case), **facts, "provider": x.name, "absent": x.reason} for x in absent]


def show(case: Case, outcome: Outcome) -> None:
    goal = "".join((f" · {case.label}" if case.label else "", f" · goal: {case.goal}" if case.goal else ""))
    if outcome.refused:
        print(f"\n{case.stem} {case.name}: no speed is shown, the check failed: {outcome.refused}")
    elif outcome.rows:
        report.print_table(outcome.rows, f"\n{case.stem} {case.name}{goal}")
        print(report.footnote(outcome.rows))
        if any(row["by_eager"] for row in outcome.rows):
            print("  † served by plain PyTorch: no kernel runs here, or auto-dispatch prefers eager at this size")
    for absent in outcome.absent:
        if "graph" in absent.name or absent.reason.startswith(report.OF_A_CASE):
            print(f"  – {absent.name}: {absent.reason}")  # what is missing everywhere is named once, at the end


# The run ------------------------------------------------------------------------------------------------------------


def run(asked: argparse.Namespace) -> int:
    """0: measured, and published unless told not to; 1: a check failed; 2: the machine was busy."""
    chosen = chosen_cases(asked)
    if asked.list:
        print("\n".join(f"{case.stem} {case.name}" for case in chosen))
        return 0
    if asked.threads:
        torch.set_num_threads(asked.threads)
    if asked.calibrate:
        return calibrate.calibrate(keep=not (asked.no_publish or asked.force), force=asked.force)
    facts = machine.facts(asked.device)
    results = machine.ROOT / "bench/results" if (machine.ROOT / "setup.py").is_file() else pathlib.Path("fastkd-bench")
    folder: pathlib.Path | None = (asked.out or results) / facts["device"]
    if asked.no_publish or asked.force or (asked.quick and not asked.out):
        folder = None
    else:
        atomic_write.probe(folder, "out")
        report.rows_of(folder)  # what is there already can be read, and so added to
    if machine.is_busy(asked.device, asked.force):
        return 2
    return run_cases(chosen, asked, facts, folder)


def run_cases(chosen: Sequence[Case], asked: argparse.Namespace, facts: dict, folder: pathlib.Path | None) -> int:
    """Published in the folder where there is one: on a CPU case by case, on a GPU as it is measured."""
    roofline = Roofline(asked.device, measure.make_timer(asked.device, cold=False))
    print("  ".join(f"{name}={value}" for name, value in facts.items() if value != ""))
    rates = {case.dtype_text: roofline.gemm_rate(case.dtype) / 1e9 for case in chosen}
    gemms = (f"{dtype} GEMM {rate:.0f} GFLOP/s" for dtype, rate in rates.items())
    print(f"copy of 256 MiB {roofline.copy_rate(2**28) / 1e9:.1f} GB/s", *gemms, sep="   ")
    failed, busy, absent = [], [], []

    def publish(case: Case, outcome: Outcome, new: Sequence = ()) -> None:
        if folder:
            report.write([*outcome.rows, *absent_rows(case, outcome.absent, facts)], folder)
        for row in new:
            beside = f", {report.number(row['times_ours_median'])}× ours" if row["times_ours_median"] else ""
            print(
                f"  {case.name} {report.mode_of(row)} {row['provider']}: {report.number(row['median_ms'])} ms{beside}",
                flush=True,
            )

    for case in chosen:
        keep = functools.partial(publish, case) if asked.device.type == "cuda" else lambda *_: None
        try:
            outcome = bench_case(case, asked, roofline, facts, None, keep)
        except (RuntimeError, MemoryError) as error:  # out of memory while timed, for one: the other cases go on
            outcome = Outcome(refused=problem_of(error))
        show(case, outcome)
        failed += [case.name] if outcome.refused else []
        absent += absent_rows(case, outcome.absent, facts)
        reason = machine.busy_reason(outcome.foreign, "while this case was measured", asked.device)
        busy += [f"{case.name}: {reason}"] if reason and folder else []
        if folder and not reason and not outcome.refused:
            publish(case, outcome)
    if folder and any(folder.glob("*.csv")):
        pictures = "" if asked.target else plots.draw(folder)
        print(f"published in {folder}:", *(path.name for path in sorted(folder.glob("*.csv"))), pictures)
    if absent:
        print("\nnot measured here:", *report.absent(absent), sep="\n  – ")
    print(*(f"not published: {text}" for text in busy), *(f"check failed: {name}" for name in failed), sep="\n")
    return 1 if failed else 2 if busy else 0


def main(argv: Sequence[str]) -> int:
    asked = parsed(argv)
    if asked.compare:
        return compare.compare(*asked.compare, asked.tolerance)
    if asked.list:
        return run(asked)
    chosen_cases(asked)  # mistakes are named before the process starts again
    if asked.against:
        return compare.against(asked.against, argv, asked.tolerance)
    machine.passive_threads(sys.orig_argv[1:])
    machine.quote_library_path()
    return run(asked)
