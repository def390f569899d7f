"""`make performance`: docs/performance.md and the pictures in it, from the CSV under bench/results alone. A device without
results has no section, and nothing is estimated."""

import json
import pathlib
import sys
import textwrap
from collections.abc import Iterator, Sequence

from fastkd.bench import machine, plots, report
from fastkd.bench.cases import STEMS, listed
from fastkd.bench.report import Row, number

from fastkd.profile import plots as profile_plots
from fastkd.profile import results

HEADINGS = ("hot path", "case", "ms", *(f"× {name}" for name in plots.BESIDE), "others", "of floor", "MiB / eager's",
            "gradient error / eager's")  # fmt: skip
HEAD = "# Performance\n\n" + textwrap.fill(
    "Medians of interleaved rounds in one process, loss and gradient unless the case has a forward only; × is the provider's "
    "time over fastkd's, with its 95 % interval; `authors` is the paper's released way of doing it, written by us; "
    "of floor: the share of what copy bandwidth or GEMM rate, measured in the same process, allow; MiB: peak extra memory. "
    "Every row's numbers were checked against float64 first. † served by plain PyTorch. `make bench` measures, "
    "`make performance` writes this page.",
    120,
)  # fmt: skip

SHOWN = ("median_ms", "cpu_ms", "extra_mib")
PROFILED = (
    "`make profile`: milliseconds / of CPU time / peak MiB beyond the models and the optimizer's state. The providers took "
    "turns in one training run; `fastkd profile --help` says what each is. Tokens per second are fastkd's."
)


def table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return ["", *(f"| {' | '.join(cells)} |" for cells in (headings, ["---"] * len(headings), *lines)), ""]


def ratio_cell(row: Row | None) -> str:
    """12.3× [11.8, 12.9]"""
    if row is None or row["times_ours_median"] is None:
        return "–"
    low, high = row["times_ours_low"], row["times_ours_high"]
    return f"**{plots.times(row['times_ours_median'])}**" + (f" [{low:.3g}, {high:.3g}]" if low and high else "")


def case_line(stem: str, case: str, there: dict[str, Row]) -> tuple[str, ...]:
    ours, eager = there["fastkd"], there.get("eager", {})
    others = [f"{name} {plots.times(row['times_ours_median'])}" for name, row in there.items()
              if name not in plots.BESIDE and not name.startswith("fastkd") and row["times_ours_median"]]  # fmt: skip

    def beside_eager(name: str, form) -> str:
        return " / ".join("–" if row.get(name) is None else form(row[name]) for row in (ours, eager))

    return (
        f"`{stem}`", plots.label_of(case) + (" †" if ours["by_eager"] else ""), number(ours["median_ms"]),
        *(ratio_cell(there.get(name)) for name in plots.BESIDE), ", ".join(others) or "–", f"{ours['floor_share']:.0%}",
        beside_eager("peak_extra_mib", number), beside_eager("gradient_error", lambda x: f"{x:.0e}"),
    )  # fmt: skip


def reached(what: str, there: dict[str, Row]) -> float | None:
    """A goal's figure: share of the `floor`, at least; time over bare `gemms`, `memory` and gradient `error` over eager's, and
    `launches`, at most; else that provider's time over ours, at least."""
    ours, eager = there["fastkd"], there.get("eager", {})
    column = {"memory": "peak_extra_mib", "error": "gradient_error"}.get(what)
    if column:
        return ours[column] / eager[column] if eager.get(column) else None
    if what == "gemms":
        return ours["median_ms"] / ours["gemms_ms"] if ours["gemms_ms"] else None
    return ours.get({"floor": "floor_share"}.get(what, what), there.get(what, {}).get("times_ours_median"))


def goal_lines(rows: Sequence[Row], why: dict[str, str]) -> Iterator[tuple[str, ...]]:
    """What was asked of each case, and whether it was reached; a miss with its reason from why.json."""
    groups, gpu = plots.by_case(rows), any(row["cuda"] for row in rows)
    for case in (case for stem in STEMS for case in listed(stem, gpu)):
        for what, limit in case.goals.items() if (case.stem, case.name) in groups else ():
            value = reached(what, groups[case.stem, case.name])
            least = what not in ("gemms", "memory", "error", "launches")
            met = value is not None and (value >= limit if least else value <= limit)
            verdict = "met" if met else f"missed: {why.get(f'{case.stem} {case.name}', 'no reason given yet')}"
            yield (f"`{case.stem}`", plots.label_of(case.name), what, f"{'≥' if least else '≤'} {limit:g}", number(value),
                   "not measured" if value is None else verdict)  # fmt: skip


