"""`python -m fastkd.bench.evidence.readme` (or `make readme`): the README's figures and pictures, from the committed CSV alone.

Everything between the two markers is written here; a test fails where README, pictures and CSV disagree. A device without
results has no row, and nothing is estimated. `--check` changes nothing and says what is stale.
"""

import argparse
import pathlib
import sys
import textwrap
from collections.abc import Iterator, Sequence

from fastkd.bench import device_plots, machine, plots, report, results_io
from fastkd.bench.cases import shapes
from fastkd.bench.evidence import targets

BEGIN, END = "<!-- figures: begin (written by `make readme` from bench/results) -->", "<!-- figures: end -->"
RIVALS = ("eager", "compile", "authors")
HEADINGS = ("hot path", "case", "ms", *(f"× {name}" for name in RIVALS), "others", "of floor", "MiB / eager's",
            "gradient error / eager's")  # fmt: skip


def devices(results: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in results.glob("*") if path.is_dir() and report.rows_of(path))


def ratio_cell(row: dict | None) -> str:
    """12.3× [11.8, 12.9]"""
    ratio = plots.value(row, "times_ours_median") if row else None
    if ratio is None:
        return "–"
    low, high = (plots.value(row, f"times_ours_{end}") for end in ("low", "high"))
    return f"**{plots.times(ratio)}**" + (f" [{low:.3g}, {high:.3g}]" if low and high else "")


def case_line(stem: str, case: str, there: dict[str, dict]) -> str:
    ours, eager = there["fastkd"], there.get("eager")
    others = [f"{name} {plots.times(plots.value(row, 'times_ours_median'))}" for name, row in there.items()
              if name not in RIVALS and not name.startswith("fastkd") and row["times_ours_median"]]  # fmt: skip

    def beside_eager(name: str, form) -> str:
        mine, other = plots.value(ours, name), plots.value(eager, name) if eager else None
        return f"{'–' if mine is None else form(mine)} / {'–' if other is None else form(other)}"

    cells = (
        f"`{stem}`", plots.label_of(case) + (" †" if ours["by_eager"] == "True" else ""),
        report.number(plots.value(ours, "median_ms")), *(ratio_cell(there.get(name)) for name in RIVALS),
        ", ".join(others) or "–", f"{plots.value(ours, 'floor_share'):.0%}",
        beside_eager("peak_extra_mib", report.number), beside_eager("gradient_error", lambda x: f"{x:.0e}"),
    )  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def table(rows: Sequence[dict]) -> list[str]:
    """Every case but the curves' points, in the order of the CSV."""
    groups: dict[tuple, dict[str, dict]] = {}
    for row in plots.headline(rows):
        if not row["sweep"]:
            groups.setdefault((row["stem"], row["case"]), {})[row["provider"]] = row
    lines = [case_line(stem, case, there) for (stem, case), there in groups.items() if "fastkd" in there]
    head = "| " + " | ".join(HEADINGS) + " |"
    return [head, "|" + "---|" * len(HEADINGS), *lines] if lines else []


def slower_than_eager(rows: Sequence[dict], limit: float = 0.95) -> list[str]:
    """Cases and modes where eager takes less than `limit` of our time; all launches and cache states, curves too."""

    def how(row: dict) -> str:
        cold = row["cache"].startswith("cold") and not row["cuda"]  # a GPU is always measured cold
        return f"{row['mode']}{'' if row['launch'] == 'plain' else ' graph'}{' cold' if cold else ''}"

    return [
        f"{row['stem']} {plots.label_of(row['case'])} {how(row)} ({plots.value(row, 'times_ours_median'):.2f}×)"
        for row in targets.beside_eager(rows)
        if plots.value(row, "times_ours_median") < limit
    ]


def stems_of(folder: pathlib.Path) -> list[str]:
    """Stems with rows or reasons; a profile, a log or what somebody else put here is none."""
    return sorted({*shapes.KINDS, *(path.stem for path in report.results_in(folder))})


def absent(folder: pathlib.Path) -> list[str]:
    """Rivals that have no row on this device, with the reason, once; what became of one case is said with its name."""
    found = [
        (f"{stem} {plots.label_of(case)}" if reason.startswith(results_io.OF_A_CASE) else stem, name, reason)
        for stem in stems_of(folder)
        for case, reasons in results_io.absent_of(folder / f"{stem}.json").items()
        for name, reason in reasons.items()
        if not name.startswith("fastkd")
    ]
    return results_io.summary(found)


