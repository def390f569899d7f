"""The bench's cases under pytest-benchmark, as ratios: `pytest tests/bench/bench_cases.py -m bench --benchmark-save=main`,
later `… --benchmark-compare --benchmark-compare-fail=median:15%`.

Not collected by default (its name, and the marker). A "second" here is not a second: the clock moves by ours over the
baseline's time, both from the same interleaved round. Times belong to one machine in one moment; their ratio travels.
"""

import pytest
import torch
from fastkd.bench import baselines, cases, check, measure
from fastkd.bench.baselines import Provider
from fastkd.bench.cases.case import build
from fastkd.bench.compare import ANCHORS
from fastkd.bench.measure import ratio_interval

pytestmark = pytest.mark.bench
pytest.importorskip("pytest_benchmark")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
POINTS = [(case, mode) for case in cases.select(quick=True) for mode in case.modes]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Overrides the tests' NaN-filled memory, which would be timed."""


class RatioClock:
    """What pytest-benchmark reads: it moves when it is told to, by a ratio."""

    __name__ = "ours_over_baseline"

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, ratio: float) -> None:
        self.now += ratio


CLOCK = RatioClock()


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize(("case", "mode"), POINTS, ids=lambda x: x if isinstance(x, str) else f"{x.stem}-{x.name}")
def test_case(case, mode, benchmark):
    """Ours as auto dispatches it, checked first, then interleaved with the first anchor there is."""
    inputs = build(case, DEVICE)
    ours = baselines.ours(case, inputs)[0]
    there = {p.name: p for p in baselines.others(case, DEVICE) if isinstance(p, Provider)}
    baseline = next((there[name] for name in ANCHORS if name in there), None)
    if baseline is None:
        pytest.skip(f"{case.stem} has no baseline here, so there is no ratio")
    oracle = check.make_oracle(case, inputs)
    errors, baseline_errors = (check.errors_of(p.call, inputs, oracle) for p in (ours, baseline))
    allowed = check.limits(case.dtype, baseline_errors if baseline.name == "eager" else None)
    assert check.verdict(errors, allowed) == ""
    timer = measure.make_timer(DEVICE, cold=False)
    tasks = [measure.make_task(p.name, mode, lambda p=p: p.call(inputs), inputs.leaves) for p in (ours, baseline)]
    timings = measure.interleave(tasks, timer, rounds=25, budget=3.0)
    own, other = timings[ours.name], timings[baseline.name]
    benchmark.group = f"{case.stem} {case.name} {mode}: time over {baseline.name}'s"
    benchmark.extra_info |= {
        "baseline": baseline.name, "served_by": ours.served_by, "ours_ms": own.median, "baseline_ms": other.median,
        "loss_error": errors.loss, "gradient_error": errors.gradient,
        "ratio_95": ratio_interval(own.samples, other.samples),
    }  # fmt: skip
    ratios = iter([a / b for a, b in zip(own.samples, other.samples, strict=True)])
    benchmark.pedantic(lambda: CLOCK.advance(next(ratios)), rounds=len(own.samples))
