"""Rows as the bench would write them, without measuring anything."""

from fastkd.bench import report, results_io

FIELDS = {
    "stem": "divergence", "case": "toy-3x5-float32", "kind": "toy", "shape": "3x5", "dtype": "float32", "mode": "both",
    "launch": "plain", "cache": "as the previous provider left it", "served_by": "", "by_eager": False, "rounds": 9,
    "calls_per_sample": 1, "median_ms": 1.0, "minimum_ms": 1.0, "p20_ms": 1.0, "p80_ms": 1.0, "median_low_ms": 1.0,
    "median_high_ms": 1.0, "times_ours_minimum": 1.0, "floor_ms": 0.5, "floor_bound": "copy", "floor_share": 0.5,
    "gemms_ms": None, "flops": 1e6, "bytes": 1e6, "copy_gb_s": 10.0, "gemm_gflop_s": 100.0, "launches": None,
    "memory_method": "fake", "loss_error": 1e-8, "gradient_error": 1e-8, "eager_loss_error": 1e-8,
    "eager_gradient_error": 1e-8, "match": True, "sweep": "", "goal": "", "label": "", "foreign_cores": 0.0, "device": "box",
    "threads": 2, "cpu_capability": "x", "driver": "", "torch": "2", "cuda": "", "triton": "", "python": "3",
    "commit": "abc", "dirty": False, "date": "2026-01-01T00:00:00Z",
}  # fmt: skip


def rows_of(eager=10.0, spread=0.01, memory=20.0, rival="eager", case="toy-3x5-float32", **changes):
    """fastkd and one rival that is `eager` times slower, ± spread."""
    low, high = eager * (1 - spread), eager * (1 + spread)
    ours = {"provider": "fastkd", "times_ours_median": 1.0, "times_ours_low": 1.0, "times_ours_high": 1.0}
    other = {"provider": rival, "times_ours_median": eager, "times_ours_low": low, "times_ours_high": high}
    fields = {**FIELDS, "case": case, "peak_extra_mib": memory, **changes}
    return [report.Row(**{**fields, **ours}), report.Row(**{**fields, **other})]


def written(folder, *rows, absent=()):
    report.write_csv([row for pair in rows for row in pair], folder)
    return results_io.write(folder, "divergence", dict(absent))
