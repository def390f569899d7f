"""The stacked bars of profile.csv: where the milliseconds of a step go, the providers under each other."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from fastkd import atomic_write
from fastkd.bench import plots, report

from .results import ORDER, STEP, group, read

COLOURS = {
    "data": "#c9a66b", "teacher forward": "#9fb3c8", "student forward": "#627d98", "loss": "#e8743b",
    "loss backward": "#f2b38c", "student backward": "#334e68", "optimizer": "#bcccdc", "trainer": "#8d7f99",
}  # fmt: skip


def draw(folder: Path) -> str:
    """The picture of profile.csv: its name."""
    path, rows = folder / f"{report.PROFILE}.png", read(folder)
    with plt.rc_context(plots.STYLE), atomic_write.replacing(path) as scratch:
        figure = stacked(rows)
        plots.title(figure, "Where the time of a training step goes", rows.to_dict("records"))
        plots.save(figure, scratch)
    return path.name


def stacked(rows: pd.DataFrame):
    """A panel per model and size of its batches, a bar per setup and provider."""
    rows = rows.assign(median=rows["median_ms"].astype(float), part=rows["phase"].map(group))
    rows = rows.assign(setup=rows.apply(setup_of, axis=1), panel=rows.apply(panel_of, axis=1))
    panels = rows.groupby("panel", sort=False)
    heights = [len(x.drop_duplicates(["setup", "provider"])) + 0.9 * x["setup"].nunique() + 2 for _, x in panels]
    options = {"figsize": (10, 1.1 + 0.27 * sum(heights)), "height_ratios": heights, "layout": "constrained"}
    figure, grid = plt.subplots(len(panels), 1, squeeze=False, **options)
    for axes, (heading, there) in zip(grid[:, 0], panels, strict=True):
        bars(axes, there)
        axes.set_title(heading)
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in ORDER]
    options = {"ncols": len(ORDER), "fontsize": 8, "handlelength": 1.2, "columnspacing": 1.2}
    figure.legend(handles, ORDER, loc="outside lower center", **options)
    return figure


def panel_of(row: pd.Series) -> str:
    model = row.model if len(row.model) < 48 else row.model[:45] + "…"
    return f"{model}, {row.batch}×{row.length} tokens, {row['dtype']}: milliseconds"


def setup_of(row: pd.Series) -> str:
    """What distinguishes a panel's setups: the method and, unless it is classification, the task."""
    task = "" if row.task == "classification" else f" · {row.task}"
    return row.method + task + (" · compiled" if row.compiled == "True" else "")


def bars(axes, rows: pd.DataFrame) -> None:
    """Medians do not add up exactly; a bar is as long as the median step, cut in the parts' proportions. At its end the
    whole, and what it is of the first provider's."""
    table = rows.pivot_table("median", ["setup", "provider"], "part", "sum", sort=False, fill_value=0.0)
    parts = table.reindex(columns=ORDER, fill_value=0.0)
    parts = parts.mul(table[STEP] / parts.sum(axis=1), axis=0)
    setups, providers = (table.index.get_level_values(name) for name in ("setup", "provider"))
    y = [i + 0.9 * gap for i, gap in enumerate(pd.factorize(setups)[0])]
    for name, left in zip(ORDER, (parts.cumsum(axis=1) - parts).to_numpy().T, strict=True):
        axes.barh(y, parts[name], left=left, height=0.84, color=COLOURS[name], edgecolor="white", linewidth=0.5)
    whole, labels = rows[rows["phase"] == STEP].set_index(["setup", "provider"]).loc[table.index], []
    for at, row, setup, provider, again in zip(
        y, whole.itertuples(), setups, providers, setups.duplicated(), strict=True
    ):
        labels.append(provider if again else f"{setup} · {provider}")
        beside = f" ({float(row.times_ours):.2f}×)" if again else ""
        text = f"  {report.number(row.median)} ms{beside}, loss {float(row.loss_share):.1%}"
        axes.text(row.median, at, text, va="center", fontsize=8)
    axes.set_yticks(y, labels, color=plots.INK)
    axes.set(ylim=(max(y) + 0.7, -0.7), xlim=(0, 1.32 * table[STEP].max()))
    axes.grid(False, axis="y")
    axes.tick_params(length=0)
