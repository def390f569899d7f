"""Rows of few tokens or classes, which the C++ kernel computes side by side, one per lane: against float64, row by row."""

import os
import subprocess
import sys

import pytest
import torch

from cases import gradients, randn
from fastkd import backends
from fastkd.checks import KINDS
from fastkd.functional import divergence

pytestmark = pytest.mark.skipif(backends.UNAVAILABLE["cpu"] is not None, reason="the C++ kernels are not built")
ROWS = 37  # no multiple of any number of lanes
# How the student comes to differ from its teacher, one after another.
STUDENTS = [
    lambda t, noise: noise,
    lambda t, noise: t + 1e-4 * noise,
    lambda t, noise: t + 37.25 + 1e-5 * noise,
    lambda t, noise: 1e4 - t,
    lambda t, noise: t.clone(),
    lambda t, noise: torch.full_like(t, -torch.inf),
]


def logits(columns, dtype):
    teacher, noise = (3 * randn(ROWS, columns, seed=seed, dtype=torch.float32) for seed in (1, 2))
    student = torch.stack([STUDENTS[i % len(STUDENTS)](teacher[i], noise[i]) for i in range(ROWS)])
    teacher[student == -torch.inf] = -torch.inf  # a row without any token
    return student.to(dtype), teacher.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [1, 2, 3, 9, 16, 17, 24, 25])
@pytest.mark.parametrize("kind", KINDS)
def test_against_float64(kind, columns, dtype):
    student, teacher = logits(columns, dtype)
    mask = torch.arange(ROWS) % 5 != 3
    options = {"kind": kind, "temperature": 1.5, "mask": mask, "reduction": "none"}

    def rows(backend, student, teacher):
        return gradients(lambda x: divergence(x, teacher, backend=backend, **options), student)

    loss, (gradient,) = rows("cpu", student, teacher)
    true_loss, (true_gradient,) = rows("reference", student.double(), teacher.double())
    assert (loss[~mask] == 0).all() and (gradient[~mask] == 0).all()
    of_value, of_gradient = 2e-6, {torch.float32: 4e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype] * 1.01
    torch.testing.assert_close(loss.double(), true_loss, rtol=of_value, atol=1e-12)
    largest = true_gradient.abs().amax(-1, keepdim=True)
    smallest = torch.finfo(dtype).tiny if dtype == torch.float16 else 1e-12
    assert ((gradient.double() - true_gradient).abs() <= of_gradient * largest + smallest).all()


@pytest.mark.skipif("FASTKD_MAX_ISA" in os.environ, reason="this is the run on a lower instruction set")
@pytest.mark.parametrize("ceiling", ["plain", "avx2"])
def test_lower_instruction_sets(ceiling):
    environment = os.environ | {"FASTKD_MAX_ISA": ceiling, "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
