"""`fastkd bench --compare A.csv B.csv`, and `--against REF`: did B get slower than A?

Times of two runs cannot be compared, ratios can: in both, fastkd ran interleaved with the same other provider in the same
process. The figure is the other's time over fastkd's in B over the same in A, below 1 where fastkd lost ground. It is a
regression where it lost more than the tolerance and the 95 % intervals of both runs together exclude that nothing changed.
`--against` builds another commit in a worktree of its own, and each side measures in its own process.
"""

import argparse
import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence

import torch
from fastkd.bench import machine, report

ANCHORS = ("eager", "authors", "compile")  # the first that both runs have; the steadiest first
MATCH = ("stem", "case", "mode", "launch", "cache")
MEMORY_SLACK_MIB = 4.0  # an allocator's mood
HEADINGS = ("case", "beside", "before", "after", "after/before", "95 %", "verdict", "extra MiB")


@dataclasses.dataclass(frozen=True)
class Change:
    """B against A in one mode of one case: the anchor's rows, and fastkd's."""

    where: str
    before: report.Row
    after: report.Row
    ours: tuple[report.Row, report.Row]

    @property
    def ratio(self) -> float:
        return self.after["times_ours_median"] / self.before["times_ours_median"]

    @property
    def interval(self) -> tuple[float, float] | None:
        ends = [row[f"times_ours_{end}"] for row in (self.before, self.after) for end in ("low", "high")]
        return None if None in ends else (ends[2] / ends[1], ends[3] / ends[0])

    def verdict(self, tolerance: float) -> str:
        if self.interval is None:
            return "no interval"
        low, high = self.interval
        if self.ratio < 1 - tolerance and high < 1:
            return "slower"
        if self.ratio > 1 + tolerance and low > 1:
            return "faster"
        return "same" if low > 1 - tolerance and high < 1 + tolerance else "cannot tell"

    @property
    def memory(self) -> list[float | None]:
        return [row["peak_extra_mib"] for row in self.ours]

    def grew(self, tolerance: float) -> bool:
        """Whether the peak extra memory rose; it does not depend on the machine's mood, so it has no interval."""
        before, after = self.memory
        return None not in (before, after) and after > before * (1 + tolerance) + MEMORY_SLACK_MIB

    def line(self, tolerance: float) -> tuple[str, ...]:
        sides = (f"{report.number(row['times_ours_median'])}×" for row in (self.before, self.after))
        memory = " → ".join(map(report.number, self.memory)) + (" grew" if self.grew(tolerance) else "")
        interval = report.interval(*self.interval or (None, None))
        name = self.before["provider"]
        return self.where, name, *sides, f"{self.ratio:.2f}", interval, self.verdict(tolerance), memory


def changes(a: Sequence[report.Row], b: Sequence[report.Row]) -> tuple[list[Change], list[str]]:
    """What both runs measured beside the same provider, and a sentence for everything else."""
    sides: list[dict[tuple, dict[str, report.Row]]] = [{}, {}]
    for groups, rows in zip(sides, (a, b), strict=True):
        for row in report.measured(rows):
            groups.setdefault(tuple(row[name] for name in MATCH), {})[row["provider"]] = row
    found, alone = [], []
    for key in dict.fromkeys((*sides[0], *sides[1])):
        there = [groups.get(key, {}) for groups in sides]
        anchor = next((x for x in ANCHORS if all(y.get(x, {}).get("times_ours_median") for y in there)), None)
        if anchor and all("fastkd" in y for y in there):
            where = " ".join(key[:3]) + ("" if key[3] == "plain" else f" {key[3]}")
            where += " cold" if key[4].startswith("cold") and not there[0][anchor]["cuda"] else ""
            found.append(Change(where, there[0][anchor], there[1][anchor], (there[0]["fastkd"], there[1]["fastkd"])))
        else:
            why = "no provider in common" if all(there) else "before only" if there[0] else "after only"
            alone.append(f"  – {' '.join(key)}: {why}")
    return sorted(found, key=lambda change: change.ratio), alone


