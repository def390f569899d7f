"""`python -m fastkd.bench.run [stem …]`: check, then measure, then publish; in that order or not at all.

make bench                             every case; table, CSV, JSON and plots under bench/results/<device>/
fastkd bench divergence --quick        a few small cases, printed only
fastkd bench gram --kind fcd --dtype bfloat16 --mode both --no-publish
fastkd bench --shape llama-1b          every stem at the shapes of a model; also bert-large@16x512, or a YAML file
fastkd bench --compare A.json B.json   what got slower, by ratios measured within each run; 1 if anything did
fastkd bench gram --against main       the same cases at another commit, built in a worktree, then compared
"""

import argparse
import dataclasses
import gc
import os
import pathlib
import sys
from collections.abc import Iterable, Sequence

import torch
from fastkd.bench import (
    baselines,
    check,
    compare,
    compare_commits,
    device_plots,
    machine,
    measure,
    plots,
    report,
    results_io,
)
from fastkd.bench.arguments import check as check_arguments
from fastkd.bench.arguments import parser, words
from fastkd.bench.baselines import Absent, Provider
from fastkd.bench.cases import case as case_module
from fastkd.bench.cases import shapes
from fastkd.bench.cases.case import Case, Inputs
from fastkd.bench.intervals import ratio_interval
from fastkd.bench.roofline import Roofs

SERVED_BY_EAGER = ("reference", "eager")
PATIENCE = 30.0  # seconds that a rival's call may take; eight of a slower one would say no more


@dataclasses.dataclass
class Outcome:
    """What became of one case."""

    rows: list = dataclasses.field(default_factory=list)
    absent: list = dataclasses.field(default_factory=list)  # rivals without a row, with their reasons
    refused: str = ""  # why no speed of this case is shown at all
    foreign: float | None = None  # cores that others used meanwhile


@dataclasses.dataclass(frozen=True)
class Settings:
    device: torch.device
    modes: tuple[str, ...] = ()
    rounds: int = 30
    budget: float = 20.0
    cold: bool = False
    memory: float = 0.0  # GiB that a call may add on a CPU; 0: what the machine has
    rivals: tuple[str, ...] = ()  # all where empty
    backends: tuple[str, ...] = ()
    seed: int = 0


def problem_of(error: Exception, memory: float) -> str:
    if machine.ran_out(error):
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return results_io.OOM + (f" at {memory:g} GiB beyond its inputs" if memory else "")
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


def checked(case: Case, providers: Sequence, inputs: Inputs, memory: float = 0.0) -> tuple[dict, list, str]:
    """(provider -> errors) of those that compute the right thing, the others as Absent, and why all are refused."""
    oracle = check.make_oracle(case, inputs)
    passed, absent, eager = {}, [], None
    for provider in sorted(providers, key=lambda p: p.name != "eager"):  # eager first: it sets limits
        try:
            with machine.memory_limit(memory):
                errors = check.errors_of(provider.call, inputs, oracle)
            if provider.ours:
                problem = check.verdict_on_ours(case, errors, eager)
            else:
                problem = check.verdict_on_rival(provider.name, case, provider.call, inputs, oracle, errors)
        except Exception as error:
            errors, problem = None, problem_of(error, memory)
        if problem and provider.ours:
            return {}, absent, f"{provider.name}: {problem}"
        if problem:
            reason = problem if problem.startswith(results_io.OOM) else f"failed its check: {problem}"
            absent.append(Absent(provider.name, reason))
            continue
        passed[provider] = errors
        eager = errors if provider.name == "eager" else eager
    return {provider: passed[provider] for provider in providers if provider in passed}, absent, ""


def tasks_of(providers: Sequence[Provider], mode: str, inputs: Inputs, launch: str) -> tuple[list, list]:
    """The tasks of one mode, and the providers that cannot be captured in a CUDA graph."""
    tasks, absent = [], []
    for provider in providers:
        call = lambda provider=provider: provider.call(inputs)  # noqa: E731
        if launch == "plain":
            tasks.append(measure.make_task(provider.name, mode, call, inputs.leaves))
            continue
        try:
            tasks.append(measure.capture_task(provider.name, mode, call, inputs.leaves))
        except Exception as error:
            reason = f"cannot be captured in a CUDA graph: {str(error).strip().splitlines()[0]}"
            absent.append(Absent(f"{provider.name} ({mode}, graph)", reason))
    return tasks, absent


