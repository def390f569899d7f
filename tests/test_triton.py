"""Triton kernels without a GPU: their arithmetic in the interpreter, their machine code for chips that are not here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastkd import backends

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent
not_interpreted = pytest.mark.skipif(backends.INTERPRETED, reason="the interpreter does not compile")


def interpreted(*arguments):
    """pytest in a process of its own: TRITON_INTERPRET must be set before triton is imported."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout


@not_interpreted
def test_kernels_in_the_interpreter():
    interpreted("tests/test_kernels.py", "-k", "triton and (forward_kl or jsd) and not awkward and not convergence")


@not_interpreted
def test_layer_cost_in_the_interpreter():
    interpreted("tests/test_layer_cost.py", "-k", "triton")


@not_interpreted
@pytest.mark.long
def test_every_kernel_test_in_the_interpreter():
    files = ("kernels", "sabotage", "divergence", "layer_cost", "layer_cost_kernels")
    interpreted(*(f"tests/test_{name}.py" for name in files), "-k", "triton")


def divergence_configurations():
    from fastkd.kernels import divergence as kernels

    dtypes = [("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("float16", "float16")]
    for kind in range(7):
        for s, t in dtypes:
            for vocabulary in (3, 30522, 256000):
                yield kernels, kind, s, t, vocabulary


def compile_divergence(kernels, name, kind, s, t, vocabulary, chip):
    from offline import POINTERS, assert_fits, compile_kernel

    block, warps = kernels._geometry(vocabulary)
    floats, logits = POINTERS["float32"], {"s_ptr": POINTERS[s], "t_ptr": POINTERS[t]}
    scalars = {"stride_s": "i32", "V": "i32", "inverse_T": "fp32", "mix": "fp32"}
    constants = {"HAS_MASK": True, "KIND": kind, "BLOCK": block}
    signature = {
        "_forward": {**logits, "mask_ptr": "*i1", "rows_ptr": floats, "stats_ptr": floats, **scalars, "stride_t": "i32"},
        "_backward": {
            "grad_ptr": floats, **logits, "mask_ptr": "*i1", "stats_ptr": floats, "out_ptr": POINTERS[s], **scalars,
            "stride_t": "i32",
        },
        "_sparse_forward": {
            "s_ptr": POINTERS[s], "rest_ptr": POINTERS[s], "index_ptr": "*i64", "log_probs_ptr": floats,
            "tail_ptr": floats, "mask_ptr": "*i1", "rows_ptr": floats, "stats_ptr": floats, **scalars, "k": "i32",
        },
        "_sparse_backward": {
            "grad_ptr": floats, "s_ptr": POINTERS[s], "index_ptr": "*i64", "log_probs_ptr": floats, "mask_ptr": "*i1",
            "stats_ptr": floats, "out_ptr": POINTERS[s], "words_ptr": POINTERS[s], **scalars, "k": "i32",
        },
    }[name]  # fmt: skip
    if name.startswith("_sparse"):
        constants |= {"HAS_TAIL": True, "WORDS": 64}
    compiled = compile_kernel(getattr(kernels, name), signature, constants, chip, warps)
    assert_fits(compiled, chip, kernels.SPILL_LIMIT[name])
    return compiled


@not_interpreted
@pytest.mark.parametrize("chip", [80, 90])
@pytest.mark.parametrize("name", ["_forward", "_backward"])
def test_divergence_compiles_offline(name, chip):
    """The two kinds that differ most in what they keep in registers, at a large vocabulary."""
    from fastkd.kernels import divergence as kernels

    for kind in (0, 3):
        compiled = compile_divergence(kernels, name, kind, "bfloat16", "bfloat16", 128256, chip)
        assert "MUFU.EX2" in compiled.sass
        assert "HMMA" not in compiled.sass


@not_interpreted
@pytest.mark.long
@pytest.mark.parametrize("chip", [80, 90])
@pytest.mark.parametrize("name", ["_forward", "_backward", "_sparse_forward", "_sparse_backward"])
def test_every_divergence_configuration_compiles_offline(name, chip):
    for kernels, kind, s, t, vocabulary in divergence_configurations():
        if name.startswith("_sparse") and (kind == 6 or s != t):
            continue  # mse has no sparse form, and a sparse teacher no dtype of its own
        compile_divergence(kernels, name, kind, s, t, vocabulary, chip)


def compile_layer_cost(name, s, t, counts, masked, chip):
    from fastkd.kernels import layer_cost as kernels

    from offline import POINTERS, assert_fits, compile_kernel

    n, m = counts
    students, teachers = (POINTERS[s],) * n, (POINTERS[t],) * m
    strides = {"strides_s": (("i32", "i32"),) * n, "strides_t": (("i32", "i32"),) * m}
    shared = {"students": students, "teachers": teachers, **strides, "parts": "i32", "S": "i32", "L": "i32"}
    shared |= {"clamp": "fp32", "first_i": "i32", "M": "i32"} | ({"mask_ptr": "*u8"} if masked else {})
    constants = {"N_TILE": n, "M_TILE": m, "CLAMP": masked} | ({} if masked else {"mask_ptr": None})
    if name == "partial_kernel":
        signature = {**shared, "partial_ptr": "*fp32", "units": "i32", "first_j": "i32", "NM": "i32"}
        block, warps = 256, 8
    else:
        signature = {**shared, "grad_ptr": "*fp32", "outputs": students, "elements": "i32"}
        signature |= {"count_ptr": "*i64"} if masked else {}
        constants |= {} if masked else {"count_ptr": None}
        block, warps = 1024, 4
    kernel = getattr(kernels, name)
    compiled = compile_kernel(kernel, signature, {**constants, "BLOCK": block}, chip, warps)
    assert_fits(compiled, chip, kernels.SPILL_LIMIT[name])
    assert "LDG" in compiled.sass and "HMMA" not in compiled.sass


@not_interpreted
@pytest.mark.parametrize("chip", [80, 90])
@pytest.mark.parametrize("name", ["partial_kernel", "gradient_kernel"])
def test_layer_cost_compiles_offline(name, chip):
    compile_layer_cost(name, "bfloat16", "bfloat16", (6, 12), True, chip)


@not_interpreted
@pytest.mark.long
@pytest.mark.parametrize("chip", [80, 90])
@pytest.mark.parametrize("name", ["partial_kernel", "gradient_kernel"])
def test_every_layer_cost_configuration_compiles_offline(name, chip):
    for s, t in (("float32", "float32"), ("float32", "bfloat16"), ("float16", "float16")):
        for counts in ((1, 1), (4, 12), (6, 12)):
            for masked in (False, True):
                compile_layer_cost(name, s, t, counts, masked, chip)