def compare(a: pathlib.Path, b: pathlib.Path, tolerance: float = 0.05) -> int:
    """0: nothing got worse. 1: something did. 2: nothing could be compared."""
    rows = report.read(a), report.read(b)
    devices, commits = (
        [", ".join(sorted({row[name] for row in side})) for side in rows] for name in ("device", "commit")
    )
    print(f"before: {a} · {devices[0]} · {commits[0]}\nafter:  {b} · {devices[1]} · {commits[1]}")
    if devices[0] != devices[1]:
        print("the devices differ: a ratio to eager is a fact about one machine, so nothing is compared")
        return 2
    found, alone = changes(*rows)
    if found:
        lines = [change.line(tolerance) for change in found]
        report.show_table(HEADINGS, lines, "the other provider's time over fastkd's, after over before", left=2)
    if alone:
        print(f"{len(alone)} cannot be compared, since only one of the two has them beside a provider of both:")
        print(*alone, sep="\n")
    if not found:
        print("nothing to compare: no case and mode was measured in both, beside the same provider")
        return 2
    slower, grown = ([c for c in found if c.verdict(tolerance) == "slower"], [c for c in found if c.grew(tolerance)])
    for change in slower:
        print(f"SLOWER {change.where}: {1 - change.ratio:.0%} of the lead over {change.before['provider']} is gone")
    for change in grown:
        print("MORE MEMORY {}: {:.0f} to {:.0f} MiB".format(change.where, *change.memory))
    if not slower and not grown:
        print(f"nothing got worse by more than {tolerance:.0%} ({len(found)} compared)")
    return 1 if slower or grown else 0


# Against another commit -------------------------------------------------------------------------------------------


def call(command: Sequence[str], folder: pathlib.Path, **environment: str) -> int:
    return subprocess.run(command, cwd=folder, env={**os.environ, **environment}).returncode


def commit_of(ref: str) -> str:
    if not machine.is_checkout():
        raise ValueError(
            f"against: {machine.ROOT} is no checkout of fastkd, so it has no other commit; clone fastkd first"
        )
    found = machine.git("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}")
    if not found:
        raise ValueError(f"against: {ref!r} names no commit of {machine.ROOT}; try a branch, a tag, HEAD~1 or a hash")
    return found


def of_both_sides(argv: Sequence[str]) -> list[str]:
    """The bench's arguments without `--against REF` and where to write."""
    differing = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--against", "--out"):
        differing.add_argument(option)
    return differing.parse_known_args(argv)[1]


def build(what: str, folder: pathlib.Path, run: Callable) -> None:
    """Named outright: with `auto`, eager would be measured where a kernel does not compile."""
    kind = "cuda" if torch.version.cuda and (os.environ.get("NVCC") or shutil.which("nvcc")) else "cpu"
    print(f"building {what}", flush=True)
    if run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], folder, FASTKD_BUILD=kind):
        raise RuntimeError(f"against: {what} does not build here (FASTKD_BUILD={kind})")


def against(ref: str, argv: Sequence[str], tolerance: float, run: Callable = call) -> int:
    """compare's exit status, but 1 or 2 where the bench ended with that on either side."""
    commit, options = commit_of(ref), of_both_sides(argv)
    with tempfile.TemporaryDirectory(prefix="fastkd-against-") as name:
        folder = pathlib.Path(name)
        checkout, outs = folder / "checkout", {"before": folder / "before", "after": folder / "after"}
        bench = [sys.executable, "-m", "fastkd", "bench", *options, "--out"]
        if run(["git", "worktree", "add", "--quiet", "--detach", str(checkout), commit], machine.ROOT):
            raise RuntimeError(f"against: git could not check out {commit[:12]}")
        try:
            build(f"{ref} ({commit[:12]})", checkout, run)
            build("this one", machine.ROOT, run)
            before = run([*bench, str(outs["before"])], checkout)
        finally:
            run(["git", "worktree", "remove", "--force", str(checkout)], machine.ROOT)
        after = run([*bench, str(outs["after"])], machine.ROOT)
        devices = [next((path.parent for path in out.glob("*/*.csv")), None) for out in outs.values()]
        if None in devices:
            print("nothing to compare: the bench published nothing on one of the sides")
        verdict = 2 if None in devices else compare(*devices, tolerance)
    for side, status in ((ref, before), ("this one", after)):
        if status:
            reasons = {1: "a check failed", 2: "the machine was busy, or an argument is unknown there"}
            why = reasons.get(status, "it died")
            print(f"the bench of {side} ended with {status}: {why}; what it lacks was not compared")
    return verdict or next((1 if status == 1 else 2 for status in (after, before) if status), 0)
