"""The pictures of a report. One look for all: few colours, thin grid, numbers where the eye wants them."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .metrics import SHARES

INK, SOFT, GRID = "#1f2933", "#7b8794", "#e4e7eb"
COLOURS = ("#334e68", "#9fb3c8", "#e8743b", "#2f855a", "#805ad5")
STYLE = {
    "text.parse_math": False,  # a name may have a $
    "figure.facecolor": "white", "axes.facecolor": "white", "axes.edgecolor": GRID, "axes.labelcolor": SOFT,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.8,
    "axes.axisbelow": True, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlecolor": INK,
    "axes.titlelocation": "left", "xtick.color": SOFT, "ytick.color": SOFT, "text.color": INK, "font.size": 10,
    "legend.frameon": False, "figure.dpi": 160, "savefig.bbox": "tight", "savefig.pad_inches": 0.15,
}  # fmt: skip


def comparison(rows: list[dict], metric: str, where: str, path: Path) -> Path:
    """One panel per quantity, one bar per model, the number at its end."""
    panels = [
        (
            metric,
            f"{metric} on the {where} set",
            [row["metric"] for row in rows],
            "{:.1%}" if metric in SHARES else "{:.3f}",
        ),
        ("parameters", "parameters, millions", [row["parameters"] / 1e6 for row in rows], "{:.1f}"),
        ("latency", "milliseconds per example", [row["latency"] for row in rows], "{:.2f}"),
    ]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(11, 0.9 + 0.5 * len(rows)), sharey=True)
        for axis, (quantity, title, values, form) in zip(axes, panels, strict=True):
            places = range(len(rows))
            axis.barh(places, values, color=[COLOURS[i % len(COLOURS)] for i in places], height=0.62)
            for place, value in zip(places, values, strict=True):
                axis.text(value, place, " " + form.format(value), va="center", ha="left", fontweight="bold")
            axis.set(title=title, xlim=(0, max(values) * 1.22 or 1), yticks=list(places))
            axis.set_yticklabels([row["name"] for row in rows], color=INK)
            if axis is axes[0]:
                axis.invert_yaxis()
            if quantity in SHARES:
                axis.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))
            axis.grid(axis="y", visible=False)
            axis.tick_params(length=0)
        figure.tight_layout(w_pad=2.5)
        return _saved(figure, path)


def tradeoff(rows: list[dict], metric: str, path: Path) -> Path:
    """The metric against size, and against latency."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), sharey=True)
        sides = (("parameters", 1e6, "parameters, millions"), ("latency", 1, "milliseconds per example"))
        top, bottom = max(r["metric"] for r in rows), min(r["metric"] for r in rows)
        room = max(top - bottom, 0.01)
        for axis, (key, unit, label) in zip(axes, sides, strict=True):
            for i, row in enumerate(rows):
                point = row[key] / unit, row["metric"]
                look = {"color": COLOURS[i % len(COLOURS)], "edgecolor": "white", "linewidth": 1.5}
                axis.scatter(*point, s=150, zorder=3, **look, label=row["name"])
            most = max(row[key] for row in rows) / unit
            axis.set(xlabel=label, xlim=(0, most * 1.2), ylim=(bottom - 0.3 * room, top + 0.3 * room))
        # Names beside the points would lie on one another: two students of one size differ by a point of accuracy.
        figure.legend(
            *axes[0].get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.5, 0), ncols=len(rows)
        )
        axes[0].set_title(f"{metric} against size")
        axes[1].set_title(f"{metric} against latency")
        if metric in SHARES:
            axes[0].yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=1))
        figure.tight_layout(w_pad=2.5)
        return _saved(figure, path)


