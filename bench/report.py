"""Rows: the CSV that people can check, and the table that they read first."""

import csv
import dataclasses
import pathlib
from collections.abc import Iterable, Sequence


@dataclasses.dataclass(frozen=True)
class Row:
    """One provider in one mode of one case; the field names are the CSV's header."""

    stem: str
    case: str
    kind: str
    shape: str
    dtype: str
    mode: str
    launch: str
    cache: str
    provider: str
    served_by: str
    by_eager: bool
    rounds: int
    calls_per_sample: int
    median_ms: float
    minimum_ms: float
    p20_ms: float
    p80_ms: float
    times_ours_median: float | None
    times_ours_minimum: float | None
    floor_ms: float
    floor_bound: str
    floor_share: float
    gemms_ms: float | None
    peak_extra_mib: float | None
    memory_method: str
    loss_error: float
    gradient_error: float
    eager_loss_error: float | None
    eager_gradient_error: float | None
    match: bool
    sweep: str
    goal: str
    foreign_cores: float | None
    device: str
    threads: int
    cpu_capability: str
    driver: str
    torch: str
    cuda: str
    triton: str
    python: str
    commit: str
    dirty: bool
    date: str


COLUMNS = tuple(field.name for field in dataclasses.fields(Row))
KEY = ("case", "mode", "launch", "cache", "provider")


def as_text(value) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def read_rows(path: pathlib.Path) -> list[dict]:
    if not path.exists():
        return []
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def merge(old: Iterable[dict], new: Sequence[dict]) -> list[dict]:
    """New rows replace the old ones of the same case and mode, whole groups at a time: a ratio lives in one run."""
    measured = {(row["case"], row["mode"], row["launch"], row["cache"]) for row in new}
    kept = [row for row in old if (row["case"], row["mode"], row["launch"], row["cache"]) not in measured]
    order = {row["case"]: i for i, row in reversed(list(enumerate([*kept, *new])))}
    return sorted([*kept, *new], key=lambda row: order[row["case"]])


def write_csv(rows: Sequence[Row], folder: pathlib.Path) -> list[pathlib.Path]:
    """`<folder>/<stem>.csv`, one per stem, cases that were not measured this time kept."""
    written = []
    for stem in dict.fromkeys(row.stem for row in rows):
        path = folder / f"{stem}.csv"
        new = [{name: as_text(getattr(row, name)) for name in COLUMNS} for row in rows if row.stem == stem]
        merged = merge(read_rows(path), new)
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(merged)
        written.append(path)
    return written


# The table --------------------------------------------------------------------------------------------------------

HEADINGS = ("provider", "mode", "median ms", "p20–p80", "min ms", "× ours", "× (min)", "floor", "× GEMMs",
            "extra MiB", "loss error", "gradient error", "match")  # fmt: skip


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, no exponent where it can be read without one."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:.0f}"
    return f"{value:.1e}"


def line(row: Row) -> tuple[str, ...]:
    served = f" → {row.served_by}" if row.served_by and ":" not in row.provider else ""
    launch = f" ({row.launch})" if row.launch != "plain" else ""
    return (
        row.provider + served + (" †" if row.by_eager else ""),
        row.mode + launch,
        number(row.median_ms),
        f"{number(row.p20_ms)}–{number(row.p80_ms)}",
        number(row.minimum_ms),
        number(row.times_ours_median),
        number(row.times_ours_minimum),
        f"{row.floor_share:.0%}",
        number(row.median_ms / row.gemms_ms) if row.gemms_ms else "–",
        number(row.peak_extra_mib),
        f"{row.loss_error:.0e}",
        f"{row.gradient_error:.0e}",
        "✓" if row.match else "✗",
    )


def footnote(rows: Sequence[Row]) -> str:
    """Floors, GEMMs and rounds, which are the same for all providers of a mode."""
    parts = []
    for row in {(row.mode, row.launch): row for row in rows}.values():
        launch = f" ({row.launch})" if row.launch != "plain" else ""
        gemms = f", bare GEMMs {number(row.gemms_ms)} ms" if row.gemms_ms else ""
        floor = f"floor {number(row.floor_ms)} ms ({row.floor_bound}){gemms}"
        parts.append(f"{row.mode}{launch}: {floor}, {row.rounds} rounds")
    return "  " + " · ".join(parts) + f" · cache: {rows[0].cache}"


def print_table(rows: Sequence[Row], title: str) -> None:
    """rich where it is installed, aligned plain text otherwise."""
    lines = [line(row) for row in rows]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(plain_table(lines, title))
        return
    table = Table(title=title, title_justify="left", pad_edge=False, header_style="bold")
    for i, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if i < 2 else "right", no_wrap=True)
    for i, (row, cells) in enumerate(zip(rows, lines, strict=True)):
        last = i + 1 < len(rows) and rows[i + 1].mode != row.mode
        style = "bold green" if row.provider.startswith("fastkd") else ""
        table.add_row(*cells, style=style, end_section=last)
    console = Console()
    Console(width=max(console.width, 170)).print(table)


def plain_table(lines: Sequence[Sequence[str]], title: str) -> str:
    widths = [max(len(row[i]) for row in [HEADINGS, *lines]) for i in range(len(HEADINGS))]

    def aligned(row):
        cells = [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        return "  ".join(cells).rstrip()

    return "\n".join([title, aligned(HEADINGS), "-" * (sum(widths) + 2 * len(widths) - 2), *map(aligned, lines)])
