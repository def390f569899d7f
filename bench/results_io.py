"""Results as JSON, beside the CSV and with the same rows, typed; and the rivals that have no row, with their reasons."""

import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence

from fastkd.bench import report

FORMAT = 1
OOM = "out of memory"
OF_A_CASE = ("failed its check", OOM, "one call takes")  # so begin the reasons that one case gave, not a rival's nature
NOT_ASKED = "not asked for"
NEEDED = (*report.KEY, "times_ours_median", "device", "commit")  # without these, a row is none of ours


def typed(row: Mapping) -> dict:
    """A row, of the CSV or the JSON, with numbers as numbers; columns that an older file lacks are None."""

    def field(name: str):
        text = row[name] if isinstance(row.get(name), str) else report.as_text(row.get(name))
        try:
            return report.as_value(name, text)
        except ValueError:
            raise ValueError(f"its {name} is {text!r}") from None

    return {name: field(name) for name in report.COLUMNS}


def foreign(path: pathlib.Path, why: str) -> ValueError:
    return ValueError(f"{path}: not a result of `fastkd bench` ({why})")


def checked(path: pathlib.Path, rows: Sequence) -> list[dict]:
    """Typed rows of a file, or which of them is not one of ours."""
    found = []
    for i, row in enumerate(rows, 1):
        missing = [name for name in NEEDED if name not in row] if isinstance(row, dict) else NEEDED
        if missing:
            raise foreign(path, f"row {i} has no {', '.join(missing)}")
        try:
            found.append(typed(row))
        except ValueError as error:
            raise foreign(path, f"row {i}: {error}") from error
    return found


def contents(path: pathlib.Path) -> dict:
    """A JSON file of ours: {"rows": [...], "absent": {case: {rival: reason}}}."""
    try:
        found = json.loads(path.read_text())
    except ValueError as error:  # also what is no text at all
        raise foreign(path, f"not JSON: {error}") from error
    absent = found.get("absent", {}) if isinstance(found, dict) else None
    rows = isinstance(found, dict) and isinstance(found.get("rows"), list)
    if not rows or not isinstance(absent, dict) or not all(isinstance(reasons, dict) for reasons in absent.values()):
        raise foreign(path, "expected a list under `rows`, and cases under `absent`")
    return {**found, "absent": absent}


def read(path: pathlib.Path) -> list[dict]:
    """Typed rows of a .json, a .csv, or of every .csv in a device's folder; at least one."""
    if not path.exists():
        raise ValueError(f"{path}: no such file; `fastkd bench` writes <stem>.csv and <stem>.json under bench/results")
    if path.is_dir():
        rows = [row for file in report.results_in(path) for row in checked(file, report.read_rows(file))]
    else:
        rows = checked(path, report.read_rows(path) if path.suffix == ".csv" else contents(path)["rows"])
    if not rows:
        devices = (
            [str(x) for x in sorted(path.glob("*")) if x.is_dir() and report.results_in(x)] if path.is_dir() else []
        )
        hint = "; name one of its devices: " + ", ".join(devices) if devices else "; `fastkd bench` writes them"
        raise ValueError(f"{path}: no results here{hint}")
    return rows


def absent_of(path: pathlib.Path) -> dict[str, dict[str, str]]:
    """case -> rival -> reason, as an earlier run left it."""
    return contents(path)["absent"] if path.exists() else {}


def pictures(stems: Iterable[str]) -> list[str]:
    """What is drawn in the folder of a device that has these stems."""
    return ["overview.png", "roofline.png", *(f"{stem}_{kind}.png" for stem in stems for kind in ("speedup", "sweep"))]


def is_picture(path: pathlib.Path) -> bool:
    """Whether it was drawn from rows."""
    from fastkd.bench import plots

    return plots.DIGEST.encode() in path.read_bytes()


def check_picture(path: pathlib.Path) -> None:
    """Raises where drawing would overwrite a picture that somebody else put there."""
    if path.exists() and not is_picture(path):
        raise foreign(path, "a picture that was not drawn from rows")


def check_files(folder: pathlib.Path, stem: str) -> None:
    """Raises where rows of this stem could not join the CSV and the JSON that are there, or something would be lost."""
    csv, path = folder / f"{stem}.csv", folder / f"{stem}.json"
    if csv.exists():
        header = report.header_of(csv)
        strange = [name for name in header if name not in report.COLUMNS]
        if not set(report.KEY) <= set(header):
            raise foreign(csv, f"its columns are {', '.join(header)}")
        if strange or any(None in row for row in report.read_rows(csv)):
            raise foreign(
                csv, f"it has more columns, which would be lost: {', '.join(strange) or 'some without a name'}"
            )
    if path.exists():
        found = contents(path)
        if found.get("stem") != stem:
            raise foreign(path, f"its stem is not {stem}")
        if found["rows"] and not csv.exists():
            raise foreign(path, f"it has rows, which would be lost, since {csv.name} is gone")


def probe(folder: pathlib.Path, stems: Sequence[str]) -> None:
    """Before anything is measured: can it be written there, and would nothing be lost that is not ours?"""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"out: {there} is a file; name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"out: {there} cannot be written to; name another folder with --out")
    try:
        for stem in stems:
            check_files(folder, stem)
        for name in pictures(stems):
            check_picture(folder / name)
    except ValueError as error:
        raise ValueError(f"{error}; move it away, or name another folder with --out") from error


def write(folder: pathlib.Path, stem: str, absent: Mapping[str, Mapping[str, str]]) -> pathlib.Path:
    """`<stem>.json` from `<stem>.csv`; what is absent from cases that were not measured this time is kept."""
    path = folder / f"{stem}.json"
    rows = [typed(row) for row in report.read_rows(folder / f"{stem}.csv")]
    there = {(row["case"], name) for row in rows for name in (row["provider"], row["case"])}
    merged = {
        case: {name: why for name, why in reasons.items() if not (_passing(case, name, why) and (case, name) in there)}
        for case, reasons in {**absent_of(path), **absent}.items()
    }
    merged = {case: reasons for case, reasons in merged.items() if reasons}
    report.store(path, json.dumps({"format": FORMAT, "stem": stem, "rows": rows, "absent": merged}, indent=1) + "\n")
    return path


def _passing(case: str, name: str, why: str) -> bool:
    """Whether a reason is about this run only: rows of an earlier one, where there are any, say more."""
    return name == case or why == NOT_ASKED


def summary(absent: Iterable[tuple[str, str, str]]) -> list[str]:
    """One line for each (rival, reason), and where: what is not there is named, once."""
    where: dict[tuple[str, str], list[str]] = {}
    for stem, name, reason in absent:
        stems = where.setdefault((name, reason), [])
        stems += [] if stem in stems else [stem]
    return [f"{name} ({', '.join(stems)}): {reason}" for (name, reason), stems in where.items()]