def slower_than_eager(rows: Sequence[Row], limit: float = 0.95) -> str:
    """Where eager takes less than `limit` of our time; every mode, launch, cache state and size; and what has no row."""
    beside = [row for row in rows if row["provider"] == "eager" and row["times_ours_median"]]
    slow = [f"{row['stem']} {plots.label_of(row['case'])} {row['mode']} {row['launch']}, {row['cache']} "
            f"({row['times_ours_median']:.2f}×)" for row in beside if row["times_ours_median"] < limit]  # fmt: skip
    gpu = any(row["cuda"] for row in rows)
    everything = {(case.stem, case.name) for stem in STEMS for case in listed(stem, gpu)}
    lacking = len(everything - {(row["stem"], row["case"]) for row in rows})
    found = f"{len(slow)} of {len(beside)} rows measured; {lacking} of {len(everything)} listed cases have none."
    return f"Slower than {limit}× eager: {found}" + (f" {'; '.join(slow)}." if slow else "")


def section(folder: pathlib.Path, where: str) -> Iterator[str]:
    """One device; `where` is its folder, as seen from the page."""
    everything = report.rows_of(folder)
    rows = report.measured(everything)
    yield from (f"## {folder.name}", "")
    if not rows:
        return (yield from training_steps(folder, where))
    newest = max(rows, key=lambda row: row["date"])
    versions = [f"torch {newest['torch']}", f"Python {newest['python']}", f"{newest['threads']} threads"]
    versions += [f"CUDA {newest['cuda']}", f"driver and clocks {newest['driver']}"] if newest["cuda"] else []
    commits = sorted({row["commit"] + (" with changes" if row["dirty"] else "") for row in rows})
    yield from (f"{', '.join(versions)}; commit {', '.join(commits)}; raw: [CSV]({where}).", "")
    lines = [case_line(stem, case, there) for (stem, case), there in plots.by_case(rows).items()]
    yield from (f"![How many times faster, case by case]({where}/overview.png)", *table(HEADINGS, lines))
    yield slower_than_eager(rows)
    reasons = folder / "why.json"
    goals = goal_lines(rows, json.loads(reasons.read_text()) if reasons.exists() else {})
    yield from ("", "### Goals", *table(("hot path", "case", "what", "asked", "reached", ""), list(goals)))
    yield from ("### Not measured here", "", *(f"- {line}" for line in report.absent(everything)), "")
    yield from training_steps(folder, where)


def training_steps(folder: pathlib.Path, where: str) -> Iterator[str]:
    """Whole training steps, where they were profiled."""
    steps = [row for row in results.read(folder).to_dict("records") if row["phase"] == results.STEP]
    if not steps:
        return
    providers, setups = list(dict.fromkeys(row["provider"] for row in steps)), {}
    for row in steps:
        setups.setdefault(tuple(row[name] for name in results.KEY), {})[row["provider"]] = row
    first = steps[0]
    yield from ("### A whole training step", "", f"{PROFILED} torch {first['torch']}, {first['threads']} threads.")
    lines = []
    for there in setups.values():
        first = next(iter(there.values()))
        cells = [" / ".join(number(float(there[who].get(name) or "nan")).replace("nan", "–") for name in SHOWN)
                 if who in there else "–" for who in providers]  # fmt: skip
        ours = there.get(providers[0])
        speed = f"{float(ours['tokens_per_second']):,.0f}" if ours else "–"
        lines.append((profiled_model(first), f"`{first['method']}`", *cells, speed))
    yield from table(("model", "method", *providers, "tokens/s"), lines)
    yield f"![Where the time of a step goes]({where}/{report.PROFILE}.png)"


def profiled_model(row: dict) -> str:
    """bert-base 8×128 fp32 compiled and, unless it is classification, the task: what tells a setup from another."""
    task = "" if row["task"] == "classification" else f" {row['task']}"
    sizes = f" {row['batch']}×{row['length']} {plots.DTYPES[row['dtype']]}"
    return row["model"] + sizes + task + (" compiled" if row["compiled"] == "True" else "")


def main(root: pathlib.Path = machine.ROOT) -> int:
    lines = [HEAD, ""]
    for folder in sorted((root / "bench/results").glob("*")):
        cases, steps = report.rows_of(folder), (folder / f"{report.PROFILE}.csv").exists()
        if cases:
            print(plots.draw(folder))
        if steps:
            profile_plots.draw(folder)
        if cases or steps:
            lines += [*section(folder, f"../bench/results/{folder.name}"), ""]
    (root / "docs/performance.md").write_text("\n".join(lines).rstrip() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
