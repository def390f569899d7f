"""The pictures of the CSV: an overview of a device's speed-ups, and the scores of the quality studies."""

import pathlib
from collections.abc import Sequence

import matplotlib
import matplotlib.pyplot as plt
from fastkd.bench import report
from fastkd.bench.report import Row
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

matplotlib.use("Agg")
INK, SOFT, GRID = "#1f2933", "#66707c", "#e4e7eb"
COLOURS = {"fastkd": "#0b7a5c", "eager": "#8a8f98", "compile": "#e08a1e", "authors": "#b8433a"}
STYLE = {
    "figure.facecolor": "white", "axes.facecolor": "white", "axes.edgecolor": "#c5cad1", "axes.labelcolor": SOFT,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.8,
    "axes.axisbelow": True, "axes.titlesize": 10, "axes.titlecolor": INK, "axes.titlelocation": "left",
    "xtick.color": SOFT, "ytick.color": SOFT, "text.color": INK, "font.size": 9.5, "legend.frameon": False,
    "legend.fontsize": 9, "axes.labelsize": 9.5, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
}  # fmt: skip
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}
BESIDE = ("eager", "compile", "authors")  # of whom the overview shows numbers
MOST_PER_STEM = 4


def label_of(case: str) -> str:
    """forward_kl-512x30522-float32 as it is read aloud."""
    kind, shape, dtype = case.rsplit("-", 2)
    return f"{kind} {shape.replace('x', '×')} {DTYPES.get(dtype, dtype)}"


def times(ratio: float) -> str:
    """Two decimals below 2, where a few percent matter."""
    return f"{ratio:.2f}×" if ratio < 2 else f"{ratio:.1f}×" if ratio < 10 else f"{ratio:.0f}×"


def headline(rows: Sequence[Row]) -> list[Row]:
    """One mode and one cache state per case: both passes where there is a backward, else forward; caches as they were
    left, flushed only where there is nothing else. Plain launches only."""
    plain = [row for row in rows if row["launch"] == "plain" and row["mode"] in ("both", "forward")]
    best: dict[tuple, tuple] = {}
    for row in plain:
        key = row["stem"], row["case"]
        best[key] = min(best.get(key, preference(row)), preference(row))
    return [row for row in plain if preference(row) == best[row["stem"], row["case"]]]


