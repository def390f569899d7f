"""Every stem's C++ kernels beside the reference in float64, by a plain loop: collecting the test suite takes too long under
emulation. tests/on_arm.sh runs it; PYTHONPATH=.:tests:tests/ops python tests/on_arm.py does so on this machine."""

import platform
import sys

import subjects
import torch

from fastkd import backends

LIMITS = {
    torch.float32: (2e-6, 1e-5),
    torch.bfloat16: (1e-2, 2e-2),
    torch.float16: (1e-2, 2e-2),
}  # of loss and gradient
SIZES = ((5, 7), (3, 33), (4, 257), (2, 1025))
UNSTABLE = {("gram-sequence", torch.float32, 7)}  # a correlation of five numbers: eager float32 is as far from float64


def main() -> int:
    assert backends.UNAVAILABLE["cpu"] is None, backends.UNAVAILABLE["cpu"]
    wrong, count = 0, 0
    for subject in subjects.SUBJECTS:
        for dtype, limits in LIMITS.items():
            for rows, width in SIZES:
                if (str(subject), dtype, width) in UNSTABLE:
                    continue
                student, teacher = subjects.inputs(subject, "cpu", width, dtype, rows, width)
                found = subjects.errors(subject, "cpu", student, teacher)
                count += 1
                if not all(error <= limit for error, limit in zip(found, limits, strict=True)):
                    wrong += 1
                    print(f"{subject} {dtype} [{rows}, {width}]: errors {found}, limits {limits}", flush=True)
    print(f"{platform.machine()}, torch {torch.__version__}: {count} cases, {wrong} beyond their limits")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
