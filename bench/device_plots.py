"""Pictures of a whole device: one overview of the speed-ups for the README, one roofline."""

import itertools
import pathlib
from collections.abc import Sequence

from fastkd.bench import plots

OVERVIEW_RIVALS = ("eager", "compile", "authors")
MOST_PER_STEM = 3
STEM_COLOURS = {
    "divergence": "#0b7a5c", "linear_divergence": "#334e68", "gram": "#e08a1e", "relation": "#8b5aa8",
    "layer_cost": "#b8433a", "contrast": "#a3a12f",
}  # fmt: skip


def leading(rows: Sequence[dict], most: int = MOST_PER_STEM) -> list[str]:
    """The cases that stand for the device: those with a target, a few of each stem; a curve's points never."""
    chosen: dict[str, list[str]] = {}
    for row in plots.headline(rows):
        cases = chosen.setdefault(row["stem"], [])
        if row["goal"] and not row["sweep"] and row["case"] not in cases and len(cases) < most:
            cases.append(row["case"])
    return [(stem, case) for stem, cases in chosen.items() for case in cases]


def overview(rows: Sequence[dict], path: pathlib.Path) -> bool:
    """A line per case from fastkd at 1 to its slowest rival, a dot for each, the numbers in columns at the right."""
    import matplotlib.pyplot as plt

    best, chosen = plots.headline(rows), []
    for stem, case in leading(rows):
        there = {row["provider"]: row for row in best if (row["stem"], row["case"]) == (stem, case)}
        found = {name: there[name] for name in OVERVIEW_RIVALS if name in there and there[name]["times_ours_median"]}
        if found and "fastkd" in there:
            star = " †" if there["fastkd"]["by_eager"] == "True" else ""
            chosen.append((stem, f"{stem}  {plots.label_of(case)}{star}", found))
    if not chosen:
        return False
    size = (10, 1.2 + 0.33 * len(chosen))
    figure, (axes, numbers) = plt.subplots(1, 2, figsize=size, layout="constrained", width_ratios=(5, 2.2), sharey=True)
    axes.set_xscale("log")
    ends = [1.0]
    for y, (_, _, found) in zip(range(len(chosen), 0, -1), chosen, strict=True):
        ends += dots(axes, y, found)
        for column, name in enumerate(OVERVIEW_RIVALS):
            text = plots.times(plots.value(found[name], "times_ours_median")) if name in found else "–"
            tone = plots.colour(name) if name in found else "#c5cad1"
            numbers.text(column, y, text, ha="center", va="center", color=tone, fontweight="bold")
    for y, (before, after) in zip(range(len(chosen), 1, -1), itertools.pairwise(chosen), strict=True):
        if before[0] != after[0]:
            axes.axhline(y - 0.5, color=plots.GRID, linewidth=0.8)
    axes.axvline(1.0, color=plots.COLOURS["fastkd"], linewidth=2.5)
    axes.set(xlim=(0.8 * min(ends), 1.25 * max(2.0, *ends)), ylim=(0.4, len(chosen) + 0.6))
    plots.decimal_ticks(axes.xaxis, tight=max(ends) / min(ends) > 300)
    axes.set_yticks(range(len(chosen), 0, -1), [label for _, label, _ in chosen], color=plots.INK)
    note = "     † served by plain PyTorch here" if any("†" in label for _, label, _ in chosen) else ""
    axes.set_xlabel(f"rival's time over fastkd's, which is the green line; shadow: 95 %{note}")
    axes.tick_params(length=0, which="both")
    axes.grid(False, axis="y")
    numbers.set(xlim=(-0.6, len(OVERVIEW_RIVALS) - 0.4))
    for column, name in enumerate(OVERVIEW_RIVALS):
        numbers.text(column, len(chosen) + 0.75, name, ha="center", va="bottom", fontsize=9.5, color=plots.colour(name))
    numbers.axis("off")
    plots.title(figure, "How many times faster, loss and gradient", rows)
    plots.save(figure, path, rows)
    return True


def dots(axes, y: float, found: dict[str, dict]) -> list[float]:
    """One case; what it needs of the x axis."""
    reach = [1.0]
    for name, row in found.items():
        ratio = plots.value(row, "times_ours_median")
        low, high = (plots.value(row, f"times_ours_{end}") or ratio for end in ("low", "high"))
        reach += [low, high]
        axes.plot(
            [low, high], [y, y], color=plots.colour(name), linewidth=5, alpha=0.3, zorder=2, solid_capstyle="butt"
        )
        axes.plot([ratio], [y], "o", color=plots.colour(name), markersize=8.5, zorder=3, markeredgecolor="white")
    medians = [1.0, *(plots.value(row, "times_ours_median") for row in found.values())]
    axes.plot([min(medians), max(medians)], [y, y], color="#d3d7dc", linewidth=1.6, zorder=1)
    return reach


