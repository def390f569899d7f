"""Rows: the CSV that people can check, and the table that they read first.

A row is one provider in one mode of one case. A provider without a number in a case has one row there, with no mode and its
reason under `absent`.
"""

import csv
import pathlib
from collections.abc import Iterable, Sequence

from fastkd.bench.cases import STEMS
from fastkd.bench.measure import Device
from rich.console import Console
from rich.table import Table

from fastkd import atomic_write

TYPES = {
    "stem": str, "case": str, "kind": str, "shape": str, "dtype": str, "mode": str, "launch": str, "cache": str,
    "provider": str, "served_by": str, "by_eager": bool, "gradient_in_forward": bool, "rounds": int,
    "calls_per_sample": int, "median_ms": float, "minimum_ms": float,
    "p20_ms": float, "p80_ms": float, "median_low_ms": float, "median_high_ms": float,
    "times_ours_median": float, "times_ours_low": float, "times_ours_high": float, "times_ours_minimum": float,
    "floor_ms": float, "floor_bound": str, "floor_share": float, "gemms_ms": float, "flops": float, "bytes": float,
    "copy_gb_s": float, "gemm_gflop_s": float, "launches": int, "peak_extra_mib": float, "memory_method": str,
    "loss_error": float, "gradient_error": float, "eager_loss_error": float, "eager_gradient_error": float, "match": bool,
    "goal": str, "label": str, "foreign_cores": float, "device": str, "threads": int, "cpu_capability": str,
    "driver": str, "torch": str, "cuda": str, "triton": str, "python": str, "commit": str, "dirty": bool, "date": str,
    "absent": str,
}  # fmt: skip
COLUMNS = tuple(TYPES)
KEY = ("stem", "case", "mode", "launch", "cache", "provider")
VERSIONS = ("commit", "dirty", "torch", "triton")
PROFILE = "profile"  # profile.csv beside the stems' files is `fastkd profile`'s
NOT_ASKED = "not asked for"
OOM = "out of memory"
OF_A_CASE = ("failed its check", OOM, "one call takes", "left out")  # so begin the reasons that one case gave
Row = dict  # column -> value of its type, None where there is none


def as_text(value) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def read_rows(path: pathlib.Path) -> list[Row]:
    """The rows of a <stem>.csv; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as handle:
        try:
            return [typed(path, row) for row in csv.DictReader(handle)]
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path}: not a CSV file ({error})") from error


def rows_of(folder: pathlib.Path) -> list[Row]:
    """Every row of a device, stem after stem."""
    return [row for stem in STEMS for row in read_rows(folder / f"{stem}.csv")]


def read(path: pathlib.Path) -> list[Row]:
    """The rows of a <stem>.csv, or of every one in a device's folder; at least one."""
    rows = rows_of(path) if path.is_dir() else read_rows(path)
    if not rows:
        raise ValueError(f"{path}: no results here; name a <stem>.csv of `fastkd bench`, or the folder of a device")
    return rows


def typed(path: pathlib.Path, row: dict) -> Row:
    """Columns that an older file lacks are None, or empty."""
    if missing := [name for name in KEY if row.get(name) is None]:
        raise ValueError(f"{path}: not a result of `fastkd bench` (a row has no {', '.join(missing)})")

    def value(name: str, kind: type):
        text = row.get(name) or ""
        if kind is str:
            return text
        try:
            return None if text == "" else text == "True" if kind is bool else kind(text)
        except ValueError:
            raise ValueError(f"{path}: not a result of `fastkd bench` (its {name} is {text!r})") from None

    return {name: value(name, kind) for name, kind in TYPES.items()}


def measured(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if not row["absent"]]


def stays(row: Row, new: Sequence[Row]) -> bool:
    """Whether an old row has no successor among the new ones. On a GPU fastkd and one other are a run by themselves, so that
    others of the same versions stay."""
    same = [other for other in new if all(row[name] == other[name] for name in KEY[1:-1])]
    in_pairs = row["memory_method"] == Device.memory_method and all(
        row[x] == other[x] for other in same for x in VERSIONS
    )
    return not same or (in_pairs and row["provider"] not in [other["provider"] for other in same])


def merge(old: Iterable[Row], new: Sequence[Row]) -> list[Row]:
    """New rows replace the old ones of the same case and mode, whole groups at a time: a ratio lives in one run. What says
    of this run only (not asked for; too large today) does not stand beside the rows of another."""
    cases = {row["case"] for row in new}
    kept = [row for row in old if stays(row, new) and not (row["absent"] and row["case"] in cases)]
    rows = [*kept, *new]
    there = {(row["case"], name) for row in measured(rows) for name in (row["provider"], row["case"])}
    passing = lambda row: row["absent"] == NOT_ASKED or row["provider"] == row["case"]  # noqa: E731
    rows = [row for row in rows if not (passing(row) and (row["case"], row["provider"]) in there)]
    order = {row["case"]: i for i, row in reversed(list(enumerate(rows)))}
    return sorted(rows, key=lambda row: (order[row["case"]], bool(row["absent"])))


