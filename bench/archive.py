"""Results as JSON, beside the CSV and with the same rows, typed; and the rivals that have no row, with their reasons."""

import json
import pathlib
from collections.abc import Iterable, Mapping

from fastkd.bench import report

FORMAT = 1
OOM = "out of memory"


def typed(row: Mapping[str, str]) -> dict:
    """A row of the CSV with numbers as numbers; columns that an older file lacks are None."""
    return {name: report.as_value(name, row.get(name) or "") for name in report.COLUMNS}


def read(path: pathlib.Path) -> list[dict]:
    """Typed rows of a .json, a .csv, or of every .csv in a folder."""
    if path.is_dir():
        return [typed(row) for row in report.rows_of(path)]
    if not path.exists():
        raise ValueError(f"{path}: no such file; `fastkd bench` writes <stem>.csv and <stem>.json under bench/results")
    if path.suffix == ".csv":
        return [typed(row) for row in report.read_rows(path)]
    try:
        return json.loads(path.read_text())["rows"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a result of `fastkd bench` ({type(error).__name__}: {error})") from error


def absent_of(path: pathlib.Path) -> dict[str, dict[str, str]]:
    """case -> rival -> reason, as an earlier run left it."""
    return json.loads(path.read_text()).get("absent", {}) if path.exists() else {}


def out_of_memory(path: pathlib.Path) -> list[tuple[str, str]]:
    """(case, rival) that ran out of memory, for the curves."""
    return [(case, name) for case, there in absent_of(path).items() for name, why in there.items() if OOM in why]


def write(folder: pathlib.Path, stem: str, absent: Mapping[str, Mapping[str, str]]) -> pathlib.Path:
    """`<stem>.json` from `<stem>.csv`; what is absent from cases that were not measured this time is kept."""
    path = folder / f"{stem}.json"
    rows = [typed(row) for row in report.read_rows(folder / f"{stem}.csv")]
    merged = {case: dict(reasons) for case, reasons in {**absent_of(path), **absent}.items() if reasons}
    path.write_text(json.dumps({"format": FORMAT, "stem": stem, "rows": rows, "absent": merged}, indent=1) + "\n")
    return path


def summary(absent: Iterable[tuple[str, str, str]]) -> list[str]:
    """One line for each (rival, reason), and where: what is not there is named, once."""
    where: dict[tuple[str, str], list[str]] = {}
    for stem, name, reason in absent:
        stems = where.setdefault((name, reason), [])
        stems += [] if stem in stems else [stem]
    return [f"{name} ({', '.join(stems)}): {reason}" for (name, reason), stems in where.items()]
