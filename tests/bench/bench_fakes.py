"""A bench without a clock: set times, a case whose answer is obvious, and bench_case over them."""

import torch
from fastkd.bench import measure, roofline, run
from fastkd.bench.baselines import Provider
from fastkd.bench.cases.case import Case, Work

CPU = torch.device("cpu")


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
        "stem": "divergence", "kind": "toy", "shape": {"N": 3, "V": 5}, "dtype": torch.float32,
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
    timer = FakeTimer({"fastkd": 1e-6, "eager": 3e-6, "other": 2e-6, "roof": 1e-3, "gemm": 1e-3})
    timer.launch = "plain"
    monkeypatch.setattr(measure, "make_timer", lambda *_, **__: timer)
    monkeypatch.setattr(measure, "peak_memory", lambda task, device: (2**20, "fake"))
    return timer


def facts():
    return {
        "device": "box", "threads": 2, "cpu_capability": "x", "driver": "", "torch": "2", "cuda": "", "triton": "",
        "python": "3", "commit": "abc", "dirty": False, "date": "2026-01-01T00:00:00Z",
    }  # fmt: skip


def outcome_of(providers, timer, **changes):
    settings = run.Settings(CPU, rounds=6)
    return run.bench_case(toy_case(**changes), settings, roofline.Roofs(CPU, timer), facts(), providers)
