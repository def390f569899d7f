"""What a profile says: medians with 95 % intervals by phase, shares, tokens per second, peaks; as rows and tables."""

import dataclasses
import statistics
from collections.abc import Sequence

from fastkd.bench import report
from fastkd.bench.measure import median_interval, ratio_interval

from .timeline import LOSS_BACKWARD, OUTSIDE, STUDENT_BACKWARD, Step

STEP = "step"
ORDER = ("data", "teacher forward", "student forward", "loss", LOSS_BACKWARD, STUDENT_BACKWARD, "optimizer", OUTSIDE)
ALLOWED_GAP = 0.05


@dataclasses.dataclass(frozen=True)
class Row:
    """One phase of one way; the phase "step" is the whole, whose share is the sum of its parts."""

    model: str
    method: str
    task: str
    way: str
    phase: str
    steps: int
    median_ms: float
    low_ms: float
    high_ms: float
    share: float
    peak_mib: float | None
    times_ours: float | None
    times_ours_low: float | None
    times_ours_high: float | None
    loss_share: float | None
    tokens_per_second: float | None
    examples_per_second: float | None
    batch: int
    length: int
    dtype: str
    compiled: bool
    foreign_cores: float | None
    device: str
    threads: int
    driver: str
    torch: str
    cuda: str
    commit: str
    dirty: bool
    date: str


COLUMNS = tuple(field.name for field in dataclasses.fields(Row))
KEY = ("model", "method", "task", "batch", "length", "dtype", "compiled")


def is_loss(phase: str) -> bool:
    return phase.startswith("loss")


def group(phase: str) -> str:
    """The part of the picture that a phase belongs to: all loss terms are one."""
    return "loss" if phase.startswith("loss: ") else phase


def phases_of(steps: Sequence[Step]) -> list[str]:
    """In the order in which a step goes through them."""
    seen = dict.fromkeys(phase for step in steps for phase in step.seconds)
    return sorted(seen, key=lambda phase: (ORDER.index(group(phase)) if group(phase) in ORDER else 99, phase))


def accounted(steps: Sequence[Step]) -> float:
    """The parts' sum over the wall time, all timed steps together."""
    timed = [step for step in steps if step.mode == "time"]
    return sum(sum(step.seconds.values()) for step in timed) / sum(step.wall for step in timed)


def rows_of(steps: Sequence[Step], facts: dict, setup: dict) -> list[Row]:
    """`setup`: model, method, task, batch, length, dtype, compiled; `facts`: the machine's columns."""
    ways = list(dict.fromkeys(step.way for step in steps))
    timed = {way: [step for step in steps if (step.way, step.mode) == (way, "time")] for way in ways}
    first = [1e3 * step.wall for step in timed[ways[0]]]
    rows = []
    for way in ways:
        walls = [1e3 * step.wall for step in timed[way]]
        whole = statistics.median(walls)
        peaks: dict[str, int] = {}
        for step in steps:
            if step.way == way:
                for phase, peak in step.peaks.items():
                    peaks[phase] = max(peak, peaks.get(phase, 0))
        common = {**setup, "way": way, "steps": len(walls), **facts}
        blank = dict.fromkeys(("times_ours", "times_ours_low", "times_ours_high", "loss_share", "tokens_per_second",
                               "examples_per_second"))  # fmt: skip
        share_of_loss = statistics.median(
            sum(seconds for phase, seconds in step.seconds.items() if is_loss(phase)) / step.wall for step in timed[way]
        )
        low, high = median_interval(walls)
        times = (whole / statistics.median(first), *ratio_interval(walls, first))
        rows.append(Row(
            phase=STEP, median_ms=whole, low_ms=low, high_ms=high, share=accounted(timed[way]),
            peak_mib=max(peaks.values()) / 2**20 if peaks else None, times_ours=times[0], times_ours_low=times[1],
            times_ours_high=times[2], loss_share=share_of_loss, examples_per_second=1e3 * setup["batch"] / whole,
            tokens_per_second=1e3 * setup["batch"] * setup["length"] / whole, **common,
        ))  # fmt: skip
        for phase in phases_of(timed[way]):
            samples = [1e3 * step.seconds.get(phase, 0.0) for step in timed[way]]
            low, high = median_interval(samples)
            share = statistics.median(step.seconds.get(phase, 0.0) / step.wall for step in timed[way])
            peak = peaks[phase] / 2**20 if phase in peaks else None
            rows.append(Row(phase=phase, median_ms=statistics.median(samples), low_ms=low, high_ms=high, share=share,
                            peak_mib=peak, **blank, **common))  # fmt: skip
    return rows


