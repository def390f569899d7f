"""Pictures of a whole device: one overview of the speed-ups for the README, one roofline."""

import itertools
import math
import pathlib
from collections.abc import Sequence

from fastkd.bench import plots
from fastkd.bench.roofline import copy_size

OVERVIEW_RIVALS = ("eager", "compile", "authors")
MOST_PER_STEM = 4
MARKERS = {"float32": "o", "bfloat16": "s", "float16": "D", "float64": "^"}


def leading(rows: Sequence[dict], most: int = MOST_PER_STEM) -> list[tuple[str, str]]:
    """The cases that stand for the device: those with a target, a few of each stem, each kind before any kind's second;
    a curve's points never."""
    chosen: dict[str, dict[str, str]] = {}
    for row in plots.headline(rows):
        cases = chosen.setdefault(row["stem"], {})
        if row["goal"] and not row["sweep"]:
            cases[row["case"]] = row["kind"]
    found = []
    for stem, cases in chosen.items():
        firsts = {kind: case for case, kind in reversed(cases.items())}.values()
        kept = sorted(cases, key=lambda case, firsts=firsts: case not in firsts)[:most]
        found += [(stem, case) for case in cases if case in kept]
    return found


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
    plots.decimal_ticks(axes.xaxis)
    axes.set_yticks(range(len(chosen), 0, -1), [label for _, label, _ in chosen], color=plots.INK)
    note = "     † served by plain PyTorch here" if any("†" in label for _, label, _ in chosen) else ""
    axes.set_xlabel(f"rival's time over fastkd's, the green line; shade: 95 % interval{note}")
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


def on_the_roof(rows: Sequence[dict]) -> dict[tuple, dict[str, dict]]:
    """(stem, dtype) -> fastkd's and eager's row of its first leading case; without transport, whose pivots depend on the
    numbers."""
    best, pairs = plots.headline(rows), {}
    for stem, case in leading(rows):
        pair = {row["provider"]: row for row in best if (row["stem"], row["case"]) == (stem, case)}
        if stem != "transport" and "fastkd" in pair and pair["fastkd"]["flops"]:
            pairs.setdefault((stem, pair["fastkd"]["dtype"]), pair)
    return pairs


def roofline(rows: Sequence[dict], path: pathlib.Path) -> bool:
    """FLOPs per second against FLOPs per byte, both of the work that nobody can avoid; the roofs as measured."""
    import matplotlib.pyplot as plt

    pairs = on_the_roof(rows)
    if not pairs:
        return False
    figure, axes = plt.subplots(figsize=(9, 5.4), layout="constrained")
    axes.set(xscale="log", yscale="log")
    spots = []
    for (stem, dtype), pair in pairs.items():
        x = float(pair["fastkd"]["flops"]) / float(pair["fastkd"]["bytes"])
        y = {name: float(row["flops"]) / float(row["median_ms"]) * 1e-6 for name, row in pair.items()}  # GFLOP/s
        style = {"marker": MARKERS.get(dtype, "o"), "linestyle": "", "zorder": 4}
        if "eager" in y:
            tone = plots.colour("eager")
            axes.plot([x, x], [y["eager"], y["fastkd"]], color=tone, linewidth=1.2, zorder=2)
            axes.plot([x], [y["eager"]], color=tone, markersize=7, **style)
        axes.plot([x], [y["fastkd"]], color=plots.colour("fastkd"), markersize=9, markeredgecolor="white", **style)
        spots.append((x, y["fastkd"], y.get("eager", y["fastkd"]), stem))
    for x, y, _, stem in spots:
        axes.annotate(stem, (x, y), (8, 0), textcoords="offset points", va="center", fontsize=9, zorder=3,
                      bbox={"color": "white", "pad": 0.5})  # fmt: skip
    xs, lowest = [spot[0] for spot in spots], min(min(spot[1:3]) for spot in spots)
    draw_roofs(axes, rows, min(xs) / 3, max(xs) * 6, lowest / 2)
    legend(axes, pairs)
    plots.decimal_ticks(axes.xaxis)
    plots.decimal_ticks(axes.yaxis)
    axes.set_xlabel("FLOP per byte, of the work that nobody can avoid")
    axes.set_ylabel("GFLOP/s reached")
    axes.tick_params(length=0, which="both")
    plots.title(figure, "Roofline: what was reached of this machine", rows)
    plots.save(figure, path, rows)
    return True


