"""attention_cost's Triton kernels compiled for chips that are not here."""

import pytest
from test_triton import FLOATS, not_interpreted

pytestmark = not_interpreted
KERNELS = ("partial_kernel", "gradient_kernel")


def compile_kernel_of(name, chip, dtype, causal=False, masked=False, of_keys=False, width=64):
    from fastkd.kernels.layer_cost import attention as kernels

    from offline import POINTERS, assert_fits, assert_no_tensor_cores, compile_kernel, tensor_core_instructions

    launch = kernels.geometry(width, dtype != "float32", width % 16 == 0)
    options = {key: launch.pop(key) for key in ("num_warps", "num_stages", "enable_fp_fusion")}
    signature = dict.fromkeys(("N", "M", "H", "Q", "K", "first", "first_t", "teachers", "OWN", "OTHER"), "i32") | {
        "factor": "fp32"
    }
    signature |= {"table_ptr": "*i64", "like_ptr": POINTERS[dtype], "mask_ptr": "*u8"}
    signature |= dict.fromkeys(("scale_ptr", "partial_ptr", "grad_ptr"), FLOATS)
    constants = {"CAUSAL": causal, "ALIGNED": width % 16 == 0, "OF_KEYS": of_keys, **launch}
    constants |= {"STUDENTS": kernels.STUDENTS, "TEACHERS": kernels.TEACHERS} | ({} if masked else {"mask_ptr": None})
    kernel = getattr(kernels, name)
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    signature = {key: value for key, value in signature.items() if key in kernel.arg_names and key not in constants}
    compiled = compile_kernel(kernel, signature, constants, chip, **options)
    assert_fits(compiled, chip, kernels.SPILL_LIMIT[name])
    if dtype == "float32":
        assert_no_tensor_cores(compiled)
    else:
        assert tensor_core_instructions(compiled) > 0
    return compiled


@pytest.mark.parametrize("chip", [80, 90])
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiles_offline(name, chip, dtype):
    compiled = compile_kernel_of(name, chip, dtype, masked=True)
    if dtype == "bfloat16":  # equal scores must leave exactly 0, whose products are not fused with the subtraction
        assert "mul.rn.f32" in compiled.ptx and "fma.rn.f32" not in compiled.ptx


@pytest.mark.parametrize("chip", [80, 90])
def test_the_table_of_addresses_compiles_offline(chip):
    from fastkd.kernels.layer_cost import attention as kernels

    from offline import assert_fits, compile_kernel

    layers, strides = ("*bf16",) * 8, (("i32",) * 3,) * 8
    signature = {"table_ptr": "*i64", "scale_ptr": FLOATS, "first": "i32", "widths": ("i32",) * 8}
    signature |= dict.fromkeys(("queries", "keys", "grads_q", "grads_k"), layers) | {"scales": ("fp32",) * 8}
    signature |= dict.fromkeys(("strides_q", "strides_k"), strides)
    compiled = compile_kernel(kernels.table_kernel, signature, {"COUNT": 8}, chip, 1)
    assert_fits(compiled, chip, kernels.SPILL_LIMIT["table_kernel"])


@pytest.mark.long
@pytest.mark.parametrize("chip", [80, 90])
@pytest.mark.parametrize("name", KERNELS)
def test_every_configuration_compiles_offline(name, chip):
    for dtype in ("float32", "bfloat16", "float16"):
        for masked, causal, of_keys in ((False, False, False), (True, True, False), (True, True, True)):
            for width in (64, 20):
                if name == "gradient_kernel" or not of_keys:
                    compile_kernel_of(name, chip, dtype, causal, masked, of_keys, width)
