"""What a profile leaves behind: profile.csv, profile.json and profile.png, a trace per setup. What stands in their place is
looked at before the first step, and only a file of ours is replaced, whole."""

import csv
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from fastkd import atomic_write
from fastkd.bench import machine, report

from .results import COLUMNS, KEY, Row

FORMAT = 1
TRACED = "fastkd profile"  # a key of our traces
RECORD = f'{{\n "format": {FORMAT},\n "rows": ['


def trace_of(folder: Path, setup: dict) -> Path:
    """One file per setup: readable, and the digest tells apart what the words do not."""
    words = "-".join(machine.slug(setup[name])[:60].strip("-") for name in ("method", "model"))
    sizes = f"{setup['batch']}x{setup['length']}-{setup['dtype']}" + ("-compiled" if setup["compiled"] else "")
    digest = hashlib.sha256("\n".join(str(setup[name]) for name in KEY).encode()).hexdigest()[:6]
    return folder / "traces" / f"{words}-{sizes}-{digest}.json"


def check(folder: Path, traces: Iterable[Path]) -> None:
    """ValueError where nothing can be written, or where somebody else's file is in the way."""
    atomic_write.probe(folder, "out")
    ours = {folder / f"{report.PROFILE}.csv": is_table, folder / f"{report.PROFILE}.json": is_record,
            **dict.fromkeys(traces, is_trace)}  # fmt: skip
    for path in ours:
        if path.parent != folder:
            atomic_write.probe(path.parent, "out")
    for path, is_ours in ours.items():
        if path.exists() and not (path.is_file() and is_ours(path)):
            raise ValueError(
                f"out: {path} is not as `fastkd profile` writes it, and is not written over; move it, or choose another --out"
            )


def is_table(path: Path) -> bool:
    """An older one may have fewer columns; another column, or a row that was cut off, is not ours to lose."""
    try:
        rows, header = report.read_rows(path), path.read_text().partition("\n")[0].split(",")
        numbers = [float(row["median_ms"]) for row in rows]
    except (UnicodeDecodeError, ValueError, KeyError, TypeError, csv.Error):
        return False
    whole = all(None not in row and None not in row.values() for row in rows)
    return {*KEY, "way", "phase", "median_ms"} <= {*header} <= {*COLUMNS} and whole and len(numbers) == len(rows)


def is_record(path: Path) -> bool:
    return path.read_bytes().startswith(RECORD.encode())  # a beginning is enough: its rows are those of the table


def is_trace(path: Path) -> bool:
    return f'"{TRACED}"'.encode() in path.read_bytes()


def write(rows: Sequence[Row], folder: Path) -> Path:
    """profile.csv and profile.json; the same setup measured before is replaced, the rest is kept."""
    path = folder / f"{report.PROFILE}.csv"
    new = [{name: report.as_text(getattr(row, name)) for name in COLUMNS} for row in rows]
    measured = {tuple(row[name] for name in KEY) for row in new}
    kept = [row for row in report.read_rows(path) if tuple(row[name] for name in KEY) not in measured]
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write.replacing(path) as scratch, scratch.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *new])
    with atomic_write.replacing(path.with_suffix(".json")) as scratch:
        scratch.write_text(json.dumps({"format": FORMAT, "rows": report.read_rows(path)}, indent=1) + "\n")
    return path
