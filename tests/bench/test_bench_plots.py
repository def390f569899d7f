"""The bench's pictures: which rows they show, what their words say, and that nothing of them is cut off."""

import dataclasses

import pytest
from bench_rows import rows_of, written
from fastkd.bench import axis_labels, curves, device_plots, plots, report, results_io, run
from fastkd.bench.cases import case as case_module

COLD = "cold (flushed)"


def texts(*pairs):
    """Rows as a CSV gives them."""
    return [{name: report.as_text(getattr(row, name)) for name in report.COLUMNS} for pair in pairs for row in pair]


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """What is drawn, as figures instead of files."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figures = {}
    monkeypatch.setattr(plots, "save", lambda figure, path, *_: figures.__setitem__(path.stem, figure))
    assert plots.ready() == ""
    yield figures
    for figure in figures.values():
        pyplot.close(figure)


def assert_nothing_is_cut_off(figure):
    """What is drawn, what the layout does not look at included, ends inside the picture."""
    figure.canvas.draw()
    figure.set_layout_engine("none")
    for artist in figure.findobj():
        artist.set_in_layout(True)
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, (box, width, height)


# Rows -------------------------------------------------------------------------------------------------------------


def test_a_case_shows_one_cache_state_and_one_mode():
    """A cold run beside a warm one doubles no bar, and its ratio does not stand over the other's interval."""
    rows = texts(
        rows_of(eager=10.0), rows_of(eager=3.0, cache=COLD), rows_of(eager=7.0, mode="forward"),
        rows_of(eager=2.0, case="cold-3x5-float32", cache=COLD), rows_of(eager=5.0, launch="graph"),
        rows_of(eager=4.0, case="there-3x5-float32", mode="forward"), rows_of(eager=6.0, stem="gram", cache=COLD),
    )  # fmt: skip
    found = [(row["stem"], row["case"], row["times_ours_median"]) for row in plots.headline(rows)]
    assert found[1::2] == [
        ("divergence", "toy-3x5-float32", "10"), ("divergence", "cold-3x5-float32", "2"),
        ("divergence", "there-3x5-float32", "4"), ("gram", "toy-3x5-float32", "6"),
    ]  # fmt: skip
    assert len(found) == 8


@pytest.mark.parametrize(
    ("ratio", "text"), [(0.962, "0.96×"), (1.018, "1.02×"), (2.04, "2.0×"), (9.04, "9.0×"), (17.5, "18×")]
)
def test_a_few_percent_are_seen(ratio, text):
    assert plots.times(ratio) == text


def test_the_overview_takes_every_kind_before_a_second_of_one():
    fcds = [rows_of(case=f"fcd-{i}x5-float32", kind="fcd", goal="x", stem="gram") for i in range(5)]
    more = [rows_of(case=f"{kind}-9x5-float32", kind=kind, goal="x", stem="gram") for kind in ("a", "b")]
    curve = rows_of(case="c-9x5-float32", kind="c", goal="x", stem="gram", sweep="N=9")
    found = device_plots.leading(texts(*fcds, *more, curve))
    assert found == [("gram", f"{name}-float32") for name in ("fcd-0x5", "fcd-1x5", "a-9x5", "b-9x5")]


def test_roofs_are_the_best_of_the_largest_copies_and_of_each_dtype():
    """Not the slowest copy of any size: 3 GB/s was a slow minute, 50 the cache."""
    copies = [(1e9, 20.0), (1e9, 3.0), (1e4, 50.0), (1e4, 40.0)]
    rows = [rows_of(case=f"a-{i}x5-float32", bytes=moved, copy_gb_s=rate, gemm_gflop_s=100.0 + i)
            for i, (moved, rate) in enumerate(copies)]  # fmt: skip
    assert device_plots.roofs_of(texts(*rows)) == ({"copy": 20.0, "copy in cache": 50.0}, {"float32": 103.0})
    assert device_plots.roofs_of(texts(*rows[:2]))[0] == {"copy": 20.0}


