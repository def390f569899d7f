"""The row kernel of linear_divergence, compiled for chips that are not here. Its arithmetic: test_linear_divergence_kernels.py."""

import pytest

from fastkd import backends
from offline import POINTERS, assert_fits, assert_no_tensor_cores, compile_kernel

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(backends.INTERPRETED, reason="the interpreter does not compile")
every_chip = pytest.mark.parametrize("chip", [80, 90])


def compile_rows(chip, kind, mode, grad="bfloat16", vocabulary=32000, masked=True, labels=True, shaped=True):
    from fastkd.kernels import linear_divergence as kernels

    launch = {"enable_fp_fusion": True} | (kernels.SMALL if vocabulary <= 1024 else kernels.LARGE)
    constants = {
        "KIND": kind,
        "MODE": mode,
        "SHAPED": shaped,
        "BLOCK": launch.pop("BLOCK"),
        "STAGES": launch.pop("STAGES"),
    }
    signature = dict.fromkeys(("s_ptr", "t_ptr", "weights_ptr", "values_ptr", "stats_ptr"), "*fp32")
    signature |= {"grad_ptr": POINTERS[grad], "mask_ptr": "*i1", "labels_ptr": "*i64"}
    signature |= dict.fromkeys(("s_stride", "t_stride", "grad_stride", "V"), "i32")
    signature |= dict.fromkeys(("inv_T", "mix", "rest", "factor", "hard", "scale", "inv_cap"), "fp32")
    for name, there in (("mask_ptr", masked), ("labels_ptr", labels)):
        if not there:
            constants[name] = None
            del signature[name]
    compiled = compile_kernel(kernels.row_kernel, signature, constants, chip, **launch)
    assert_fits(compiled, chip, kernels.SPILL_LIMIT["row_kernel"])
    assert_no_tensor_cores(compiled)
    return compiled


@every_chip
def test_compiles_offline(chip):
    """Two programs at least share a multiprocessor, plain and with everything on; blocks are read 16 bytes at a time."""
    for kind in (0, 3):
        plain = compile_rows(chip, kind, 1, masked=False, labels=False, shaped=False)
        assert plain.programs_per_multiprocessor >= 2
        assert "LDGSTS.E.BYPASS.128" in plain.sass
        assert compile_rows(chip, kind, 1).programs_per_multiprocessor >= 2


@pytest.mark.long
@every_chip
def test_every_configuration_compiles_offline(chip):
    for kind in range(7):
        for mode in range(3):
            for grad, vocabulary in (("float32", 1000), ("bfloat16", 32000)):
                compile_rows(chip, kind, mode, grad, vocabulary, masked=kind % 2 == 0, labels=mode != 1)