def measure_mode(case, mode, launch, passed, inputs, settings, roofs, gemms) -> tuple[list[dict], list]:
    """Peak memory, then interleaved time, of every provider that passed; the measured columns of its rows."""
    timer = measure.make_timer(settings.device, settings.cold, launch)
    tasks, absent = tasks_of(list(passed), mode, inputs, launch)
    if not tasks:
        return [], absent
    plain, _ = tasks_of(list(passed), mode, inputs, "plain")
    first = {task.provider: timer.sample(task, 1) for task in plain}  # warm-up: compilation and allocator
    slow = [name for name in first if first[name] > PATIENCE and not name.startswith("fastkd")]
    absent += [Absent(name, f"one call takes {first[name]:.0f} s ({mode})") for name in slow]
    tasks, plain = ([task for task in some if task.provider not in slow] for some in (tasks, plain))
    memory = {task.provider: measure.peak_memory(task, settings.device) for task in plain}
    counted = [task for task in plain if task.provider in ("fastkd", "eager") and launch == "plain"]
    launches = {task.provider: measure.count_launches(task, settings.device) for task in counted}
    timings = measure.interleave(tasks, timer, settings.rounds, settings.budget)
    roofs.again(case, mode)
    seconds, bound = roofs.floor_of(case, mode)
    own, moved = timings.get("fastkd"), case.bytes.of(mode)
    columns = []
    for provider in (p for p in passed if p.name in timings):
        t, (peak, method) = timings[provider.name], memory[provider.name]
        low, high = ratio_interval(t.samples, own.samples) if own else (None, None)
        columns.append({
            "mode": mode, "launch": launch, "cache": measure.cache_state(settings.device, settings.cold),
            "provider": provider.name, "served_by": provider.served_by,
            "by_eager": provider.served_by in SERVED_BY_EAGER, "rounds": t.rounds, "calls_per_sample": t.number,
            "median_ms": t.median, "minimum_ms": t.minimum, "p20_ms": t.p20, "p80_ms": t.p80,
            "median_low_ms": t.low, "median_high_ms": t.high,
            "times_ours_median": t.median / own.median if own else None,
            "times_ours_low": low, "times_ours_high": high,
            "times_ours_minimum": t.minimum / own.minimum if own else None,
            "floor_ms": 1e3 * seconds, "floor_bound": bound, "floor_share": 1e3 * seconds / t.median,
            "gemms_ms": 1e3 * gemms[mode] if gemms.get(mode) else None,
            "flops": case.flops.of(mode), "bytes": moved, "copy_gb_s": roofs.copy_rate(moved) / 1e9,
            "gemm_gflop_s": roofs.gemm_rate(case.dtype) / 1e9, "launches": launches.get(provider.name),
            "peak_extra_mib": None if peak is None else peak / 2**20, "memory_method": method,
        })  # fmt: skip
    return columns, absent


def wanted(provider: Provider | Absent, settings: Settings) -> bool:
    """What is absent anyway keeps its own reason."""
    asked = not settings.rivals or provider.name in settings.rivals
    return asked or provider.name.startswith("fastkd") or isinstance(provider, Absent)


