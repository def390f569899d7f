"""The bench's cases under pytest-benchmark: `pytest tests/bench_cases.py -m bench --benchmark-json=now.json`.

Not collected by default (its name, and the marker). Times are of one machine in one moment: compare the ratio in
`extra_info`, which is measured interleaved in the same run, never the absolute times.
"""

import pytest
import torch
from fastkd.bench import case as case_module
from fastkd.bench import cases as _every_stem  # noqa: F401  importing it registers the cases
from fastkd.bench import check, measure, rivals
from fastkd.bench.rivals import Provider

pytestmark = pytest.mark.bench
pytest.importorskip("pytest_benchmark")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
POINTS = [(case, mode) for case in case_module.select(quick=True) for mode in case.modes]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Overrides the tests' NaN-filled memory, which would be timed."""


@pytest.mark.parametrize(("case", "mode"), POINTS, ids=lambda x: x if isinstance(x, str) else f"{x.stem}-{x.name}")
def test_case(case, mode, benchmark):
    """Ours as auto dispatches it, checked first, with the interleaved ratio to eager beside it."""
    inputs = case_module.build(case, DEVICE)
    ours = rivals.ours(case, inputs)[0]
    eager = next((p for p in rivals.rivals(case, DEVICE) if isinstance(p, Provider) and p.name == "eager"), None)
    oracle = check.make_oracle(case, inputs)
    errors = check.errors_of(ours.call, inputs, oracle)
    eager_errors = check.errors_of(eager.call, inputs, oracle) if eager else None
    assert check.verdict_on_ours(case, errors, eager_errors) == ""
    timer = measure.make_timer(DEVICE, cold=False)
    tasks = [measure.make_task(p.name, mode, lambda p=p: p.call(inputs), inputs.leaves) for p in (ours, eager) if p]
    timings = measure.interleave(tasks, timer, rounds=15, budget=3.0)
    benchmark.group = f"{case.stem} {case.name} {mode}"
    benchmark.extra_info |= {"served_by": ours.served_by, "loss_error": errors.loss, "gradient_error": errors.gradient}
    if eager:
        benchmark.extra_info["eager_over_ours"] = timings["eager"].median / timings["fastkd"].median
        benchmark.extra_info["eager_over_ours_minima"] = timings["eager"].minimum / timings["fastkd"].minimum
    synchronize = torch.cuda.synchronize if DEVICE.type == "cuda" else (lambda: None)
    task = tasks[0]

    def measured(state):
        task.run(state)
        synchronize()

    benchmark.pedantic(measured, setup=lambda: ((task.prepare(),), {}), rounds=15, warmup_rounds=1)