# Words ------------------------------------------------------------------------------------------------------------


def test_every_size_of_every_case_has_a_word():
    assert run.case_module is case_module  # run registers every case
    for case in (*case_module.select(gpu=True), *case_module.select(scale=True)):
        row = {"stem": case.stem, "kind": case.kind, "shape": case.shape_text}
        assert axis_labels.sizes_of(row) == dict(case.shape), case.name


def points_of(stem, kind, letter, *shapes):
    """A curve's rows from its shapes; `letter` is the axis."""
    made = []
    for shape in shapes:
        size = axis_labels.sizes_of({"stem": stem, "kind": kind, "shape": shape})[letter]
        made.append({"stem": stem, "kind": kind, "shape": shape, "sweep": f"{letter}={size}"})
    return made


@pytest.mark.parametrize(
    ("points", "axis", "fixed"),
    [
        (points_of("contrast", "info_nce", "K", "32x16384x256", "32x65536x256"), "negatives K", "32 examples, width 256"),
        (points_of("layer_cost", "hidden", "N", "6x6x8x128x256", "12x12x8x128x256"), "layers per side N",
         "8 examples, 128 tokens, width 256"),
        (points_of("transport", "exact", "P", "1x12x24", "16x12x24"), "problems P", "12 student layers, 24 teacher layers"),
        (points_of("relation", "self", "L", "1x12x128x64x1", "1x12x8192x64x1"), "tokens L",
         "1 example, 12 heads, head width 64, 1 relation"),
        (points_of("divergence", "forward_kl", "N", "16x30522", "64x30522"), "tokens N", "30,522 words"),
    ],
)  # fmt: skip
def test_axes_and_captions_are_words(points, axis, fixed):
    assert axis_labels.axis_label(points) == axis and axis_labels.fixed(points) == fixed


def test_a_stem_without_words_keeps_its_letter():
    points = [{"stem": "new", "kind": "x", "shape": f"{n}x5", "sweep": f"Q={n}"} for n in (1, 2)]
    assert axis_labels.axis_label(points) == "Q" and axis_labels.fixed(points) == ""


# Pictures ---------------------------------------------------------------------------------------------------------


def curve(*sizes, rival="eager", **changes):
    return [row for v in sizes for row in rows_of(case=f"forward_kl-4x{v}-float32", shape=f"4x{v}", sweep=f"V={v}",
                                                  kind="forward_kl", rival=rival, median_ms=float(v), **changes)]  # fmt: skip


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("out of memory at 11 GiB beyond its inputs", "out of memory at 11 GiB"),
        ("failed its check: a gradient is off by 1.3e-02, allowed 1.0e-02", "failed its check"),
        ("problem after problem, so many would take minutes", "would take minutes"),
        ("not asked for", "not measured"),
        (None, "not measured"),
    ],
)
def test_a_curve_says_why_it_ends(reason, said, drawn, tmp_path):
    rows = [row for row in curve(8, 64, 512) if row.provider == "fastkd" or row.sweep != "V=512"]
    absent = {"forward_kl-4x512-float32": {"eager": reason} if reason else {"liger": "not installed"}}
    written(tmp_path, rows, absent=absent)
    plots.draw(report.read_rows(tmp_path / "divergence.csv"), "divergence", tmp_path)
    figure = drawn["divergence_sweep"]
    time, memory, beside = figure.axes
    labels = [text.get_text() for text in beside.get_legend().get_texts()]
    assert sorted(labels) == sorted(["fastkd", f"eager\n✕ {said}", "floor"])
    for axes in (time, memory):
        (cross,) = [line for line in axes.lines if line.get_marker() == "x"]
        assert list(cross.get_xdata()) == [64] and cross.get_color() == plots.colour("eager")
    assert time.get_xlabel() == "words V"
    assert_nothing_is_cut_off(figure)


