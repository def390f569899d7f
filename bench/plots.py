"""Pictures of the committed CSV: how much faster per case, and how time and memory grow with size."""

import pathlib
from collections.abc import Sequence

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


def colour(provider: str) -> str:
    return COLOURS.get(provider.split(":")[0], OTHER)


def value(row: dict, name: str) -> float | None:
    return float(row[name]) if row.get(name) else None


def headline(rows: Sequence[dict]) -> list[dict]:
    """One mode per case: both where there is a backward, else forward; plain launches only."""
    plain = [row for row in rows if row["launch"] == "plain"]
    with_both = {row["case"] for row in plain if row["mode"] == "both"}
    return [row for row in plain if row["mode"] == ("both" if row["case"] in with_both else "forward")]


def axes_style(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, axis="both", which="major", color="#e4e6ea", linewidth=0.8)
    axes.set_axisbelow(True)


def label_of(case: str) -> str:
    """forward_kl-512x30522-float32 as it is read aloud."""
    kind, shape, dtype = case.rsplit("-", 2)
    short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}
    return f"{kind} {shape.replace('x', '×')} {short.get(dtype, dtype)}"


def speedups(rows: Sequence[dict], stem: str, path: pathlib.Path) -> bool:
    """Bars from 1 (fastkd), one group per case: to the right a slower rival, to the left a faster one. Sweeps have
    their own plot. False without data."""
    import matplotlib.pyplot as plt

    chosen = [row for row in headline(rows) if not row["sweep"] and row["times_ours_median"]]
    chosen = [row for row in chosen if not row["provider"].startswith("fastkd")]
    if not chosen:
        return False
    cases = list(dict.fromkeys(row["case"] for row in chosen))
    providers = list(dict.fromkeys(row["provider"] for row in chosen))
    by_eager = {row["case"] for row in rows if row["provider"] == "fastkd" and row["by_eager"] == "True"}
    figure, axes = plt.subplots(figsize=(9, 1.6 + 0.2 * len(chosen) + 0.14 * len(cases)), layout="constrained")
    axes.set_xscale("log")
    position, ticks = 0.0, []
    for case in cases:
        group = [row for row in chosen if row["case"] == case]
        for i, row in enumerate(group):
            ratio_bar(axes, position + i, row)
        ticks.append((position + (len(group) - 1) / 2, label_of(case) + (" †" if case in by_eager else "")))
        position += len(group) + 0.7
    axes.axvline(1.0, color=COLOURS["fastkd"], linewidth=2.5)
    ratios = [value(row, "times_ours_median") for row in chosen]
    axes.set_xlim(0.55 * min(1.0, *ratios) if min(ratios) < 1 else 0.9, 1.7 * max(1.5, *ratios))
    decimal_ticks(axes.xaxis)
    axes.set_yticks([at for at, _ in ticks], [text for _, text in ticks])
    axes.set_ylim(position - 0.8, -0.9)
    note = "time over fastkd's, which is the green line (bar: medians, tick: minima)"
    axes.set_xlabel(note + ("\n† fastkd is served by plain PyTorch here" if by_eager & set(cases) else ""))
    figure.suptitle(f"{stem}: {modes_of(chosen)}, {rows[0]['device']}", x=0.01, ha="left", fontsize=11)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour(provider)) for provider in providers]
    axes.legend(handles, providers, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(providers), frameon=False)
    axes_style(axes)
    axes.grid(False, axis="y")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def ratio_bar(axes, position: float, row: dict) -> None:
    ratio, least = value(row, "times_ours_median"), value(row, "times_ours_minimum")
    axes.barh(position, ratio - 1, left=1, height=0.82, color=colour(row["provider"]))
    axes.plot([least], [position], marker="|", color="black", markersize=7, markeredgewidth=1.2)
    beyond, side = (max(ratio, least, 1.0) * 1.04, "left") if ratio >= 1 else (min(ratio, least) / 1.04, "right")
    axes.text(beyond, position, f"{ratio:.2g}×" if ratio < 10 else f"{ratio:.0f}×", va="center", ha=side, fontsize=8)


def decimal_ticks(axis) -> None:
    """1, 10, 100 on a logarithmic axis, with 2 and 5 between where there is room; no powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def modes_of(rows: Sequence[dict]) -> str:
    names = {"both": "forward + backward", "forward": "forward"}
    return " / ".join(dict.fromkeys(names.get(row["mode"], row["mode"]) for row in rows))


def sweep(rows: Sequence[dict], stem: str, path: pathlib.Path) -> bool:
    """Log-log time and memory against the swept size, the floor dashed. False where no sweep has two points."""
    import matplotlib.pyplot as plt

    points = [row for row in headline(rows) if row["sweep"]]
    sizes = sorted({int(row["sweep"].split("=")[1]) for row in points})
    if len(sizes) < 2:
        return False
    axis = points[0]["sweep"].split("=")[0]
    figure, (time_axes, memory_axes) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for provider in sorted(dict.fromkeys(row["provider"] for row in points), key=lambda p: not p.startswith("fastkd")):
        mine = sorted((int(row["sweep"].split("=")[1]), row) for row in points if row["provider"] == provider)
        style = {"color": colour(provider), "marker": "o", "markersize": 4, "label": provider}
        style["linewidth"] = 2.6 if provider.startswith("fastkd") else 1.6
        time_axes.plot([size for size, _ in mine], [value(row, "median_ms") for _, row in mine], **style)
        low, high = ([value(row, name) for _, row in mine] for name in ("p20_ms", "p80_ms"))
        time_axes.fill_between([size for size, _ in mine], low, high, color=colour(provider), alpha=0.15, linewidth=0)
        memory = [(size, value(row, "peak_extra_mib")) for size, row in mine]
        memory = [(size, mib) for size, mib in memory if mib]
        memory_axes.plot([size for size, _ in memory], [mib for _, mib in memory], **style)
    floors = {int(row["sweep"].split("=")[1]): value(row, "floor_ms") for row in points}
    time_axes.plot(sizes, [floors[size] for size in sizes], "--", color="black", linewidth=1.2, label="floor")
    for axes, title in ((time_axes, f"{modes_of(points)}, ms"), (memory_axes, "peak extra memory, MiB")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()
        decimal_ticks(axes.yaxis)
        axes.set_xlabel(axis)
        axes.set_title(title, loc="left", fontsize=11)
        axes_style(axes)
    time_axes.legend(frameon=False, fontsize=9)
    fixed = label_of(points[0]["case"])
    figure.suptitle(
        f"{stem} against {axis} (first point: {fixed}), {rows[0]['device']}", fontsize=11, x=0.01, ha="left"
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def draw(rows: Sequence[dict], stem: str, folder: pathlib.Path) -> tuple[list[pathlib.Path], str]:
    """The plots of one stem, and a reason where there are none."""
    try:
        import matplotlib
    except ImportError:
        return [], "no plots: matplotlib is not installed (pip install 'fastkd[bench]')"
    matplotlib.use("Agg")
    if not rows:
        return [], f"no plots: {stem} has no rows"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = ((speedups, folder / f"{stem}_speedup.png"), (sweep, folder / f"{stem}_sweep.png"))
    return [path for function, path in wanted if function(rows, stem, path)], ""