def by_case(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """(stem, case) -> provider -> row of `headline`, in the order of the CSV, where fastkd has one."""
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    for row in headline(rows):
        groups.setdefault((row["stem"], row["case"]), {})[row["provider"]] = row
    return {key: there for key, there in groups.items() if "fastkd" in there}


def preference(row: Row) -> tuple:
    return row["mode"] != "both", row["cache"].startswith("cold"), row["cache"]


def title(figure, text: str, rows: Sequence[dict]) -> None:
    """What it is, large at the left; where the numbers come from, small at the right."""
    dates = sorted({row["date"][:10] for row in rows})
    source = f"{rows[0]['device']} · torch {rows[0]['torch']} · {' to '.join(dict.fromkeys((dates[0], dates[-1])))}"
    figure.suptitle(text, x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.text(0.992, 0.992, source, ha="right", va="top", fontsize=7.5, color="#7b8490")


def save(figure, path: pathlib.Path) -> None:
    """The date of drawing stays out of the file: the same rows give the same picture."""
    figure.savefig(path, dpi=140, metadata={"Software": None})
    plt.close(figure)


def decimal_ticks(axis) -> None:
    """Plain numbers on a logarithmic axis, the more of each decade the fewer decades there are; after its limits are set."""
    low, high = axis.get_view_interval()
    steps = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if high < 12 * low else (1.0, 2.0, 5.0) if high < 1000 * low else (1.0,)
    axis.set_major_locator(LogLocator(base=10, subs=steps, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}" if x >= 10 else f"{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def draw(folder: pathlib.Path) -> str:
    """The picture of a device's rows: its name, or nothing where there is no case to show."""
    with plt.rc_context(STYLE):
        drawn = overview(report.measured(report.rows_of(folder)), folder / "overview.png")
    return "overview.png" if drawn else ""


def leading(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The cases that stand for the device: a few of each stem, those with a goal where there are any, each kind before any
    kind's second."""
    chosen: dict[str, dict[str, Row]] = {}
    for row in headline(rows):
        chosen.setdefault(row["stem"], {})[row["case"]] = row
    found = []
    for stem, there in chosen.items():
        cases = {
            case: row["kind"]
            for case, row in there.items()
            if row["goal"] or not any(r["goal"] for r in there.values())
        }
        firsts = {kind: case for case, kind in reversed(cases.items())}.values()
        kept = sorted(cases, key=lambda case, firsts=firsts: case not in firsts)[:MOST_PER_STEM]
        found += [(stem, case) for case in cases if case in kept]
    return found


def overview(rows: Sequence[Row], path: pathlib.Path) -> bool:
    """A line per case, a dot with its 95 % interval for each provider, the numbers in columns at the right; fastkd is at 1."""
    groups = by_case(rows)
    chosen = [key for key in leading(rows) if key in groups]
    if not chosen:
        return False
    size = (10, 1.2 + 0.33 * len(chosen))
    figure, (axes, numbers) = plt.subplots(1, 2, figsize=size, layout="constrained", width_ratios=(5, 2.2), sharey=True)
    axes.set(xscale="log", ylim=(0.4, len(chosen) + 0.6))
    numbers.set(xlim=(-0.6, len(BESIDE) - 0.4))
    numbers.axis("off")
    heights, labels = range(len(chosen), 0, -1), []
    for y, key in zip(heights, chosen, strict=True):
        there = groups[key]
        labels.append(f"{key[0]}  {label_of(key[1])}{' †' if there['fastkd']['by_eager'] else ''}")
        for column, name in enumerate(BESIDE):
            ratio, style = there.get(name, {}).get("times_ours_median"), {"color": COLOURS[name], "ha": "center"}
            numbers.text(column, y, times(ratio) if ratio else "–", va="center", fontweight="bold", **style)
            if ratio:
                ends = [there[name][f"times_ours_{end}"] or ratio for end in ("low", "high")]
                axes.plot(ends, [y, y], color=COLOURS[name], linewidth=5, alpha=0.3, solid_capstyle="butt")
                axes.plot(ratio, y, "o", color=COLOURS[name], markersize=8.5, markeredgecolor="white")
            if y == len(chosen):
                numbers.text(column, y + 0.75, name, **style)
    axes.axvline(1.0, color=COLOURS["fastkd"], linewidth=2.5)
    decimal_ticks(axes.xaxis)
    axes.set_yticks(heights, labels, color=INK)
    note = "     † served by plain PyTorch here" if any("†" in label for label in labels) else ""
    axes.set_xlabel(f"time over fastkd's, the green line; shade: 95 % interval{note}")
    axes.tick_params(length=0, which="both")
    axes.grid(False, axis="y")
    title(figure, "How many times faster, loss and gradient", rows)
    save(figure, path)
    return True


def scores(
    lines: Sequence[tuple[str, Sequence[float], float]], text: str, unit: str, rows: Sequence[Row], path
) -> None:
    """A line per (label, a score for each seed, the teacher's score): a dot per seed, a tick at their mean, one for the teacher.
    A label with "alone" is the student without a teacher."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 1.1 + 0.28 * len(lines)), layout="constrained")
        heights = range(len(lines), 0, -1)
        for y, (label, found, teacher) in zip(heights, lines, strict=True):
            colour = COLOURS["eager" if "alone" in label else "fastkd"]
            axes.plot(found, [y] * len(found), "o", color=colour, alpha=0.55, markersize=6, markeredgecolor="white")
            axes.plot(sum(found) / len(found), y, "|", color=colour, markersize=15, markeredgewidth=2.5)
            axes.plot(teacher, y, "|", color=INK, markersize=15, markeredgewidth=2.5)
        axes.set_yticks(heights, [label for label, *_ in lines], color=INK)
        axes.set(ylim=(0.4, len(lines) + 0.6), xlabel=f"{unit}\na dot per seed, a tick at the mean; black: the teacher")
        axes.tick_params(length=0, which="both")
        axes.grid(False, axis="y")
        title(figure, text, rows)
        save(figure, path)


def curves(
    lines: dict[str, tuple[Sequence, Sequence]], text: str, labels: tuple[str, str], rows: Sequence[Row], path
) -> None:
    """A line per {label: (x, y)}, on a logarithmic axis of y. A label that begins with "eager" is PyTorch's; one that ends in
    "bfloat16" is dashed."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
        for label, (x, y) in lines.items():
            colour = COLOURS["eager" if label.startswith("eager") else "fastkd"]
            axes.plot(x, y, "--" if label.endswith("bfloat16") else "-", color=colour, label=label)
        axes.set_yscale("log")
        decimal_ticks(axes.yaxis)
        axes.set(xlabel=labels[0], ylabel=labels[1])
        axes.legend()
        title(figure, text, rows)
        save(figure, path)
