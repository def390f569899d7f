"""`fastkd bench --compare A.json B.json`: did B get slower than A?

Times of two runs cannot be compared, ratios can: in both, fastkd ran interleaved with the same rival in the same
process. The figure is rival/fastkd in B over the same in A, below 1 where fastkd lost ground. It is a regression where it
lost more than the tolerance and the 95 % intervals of both runs together exclude that nothing changed.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

from fastkd.bench import report, results_io

ANCHORS = ("eager", "authors", "compile", "scipy")  # the first that both runs have; the steadiest first
MATCH = ("stem", "case", "mode", "launch", "cache")
MEMORY_SLACK_MIB = 4.0  # an allocator's mood


@dataclasses.dataclass(frozen=True)
class Change:
    """B against A in one mode of one case, in units of the anchor; low and high where both runs have intervals."""

    where: str
    anchor: str
    before: float
    after: float
    low: float | None
    high: float | None
    memory_before: float | None
    memory_after: float | None

    @property
    def ratio(self) -> float:
        return self.after / self.before

    def verdict(self, tolerance: float) -> str:
        if self.low is None:
            return "no interval"
        if self.ratio < 1 - tolerance and self.high < 1:
            return "slower"
        if self.ratio > 1 + tolerance and self.low > 1:
            return "faster"
        return "same" if self.low > 1 - tolerance and self.high < 1 + tolerance else "cannot tell"

    def grew(self, tolerance: float) -> bool:
        """Whether the peak extra memory rose; it does not depend on the machine's mood, so it has no interval."""
        if self.memory_before is None or self.memory_after is None:
            return False
        return self.memory_after > self.memory_before * (1 + tolerance) + MEMORY_SLACK_MIB


def by_group(rows: Sequence[dict]) -> dict[tuple, dict[str, dict]]:
    groups: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in MATCH), {})[row["provider"]] = row
    return groups


def change_of(group: tuple, a: dict[str, dict], b: dict[str, dict]) -> Change | None:
    """None where the two runs have no rival in common."""
    anchor = next((name for name in ANCHORS if all(x.get(name, {}).get("times_ours_median") for x in (a, b))), None)
    if anchor is None or "fastkd" not in a or "fastkd" not in b:
        return None
    one, two = a[anchor], b[anchor]
    ends = [x.get(name) for x in (one, two) for name in ("times_ours_low", "times_ours_high")]
    stem, case, mode, launch, cache = group
    where = f"{stem} {case} {mode}" + ("" if launch == "plain" else f" {launch}")
    return Change(
        where + (" cold" if cache.startswith("cold") and one["cuda"] in ("", None) else ""), anchor,
        one["times_ours_median"], two["times_ours_median"],
        None if None in ends else ends[2] / ends[1], None if None in ends else ends[3] / ends[0],
        a["fastkd"]["peak_extra_mib"], b["fastkd"]["peak_extra_mib"],
    )  # fmt: skip


def changes(a: Sequence[dict], b: Sequence[dict]) -> tuple[list[Change], list[tuple]]:
    """What both runs measured, and what only one of them did."""
    before, after = by_group(a), by_group(b)
    found = {key: change_of(key, before[key], after[key]) for key in before if key in after}
    alone = [key for key in (*before, *after) if found.get(key) is None]
    return [change for change in found.values() if change], list(dict.fromkeys(alone))


def lost_lines(alone: Sequence[tuple], before: dict, after: dict) -> list[str]:
    def why(key: tuple) -> str:
        return "no common rival" if key in before and key in after else f"{'before' if key in before else 'after'} only"

    return [f"  – {' '.join(key)}: {why(key)}" for key in alone]


def lines_of(found: Sequence[Change], tolerance: float) -> list[tuple[str, ...]]:
    lines = []
    for change in sorted(found, key=lambda c: c.ratio):
        memory = f"{report.number(change.memory_before)} → {report.number(change.memory_after)}"
        lines.append((
            change.where, change.anchor, f"{report.number(change.before)}×", f"{report.number(change.after)}×",
            f"{change.ratio:.2f}", report.interval(change.low, change.high), change.verdict(tolerance),
            memory + (" grew" if change.grew(tolerance) else ""),
        ))  # fmt: skip
    return lines


HEADINGS = ("case", "rival", "before", "after", "after/before", "95 %", "verdict", "extra MiB")


def compare(a: pathlib.Path, b: pathlib.Path, tolerance: float = 0.05) -> int:
    """0: nothing got worse. 1: something did. 2: nothing could be compared."""
    rows = results_io.read(a), results_io.read(b)
    devices = [", ".join(sorted({row["device"] for row in side})) for side in rows]
    commits = [", ".join(sorted({row["commit"] for row in side})) for side in rows]
    print(f"before: {a} · {devices[0]} · {commits[0]}\nafter:  {b} · {devices[1]} · {commits[1]}")
    if devices[0] != devices[1]:
        print("the devices differ: a ratio to eager is a fact about one machine, so nothing is compared")
        return 2
    found, alone = changes(*rows)
    if not found:
        print("nothing to compare: no case and mode was measured in both, against the same rival")
        print(*lost_lines(alone, *map(by_group, rows)), sep="\n")
        return 2
    report.show_table(HEADINGS, lines_of(found, tolerance), "rival's time over fastkd's, after over before", left=2)
    if alone:
        print(f"{len(alone)} more were measured in one of the two only (or without fastkd or a common rival):")
        print(*lost_lines(alone, *map(by_group, rows)), sep="\n")
    slower = [c for c in found if c.verdict(tolerance) == "slower"]
    grown = [c for c in found if c.grew(tolerance)]
    for change in slower:
        print(f"SLOWER {change.where}: {1 - change.ratio:.0%} of the lead over {change.anchor} is gone")
    for change in grown:
        print(f"MORE MEMORY {change.where}: {change.memory_before:.0f} to {change.memory_after:.0f} MiB")
    if not slower and not grown:
        print(f"nothing got worse by more than {tolerance:.0%} ({len(found)} compared)")
    return 1 if slower or grown else 0
