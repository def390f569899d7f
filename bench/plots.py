"""Pictures of the committed CSV, stem by stem: how much faster per case, and how time and memory grow with size.

Every picture carries the digest of the rows it shows (PNG text `fastkd-rows`), so that a test can tell an old one.
"""

import hashlib
import pathlib
from collections.abc import Iterable, Sequence

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
DIGEST, MARKS = "fastkd-rows", "fastkd-marks"


def colour(provider: str) -> str:
    return COLOURS.get(provider.split(":")[0], OTHER)


def value(row: dict, name: str) -> float | None:
    return float(row[name]) if row.get(name) else None


def headline(rows: Sequence[dict]) -> list[dict]:
    """One mode per case: both where there is a backward, else forward; plain launches only."""
    plain = [row for row in rows if row["launch"] == "plain"]
    with_both = {row["case"] for row in plain if row["mode"] == "both"}
    return [row for row in plain if row["mode"] == ("both" if row["case"] in with_both else "forward")]


DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}


def label_of(case: str) -> str:
    """forward_kl-512x30522-float32 as it is read aloud."""
    kind, shape, dtype = case.rsplit("-", 2)
    return f"{kind} {shape.replace('x', '×')} {DTYPES.get(dtype, dtype)}"


def digest(*parts: object) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]


def digest_of(rows: Iterable[dict]) -> str:
    return digest(*(sorted(row.items()) for row in rows))


def title(figure, text: str, rows: Sequence[dict]) -> None:
    """What it is, large at the left; where the numbers come from, small at the right."""
    figure.suptitle(text, x=0.01, ha="left", fontsize=11.5, fontweight="bold")
    figure.text(0.992, 0.992, source(rows), ha="right", va="top", fontsize=7, color="#8b949e")


def is_of(picture: bytes, rows: Sequence[dict], marks: Iterable = ()) -> bool:
    """Whether a picture shows these rows and marks; one from before the marks were noted has none to compare."""
    return digest_of(rows).encode() in picture and (MARKS.encode() not in picture or digest(*marks).encode() in picture)


def save(figure, path: pathlib.Path, rows: Sequence[dict], marks: Iterable = ()) -> None:
    """The date of drawing stays out of the file: the same rows give the same picture."""
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=140, metadata={DIGEST: digest_of(rows), MARKS: digest(*marks), "Software": None})
    plt.close(figure)


def source(rows: Sequence[dict]) -> str:
    """Which machine, which torch, when."""
    dates = sorted({row["date"][:10] for row in rows})
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return f"{rows[0]['device']} · torch {rows[0]['torch']} · {when}"