def test_a_curve_that_reaches_the_end_says_nothing():
    rows = texts(curve(8, 64))
    assert curves.ending(rows, "eager", {"forward_kl-4x8-float32": {"eager": "out of memory"}}) == ""


def test_bands_are_intervals_of_the_median_and_no_memory_is_said(drawn, tmp_path):
    changes = {"median_low_ms": 0.5, "median_high_ms": 2.0, "p20_ms": 0.9, "p80_ms": 1.1}
    rows = curve(8, 64, **changes) + curve(8, 64, rival="authors", **changes)[1::2]
    rows = [dataclasses.replace(row, peak_extra_mib=0.0) if row.sweep == "V=8" else row for row in rows]
    written(tmp_path, rows)
    plots.draw(report.read_rows(tmp_path / "divergence.csv"), "divergence", tmp_path)
    figure = drawn["divergence_sweep"]
    time, memory, _ = figure.axes
    heights = {height for band in time.collections for path in band.get_paths() for height in path.vertices[:, 1]}
    assert heights == {0.5, 2.0}
    assert "95 % interval" in figure.get_supxlabel()
    assert " 0: authors, eager, fastkd" in [text.get_text() for text in memory.texts]
    assert [list(line.get_xdata()) for line in memory.lines] == [[64]] * 3
    order = [line.get_color() for line in time.lines]  # ours over the others, in an order that no run changes
    assert order == [*(plots.colour(name) for name in ("authors", "eager", "fastkd")), plots.INK]


def test_whiskers_and_all_names_are_inside(drawn, tmp_path):
    """Intervals that reach below 1 and far above, and more rivals than a line of the legend holds."""
    rivals = [
        "eager",
        "compile",
        "liger",
        "authors",
        "trl-style",
        "autochunker",
        "cut-cross-entropy",
        "linear_cross_entropy",
    ]
    rows = [rows_of(eager=1.1 * 2**i, spread=0.6, rival=name)[1] for i, name in enumerate(rivals)]
    written(tmp_path, [rows_of()[0], *rows])
    plots.draw(report.read_rows(tmp_path / "divergence.csv"), "divergence", tmp_path)
    figure = drawn["divergence_speedup"]
    (axes,) = figure.axes
    low, high = axes.get_xlim()
    assert low < 0.4 * 1.1 and high > 1.6 * 1.1 * 2**7
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["fastkd", *sorted(rivals, key=plots.rank)]
    assert_nothing_is_cut_off(figure)


def test_pictures_of_a_device_are_whole(drawn, tmp_path):
    rows = texts(*(rows_of(case=f"{kind}-4x{v}-{dtype}", kind=kind, goal="x", stem=stem, dtype=dtype, flops=1e3 * v, bytes=1e5)
                   for stem, kind, v, dtype in (("gram", "fcd", 900, "float32"), ("gram", "fcd", 90000, "bfloat16"),
                                                ("divergence", "jsd", 90, "float32"))))  # fmt: skip
    device_plots.draw(rows, tmp_path)
    assert list(drawn) == ["overview", "roofline"]
    for figure in drawn.values():
        assert_nothing_is_cut_off(figure)
    said = [text.get_text() for text in drawn["roofline"].axes[0].texts]
    assert said.count("gram") == 2 and said.count("divergence") == 1 and "copy 10 GB/s" in said
    shapes = {line.get_marker() for line in drawn["roofline"].axes[0].lines}
    assert {"o", "s"} <= shapes


def test_a_sweep_carries_the_digest_of_its_reasons(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "divergence_sweep.png"
    absent = {"forward_kl-4x512-float32": {"liger": "not installed"}}
    written(tmp_path, curve(8, 64), absent=absent)
    plots.draw(report.read_rows(tmp_path / "divergence.csv"), "divergence", tmp_path)
    assert plots.digest_of_absent(results_io.absent_of(tmp_path / "divergence.json")).encode() in path.read_bytes()
    assert plots.digest_of_absent(absent) != plots.digest_of_absent({})