def write(rows: Sequence[Row], folder: pathlib.Path) -> list[pathlib.Path]:
    """`<folder>/<stem>.csv`, one per stem, cases that were not measured this time kept. All of a file or nothing: who is
    stopped meanwhile still has the old one."""
    written = []
    folder.mkdir(parents=True, exist_ok=True)
    for stem in dict.fromkeys(row["stem"] for row in rows):
        path = folder / f"{stem}.csv"
        there = read_rows(path)
        with atomic_write.replacing(path) as scratch, scratch.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, COLUMNS, lineterminator="\n")
            writer.writeheader()
            for row in merge(there, [row for row in rows if row["stem"] == stem]):
                writer.writerow({name: as_text(row.get(name)) for name in COLUMNS})
        written.append(path)
    return written


def absent(rows: Iterable[Row]) -> list[str]:
    """One line for each provider and reason, with the stems; what became of one case is said with its name."""
    where: dict[tuple[str, str], dict[str, None]] = {}
    for row in (row for row in rows if row["absent"]):
        place = f"{row['stem']} {row['case']}" if row["absent"].startswith(OF_A_CASE) else row["stem"]
        where.setdefault((row["provider"], row["absent"]), {})[place] = None
    return [f"{name} ({', '.join(places)}): {reason}" for (name, reason), places in where.items()]


# The table --------------------------------------------------------------------------------------------------------

HEADINGS = (
    "provider",
    "median ms",
    "× ours",
    "95 %",
    "of floor",
    "extra MiB",
    "errors",
)  # 100 columns; the CSV has all


def number(value: float | None) -> str:
    """Three significant digits, no exponent where it can be read without one."""
    if value is None:
        return "–"
    if value == 0 or 1e-3 <= abs(value) < 999.5:
        return f"{value:.3g}"
    return f"{value:.0f}" if 999.5 <= abs(value) < 1e5 else f"{value:.1e}"


def interval(low: float | None, high: float | None) -> str:
    return "–" if low is None or high is None else f"{number(low)}–{number(high)}"


def mode_of(row: Row) -> str:
    return row["mode"] + ("" if row["launch"] == "plain" else f" ({row['launch']})")


def only_rescales(row: Row) -> bool:
    """Whether this is the time of a backward beside which ours had nothing left to do but to rescale its gradient."""
    return row["mode"] == "backward" and bool(row["gradient_in_forward"])


def line(row: Row) -> tuple[str, ...]:
    unfair = only_rescales(row)
    served = f" → {row['served_by']}" if row["served_by"] and ":" not in row["provider"] else ""
    return (
        "  " + row["provider"] + served + (" †" if row["by_eager"] else ""),
        number(row["median_ms"]),
        "–" if unfair else number(row["times_ours_median"]),
        "" if unfair or row["provider"] == "fastkd" else interval(row["times_ours_low"], row["times_ours_high"]),
        "–" if unfair and row["provider"].startswith("fastkd") else f"{row['floor_share']:.0%}",
        number(row["peak_extra_mib"]),
        f"{row['loss_error']:.0e} {row['gradient_error']:.0e}",
    )


def footnote(rows: Sequence[Row]) -> str:
    """Floors, GEMMs and rounds, which are the same for all providers of a mode, a line each; launches are ours."""
    parts = []
    for row in {
        (row["mode"], row["launch"]): row for row in sorted(rows, key=lambda r: r["provider"] == "fastkd")
    }.values():
        gemms = f", bare GEMMs {number(row['gemms_ms'])} ms" if row["gemms_ms"] else ""
        launches = f", {row['launches']} launches" if row["launches"] and row["launch"] == "plain" else ""
        floor = f"floor {number(row['floor_ms'])} ms ({row['floor_bound']}){gemms}"
        parts.append(f"{mode_of(row)}: {floor}{launches}, {row['rounds']} rounds")
    if any(map(only_rescales, rows)):
        parts.append("‡ fastkd makes its gradient in the forward, and only rescales it here: compare the mode both")
    return "\n".join(f"  {part}" for part in (*parts, f"errors: of loss and gradient · cache: {rows[0]['cache']}"))


def print_table(rows: Sequence[Row], title: str) -> None:
    """Mode after mode, ours in bold green."""
    lines, ours, ends, mode = [], [], [], None
    for row in rows:
        if mode_of(row) != mode:
            mode = mode_of(row)
            ends += [len(lines) - 1] if lines else []
            lines.append((mode + (" ‡" if only_rescales(row) else ""), *[""] * (len(HEADINGS) - 1)))
        ours += [len(lines)] if row["provider"].startswith("fastkd") else []
        lines.append(line(row))
    show_table(HEADINGS, lines, title, 1, ours, ends)


def show_table(headings, lines: Sequence[Sequence[str]], title: str, left: int = 1, strong=(), ends=()) -> None:
    """`left` columns are text, the others numbers."""
    table = Table(title=title, title_justify="left", pad_edge=False, header_style="bold")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i < left else "right", no_wrap=True)
    for i, cells in enumerate(lines):
        table.add_row(*cells, style="bold green" if i in strong else "", end_section=i in ends)
    console = Console()
    Console(width=max(console.width, 180)).print(table)
