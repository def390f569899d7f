"""Pictures of the committed CSV, stem by stem: how much faster per case, and how time and memory grow with size.

Every picture carries the digest of the rows it shows (PNG text `fastkd-rows`), so that a test can tell an old one; curves
also that of the reasons at their ends (`fastkd-absent`).
"""

import hashlib
import pathlib
from collections.abc import Iterable, Mapping, Sequence

from fastkd.bench import results_io

INK, SOFT, GRID = "#1f2933", "#66707c", "#e4e7eb"
COLOURS = {
    "fastkd": "#0b7a5c",
    "eager": "#8a8f98",
    "compile": "#e08a1e",
    "authors": "#b8433a",
    "liger": "#4868b0",
    "eager stacked": "#b9bdc4",
    "trl-style": "#8b5aa8",
    "cdist": "#5aa6c4",
    "scipy": "#c46a9a",
    "autochunker": "#a3a12f",
}
OTHER = "#6f7f5f"
STYLE = {
    "figure.facecolor": "white", "axes.facecolor": "white", "axes.edgecolor": "#c5cad1", "axes.labelcolor": SOFT,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.8,
    "axes.axisbelow": True, "axes.titlesize": 10, "axes.titlecolor": INK, "axes.titlelocation": "left",
    "xtick.color": SOFT, "ytick.color": SOFT, "text.color": INK, "font.size": 9.5, "legend.frameon": False,
    "legend.fontsize": 9, "axes.labelsize": 9.5, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
}  # fmt: skip
DIGEST, DIGEST_ABSENT = "fastkd-rows", "fastkd-absent"


def colour(provider: str) -> str:
    return COLOURS.get(provider.split(":")[0], OTHER)


def value(row: dict, name: str) -> float | None:
    return float(row[name]) if row.get(name) else None


def headline(rows: Sequence[dict]) -> list[dict]:
    """One mode and one cache state per case: both passes where there is a backward, else forward; caches as they were
    left, flushed only where there is nothing else. Plain launches only."""
    plain = [row for row in rows if row["launch"] == "plain" and row["mode"] in ("both", "forward")]
    best: dict[tuple, tuple] = {}
    for row in plain:
        key = row["stem"], row["case"]
        best[key] = min(best.get(key, preference(row)), preference(row))
    return [row for row in plain if preference(row) == best[row["stem"], row["case"]]]


def preference(row: dict) -> tuple:
    return row["mode"] != "both", row["cache"].startswith("cold"), row["cache"]


DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}


def label_of(case: str) -> str:
    """forward_kl-512x30522-float32 as it is read aloud."""
    kind, shape, dtype = case.rsplit("-", 2)
    return f"{kind} {shape.replace('x', '×')} {DTYPES.get(dtype, dtype)}"


def digest(*parts: object) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]


def digest_of(rows: Iterable[dict]) -> str:
    return digest(*(sorted(row.items()) for row in rows))


def digest_of_absent(absent: Mapping[str, Mapping[str, str]]) -> str:
    return digest(*(f"{case} {sorted(reasons.items())}" for case, reasons in sorted(absent.items())))


