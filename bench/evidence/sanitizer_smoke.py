"""Every stem in every implementation that runs here, tiny and checked: for compute-sanitizer, under which a step takes a
thousand times as long. `compute-sanitizer --tool memcheck python -m fastkd.bench.evidence.sanitizer_smoke`
"""

import sys
from collections.abc import Iterator

import torch
from fastkd.bench import baselines, check
from fastkd.bench.baselines import Absent
from fastkd.bench.cases import STEMS
from fastkd.bench.cases.case import BF16, FP32, Case, build

SIZES = {"N": 7, "V": 131, "K": 20, "B": 3, "Ds": 24, "Dt": 40, "H": 2, "L": 19, "d": 16, "R": 2, "S": 9, "D": 24, "n": 50,
         "P": 5, "M": 6}  # primes and one more than a block: tails are where overruns happen  # fmt: skip
SIZES_OF = {"layer_cost": {"N": 2, "M": 3}, "transport": {"N": 4}, "linear_divergence": {"R": 37}, "gram": {"N": 19}}
LIMITS = {FP32: 1e-4, torch.float64: 1e-9, BF16: 5e-2}


def small_cases() -> Iterator[Case]:
    """One of each kind of each stem, in float32 and bfloat16."""
    for stem, module in STEMS.items():
        for kind, axes in module.AXES.items():
            sizes = [SIZES_OF.get(stem, {}).get(axis, SIZES[axis]) for axis in axes]
            found = [module.case(kind, *sizes, dtype=dtype) for dtype in (FP32, BF16)]
            yield from {case.name: case for case in found}.values()  # some have one dtype, whatever is asked for


def implementations(case: Case, inputs) -> list:
    """fastkd as it dispatches, and every other kernel that can run."""
    return [p for p in baselines.ours(case, inputs) if not isinstance(p, Absent)]


def main(device: str) -> int:
    wrong = count = 0
    for case in small_cases():
        inputs = build(case, torch.device(device))
        oracle = check.make_oracle(case, inputs)
        for provider in implementations(case, inputs):
            problem = check.verdict(check.errors_of(provider.call, inputs, oracle), (LIMITS[case.dtype],) * 2)
            kernel = "" if provider.served_by in ("reference", "eager") else "kernel"
            print(f"{case.stem} {case.name} {provider.served_by} {kernel}", problem or "ok", flush=True)
            wrong += bool(problem)
            count += bool(kernel)
    print(f"{count} kernel runs, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main("cuda" if torch.cuda.is_available() else "cpu"))