def folded(title: str, lines: Sequence[str]) -> list[str]:
    return ["", f"<details><summary>{title}</summary>", "", *lines, "", "</details>"]


def section(folder: pathlib.Path, root: pathlib.Path) -> Iterator[str]:
    """One device."""
    rows, where = report.rows_of(folder), folder.relative_to(root).as_posix()
    newest = max(rows, key=lambda row: row["date"])
    yield from ("", f"### {folder.name}", "")
    versions = [f"torch {newest['torch']}", f"Python {newest['python']}", f"{newest['threads']} threads"]
    versions += [f"CUDA {newest['cuda']}", f"driver and clocks {newest['driver']}"] if newest["cuda"] else []
    commits = sorted({row["commit"] + (" with changes" if row["dirty"] == "True" else "") for row in rows})
    yield f"{', '.join(versions)}; commit {', '.join(commits)}; raw: [{where}]({where})."
    if device_plots.leading(rows):
        yield from ("", f"![How many times faster, case by case]({where}/overview.png)")
    yield from ("", *table(rows))
    slow = slower_than_eager(rows)
    yield from ("", f"Slower than 0.95× eager: {len(slow)} of {targets.coverage(rows)}.")
    if slow:
        yield f"Those are {'; '.join(slow)}."
    lines = targets.table(rows, folder)
    if lines:
        yield from folded("Targets", lines)
    pictures = ["roofline", *(f"{stem}_sweep" for stem in dict.fromkeys(row["stem"] for row in rows))]
    shown = [name for name in pictures if (folder / f"{name}.png").exists()]
    if shown:
        yield from folded("Roofline, and how time and memory grow", [f"![{n}]({where}/{n}.png)\n" for n in shown])
    missing = absent(folder)
    if missing:
        yield from folded("Rivals that were not measured here, and why", [f"- {line}" for line in missing])
    yield from profile_section(folder, where)


def profile_section(folder: pathlib.Path, where: str) -> Iterator[str]:
    """Whole training steps, where they were profiled."""
    path = folder / "profile.csv"
    if not path.exists():
        return
    steps = [row for row in report.read_rows(path) if row["phase"] == "step"]
    if not steps:
        return
    ways = list(dict.fromkeys(row["way"] for row in steps))
    from fastkd.profile.results import KEY

    setups: dict[tuple, dict[str, dict]] = {}
    for row in steps:
        setups.setdefault(tuple(row.get(name) for name in KEY), {})[row["way"]] = row
    ways = list(dict.fromkeys(row["way"] for row in steps))
    yield from ("", "A whole training step (`fastkd profile`), milliseconds; in brackets the loss's share of it:", "")
    yield "| model | method | " + " | ".join(ways) + " | tokens/s |"
    yield "|---|---|" + "---|" * (len(ways) + 1)
    for mine in setups.values():
        first = next(iter(mine.values()))
        cells = [f"{report.number(float(mine[w]['median_ms']))} ({float(mine[w]['loss_share']):.0%})" if w in mine else "–"
                 for w in ways]  # fmt: skip
        speed = f"{float(mine[ways[0]]['tokens_per_second']):,.0f}" if ways[0] in mine else "–"
        yield f"| {profiled_model(first)} | `{first['method']}` | {' | '.join(cells)} | {speed} |"
    if (folder / "profile.png").exists():
        yield from ("", f"![Where the time of a step goes]({where}/profile.png)")


def profiled_model(row: dict) -> str:
    """bert-base 8×128 fp32 compiled and, unless it is classification, the task: what tells a setup from another."""
    sizes = (
        f" {row['batch']}×{row['length']} {plots.DTYPES.get(row['dtype'], row['dtype'])}" if row.get("batch") else ""
    )
    task = "" if row["task"] == "classification" else f" {row['task']}"
    return row["model"] + sizes + task + (" compiled" if row.get("compiled") == "True" else "")


LEGEND = textwrap.fill(
    "Medians of interleaved rounds in one process, loss and gradient unless the case has a forward only; × is the rival's "
    "time over fastkd's, with its 95 % interval; `authors` is the paper's released way of doing it, written by us; "
    "of floor: the share of what copy bandwidth or GEMM rate, measured in the same process, allow; MiB: peak extra memory. "
    "Every row's numbers were checked against float64 first. † served by plain PyTorch. `make bench` repeats it, "
    "`make readme` rewrites this section.",
    120,
)  # fmt: skip


