"""The stacked bars of profile.csv: where the milliseconds of a step go, the three ways under each other."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from fastkd import atomic_write
from fastkd.bench import plots, report

from .results import KEY, ORDER, STEP, group

COLOURS = {
    "data": "#c9a66b", "teacher forward": "#9fb3c8", "student forward": "#627d98", "loss": "#e8743b",
    "loss backward": "#f2b38c", "student backward": "#334e68", "optimizer": "#bcccdc", "trainer": "#8d7f99",
}  # fmt: skip


def stacked(rows: Sequence[dict], path: Path) -> bool:
    """A panel per model and size of its batches, a group per setup, a bar per way; at its end the whole, and what it is of
    ours."""
    import matplotlib.pyplot as plt

    groups: dict[tuple, dict[str, list[dict]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in KEY), {}).setdefault(row["way"], []).append(row)
    if not groups:
        return False
    panels: dict[str, list[tuple]] = {}
    for key in groups:
        panels.setdefault(panel_of(key), []).append(key)
    heights = [sum(len(groups[key]) + 0.9 for key in keys) for keys in panels.values()]
    size = (10, 1.1 + 0.27 * sum(heights) + 0.55 * len(panels))
    figure, grid = plt.subplots(
        len(panels), 1, figsize=size, layout="constrained", squeeze=False, height_ratios=heights
    )
    for axes, (heading, keys) in zip(grid[:, 0], panels.items(), strict=True):
        panel(axes, heading, {key: groups[key] for key in keys})
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in ORDER]
    figure.legend(
        handles, ORDER, loc="outside lower center", ncols=len(ORDER), fontsize=8, handlelength=1.2, columnspacing=1.2
    )
    plots.title(figure, "Where the time of a training step goes", rows)
    plots.save(figure, path)
    return True


def panel_of(key: tuple) -> str:
    there = dict(zip(KEY, key, strict=True))
    model = there["model"] if len(there["model"]) < 48 else there["model"][:45] + "…"
    return f"{model}, {there['batch']}×{there['length']} tokens, {there['dtype']}: milliseconds"


def labels_of(keys: Iterable[tuple]) -> dict[tuple, str]:
    """The method, and what else it takes to tell a panel's groups apart."""
    there = {key: dict(zip(KEY, key, strict=True)) for key in keys}
    tasks = {method: {x["task"] for x in there.values() if x["method"] == method} for method in
             (x["method"] for x in there.values())}  # fmt: skip
    return {key: x["method"] + (f" · {x['task']}" if len(tasks[x["method"]]) > 1 else "")
            + (" · compiled" if x["compiled"] == "True" else "") for key, x in there.items()}  # fmt: skip


def panel(axes, heading: str, groups: dict[tuple, dict[str, list[dict]]]) -> None:
    position, ticks = 0.0, []
    wholes = {key: {way: whole_of(parts) for way, parts in ways.items()} for key, ways in groups.items()}
    longest = max(float(row["median_ms"]) for ways in wholes.values() for row in ways.values())
    labels = labels_of(groups)
    for key, ways in groups.items():
        for i, (way, parts) in enumerate(ways.items()):
            whole = wholes[key][way]
            bar(axes, position, parts, float(whole["median_ms"]), longest)
            ticks.append((position, f"{labels[key]} · {way}" if i == 0 else way))
            text = f"{report.number(float(whole['median_ms']))} ms"
            text += "" if i == 0 else f" ({float(whole['times_ours']):.2f}×)"
            text += f", loss {float(whole['loss_share']):.1%}"
            axes.text(float(whole["median_ms"]), position, "  " + text, va="center", fontsize=8)
            position += 1
        position += 0.9
    axes.set_yticks([at for at, _ in ticks], [text for _, text in ticks], color=plots.INK)
    axes.set(ylim=(position - 1.2, -0.7), xlim=(0, 1.32 * longest))
    axes.set_title(heading)
    axes.grid(False, axis="y")
    axes.tick_params(length=0)


def whole_of(parts: Sequence[dict]) -> dict:
    return next(row for row in parts if row["phase"] == STEP)


def bar(axes, position: float, parts: Sequence[dict], whole: float, longest: float) -> None:
    """Medians do not add up exactly; the bar is as long as the median step, cut in the parts' proportions."""
    sizes = dict.fromkeys(ORDER, 0.0)
    for row in parts:
        if row["phase"] != STEP:
            sizes[group(row["phase"])] += float(row["median_ms"])
    scale, left = whole / sum(sizes.values()), 0.0
    for name, size in sizes.items():
        width = size * scale
        axes.barh(position, width, left=left, height=0.84, color=COLOURS[name], edgecolor="white", linewidth=0.5)
        left += width


def draw(folder: Path) -> tuple[list[Path], str]:
    """profile.png of profile.csv, and a reason where there is none."""
    reason, rows = plots.ready(), report.read_rows(folder / f"{report.PROFILE}.csv")
    if reason or not rows:
        return [], reason or "no plot: profile.csv has no rows"
    import matplotlib.pyplot as plt

    path = folder / f"{report.PROFILE}.png"
    with plt.rc_context(plots.STYLE), atomic_write.replacing(path) as scratch:
        stacked(rows, scratch)
    return [path], ""