def decimal_ticks(axis, tight: bool = False) -> None:
    """1, 10, 100 on a logarithmic axis, with 2 and 5 between where there is room; no powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(base=10, subs=(1.0,) if tight else (1.0, 2.0, 5.0), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}" if x >= 1 else f"{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def modes_of(rows: Sequence[dict]) -> str:
    names = {"both": "forward + backward", "forward": "forward"}
    return " / ".join(dict.fromkeys(names.get(row["mode"], row["mode"]) for row in rows))


def times(ratio: float) -> str:
    return f"{ratio:.2g}×" if ratio < 10 else f"{ratio:.0f}×"


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
    providers = list(dict.fromkeys(row["provider"] for row in chosen))
    by_eager = {row["case"] for row in rows if row["provider"] == "fastkd" and row["by_eager"] == "True"}
    height = 1.3 + 0.2 * len(chosen) + 0.16 * len(cases)
    figure, axes = plt.subplots(figsize=(9, height), layout="constrained")
    axes.set_xscale("log")
    position, ticks = 0.0, []
    for case in cases:
        group = [row for row in chosen if row["case"] == case]
        for i, row in enumerate(group):
            ratio_bar(axes, position + i, row)
        ticks.append((position + (len(group) - 1) / 2, label_of(case) + (" †" if case in by_eager else "")))
        position += len(group) + 0.8
    axes.axvline(1.0, color=COLOURS["fastkd"], linewidth=2.5)
    ratios = [value(row, "times_ours_median") for row in chosen]
    axes.set_xlim(0.55 * min(1.0, *ratios) if min(ratios) < 1 else 0.92, 1.9 * max(1.5, *ratios))
    decimal_ticks(axes.xaxis)
    axes.set_yticks([at for at, _ in ticks], [text for _, text in ticks], color=INK)
    axes.set_ylim(position - 0.9, -0.9)
    note = "time over fastkd's, the green line (whisker: 95 % interval)"
    axes.set_xlabel(note + ("\n† fastkd is served by plain PyTorch here" if by_eager & set(cases) else ""))
    title(figure, f"{stem}, {modes_of(chosen)}", rows)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour(provider)) for provider in providers]
    axes.legend(handles, providers, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(providers), borderaxespad=0.2)
    axes.grid(False, axis="y")
    axes.tick_params(length=0, which="both")
    save(figure, path, rows)
    return True


def ratio_bar(axes, position: float, row: dict) -> None:
    ratio = value(row, "times_ours_median")
    low, high = (value(row, name) or ratio for name in ("times_ours_low", "times_ours_high"))
    axes.barh(position, ratio - 1, left=1, height=0.84, color=colour(row["provider"]))
    axes.plot([low, high], [position, position], color=INK, linewidth=1.1, solid_capstyle="butt")
    beyond, side = (max(high, 1.0) * 1.04, "left") if ratio >= 1 else (min(low, 1.0) / 1.04, "right")
    axes.text(beyond, position, times(ratio), va="center", ha=side, fontsize=8)


# Curves -----------------------------------------------------------------------------------------------------------


def sweep_groups(rows: Sequence[dict]) -> dict[tuple, list[dict]]:
    """(axis, kind, dtype) -> its points, where there are at least two sizes."""
    groups: dict[tuple, list[dict]] = {}
    for row in headline(rows):
        if row["sweep"]:
            groups.setdefault((row["sweep"].split("=")[0], row["kind"], row["dtype"]), []).append(row)
    return {key: points for key, points in groups.items() if len({row["sweep"] for row in points}) > 1}


def sweep(rows: Sequence[dict], stem: str, path: pathlib.Path, out_of_memory=()) -> bool:
    """Log-log time and memory against each swept size, the floor dashed. `out_of_memory`: (case, provider) that ran out,
    marked at the top. False where no sweep has two points."""
    import matplotlib.pyplot as plt

    groups = sweep_groups(rows)
    if not groups:
        return False
    size = (10.5, 0.8 + 3.5 * len(groups))
    figure, grid = plt.subplots(len(groups), 2, figsize=size, layout="constrained", squeeze=False)
    for panels, ((axis, kind, dtype), points) in zip(grid, groups.items(), strict=True):
        lost = {name for case, name in out_of_memory if any(case == row["case"] for row in points)}
        curves(panels, axis, points, lost)
        first = min(points, key=size_of)["case"].rsplit("-", 2)[1].replace("x", "×")
        panels[0].set_title(f"{kind} {DTYPES.get(dtype, dtype)} (first point {first}): {modes_of(points)}, ms")
        panels[1].set_title("peak extra memory, MiB")
    title(figure, f"{stem}: how it grows", rows)
    save(figure, path, rows, out_of_memory)
    return True


def size_of(row: dict) -> int:
    return int(row["sweep"].split("=")[1])


def curves(panels, axis: str, points: Sequence[dict], lost: set[str]) -> None:
    time_axes, memory_axes = panels
    sizes = sorted({size_of(row) for row in points})
    for provider in sorted(dict.fromkeys(row["provider"] for row in points), key=lambda p: p.startswith("fastkd")):
        mine = sorted((row for row in points if row["provider"] == provider), key=size_of)
        ours, xs = provider.startswith("fastkd"), [size_of(row) for row in mine]
        style = {"color": colour(provider), "marker": "o", "markersize": 5 if ours else 3.5, "zorder": 3 if ours else 2}
        style |= {"linewidth": 2.6 if ours else 1.5, "label": provider}
        time_axes.plot(xs, [value(row, "median_ms") for row in mine], **style)
        low, high = ([value(row, name) for row in mine] for name in ("p20_ms", "p80_ms"))
        time_axes.fill_between(xs, low, high, color=colour(provider), alpha=0.15, linewidth=0)
        held = [(x, value(row, "peak_extra_mib")) for x, row in zip(xs, mine, strict=True)]
        held = [(x, mib) for x, mib in held if mib]
        memory_axes.plot([x for x, _ in held], [mib for _, mib in held], **style)
        if provider in lost and xs[-1] < sizes[-1]:
            for axes, at in ((time_axes, value(mine[-1], "median_ms")), (memory_axes, held[-1][1] if held else None)):
                if at:
                    axes.annotate("out of memory", (xs[-1], at), (4, 6), textcoords="offset points", fontsize=7.5,
                                  color=colour(provider))  # fmt: skip
                    axes.plot([xs[-1]], [at], "x", color=colour(provider), markersize=9, markeredgewidth=2)
    floors = {size_of(row): value(row, "floor_ms") for row in points}
    time_axes.plot(sizes, [floors[size] for size in sizes], "--", color=INK, linewidth=1.1, label="floor")
    for axes in panels:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sizes, [short(size) for size in sizes])
        axes.minorticks_off()
        bottom, top = axes.get_ylim()
        decimal_ticks(axes.yaxis, tight=top / bottom > 200)
        axes.set_xlabel(axis)
        axes.tick_params(length=0, which="both")
    handles, labels = time_axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: (labels[i] == "floor", not labels[i].startswith("fastkd")))
    time_axes.legend([handles[i] for i in order], [labels[i] for i in order], loc="upper left")


def short(size: int) -> str:
    """131072 as 128k, where it divides."""
    if size >= 1 << 20 and size % (1 << 20) == 0:
        return f"{size >> 20}M"
    return f"{size >> 10}k" if size >= 1024 and size % 1024 == 0 else f"{size}"


def ready() -> str:
    """Empty where matplotlib is there, else the sentence that says what to do."""
    try:
        import matplotlib
    except ImportError:
        return "no plots: matplotlib is not installed (pip install 'fastkd[bench]')"
    matplotlib.use("Agg")
    return ""


def draw(rows, stem: str, folder: pathlib.Path, out_of_memory=()) -> tuple[list[pathlib.Path], str]:
    """The plots of one stem, and a reason where there are none."""
    reason = ready()
    if reason or not rows:
        return [], reason or f"no plots: {stem} has no rows"
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    bars, lines = folder / f"{stem}_speedup.png", folder / f"{stem}_sweep.png"
    with plt.rc_context(STYLE):
        drawn = [(bars, speedups(rows, stem, bars)), (lines, sweep(rows, stem, lines, out_of_memory))]
    return [path for path, done in drawn if done], ""
