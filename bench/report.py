"""Rows: the CSV that people can check, and the table that they read first."""

import csv
import dataclasses
import io
import pathlib
from collections.abc import Iterable, Sequence

from fastkd import atomic_write


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
    median_low_ms: float
    median_high_ms: float
    times_ours_median: float | None
    times_ours_low: float | None
    times_ours_high: float | None
    times_ours_minimum: float | None
    floor_ms: float
    floor_bound: str
    floor_share: float
    gemms_ms: float | None
    flops: float
    bytes: float
    copy_gb_s: float
    gemm_gflop_s: float
    launches: int | None
    peak_extra_mib: float | None
    memory_method: str
    loss_error: float
    gradient_error: float
    eager_loss_error: float | None
    eager_gradient_error: float | None
    match: bool
    sweep: str
    goal: str
    label: str
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


TYPES = {field.name: str(getattr(field.type, "__name__", field.type)) for field in dataclasses.fields(Row)}
COLUMNS = tuple(field.name for field in dataclasses.fields(Row))
KEY = ("stem", "case", "mode", "launch", "cache", "provider")
PROFILE = "profile"  # profile.csv beside the stems' files is `fastkd profile`'s


def as_text(value) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def as_value(name: str, text: str):
    """A field of the CSV as its type in Row says; None where it is empty."""
    kind = TYPES[name]
    if "str" in kind:
        return text
    if text == "":
        return None
    return {"bool": lambda: text == "True", "int": lambda: int(text)}.get(kind.split(" ")[0], lambda: float(text))()


def read_rows(path: pathlib.Path) -> list[dict]:
    if not path.exists():
        return []
    with path.open(newline="") as handle:
        try:
            return list(csv.DictReader(handle))
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path}: not a CSV file ({error})") from error


def results_in(folder: pathlib.Path) -> list[pathlib.Path]:
    """The stems' CSV files of a device; a profile, or what somebody else put beside them, is none."""
    return [path for path in sorted(folder.glob("*.csv")) if set(KEY) <= set(header_of(path))]


def header_of(path: pathlib.Path) -> list[str]:
    with path.open(newline="", errors="replace") as handle:
        return next(csv.reader([handle.readline().replace("\0", "")]), [])


def rows_of(folder: pathlib.Path) -> list[dict]:
    """Every row of a device, stem after stem."""
    return [row for path in results_in(folder) for row in read_rows(path)]


def merge(old: Iterable[dict], new: Sequence[dict]) -> list[dict]:
    """New rows replace the old ones of the same case and mode, whole groups at a time: a ratio lives in one run."""
    measured = {tuple(row[name] for name in KEY[1:-1]) for row in new}
    kept = [row for row in old if tuple(row[name] for name in KEY[1:-1]) not in measured]
    order = {row["case"]: i for i, row in reversed(list(enumerate([*kept, *new])))}
    return sorted([*kept, *new], key=lambda row: order[row["case"]])


def store(path: pathlib.Path, text: str) -> None:
    """All of it or nothing: who is stopped meanwhile still has the old file."""
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write.replacing(path) as scratch:
        scratch.write_text(text, newline="")


def write_csv(rows: Sequence[Row], folder: pathlib.Path) -> list[pathlib.Path]:
    """`<folder>/<stem>.csv`, one per stem, cases that were not measured this time kept."""
    written = []
    for stem in dict.fromkeys(row.stem for row in rows):
        path = folder / f"{stem}.csv"
        new = [{name: as_text(getattr(row, name)) for name in COLUMNS} for row in rows if row.stem == stem]
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(merge(read_rows(path), new))
        store(path, text.getvalue())
        written.append(path)
    return written


# The table --------------------------------------------------------------------------------------------------------

HEADINGS = ("provider", "mode", "median ms", "95 %", "× ours", "95 %", "× (min)", "of floor", "rate", "× GEMMs",
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


def interval(low: float | None, high: float | None) -> str:
    return "–" if low is None or high is None else f"{number(low)}–{number(high)}"


def rate(row: Row) -> str:
    """What was reached of the roof that bounds this case: bytes or FLOPs that nobody can avoid, per second."""
    if row.floor_bound == "copy":
        return f"{number(row.bytes / row.median_ms * 1e-6)} GB/s"
    per_second = row.flops / row.median_ms * 1e-6  # GFLOP/s
    return f"{number(per_second / 1e3)} TFLOP/s" if per_second >= 1000 else f"{number(per_second)} GFLOP/s"


def line(row: Row) -> tuple[str, ...]:
    served = f" → {row.served_by}" if row.served_by and ":" not in row.provider else ""
    launch = f" ({row.launch})" if row.launch != "plain" else ""
    return (
        row.provider + served + (" †" if row.by_eager else ""),
        row.mode + launch,
        number(row.median_ms),
        interval(row.median_low_ms, row.median_high_ms),
        number(row.times_ours_median),
        "" if row.provider == "fastkd" else interval(row.times_ours_low, row.times_ours_high),
        number(row.times_ours_minimum),
        f"{row.floor_share:.0%}",
        rate(row),
        number(row.median_ms / row.gemms_ms) if row.gemms_ms else "–",
        number(row.peak_extra_mib),
        f"{row.loss_error:.0e}",
        f"{row.gradient_error:.0e}",
        "✓" if row.match else "✗",
    )


def footnote(rows: Sequence[Row]) -> str:
    """Floors, GEMMs and rounds, which are the same for all providers of a mode; launches are ours."""
    parts = []
    for row in {(row.mode, row.launch): row for row in sorted(rows, key=lambda r: r.provider == "fastkd")}.values():
        launch = f" ({row.launch})" if row.launch != "plain" else ""
        gemms = f", bare GEMMs {number(row.gemms_ms)} ms" if row.gemms_ms else ""
        launches = f", {row.launches} launches" if row.launches and row.launch == "plain" else ""
        floor = f"floor {number(row.floor_ms)} ms ({row.floor_bound}){gemms}"
        parts.append(f"{row.mode}{launch}: {floor}{launches}, {row.rounds} rounds")
    return "  " + " · ".join(parts) + f" · cache: {rows[0].cache}"


def print_table(rows: Sequence[Row], title: str) -> None:
    """Ours in bold green, a line between the modes."""
    ours = [i for i, row in enumerate(rows) if row.provider.startswith("fastkd")]
    ends = [i for i, row in enumerate(rows[:-1]) if rows[i + 1].mode != row.mode]
    show_table(HEADINGS, [line(row) for row in rows], title, 2, ours, ends)


def show_table(headings, lines: Sequence[Sequence[str]], title: str, left: int = 1, strong=(), ends=()) -> None:
    """rich where it is installed, aligned plain text otherwise. `left` columns are words, the others numbers."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(plain_table(lines, title, headings, left))
        return
    table = Table(title=title, title_justify="left", pad_edge=False, header_style="bold")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i < left else "right", no_wrap=True)
    for i, cells in enumerate(lines):
        table.add_row(*cells, style="bold green" if i in strong else "", end_section=i in ends)
    console = Console()
    Console(width=max(console.width, 180)).print(table)


def plain_table(lines: Sequence[Sequence[str]], title: str, headings: Sequence[str] = HEADINGS, left: int = 2) -> str:
    widths = [max(len(row[i]) for row in [headings, *lines]) for i in range(len(headings))]

    def aligned(row):
        pairs = enumerate(zip(row, widths, strict=True))
        return "  ".join(cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in pairs).rstrip()

    return "\n".join([title, aligned(headings), "-" * (sum(widths) + 2 * len(widths) - 2), *map(aligned, lines)])
