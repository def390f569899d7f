"""`python tests/ops/coverage.py`: which dtypes, masks, gradients and second derivatives each function takes on each backend, found
by calling it. A backend that cannot run here is listed with its reason; TRITON_INTERPRET=1 runs Triton without a GPU."""

import inspect
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]  # cases.py, fastkd

import torch  # noqa: E402 - the path comes first
from test_autograd import CASES, inputs  # noqa: E402

from fastkd import backends, functional  # noqa: E402

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
COLUMNS = ("stem", "function", "backend", "dtypes", "mask", "gradient", "double backward")


def derivative(case, backend: str, dtype: torch.dtype, order: int) -> bool:
    """Whether the function, or its derivative of this order by the student, can be computed."""
    student, others = inputs(case, backend, dtype)
    leaf = student.requires_grad_(order > 0)
    try:
        out = case.call(leaf, others, backend)
        for _ in range(order):
            (out,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=order > 1)
    except (RuntimeError, ValueError):
        return False
    return bool(out.isfinite().all())


def rows():
    """One row per function, variant and backend that has an implementation of it."""
    for case in CASES:
        mask = "mask" in inspect.signature(getattr(functional, case.function)).parameters
        for backend in backends.BACKENDS[1:]:
            if backend != "reference" and backend not in set(case.only) & set(backends.WRITTEN[case.stem]):
                continue
            names = (case.stem, str(case), backend)
            if backends.UNAVAILABLE[backend] is not None:
                yield *names, backends.UNAVAILABLE[backend], "", "", ""
                continue
            dtypes = [str(x).removeprefix("torch.") for x in DTYPES if derivative(case, backend, x, 0)]
            orders = (derivative(case, backend, torch.float32, order) for order in (1, 2))
            yield *names, " ".join(dtypes), *("yes" if x else "no" for x in (mask, *orders))


def main() -> None:
    table = [COLUMNS, *rows()]
    for row in table:
        print("| " + " | ".join(row) + " |")
        if row is COLUMNS:
            print("|---" * len(COLUMNS) + "|")


if __name__ == "__main__":
    main()
