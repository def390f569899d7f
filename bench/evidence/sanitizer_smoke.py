"""Every stem in every implementation that runs here, tiny and checked: for compute-sanitizer, under which a step takes a
thousand times as long. `compute-sanitizer --tool memcheck python -m fastkd.bench.evidence.sanitizer_smoke`
"""

import argparse
import sys
from collections.abc import Iterator, Sequence

import torch
from fastkd.bench import baselines, check
from fastkd.bench.baselines import Absent
from fastkd.bench.cases import case as case_module
from fastkd.bench.cases import shapes
from fastkd.bench.cases.case import Case

SIZES = {"N": 7, "V": 131, "K": 20, "B": 3, "Ds": 24, "Dt": 40, "H": 2, "L": 19, "d": 16, "R": 2, "S": 9, "D": 24, "n": 50,
         "P": 5, "M": 6}  # primes and one more than a block: tails are where overruns happen  # fmt: skip
SIZES_OF = {"layer_cost": {"N": 2, "M": 3}, "transport": {"N": 4}, "linear_divergence": {"R": 37}, "gram": {"N": 19}}
LIMITS = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 5e-2}


def small_cases() -> Iterator[Case]:
    """One of each kind of each stem, in float32 and bfloat16."""
    for stem, kinds in shapes.KINDS.items():
        for kind in kinds:
            for dtype in (torch.float32, torch.bfloat16):
                axes = (shapes.BUILDERS.get((stem, kind)) or shapes.BUILDERS[stem, None])[0]
                sizes = {axis: SIZES_OF.get(stem, {}).get(axis, SIZES[axis]) for axis in axes}
                case = shapes.case_from(stem, {**sizes, "kind": kind}, "small", dtype)
                if case.dtype == dtype or dtype == torch.float32:  # transport is float64, whatever is asked for
                    yield case


def implementations(case: Case, inputs) -> list:
    """fastkd as it dispatches, and every other kernel that can run."""
    return [p for p in baselines.ours(case, inputs) if not isinstance(p, Absent)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("fastkd.bench.evidence.sanitizer_smoke", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    device, wrong, count = torch.device(arguments.device), 0, 0
    for case in small_cases():
        inputs = case_module.build(case, device)
        oracle = check.make_oracle(case, inputs)
        for provider in implementations(case, inputs):
            errors = check.errors_of(provider.call, inputs, oracle)
            limit = LIMITS[case.dtype]
            problem = check.verdict(errors, (limit, limit))
            kernel = "" if provider.served_by in ("reference", "eager") else "kernel"
            print(f"{case.stem} {case.name} {provider.served_by} {kernel}", problem or "ok", flush=True)
            wrong += bool(problem)
            count += bool(kernel)
    print(f"{count} kernel runs, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