def terms(history: list[dict], path: Path) -> Path | None:
    """One small panel per term: as logged (light) and smoothed."""
    names = sorted({key[5:] for entry in history for key in entry if key.startswith("term/")})
    if not names:
        return None
    columns = min(len(names), 4)
    lines = -(-len(names) // columns)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(lines, columns, figsize=(11, 2.6 * lines), squeeze=False)
        for axis, name in zip(axes.flat, names, strict=False):
            points = [(entry["step"], entry[f"term/{name}"]) for entry in history if f"term/{name}" in entry]
            weight = next(entry[f"weight/{name}"] for entry in reversed(history) if f"weight/{name}" in entry)
            steps, values = zip(*points, strict=True)
            axis.plot(steps, values, color=COLOURS[1], linewidth=1)
            axis.plot(steps, _smoothed(values), color=COLOURS[2], linewidth=2)
            axis.set_title(f"{name}   × {weight:g}", fontsize=10)
            axis.set_xlabel("step")
            axis.set_ylim(bottom=min(0, *values) if max(values) < 3 * max(min(values), 1e-12) else None)
        for axis in list(axes.flat)[len(names) :]:
            axis.set_visible(False)
        figure.tight_layout()
        return _saved(figure, path)


def progress(histories: dict[str, list[dict]], metric: str, teacher: float | None, path: Path) -> Path | None:
    """The metric on the validation set during training, a line per model; `teacher` (where it did not train here) as a level."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(11, 3.4))
        drawn = 0
        for i, (name, history) in enumerate(histories.items(), start=0 if "teacher" in histories else 1):
            points = [(e["step"], e[f"eval_{metric}"]) for e in history if f"eval_{metric}" in e]
            if points:
                drawn = max(drawn, len(points))
                colour = COLOURS[i % len(COLOURS)]
                axis.plot(*zip(*points, strict=True), color=colour, linewidth=2, marker="o", markersize=5, label=name)
        if teacher is not None:
            axis.axhline(teacher, color=COLOURS[0], linewidth=1.5, linestyle=(0, (4, 3)), label="teacher")
        if drawn < 2:  # one evaluation is no curve
            plt.close(figure)
            return None
        axis.set(title=f"{metric} on the validation set while training", xlabel="step")
        if metric in SHARES:
            axis.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))
        axis.legend(loc="lower right", ncols=3)
        return _saved(figure, path)


def transport(maps: list[dict], path: Path) -> Path | None:
    """The flow between student and teacher layers at the start, in the middle and at the end, and the layers' weights."""
    if not maps:
        return None
    shown = [maps[0], maps[len(maps) // 2], maps[-1]]
    kinds = [kind for kind in ("attention", "hidden") if kind in shown[0]["flows"]]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(kinds), 4, figsize=(12, 2.7 * len(kinds)), squeeze=False, width_ratios=(1, 1, 1, 0.9)
        )
        for line, kind in zip(axes, kinds, strict=True):
            most = max(max(max(row) for row in entry["flows"][kind]) for entry in shown)
            for axis, entry in zip(line, shown, strict=False):
                _heat(axis, entry["flows"][kind], most)
                axis.set_title(f"{kind} · step {entry['step']}", fontsize=10)
            line[0].set_ylabel("student layer")
            steps = [entry["step"] for entry in maps]
            for layer in range(len(maps[0]["weights"][kind])):
                values = [entry["weights"][kind][layer] for entry in maps]
                line[3].plot(steps, values, color=COLOURS[(layer + 2) % 5], linewidth=2, label=f"layer {layer + 1}")
            line[3].set_title("weight of each student layer", fontsize=10)
            line[3].legend(fontsize=8)
        for axis in axes[-1, :3]:
            axis.set_xlabel("teacher layer")
        axes[-1, 3].set_xlabel("step")
        figure.tight_layout()
        return _saved(figure, path)


def _heat(axis, flow: list[list[float]], most: float) -> None:
    axis.imshow(flow, cmap="Oranges", vmin=0, vmax=most, aspect="auto")
    for i, row in enumerate(flow):
        for j, value in enumerate(row):
            if value > 5e-3:
                axis.text(
                    j,
                    i,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if value > most / 2 else INK,
                )
    axis.set(xticks=range(len(flow[0])), yticks=range(len(flow)))
    axis.set_xticklabels(range(1, len(flow[0]) + 1))
    axis.set_yticklabels(range(1, len(flow) + 1))
    axis.grid(visible=False)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _smoothed(values, keep: float = 0.7) -> list[float]:
    """An exponential mean, corrected for its start."""
    mean, mass, found = 0.0, 0.0, []
    for value in values:
        mean, mass = keep * mean + (1 - keep) * value, keep * mass + (1 - keep)
        found.append(mean / mass)
    return found


def _saved(figure, path: Path) -> Path:
    figure.savefig(path)
    plt.close(figure)
    return path
