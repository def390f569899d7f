"""contrast's Triton kernels as machine code for chips that are not here: shared memory, spills, tensor cores."""

import pytest

from fastkd import backends
from offline import POINTERS, assert_fits, assert_no_tensor_cores, compile_kernel, tensor_core_instructions

pytest.importorskip("triton")
not_interpreted = pytest.mark.skipif(backends.INTERPRETED, reason="the interpreter does not compile")


EIGHT = {80: "uint8", 90: "float8"}  # as the chip reads float8 rows: sm_80 cannot convert them


def compile_contrast(name, q, bank, width, chip, excluded=False, aligned=True, of_z=False):
    """aligned: the rows are multiples of 16 elements, which Triton looks at when it launches. of_z: for NCE's normaliser."""
    from fastkd.kernels.contrast import loss, nce, tiles

    module = next(module for module in (loss, tiles, nce) if hasattr(module, name))
    kernel, scaled = getattr(module, name), bank in EIGHT.values()
    half = "bfloat16" if scaled else bank  # what the products are in
    launch = {
        "shared_kernel": loss.geometry(32, width, (loss.CHUNKS if chip >= 90 else 2) if aligned else 1),
        "gathered_kernel": loss.gathered_geometry(width, bank == "uint8"),
        "merge_kernel": {"WIDTH": 256, "SPLITS": 16, "num_warps": 4},
        "normaliser_kernel": {"BLOCK": 1024, "num_warps": 4},
    }.get(name, tiles.LAUNCH)
    pointers = POINTERS | {"uint8": "*u8", "float8": "*fp8e4nv"}
    types = {
        "q_ptr": pointers[half if name == "shared_kernel" else q],
        "positive_ptr": pointers[q],
        "x_ptr": pointers[q],
    }
    types |= {"bank_ptr": pointers[bank], "index_ptr": "*i64"}
    types |= dict.fromkeys(("weight_ptr", "low_ptr", "part_ptr"), pointers[half] if module is tiles else FLOATS)
    types |= dict.fromkeys(("inverse_ptr", "scale_ptr", "shift_ptr"), "*fp64")
    types |= dict.fromkeys(("query_ids", "bank_ids"), "*i64") | dict.fromkeys(FACTORS, "fp32")
    types |= {x: FLOATS if x.endswith("_ptr") else "i32" for x in kernel.arg_names if x not in types}
    constants = {"PARTS": 1 if q == half else 3, "COUNT": 3, "UNIT_GRAD": True, "NCE": not excluded} | launch
    constants |= {} if excluded else {"query_ids": None, "bank_ids": None}
    constants |= {"NCE": False, "shift_ptr": None, "UNIT_GRAD": False} if of_z else {"z_ptr": None}
    constants |= {} if scaled else {"row_scale_ptr": None}
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    options = {key: value for key, value in launch.items() if key.startswith("num_")}
    signature = {key: value for key, value in types.items() if key in kernel.arg_names and key not in constants}
    divisible = ("D", "q_stride", "part_stride", "bank_stride") if aligned and name == "shared_kernel" else ()
    compiled = compile_kernel(kernel, signature, constants, chip, divisible=divisible, **options)
    assert_fits(compiled, chip, module.SPILL_LIMIT[name])
    assert "TF32" not in compiled.sass and "FMUL.FTZ" not in compiled.sass  # float8 passes through subnormal numbers
    assert (tensor_core_instructions(compiled) > 0) == (name == "shared_kernel")
    return compiled


FLOATS, FACTORS = "*fp32", ("gain", "share", "noise", "noise_low")
CONTRAST = ("shared_kernel", "gathered_kernel", "merge_kernel", "forward_kernel", "parts_kernel", "backward_kernel")


@not_interpreted
@pytest.mark.parametrize("chip", [80, 90])
@pytest.mark.parametrize("name", CONTRAST)
def test_contrast_compiles_offline(name, chip):
    compile_contrast(name, "bfloat16", "bfloat16", 128, chip)


@not_interpreted
@pytest.mark.parametrize("chip", [80, 90])
def test_the_normaliser_compiles_offline(chip):
    compile_contrast("gathered_kernel", "float32", "float32", 128, chip, of_z=True)
    compile_contrast("normaliser_kernel", "float32", "float32", 128, chip, of_z=True)


@not_interpreted
@pytest.mark.long
@pytest.mark.parametrize("chip", [80, 90])
@pytest.mark.parametrize("name", CONTRAST)
def test_every_contrast_configuration_compiles_offline(name, chip):
    for q, bank in (("float32", "float32"), ("float32", "bfloat16"), ("float16", "float16")):
        for width in (16, 128, 256, 768):
            for excluded in (False, True):
                if name != "shared_kernel" or bank == "bfloat16":  # it multiplies in half precision only
                    compile_contrast(name, q, bank, width, chip, excluded)
                    compile_contrast(name, q, bank, width, chip, excluded, aligned=False)


@not_interpreted
@pytest.mark.parametrize("chip", [80, 90])
def test_eight_bit_rows_compile_offline(chip):
    """sm_90 has an instruction for them, sm_80 moves bits; either way products are bfloat16 on tensor cores."""
    compiled = compile_contrast("shared_kernel", "bfloat16", EIGHT[chip], 128, chip)
    assert ("E4M3" in compiled.sass) == (chip == 90)


@not_interpreted
@pytest.mark.long
@pytest.mark.parametrize("chip", [80, 90])
@pytest.mark.parametrize("name", ["shared_kernel", "gathered_kernel"])
def test_every_eight_bit_configuration_compiles_offline(name, chip):
    for bank in {EIGHT[chip], "uint8"}:
        for q in ("float32", "bfloat16", "float16"):
            for width in (16, 128, 256, 768):
                compile_contrast(name, q, bank, width, chip, excluded=width == 128)


@not_interpreted
@pytest.mark.parametrize("chip", [80, 90])
@pytest.mark.parametrize(
    ("name", "more"),
    [("draw_kernel", False), ("draw_kernel", True), ("shuffle_kernel", False), ("shuffle_kernel", True),
     ("update_kernel", False), ("update_kernel", True)],
)  # fmt: skip
def test_contrast_bank_compiles_offline(name, more, chip):
    """more: with labels; an update of 8-bit rows."""
    from fastkd.kernels.contrast import bank as kernels

    kernel = getattr(kernels, name)
    tensors = {"bank_ptr": "*bf16", "row_ptr": "*fp32", "scale_ptr": "*fp32", "momentum": "fp32"}
    tensors |= {"bank_ptr": "*u8"} if more else {}
    types = {x: tensors.get(x, "*i64" if x.endswith("_ptr") else "i32") for x in kernel.arg_names}
    absent = {} if more else dict.fromkeys(("label_ptr", "order_ptr", "bound_ptr", "scale_ptr"))
    block = {"draw_kernel": 128, "shuffle_kernel": 64}.get(name)
    constants = {"REPLACEMENT": False, "BLOCK": block, "SCAN": 128 if name == "update_kernel" else 32, "WIDTH": 1024}
    constants = {key: value for key, value in (constants | absent).items() if key in kernel.arg_names}
    signature = {key: value for key, value in types.items() if key not in constants}
    compiled = compile_kernel(kernel, signature, constants, chip, num_warps=4)
    assert_fits(compiled, chip, kernels.SPILL_LIMIT[name])
    assert_no_tensor_cores(compiled)
    assert "FMUL.FTZ" not in compiled.sass