def bench_case(case: Case, settings: Settings, roofs: Roofs, facts: dict, providers: Sequence | None = None) -> Outcome:
    """Check first; a case whose check fails has no speed."""
    outcome = Outcome()
    left_out = machine.too_large(case, machine.available_bytes(settings.device))
    if left_out:
        outcome.absent = [Absent(case.name, left_out)]
        return outcome
    inputs = case_module.build(case, settings.device, settings.seed)
    if providers is None:
        everyone = [*baselines.ours(case, inputs, settings.backends), *baselines.rivals(case, settings.device)]
        everyone = [p if wanted(p, settings) else Absent(p.name, results_io.NOT_ASKED) for p in everyone]
        outcome.absent = [p for p in everyone if isinstance(p, Absent)]
        providers = [p for p in everyone if isinstance(p, Provider)]
    passed, failed, outcome.refused = checked(case, providers, inputs, settings.memory)
    outcome.absent += failed
    if outcome.refused:
        return outcome
    gemms = roofs.gemms_of(case)
    eager = next((errors for provider, errors in passed.items() if provider.name == "eager"), None)
    launches = ("plain", "graph") if settings.device.type == "cuda" else ("plain",)
    meter = machine.LoadMeter()
    measured = []
    for mode in (m for m in case.modes if not settings.modes or m in settings.modes):
        for launch in launches:
            columns, absent = measure_mode(case, mode, launch, passed, inputs, settings, roofs, gemms)
            measured += columns
            outcome.absent += absent
    outcome.foreign = meter.stop()
    facts = {**facts, "driver": machine.driver(settings.device)}  # the clocks of a GPU that has just worked
    errors_by_name = {provider.name: errors for provider, errors in passed.items()}
    for columns in measured:
        errors = errors_by_name[columns["provider"]]
        outcome.rows.append(report.Row(
            stem=case.stem, case=case.name, kind=case.kind, shape=case.shape_text, dtype=case.dtype_text,
            loss_error=errors.loss, gradient_error=errors.gradient,
            eager_loss_error=eager.loss if eager else None, eager_gradient_error=eager.gradient if eager else None,
            match=True, sweep=f"{case.sweep}={case.shape[case.sweep]}" if case.sweep else "", goal=case.goal,
            label=case.label,
            foreign_cores=outcome.foreign, **columns, **facts,
        ))  # fmt: skip
    return outcome


def show(case: Case, outcome: Outcome) -> None:
    goal = "".join((f" · {case.label}" if case.label else "", f" · goal: {case.goal}" if case.goal else ""))
    if outcome.refused:
        print(f"\n{case.stem} {case.name}: no speed is shown, the check failed: {outcome.refused}")
    elif outcome.rows:
        report.print_table(outcome.rows, f"\n{case.stem} {case.name}{goal}")
        print(report.footnote(outcome.rows))
        if any(row.by_eager for row in outcome.rows):
            print("  † served by plain PyTorch: no kernel runs here, or auto-dispatch prefers eager at this size")
    for absent in outcome.absent:
        if absent.name == case.name or "graph" in absent.name or absent.reason.startswith(results_io.OF_A_CASE):
            print(f"  – {absent.name}: {absent.reason}")  # what is missing everywhere is named once, at the end


def publish(case: Case, outcome: Outcome, folder: pathlib.Path) -> str:
    """Writes the rows as CSV and JSON, or says why not: an empty string means written."""
    reason = machine.busy_reason(outcome.foreign, "while this case was measured") if outcome.rows else ""
    if not reason:  # a case that was left out has no rows, but a reason
        report.write_csv(outcome.rows, folder)
        results_io.write(folder, case.stem, {case.name: {absent.name: absent.reason for absent in outcome.absent}})
    return reason