def roofline(rows: Sequence[dict], path: pathlib.Path) -> bool:
    """FLOPs per second against FLOPs per byte, both of the work that nobody can avoid; the roofs as measured. Without
    transport, whose pivots depend on the numbers."""
    import matplotlib.pyplot as plt

    points = [row for row in plots.headline(rows) if row.get("flops") and row["stem"] != "transport"]
    pairs = {}
    for row in points:
        if row["provider"] in ("fastkd", "eager"):
            pairs.setdefault((row["stem"], row["case"]), {})[row["provider"]] = row
    pairs = {key: pair for key, pair in pairs.items() if "fastkd" in pair}
    if not pairs:
        return False
    figure, axes = plt.subplots(figsize=(9, 5.4), layout="constrained")
    axes.set_xscale("log")
    axes.set_yscale("log")
    intensities, beside = [], {}
    for (stem, _), pair in pairs.items():
        x = float(pair["fastkd"]["flops"]) / float(pair["fastkd"]["bytes"])
        beside[round(x, 3)] = beside.get(round(x, 3), -1) + 1
        x *= 1.07 ** beside[round(x, 3)]  # equal intensities stand side by side
        y = {name: float(row["flops"]) / float(row["median_ms"]) * 1e-6 for name, row in pair.items()}  # GFLOP/s
        intensities.append(x)
        tone = STEM_COLOURS.get(stem, plots.OTHER)
        if "eager" in y:
            axes.plot([x, x], [y["eager"], y["fastkd"]], color=tone, linewidth=0.9, alpha=0.5, zorder=2)
            axes.plot([x], [y["eager"]], "o", markerfacecolor="white", markeredgecolor=tone, markersize=4.5, zorder=3)
        axes.plot([x], [y["fastkd"]], "o", color=tone, markersize=6.5, markeredgecolor="white", zorder=4)
    lines = draw_roofs(axes, points, min(intensities) / 2, max(intensities) * 3)
    stems = [stem for stem in STEM_COLOURS if any(key[0] == stem for key in pairs)]
    handles = [plt.Line2D([], [], marker="o", linestyle="", color=STEM_COLOURS[stem]) for stem in stems]
    handles.append(plt.Line2D([], [], marker="o", linestyle="", markerfacecolor="white", markeredgecolor=plots.SOFT))
    names = [*stems, "eager, the same case", *(line.get_label() for line in lines)]
    axes.legend([*handles, *lines], names, loc="center left", bbox_to_anchor=(1.0, 0.5))
    plots.decimal_ticks(axes.xaxis, tight=True)
    plots.decimal_ticks(axes.yaxis, tight=True)
    axes.set_xlabel("FLOP per byte, of the work that nobody can avoid")
    axes.set_ylabel("GFLOP/s reached")
    axes.tick_params(length=0, which="both")
    plots.title(figure, "Roofline: what was reached of this machine", rows)
    plots.save(figure, path, rows)
    return True


def draw_roofs(axes, points: Sequence[dict], left: float, right: float) -> list:
    """The copy roof, of the largest copies and (where it differs) of those that fit a cache, and one GEMM roof per dtype;
    the lines, for the legend."""
    copies = sorted(float(row["copy_gb_s"]) for row in points)
    gemms = {row["dtype"]: float(row["gemm_gflop_s"]) for row in points if row["dtype"] in plots.DTYPES}
    rates = [(copies[0], "-", "copy")]
    rates += [(copies[-1], "--", "copy in cache")] if copies[-1] > 1.3 * copies[0] else []
    highest, lines = max(gemms.values()), []
    for rate, style, name in rates:
        end = min(right, highest / rate)
        label = f"{name} {rate:,.0f} GB/s"
        lines += axes.plot([left, end], [left * rate, end * rate], style, color=plots.INK, linewidth=1.3, label=label)
    for (dtype, rate), style in zip(
        sorted(gemms.items(), key=lambda pair: pair[1]), ("-.", ":", (0, (6, 1)), "-"), strict=False
    ):
        label = f"{plots.DTYPES[dtype]} GEMM {rate:,.0f} GFLOP/s"
        start = rate / rates[-1][0]
        lines += axes.plot([start, max(right, start)], [rate, rate], style, color=plots.INK, linewidth=1.3, label=label)
    axes.set_xlim(left, right)
    return lines


def draw(rows: Sequence[dict], folder: pathlib.Path) -> tuple[list[pathlib.Path], str]:
    """overview.png and roofline.png of a device, and a reason where there are none."""
    reason = plots.ready()
    if reason or not rows:
        return [], reason or "no plots: no rows"
    import matplotlib.pyplot as plt

    with plt.rc_context(plots.STYLE):
        wanted = ((overview, folder / "overview.png"), (roofline, folder / "roofline.png"))
        return [path for function, path in wanted if function(rows, path)], ""
