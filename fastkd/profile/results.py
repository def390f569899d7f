"""What a profile says: medians with 95 % intervals by phase, shares, CPU time, tokens per second, and peak memory beyond the
models and the optimizer's state; as rows, tables and files."""

import hashlib
import statistics
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from fastkd import atomic_write
from fastkd.bench import machine, report
from fastkd.bench.measure import median_interval, ratio_interval

from .timeline import LOSS_BACKWARD, OUTSIDE, STUDENT_BACKWARD, Step

STEP = "step"  # the phase that is the whole; its share is the sum of its parts
ORDER = ("data", "teacher forward", "student forward", "loss", LOSS_BACKWARD, STUDENT_BACKWARD, "optimizer", OUTSIDE)
ALLOWED_GAP = 0.05
KEY = ("model", "method", "task", "batch", "length", "dtype", "compiled")
COLUMNS = (
    *("model", "method", "task", "provider", "phase", "steps", "median_ms", "low_ms", "high_ms", "share", "extra_mib"),
    *("times_ours", "times_ours_low", "times_ours_high", "loss_share", "tokens_per_second", "examples_per_second"),
    *("batch", "length", "dtype", "compiled", "foreign_cores", "device", "threads", "driver", "torch", "cuda"),
    *("cpu_ms", "commit", "dirty", "date"),
)


def group(phase: str) -> str:
    """The part of the picture that a phase belongs to: all loss terms are one."""
    return "loss" if phase.startswith("loss: ") else phase


def place(phase: str) -> tuple:
    """Where it stands in the order in which a step goes through its phases; the step itself is last."""
    return (ORDER.index(group(phase)) if group(phase) in ORDER else len(ORDER), phase == STEP, phase)


def accounted(steps: Sequence[Step]) -> float:
    """The parts' sum over the wall time, all steps together."""
    return sum(sum(step.seconds.values()) for step in steps) / sum(step.wall for step in steps)


def rows_of(steps: Sequence[Step], facts: dict, setup: dict) -> pd.DataFrame:
    """A row per provider and phase. `setup`: the columns of KEY; `facts`: the machine's."""
    timed: dict[str, list[Step]] = {}
    for step in (step for step in steps if step.mode == "time"):
        timed.setdefault(step.provider, []).append(step)
    first, rows = [1e3 * step.wall for step in next(iter(timed.values()))], []
    for provider, mine in timed.items():
        walls = [1e3 * step.wall for step in mine]
        whole = statistics.median(walls)
        peaks = pd.DataFrame([step.peaks for step in steps if step.provider == provider]).max() / 2**20
        parts = 1e3 * pd.DataFrame([step.seconds for step in mine]).fillna(0.0)  # [steps, phases]
        shares = parts.div(walls, axis=0)
        low, high = ratio_interval(walls, first)
        rows.append({
            **spread(walls), "provider": provider, "phase": STEP, "share": accounted(mine), "extra_mib": peaks.max(),
            "cpu_ms": 1e3 * statistics.median(step.cpu for step in mine),
            "times_ours": whole / statistics.median(first), "times_ours_low": low, "times_ours_high": high,
            "loss_share": shares.filter(regex="^loss").sum(axis=1).median(),
            "tokens_per_second": 1e3 * setup["batch"] * setup["length"] / whole,
            "examples_per_second": 1e3 * setup["batch"] / whole,
        })  # fmt: skip
        for phase in sorted(parts, key=place):
            share, peak = shares[phase].median(), peaks.get(phase)
            rows.append(
                {**spread(parts[phase]), "provider": provider, "phase": phase, "share": share, "extra_mib": peak}
            )
    return pd.DataFrame([{**row, **setup, **facts} for row in rows], columns=COLUMNS)


def spread(milliseconds: Sequence[float]) -> dict:
    low, high = median_interval(milliseconds)
    return {"steps": len(milliseconds), "median_ms": statistics.median(milliseconds), "low_ms": low, "high_ms": high}


