"""A wrong call of a compiled op, or of a public function, is an exception: never a signal, never a read past the end."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from cases import ROOT
from fastkd import backends

pytestmark = pytest.mark.skipif(backends.UNAVAILABLE["cpu"] is not None, reason="the C++ kernels are not built")
OURS = "csrc/cpu/runtime/tensors.h"  # where Check is: its refusals say so


def run(script: str, *numbers: int) -> list[str]:
    """The outcome of each call, in a process of its own; where it dies, the call that it died of."""
    command = [sys.executable, ROOT / "tests" / script, *map(str, numbers)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = found.stdout.splitlines()
    assert found.returncode == 0, (found.returncode, lines[-1:], found.stderr[-3000:])
    return [line.rpartition(" -> ")[2] for line in lines]


def test_every_op_is_called():
    """A new op needs a line in the table of valid calls."""
    import raw_op_calls

    registered = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    assert {name.partition("::")[2] for name in registered if name.startswith("fastkd::")} == set(raw_op_calls.VALID)


def test_the_valid_calls_are_valid():
    import raw_op_calls

    for op, calls in raw_op_calls.VALID.items():
        for build in calls:
            assert raw_op_calls.outcome(op, raw_op_calls.flat(build())) == "valid", op


def test_some_wrong_calls_of_raw_ops():
    found = run("raw_op_calls.py", 1, 25, 0, 700)
    assert len(found) == 700
    assert found.count("RuntimeError of our own") > 200 and found.count("valid") > 100


@pytest.mark.long
@pytest.mark.parametrize("first", [0, 9000])
def test_wrong_calls_of_raw_ops(first):
    """Every mistake with every argument, and then two at a time."""
    assert len(run("raw_op_calls.py", 0, 1, first, first + 9000)) == 9000


def test_some_wrong_calls_of_public_functions():
    assert len(run("function_calls.py", 1, 12, 0, 500)) == 500


@pytest.mark.long
def test_wrong_calls_of_public_functions():
    assert len(run("function_calls.py", 0, 1, 0, 7000)) == 7000


X = torch.ones(2, 5, 3)
REFUSED = {
    "rank": (lambda ops: ops.probe(X), "probe: x: expected float32 [N, D] = [*, *] on the CPU, got float32 [2, 5, 3]"),
    "a size": (
        lambda ops: ops.unit_linear_fwd(X[0], X[1], torch.ones(0)),
        "unit_linear_fwd: bias: expected float32 [D] = [5] on the CPU, got float32 [0]",
    ),
    "dtype": (
        lambda ops: ops.layer_cost_fwd([X], [X, X.double()], None, None),
        "layer_cost_fwd: teachers[1]: expected float32 or bfloat16 or float16 [...] = [2, 5, 3] on the CPU, got float64 [2, 5, 3]",
    ),
    "length of a list": (
        lambda ops: ops.gram_fwd([X, X], [X], None, [0], False, True, 1e-6, False),
        "gram_fwd: teachers: expected a list of 2, got 1",
    ),
    "a number": (
        lambda ops: ops.divergence_fwd(X[0], X[0], None, 7, 1.0, 1.0),
        "divergence_fwd: kind: expected 0 to 6, got 7",
    ),
    "one of two": (
        lambda ops: ops.info_nce_fwd(X[0], X[0], X[0], None, torch.ones((), dtype=torch.float64), torch.arange(5), None, True),
        "info_nce_fwd: query_ids, bank_ids: expected both or neither, got one of them",
    ),
    "gaps": (
        lambda ops: ops.divergence_rescale_grad(X[0].t(), torch.ones(3), None, False, 1.0),
        "divergence_rescale_grad: grad: expected a contiguous tensor, got one with gaps",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", REFUSED)
def test_an_error_names_the_op_and_the_argument(mistake):
    call, words = REFUSED[mistake]
    with pytest.raises(RuntimeError) as error:
        call(torch.ops.fastkd)
    assert words in str(error.value) and OURS in str(error.value)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None or shutil.which("make") is None, reason="needs g++ and make")
@pytest.mark.skipif("FASTKD_LIBRARY" in os.environ, reason="this is the sanitized run")
def test_kernels_under_sanitizers():
    """`make asan` on the tests that call every kernel, in every dtype, on awkward sizes."""
    tests = "tests/ops/test_raw_op_arguments.py tests/ops/test_gemm.py tests/ops/contrast/test_bank.py tests/ops/gram/test_gram_kernels.py"
    here = os.path.relpath(sys.prefix, ROOT)  # make has no names with a space, which the path before may have
    installed = ["-o", f"{here}/installed", f"VENV={here}"]  # whatever is in this environment
    command = ["make", "asan", *installed, f"ASAN_TESTS={tests}"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, (found.stdout + found.stderr)[-5000:]