def title(figure, text: str, rows: Sequence[dict]) -> None:
    """What it is, large at the left; where the numbers come from, small at the right."""
    figure.suptitle(text, x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.text(0.992, 0.992, source(rows), ha="right", va="top", fontsize=7.5, color="#7b8490")


def save(figure, path: pathlib.Path, rows: Sequence[dict], absent: Mapping | None = None) -> None:
    """The date of drawing stays out of the file: the same rows give the same picture."""
    import matplotlib.pyplot as plt

    digests = {DIGEST: digest_of(rows), **({} if absent is None else {DIGEST_ABSENT: digest_of_absent(absent)})}
    figure.savefig(path, dpi=140, metadata={**digests, "Software": None})
    plt.close(figure)


def source(rows: Sequence[dict]) -> str:
    """Which machine, which torch, when."""
    dates = sorted({row["date"][:10] for row in rows})
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return f"{rows[0]['device']} · torch {rows[0]['torch']} · {when}"


def decimal_ticks(axis) -> None:
    """Plain numbers on a logarithmic axis, the more of each decade the fewer decades there are; after its limits are set."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    steps = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if high < 12 * low else (1.0, 2.0, 5.0) if high < 1000 * low else (1.0,)
    axis.set_major_locator(LogLocator(base=10, subs=steps, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}" if x >= 10 else f"{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def modes_of(rows: Sequence[dict]) -> str:
    names = {"both": "forward + backward", "forward": "forward"}
    return " / ".join(dict.fromkeys(names[row["mode"]] for row in rows))


def times(ratio: float) -> str:
    """Two decimals below 2, where a few percent matter."""
    return f"{ratio:.2f}×" if ratio < 2 else f"{ratio:.1f}×" if ratio < 10 else f"{ratio:.0f}×"


# One stem's cases -------------------------------------------------------------------------------------------------


def speedups(rows: Sequence[dict], stem: str, path: pathlib.Path) -> bool:
    """Bars from 1 (fastkd), one group per case: to the right a slower rival, to the left a faster one. Sweeps have
    their own plot. False without data."""
    import matplotlib.pyplot as plt

    chosen = [row for row in headline(rows) if not row["sweep"] and row["times_ours_median"]]
    chosen = [row for row in chosen if not row["provider"].startswith("fastkd")]
    if not chosen:
        return False
    cases = list(dict.fromkeys(row["case"] for row in chosen))
    by_eager = {row["case"] for row in rows if row["provider"] == "fastkd" and row["by_eager"] == "True"}
    figure, axes = plt.subplots(figsize=(9, 1.4 + 0.2 * len(chosen) + 0.16 * len(cases)), layout="constrained")
    axes.set_xscale("log")
    position, ticks = 0.0, []
    for case in cases:
        group = [row for row in chosen if row["case"] == case]
        for i, row in enumerate(group):
            ratio_bar(axes, position + i, row)
        ticks.append((position + (len(group) - 1) / 2, label_of(case) + (" †" if case in by_eager else "")))
        position += len(group) + 0.8
    axes.axvline(1.0, color=COLOURS["fastkd"], linewidth=3)
    ends = [1.0, *(end for row in chosen for end in interval_of(row))]
    spread = max(2.0, max(ends)) / min(ends)  # beyond the whiskers: room for their numbers
    axes.set_xlim(min(ends) / spread ** (0.12 if min(ends) < 1 else 0.04), max(2.0, max(ends)) * spread**0.12)
    decimal_ticks(axes.xaxis)
    axes.set_yticks([at for at, _ in ticks], [text for _, text in ticks], color=INK)
    axes.set_ylim(position - 0.9, -0.9)
    note = f"rival's time over fastkd's (green line), {modes_of(chosen)}; whisker: 95 % interval"
    axes.set_xlabel(note + ("\n† fastkd is served by plain PyTorch here" if by_eager & set(cases) else ""))
    title(figure, f"{stem}: how many times faster", rows)
    legend_above(axes, sorted(dict.fromkeys(row["provider"] for row in chosen), key=rank))
    axes.grid(False, axis="y")
    axes.tick_params(length=0, which="both")
    save(figure, path, rows)
    return True


def legend_above(axes, rivals: Sequence[str], most: int = 7) -> None:
    """From the figure's left edge, `most` to a line; an empty title of as many lines keeps the room."""
    import matplotlib.pyplot as plt
    from matplotlib.transforms import blended_transform_factory

    handles = [plt.Line2D([], [], color=COLOURS["fastkd"], linewidth=3)]
    handles += [plt.Rectangle((0, 0), 1, 1, color=colour(name)) for name in rivals]
    where = blended_transform_factory(axes.figure.transFigure, axes.transAxes)
    legend = axes.legend(handles, ["fastkd", *rivals], loc="lower left", bbox_to_anchor=(0.005, 1), handlelength=1.4,
                         bbox_transform=where, ncols=most, columnspacing=1.6, borderaxespad=0.3)  # fmt: skip
    legend.set_in_layout(False)
    axes.set_title(" " + "\n " * (len(rivals) // most), fontsize=13)


def rank(provider: str) -> int:
    name = provider.split(":")[0]
    return list(COLOURS).index(name) if name in COLOURS else len(COLOURS)


def interval_of(row: dict) -> tuple[float, float, float]:
    """Low end, median, high end of a rival's time over ours."""
    ratio = value(row, "times_ours_median")
    return value(row, "times_ours_low") or ratio, ratio, value(row, "times_ours_high") or ratio


def ratio_bar(axes, position: float, row: dict) -> None:
    low, ratio, high = interval_of(row)
    axes.barh(position, ratio - 1, left=1, height=0.84, color=colour(row["provider"]))
    axes.plot([low, high], [position, position], color=INK, linewidth=1.1, solid_capstyle="butt")
    beyond, side = (max(high, 1.0) * 1.04, "left") if ratio >= 1 else (min(low, 1.0) / 1.04, "right")
    axes.text(beyond, position, times(ratio), va="center", ha=side, fontsize=8.5)


def ready() -> str:
    """Empty where matplotlib is there, else the sentence that says what to do."""
    try:
        import matplotlib
    except ImportError:
        return "no plots: matplotlib is not installed (pip install 'fastkd[bench]')"
    matplotlib.use("Agg")
    return ""


def draw(rows, stem: str, folder: pathlib.Path) -> tuple[list[pathlib.Path], str]:
    """The plots of one stem, and a reason where there are none. Why a curve ends is in the JSON beside the CSV."""
    from fastkd.bench import curves

    reason = ready()
    if reason or not rows:
        return [], reason or f"no plots: {stem} has no rows"
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    bars, lines = folder / f"{stem}_speedup.png", folder / f"{stem}_sweep.png"
    with plt.rc_context(STYLE):
        absent = results_io.absent_of(folder / f"{stem}.json")
        drawn = [(bars, speedups(rows, stem, bars)), (lines, curves.sweep(rows, stem, lines, absent))]
    return [path for path, done in drawn if done], ""