def legend(axes, pairs) -> None:
    """Colour: whose; shape: which dtype."""
    import matplotlib.pyplot as plt

    def mark(marker, tone, **more):
        return plt.Line2D([], [], marker=marker, linestyle="", markersize=8, color=tone, **more)

    found = {name: mark("o", plots.colour(name)) for name in ("fastkd", "eager")}
    there = {dtype for _, dtype in pairs}
    for dtype in (dtype for dtype in MARKERS if dtype in there):
        found[plots.DTYPES[dtype]] = mark(MARKERS[dtype], plots.INK, markerfacecolor="white")
    axes.legend(found.values(), found, loc="lower right", handletextpad=0.3)


def roofs_of(rows: Sequence[dict]) -> tuple[dict[str, float], dict[str, float]]:
    """The best GB/s of the largest copies (what does not fit a cache) and, where it is clearly more, of smaller ones; the
    best GFLOP/s per dtype. A roof is what the machine can do, so of several measurements the best counts."""
    rates: dict[int, float] = {}
    for row in rows:
        size = copy_size(float(row["bytes"]))
        rates[size] = max(rates.get(size, 0.0), float(row["copy_gb_s"]))
    copies = {"copy": rates[max(rates)]}
    if max(rates.values()) > 1.3 * copies["copy"]:
        copies["copy in cache"] = max(rates.values())
    gemms: dict[str, float] = {}
    for row in rows:
        if row["dtype"] in plots.DTYPES and row["stem"] != "transport":
            gemms[row["dtype"]] = max(gemms.get(row["dtype"], 0.0), float(row["gemm_gflop_s"]))
    return copies, gemms


def draw_roofs(axes, rows: Sequence[dict], left: float, right: float, bottom: float) -> None:
    """Each roof with its name on it: copies where they begin, GEMMs where they end."""
    copies, gemms = roofs_of(rows)
    highest, text = max(gemms.values()), {"fontsize": 9, "color": plots.INK}
    axes.set(xlim=(left, right), ylim=(bottom, 2 * highest))
    for dtype, rate in gemms.items():
        axes.plot([rate / max(copies.values()), right], [rate, rate], color=plots.INK, linewidth=1.4)
        axes.text(1.5 * rate / copies["copy"], rate * 1.06, f"{plots.DTYPES[dtype]} GEMM {rate:,.0f} GFLOP/s", **text)
    axes.figure.canvas.draw()  # a slope is known once the axes have their size
    for (name, rate), style in zip(copies.items(), ("-", "--"), strict=False):
        ends = [(x, x * rate) for x in (max(left, bottom / rate), highest / rate)]
        axes.plot(*zip(*ends, strict=True), style, color=plots.INK, linewidth=1.4)
        (x0, y0), (x1, y1) = axes.transData.transform(ends)
        slope = math.degrees(math.atan2(y1 - y0, x1 - x0))
        axes.annotate(f"{name} {rate:,.0f} GB/s", ends[0], (10, 11), textcoords="offset points", rotation=slope,
                      rotation_mode="anchor", **text)  # fmt: skip


def draw(rows: Sequence[dict], folder: pathlib.Path) -> tuple[list[pathlib.Path], str]:
    """overview.png and roofline.png of a device, and a reason where there are none."""
    reason = plots.ready()
    if reason or not rows:
        return [], reason or "no plots: no rows"
    import matplotlib.pyplot as plt

    with plt.rc_context(plots.STYLE):
        wanted = ((overview, folder / "overview.png"), (roofline, folder / "roofline.png"))
        return [path for function, path in wanted if function(rows, path)], ""