def text(root: pathlib.Path) -> str:
    """What stands between the markers."""
    found = devices(root / "bench" / "results")
    if not found:
        return "\nNothing was measured yet: `make bench`, then `make readme`.\n"
    lines = ["", LEGEND]
    for folder in found:
        lines += section(folder, root)
    return "\n".join(lines) + "\n"


def replaced(readme: str, figures: str) -> str:
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(
            f"README.md: expected exactly one line {BEGIN!r} and one {END!r}; put them where figures belong"
        )
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{figures}\n{END}{rest.split(END)[1]}"


def draw(folder: pathlib.Path) -> list[pathlib.Path]:
    """All pictures of one device."""
    drawn = []
    for path in report.results_in(folder):
        drawn += plots.draw(report.read_rows(path), path.stem, folder)[0]
    drawn += device_plots.draw(report.rows_of(folder), folder)[0]
    if (folder / f"{report.PROFILE}.csv").exists():
        from fastkd.profile import plots as profile_plots

        drawn += profile_plots.draw(folder)[0]
    return drawn


def rewrite(folder: pathlib.Path) -> list[pathlib.Path]:
    """JSON and pictures of one device, from its CSV. What we would not draw is somebody else's and stays."""
    for stem in (path.stem for path in report.results_in(folder)):
        if json_is_stale(folder, stem):
            results_io.write(folder, stem, {})
    pictures = [folder / name for name in results_io.pictures(stems_of(folder))]
    for path in (*pictures, folder / f"{report.PROFILE}.png"):
        results_io.check_picture(path)
    for path in pictures:
        path.unlink(missing_ok=True)
    return draw(folder)


def json_is_stale(folder: pathlib.Path, stem: str) -> bool:
    csv, json = folder / f"{stem}.csv", folder / f"{stem}.json"
    return not json.exists() or results_io.contents(json)["rows"] != results_io.checked(csv, report.read_rows(csv))


def drawn_from_others(folder: pathlib.Path) -> Iterator[str]:
    """Pictures of ours that show other rows than the CSV has, or curves that end for other reasons than the JSON gives."""
    names = [*results_io.pictures(stems_of(folder)), f"{report.PROFILE}.png"]
    for path in (folder / name for name in names if (folder / name).exists()):
        stem, _, kind = path.stem.rpartition("_")
        csv = folder / f"{stem or kind}.csv"
        rows = report.rows_of(folder) if kind in ("overview", "roofline") else report.read_rows(csv)
        digests, picture = [plots.digest_of(rows)], path.read_bytes()
        if plots.DIGEST_ABSENT.encode() in picture:  # a picture from before the reasons were noted has none
            digests.append(plots.digest_of_absent(results_io.absent_of(csv.with_suffix(".json"))))
        if not all(digest.encode() in picture for digest in digests):
            yield path.name


def stale(root: pathlib.Path) -> list[str]:
    """What does not say what the CSV says; empty where everything does."""
    readme = (root / "README.md").read_text()
    found = [] if replaced(readme, text(root)) == readme else ["README.md: its figures are not those of bench/results"]
    for folder in devices(root / "bench" / "results"):
        where = folder.relative_to(root)
        for stem in (path.stem for path in report.results_in(folder)):
            found += [f"{where}/{stem}.json: its rows are not those of the CSV"] if json_is_stale(folder, stem) else []
        found += [f"{where}/{name}: drawn from other rows" for name in drawn_from_others(folder)]
        if device_plots.leading(report.rows_of(folder)) and not (folder / "overview.png").exists():
            found.append(f"{where}/overview.png: missing")
    return found


def main(argv: Sequence[str] | None = None, root: pathlib.Path = machine.ROOT) -> int:
    parser = argparse.ArgumentParser("make readme", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; 1 and a list where something is stale")
    arguments = parser.parse_args(argv)
    try:
        return run(root, arguments.check)
    except ValueError as error:
        print(f"make readme: {error}", file=sys.stderr)
        return 2


def run(root: pathlib.Path, only_check: bool) -> int:
    if not only_check:
        reason = plots.ready()
        if reason:
            print(reason, file=sys.stderr)
            return 2
        for folder in devices(root / "bench" / "results"):
            print(*(path.relative_to(root) for path in rewrite(folder)), sep="\n")
        readme = root / "README.md"
        report.store(readme, replaced(readme.read_text(), text(root)))
    wrong = stale(root)
    print("\n".join((*wrong, "run `make readme`")) if wrong else "README.md and its pictures say what the CSV says")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