def half_of_memory() -> float:
    """GiB: on a CPU the system kills what asks for more than there is, instead of saying no."""
    available = machine.available_bytes(torch.device("cpu"))
    return 0.0 if available is None else max(1.0, available // 2**31)


def default_folder() -> pathlib.Path:
    inside_checkout = (machine.ROOT / "setup.py").is_file()
    return machine.ROOT / "bench" / "results" if inside_checkout else pathlib.Path("fastkd-bench")


def chosen_cases(arguments: argparse.Namespace) -> list[Case]:
    """At least one, or a ValueError."""
    filters = {name: getattr(arguments, name) for name in ("stems", "shape", "kind", "case", "dtype", "quick", "scale")}
    if arguments.shape:
        texts, device = arguments.shape.split(","), torch.device(arguments.device)
        found = shapes.select(texts, arguments.dtype, device, arguments.stems, arguments.kind, arguments.case)
    else:
        wanted = (arguments.stems, arguments.kind, arguments.case, arguments.dtype, arguments.quick)
        cuda = arguments.device.startswith("cuda")
        found = list(case_module.select(*wanted, gpu=cuda, scale=arguments.scale))
    if not found:
        asked = ", ".join(f"{name}={value!r}" for name, value in filters.items() if value)
        raise ValueError(f"no case matches all of {asked}; leave one out, or see --list")
    return found


def settings_of(arguments: argparse.Namespace) -> Settings:
    device, quick = torch.device(arguments.device), arguments.quick
    memory = half_of_memory() if arguments.scale and device.type == "cpu" else 0.0
    return Settings(
        device, modes=(arguments.mode,) if arguments.mode else (),
        rounds=arguments.rounds or (10 if quick else 30), cold=arguments.cold, memory=arguments.memory or memory,
        budget=(3.0 if quick else 20.0) if arguments.budget is None else arguments.budget,
        rivals=words(arguments.rivals), backends=words(arguments.backends),
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """0: measured, and published unless told not to; 1: a check failed; 2: the machine was busy."""
    chosen = chosen_cases(arguments)
    if arguments.list:
        print("\n".join(f"{case.stem} {case.name}" for case in chosen))
        return 0
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    settings = settings_of(arguments)
    facts = machine.facts(settings.device)
    publishing = not (arguments.no_publish or arguments.force or (arguments.quick and not arguments.out))
    folder = (arguments.out or default_folder()) / facts["device"]
    if publishing:
        results_io.probe(folder, list(dict.fromkeys(case.stem for case in chosen)))
    busy = machine.busy_reason(machine.load_before(), "before the run")
    busy = busy or (machine.gpu_busy_reason(settings.device) if settings.device.type == "cuda" else "")
    if busy:
        print(f"{busy}. " + ("Measuring anyway (--force); nothing is published." if arguments.force else
              "Wait, or pass --force to see numbers that are not published."))  # fmt: skip
        if not arguments.force:
            return 2
    return run_cases(chosen, settings, facts, folder, publishing)


def run_cases(chosen: Sequence[Case], settings: Settings, facts: dict, folder: pathlib.Path, publishing: bool) -> int:
    roofs = Roofs(settings.device, measure.make_timer(settings.device, cold=False))
    print("  ".join(f"{name}={value}" for name, value in facts.items() if value != ""))
    print(f"copy of 256 MiB {roofs.copy_rate(2**28) / 1e9:.1f} GB/s   " + "   ".join(
        f"{str(dtype).removeprefix('torch.')} GEMM {roofs.gemm_rate(dtype) / 1e9:.0f} GFLOP/s"
        for dtype in dict.fromkeys(case.dtype for case in chosen)
    ))  # fmt: skip
    failed, busy, stems, absent = [], [], [], []
    for case in chosen:
        try:
            outcome = bench_case(case, settings, roofs, facts)
        except (RuntimeError, MemoryError) as error:  # out of memory while timed, for one: the other cases go on
            outcome = Outcome(refused=problem_of(error, settings.memory))
        show(case, outcome)
        failed += [case.name] if outcome.refused else []
        absent += [(case.stem, rival.name, rival.reason) for rival in outcome.absent]
        if publishing and not outcome.refused:
            reason = publish(case, outcome, folder)
            busy += [f"{case.name}: {reason}"] if reason else []
            stems += [] if reason else [case.stem]
    draw(dict.fromkeys(stems), folder)
    if absent:
        print("\nnot measured here:", *results_io.summary(absent), sep="\n  – ")
    for text in busy:
        print(f"not published: {text}")
    for name in failed:
        print(f"check failed: {name}")
    return 1 if failed else 2 if busy else 0


def draw(stems: Iterable[str], folder: pathlib.Path) -> None:
    """The pictures of these stems, and those of the device."""
    for stem in stems:
        paths, reason = plots.draw(report.read_rows(folder / f"{stem}.csv"), stem, folder)
        print(f"published {folder / stem}.json and .csv", *(path.name for path in paths), reason)
    if stems:
        print(*(path.name for path in device_plots.draw(report.rows_of(folder), folder)[0]))


def main(argv: Sequence[str] | None = None) -> int:
    try:
        arguments = parser(__doc__).parse_args(argv)
        if arguments.compare:
            return compare.compare(*arguments.compare, arguments.tolerance)
        check_arguments(arguments)
        if not arguments.list:
            chosen_cases(arguments)  # mistakes are named before the process starts again
        if arguments.against:
            return compare_commits.against(
                arguments.against, sys.argv[1:] if argv is None else argv, arguments.tolerance
            )
        if not arguments.list:
            machine.passive_threads(sys.orig_argv[1:])
            machine.quote_library_path()
        return run(arguments)
    except (ValueError, RuntimeError, OSError) as error:
        known = not isinstance(error, RuntimeError) or str(error).startswith("against: ")
        if not known or os.environ.get("FASTKD_TRACEBACK") == "1":
            raise
        print(f"fastkd bench: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