def print_table(rows: pd.DataFrame) -> None:
    """The providers beside each other, then a line per phase."""
    providers, cells = list(rows["provider"].unique()), {}
    for row in rows.itertuples():
        cells[row.phase, row.provider] = report.number(row.median_ms), number(row.extra_mib)
    phases = sorted(rows["phase"].unique(), key=place)
    lines = [
        (phase, *(x for provider in providers for x in cells.get((phase, provider), ("–", "")))) for phase in phases
    ]
    one, steps = next(rows.itertuples()), rows[rows["phase"] == STEP]
    title = f"\n{one.model} · {one.method} · {one.task} · {one.batch}×{one.length} tokens · {one.dtype}"
    title += " · compiled" if one.compiled else ""
    headings = "a step", "ms", "95 %", f"× {providers[0]}", "95 %", "CPU ms", "tokens/s", "extra MiB", "loss"
    whole = [(row.provider, report.number(row.median_ms), report.interval(row.low_ms, row.high_ms), f"{row.times_ours:.2f}",
              report.interval(row.times_ours_low, row.times_ours_high), report.number(row.cpu_ms),
              f"{row.tokens_per_second:,.0f}", number(row.extra_mib), f"{row.loss_share:.0%}")
             for row in steps.itertuples()]  # fmt: skip
    report.show_table(headings, whole, title, 1, [0])
    headings = ("phase", *(text for provider in providers for text in (f"{provider} ms", "MiB")))
    report.show_table(headings, lines, "", 1, [len(lines) - 1], [len(lines) - 2])
    print(f"  {sums(dict(zip(steps['provider'], steps['share'], strict=True)))}")


def print_summary(rows: pd.DataFrame) -> None:
    """One line per method, after all of them."""
    steps, lines = rows[rows["phase"] == STEP], []
    ours, *others = steps["provider"].unique()
    for method, there in steps.groupby("method", sort=False):
        by_provider = {row.provider: row for row in there.itertuples()}
        first = next(iter(by_provider.values()))
        speed = f"{first.tokens_per_second:,.0f}", f"{first.loss_share:.0%}"
        beside = (times(by_provider[provider]) if provider in by_provider else "–" for provider in others)
        lines.append((method, report.number(first.median_ms), *speed, *beside))
    headings = ("method", f"{ours} ms", "tokens/s", "loss", *(f"{provider}, as long" for provider in others))
    report.show_table(headings, lines, "\nall methods", 1)


def number(value) -> str:
    return "–" if pd.isna(value) else report.number(value)


def times(step) -> str:
    return f"{step.times_ours:.2f}× [{report.interval(step.times_ours_low, step.times_ours_high)}]"


def sums(shares: dict[str, float]) -> str:
    """What the parts add up to, and of which providers that is not what the clock says."""
    far = ", ".join(provider for provider, share in shares.items() if abs(1 - share) > ALLOWED_GAP)
    found = "the parts add up to the wall time: " + ", ".join(
        f"{provider} {share:.1%}" for provider, share in shares.items()
    )
    return f"{found}; {far}: TOO FAR OFF to believe the shares" if far else found


def trace_of(folder: Path, setup: dict) -> Path:
    """One file per setup: readable, and the digest distinguishes what the words do not."""
    words = "-".join(machine.slug(setup[name])[:60].strip("-") for name in ("method", "model"))
    digest = hashlib.sha256(repr([setup[name] for name in KEY]).encode()).hexdigest()[:6]
    return folder / "traces" / f"{words}-{setup['batch']}x{setup['length']}-{setup['dtype']}-{digest}.json"


def read(folder: Path) -> pd.DataFrame:
    """profile.csv as text, or no rows where there is none. The column `provider` was called `way`."""
    path = folder / f"{report.PROFILE}.csv"
    if not path.exists():
        return pd.DataFrame(columns=COLUMNS)
    rows = pd.read_csv(path, dtype=str, keep_default_na=False).rename(columns={"way": "provider"})
    if strange := set(rows) - set(COLUMNS) or set(KEY) - set(rows):
        names = ", ".join(sorted(strange))
        raise ValueError(f"out: {path} is no table of `fastkd profile` ({names}); choose another --out")
    return rows


def write(rows: pd.DataFrame, folder: Path) -> None:
    """profile.csv; the same setup measured before is replaced, the rest is kept."""
    new = rows.map(lambda value: "" if pd.isna(value) else report.as_text(value))
    old, key = read(folder), list(KEY)
    kept = old[~pd.MultiIndex.from_frame(old[key]).isin(pd.MultiIndex.from_frame(new[key]))]
    with atomic_write.replacing(folder / f"{report.PROFILE}.csv") as scratch:
        pd.concat([kept, new]).to_csv(scratch, index=False, columns=COLUMNS)
