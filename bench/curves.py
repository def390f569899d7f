"""How time and memory grow with a size: two panels a curve, what they show in words, and why a rival's line ends."""

import pathlib
from collections.abc import Mapping, Sequence

from fastkd.bench import axis_labels, plots
from fastkd.bench.results_io import OOM

NOT_MEASURED = "not measured"
Absent = Mapping[str, Mapping[str, str]]  # case -> rival -> why it has no row


def groups_of(rows: Sequence[dict]) -> dict[tuple, list[dict]]:
    """(axis, kind, dtype) -> its points by size, where there are at least two sizes."""
    groups: dict[tuple, list[dict]] = {}
    for row in plots.headline(rows):
        if row["sweep"]:
            groups.setdefault((row["sweep"].split("=")[0], row["kind"], row["dtype"]), []).append(row)
    return {key: sorted(points, key=size_of) for key, points in groups.items() if len(set(map(size_of, points))) > 1}


def size_of(row: dict) -> int:
    return int(row["sweep"].split("=")[1])


def ending(points: Sequence[dict], provider: str, absent: Absent) -> str:
    """Why a rival's curve stops before the last size, in a few words; empty where it does not."""
    last = max(size_of(row) for row in points if row["provider"] == provider)
    beyond = [row["case"] for row in points if size_of(row) > last]
    reason = absent.get(beyond[0], {}).get(provider, "") if beyond else None
    if reason is None:
        return ""
    if reason.startswith(OOM):
        return reason.removesuffix(" beyond its inputs")
    if reason.startswith("one call takes"):
        return reason.partition(" (")[0]
    known = ("failed its check", "would take minutes")
    return next((text for text in known if text in reason), NOT_MEASURED)


def sweep(rows: Sequence[dict], stem: str, path: pathlib.Path, absent: Absent) -> bool:
    """Log-log time and memory against each swept size, the floor dashed. False where no sweep has two points."""
    import matplotlib.pyplot as plt

    groups = groups_of(rows)
    if not groups:
        return False
    size = (9, 0.7 + 3.0 * len(groups))
    figure, grid = plt.subplots(
        len(groups), 3, figsize=size, layout="constrained", squeeze=False, width_ratios=(3, 3, 1.75)
    )
    for (time, memory, beside), ((_, kind, dtype), points) in zip(grid, groups.items(), strict=True):
        lines = curves(time, memory, points, absent)
        beside.axis("off")
        beside.legend(*zip(*lines, strict=True), loc="center left", borderaxespad=0, labelspacing=0.7, handlelength=1.8)
        head(time, 20, f"{kind} {plots.DTYPES.get(dtype, dtype)}: {axis_labels.fixed(points)}", fontweight="bold")
        head(time, 6, f"milliseconds, {plots.modes_of(points)}")
        memory.set_title("\npeak extra memory, MiB")  # the first line is the caption's, which reaches over both panels
    plots.title(figure, f"{stem}: how time and memory grow", rows)
    figure.supxlabel("shaded: 95 % interval of the median; floor: what copy bandwidth and GEMM rate allow at best",
                     fontsize=8.5, color=plots.SOFT)  # fmt: skip
    plots.save(figure, path, rows, absent)
    return True


def head(axes, above: float, text: str, **style) -> None:
    axes.annotate(text, (0, 1), (0, above), "axes fraction", "offset points", fontsize=10, **style).set_in_layout(False)


def curves(time, memory, points: Sequence[dict], absent: Absent) -> list[tuple]:
    """One line per provider in both panels; (handle, label) for the legend, the slowest first as on the right of the plot."""
    lines, nothing = [], []
    providers = dict.fromkeys(row["provider"] for row in points)
    for provider in sorted(providers, key=plots.rank, reverse=True):  # ours over the others
        mine, why = [row for row in points if row["provider"] == provider], ending(points, provider, absent)
        ours, tone = provider.startswith("fastkd"), plots.colour(provider)
        style = {"color": tone, "marker": "o", "markersize": 6 if ours else 4.5, "linewidth": 3 if ours else 1.7}
        style |= {"zorder": 3 if ours else 2, "linestyle": ":" if provider.startswith("fastkd:") else "-"}
        xs, ms = [size_of(row) for row in mine], [plots.value(row, "median_ms") for row in mine]
        (line,) = time.plot(xs, ms, **style)
        band = [[plots.value(row, name) or y for row, y in zip(mine, ms, strict=True)]
                for name in ("median_low_ms", "median_high_ms")]  # fmt: skip
        time.fill_between(xs, *band, color=tone, alpha=0.18, linewidth=0)
        held = [(x, plots.value(row, "peak_extra_mib")) for x, row in zip(xs, mine, strict=True)]
        held = [(x, mib) for x, mib in held if mib is not None]
        memory.plot([x for x, mib in held if mib], [mib for _, mib in held if mib], **style)
        nothing += [(x, provider) for x, mib in held if not mib]
        lines.append((-ms[-1], line, provider + (f"\n✕ {why}" if why else "")))
        if why:
            for axes, end in ((time, (xs[-1], ms[-1])), *(((memory, held[-1]),) if held and held[-1][1] else ())):
                axes.plot(*end, "x", color=tone, markersize=10, markeredgewidth=2.4, zorder=4)
    floors = {size_of(row): plots.value(row, "floor_ms") for row in points}
    (line,) = time.plot(list(floors), list(floors.values()), "--", color=plots.INK, linewidth=1.2)
    for axes in (time, memory):
        finish(axes, points)
    if nothing:  # a logarithmic axis has no 0: room for saying so
        bottom, top = memory.get_ylim()
        memory.set_ylim(bottom * (bottom / top) ** 0.12, top)
    for x in dict(nothing):
        none = ", ".join(provider for at, provider in nothing if at == x)
        memory.annotate(f" 0: {none}", (x, 0), (0, 4), ("data", "axes fraction"), "offset points", fontsize=8.5)
    return [(handle, label) for _, handle, label in sorted(lines, key=lambda item: item[0])] + [(line, "floor")]


def finish(axes, points: Sequence[dict]) -> None:
    sizes = sorted(set(map(size_of, points)))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [axis_labels.short(size) for size in sizes])
    axes.minorticks_off()
    plots.decimal_ticks(axes.yaxis)
    axes.set_xlabel(axis_labels.axis_label(points))
    axes.tick_params(length=0, which="both")