def print_table(rows: Sequence[Row]) -> None:
    """One line per phase, a pair of columns per way."""
    ways = list(dict.fromkeys(row.way for row in rows))
    by_phase: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_phase.setdefault(row.phase, {})[row.way] = row
    order = [phase for phase in by_phase if phase != STEP]
    order.sort(key=lambda phase: (ORDER.index(group(phase)) if group(phase) in ORDER else 99, phase))
    headings = ("phase", *(text for way in ways for text in (f"{way} ms", "share", "peak MiB")))
    lines = [cells(phase, by_phase[phase], ways) for phase in [*order, STEP]]
    first = rows[0]
    title = f"\n{first.model} · {first.method} · {first.task} · {first.batch}×{first.length} tokens · {first.dtype}"
    title += " · compiled" if first.compiled else ""
    report.show_table(headings, lines, title, 1, [len(lines) - 1], [len(lines) - 2])
    for way in ways:
        step = by_phase[STEP][way]
        beside = "" if way == ways[0] else f" · {times(step)} as long as {ways[0]}"
        print(f"  {way}: {report.number(step.median_ms)} ms [{report.interval(step.low_ms, step.high_ms)}], "
              f"{step.tokens_per_second:,.0f} tokens/s, {step.examples_per_second:,.1f} examples/s, "
              f"the loss is {step.loss_share:.0%} of the step{beside}")  # fmt: skip
    print(f"  {sums({way: by_phase[STEP][way].share for way in ways})}")


def sums(shares: dict[str, float]) -> str:
    """What the parts add up to, and in which ways that is not what the clock says."""
    far = ", ".join(way for way, share in shares.items() if abs(1 - share) > ALLOWED_GAP)
    found = ", ".join(f"{way} {share:.1%}" for way, share in shares.items())
    return f"the parts add up to the wall time: {found}" + (
        f"; {far}: TOO FAR OFF to believe the shares" if far else ""
    )


def print_summary(rows: Sequence[Row]) -> None:
    """One line per method, after all of them."""
    steps = [row for row in rows if row.phase == STEP]
    ways = list(dict.fromkeys(row.way for row in steps))
    lines = []
    for method in dict.fromkeys(row.method for row in steps):
        there = {row.way: row for row in steps if row.method == method}
        first = there[ways[0]]
        others = [times(there[way]) for way in ways[1:]]
        lines.append(
            (
                method,
                report.number(first.median_ms),
                f"{first.tokens_per_second:,.0f}",
                f"{first.loss_share:.0%}",
                *others,
            )
        )
    headings = ("method", f"{ways[0]} ms", "tokens/s", "loss", *(f"{way}, as long" for way in ways[1:]))
    report.show_table(headings, lines, "\nall methods", 1)


def times(step: Row) -> str:
    return f"{step.times_ours:.2f}× [{report.interval(step.times_ours_low, step.times_ours_high)}]"


def cells(phase: str, there: dict[str, Row], ways: Sequence[str]) -> tuple[str, ...]:
    found = [phase]
    for way in ways:
        row = there.get(way)
        found += (
            ["–", "", ""]
            if row is None
            else [report.number(row.median_ms), f"{row.share:.0%}", report.number(row.peak_mib)]
        )
    return tuple(found)
