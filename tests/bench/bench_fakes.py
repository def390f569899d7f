"""A bench without a clock: set times, a case whose answer is obvious, bench_case over them, and rows as they are published."""

import torch
from fastkd.bench import measure, report, roofline, run
from fastkd.bench.baselines import Provider
from fastkd.bench.cases.case import Case, Work

CPU = torch.device("cpu")
FACTS = {
    "device": "box", "threads": 2, "cpu_capability": "x", "driver": "", "torch": "2", "cuda": "", "triton": "",
    "python": "3", "commit": "abc", "dirty": False, "date": "2026-01-01T00:00:00Z",
}  # fmt: skip


class FakeTimer:
    """Each provider takes a set time; the order of samples is kept."""

    def __init__(self, seconds):
        self.seconds, self.order = seconds, []

    def sample(self, task, number):
        self.order.append(task.provider)
        return self.seconds[task.provider]


def toy_case(**changes) -> Case:
    """sum(x²): its reference, gradient and floors are obvious."""
    fields = {
        "stem": "divergence", "kind": "forward_kl", "shape": {"N": 3, "V": 5}, "dtype": torch.float32,
        "make": lambda case, generator: {"x": torch.randn(3, 5, generator=generator)},
        "ours": lambda x, backend: x["x"].square().sum(), "leaves": ("x",),
        "flops": Work(1e6, 2e6, 3e6), "bytes": Work(120.0, 60.0, 180.0),
    }  # fmt: skip
    return Case(**{**fields, **changes})


def square(x):
    return x["x"].square().sum()


def provider(name, call=square):
    return Provider(name, call, served_by="cpu" if name.startswith("fastkd") else "")


def fake_measure(monkeypatch):
    """bench_case without timing: every sample takes a microsecond, eager's three. A fixture (conftest.py)."""
    timer = FakeTimer({"fastkd": 1e-6, "eager": 3e-6, "other": 2e-6, "roofline": 1e-3, "gemm": 1e-3})
    monkeypatch.setattr(measure, "make_timer", lambda *_, **__: timer)
    monkeypatch.setattr(measure, "peak_memory", lambda task, device: (2**20, "fake"))
    return timer


def outcome_of(providers, timer, *argv, **changes):
    asked = run.parsed(["--device", "cpu", "--rounds", "6", *argv])
    return run.bench_case(toy_case(**changes), asked, roofline.Roofline(CPU, timer), FACTS, providers)


ZERO = {name: kind() for name, kind in report.TYPES.items()}
FIELDS = {
    **ZERO, **FACTS, "stem": "divergence", "kind": "forward_kl", "shape": "3x5", "dtype": "float32", "mode": "both",
    "launch": "plain", "cache": "as the previous provider left it", "median_ms": 1.0, "floor_ms": 0.5, "floor_bound": "copy",
    "floor_share": 0.5, "flops": 1e6, "bytes": 1e6, "copy_gb_s": 10.0, "gemm_gflop_s": 100.0, "loss_error": 1e-8,
    "gradient_error": 1e-8, "match": True,
}  # fmt: skip
CASE = "forward_kl-3x5-float32"


def rows_of(eager=10.0, spread=0.01, memory=20.0, other="eager", case=CASE, **changes):
    """fastkd and one other that is `eager` times slower, ± spread."""
    fields = {**FIELDS, "case": case, "peak_extra_mib": memory, **changes}
    sides = ("fastkd", 1.0, 0.0), (other, eager, spread)
    return [{**fields, "provider": name, "times_ours_median": ratio, "times_ours_low": ratio * (1 - by),
             "times_ours_high": ratio * (1 + by)} for name, ratio, by in sides]  # fmt: skip


def absent(name, reason, case=CASE):
    empty = {name: "" if kind is str else None for name, kind in report.TYPES.items()}
    return {**empty, "stem": "divergence", "case": case, "provider": name, "absent": reason}


def written(folder, *pairs):
    report.write([row for pair in pairs for row in pair], folder)
    return folder / "divergence.csv"
