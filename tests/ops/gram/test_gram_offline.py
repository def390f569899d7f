"""gram's Triton kernels without a GPU: their machine code for chips that are not here."""

import pytest
from test_triton import not_interpreted

from offline import POINTERS, assert_fits, assert_no_tensor_cores, compile_kernel, tensor_core_instructions

pytest.importorskip("triton")


def compile_gram(name, chip, s, t, rows=128, divisible=True, pairs=1, masked=False, per_row=False, **options):
    """options: the constants that are not the launch's."""
    from fastkd.kernels.gram import in_cache, row_stats, tiled
    from fastkd.kernels.gram import rows as shared

    module = next(m for m in (in_cache, tiled, row_stats, shared) if name in m.SPILL_LIMIT)
    kernel, half = getattr(module, name), "float32" not in (s, t)
    launch = shared.geometry(rows, half, per_row)
    if name == "pull_kernel":
        launch = tiled.pull_geometry(launch, half)
    elif name in WITHOUT_TILES:
        launch = {"BLOCK": 16 if name == "means_kernel" else 128, "BLOCK_D": 128, "num_warps": 4}
    types = {"students": POINTERS[s], "teachers": POINTERS[t], "outputs": POINTERS[s], "valids": "*u8"}
    types |= dict.fromkeys(("grads", "values", "saved"), "*fp32")
    types = {key: (pointer,) * pairs for key, pointer in types.items()} | {"mask_ptr": "*u8", "eps": "fp32"}
    types |= {"weights_ptr": POINTERS[s]} | dict.fromkeys(("partial_ptr", "sums_s", "sums_t", "slots_ptr"), "*fp32")
    types |= dict.fromkeys(("moments_ptr", "levels_ptr"), "*fp64")
    constants = {"ENOUGH": 2, "ROW": False, "NORMALIZE": True, "ADD": False, "SYMMETRIC": True} | launch | options
    constants |= {"HALF_S": s != "float32", "HALF_T": t != "float32", "PER_ROW": per_row} | (
        {} if masked else {"mask_ptr": None}
    )
    constants = {"OFFICIAL": per_row, **({} if per_row else {"levels_ptr": None})} | constants
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    signature = {key: types.get(key, "i32") for key in kernel.arg_names if key not in constants}
    sizes = ("D_s", "D_t", "s_group", "s_row", "t_group", "t_row", "out_group", "out_row") if divisible else ()
    more = {key: value for key, value in launch.items() if key not in kernel.arg_names and not key.isupper()}
    sizes = [key for key in (*sizes, "stride") if key in signature]
    compiled = compile_kernel(kernel, signature, constants, chip, divisible=sizes, **more)
    assert_fits(compiled, chip, module.SPILL_LIMIT[name])
    if name in WITHOUT_TILES or (s == t == "float32"):
        assert_no_tensor_cores(compiled)
    elif name != "pull_kernel" or s != "float32":
        assert tensor_core_instructions(compiled) > 0
    return compiled


IN_CACHE = ("forward_kernel", "backward_kernel")
TILED = ("rows_kernel", "means_kernel", "moments_kernel", "conclude_kernel", "weights_kernel", "pull_kernel")
PER_ROW = ("means_kernel", "row_stats_kernel", "official_kernel", "weights_kernel", "pull_kernel")
WITHOUT_TILES = ("rows_kernel", "means_kernel", "conclude_kernel", "official_kernel")


@not_interpreted
@pytest.mark.parametrize("chip", [80, 90])
@pytest.mark.parametrize("name", [*IN_CACHE, *TILED])
def test_gram_compiles_offline(name, chip):
    """In the main loop the tensor cores eat what asynchronous copies brought, some blocks ahead."""
    compiled = compile_gram(name, chip, "bfloat16", "bfloat16")
    if name in (*IN_CACHE, "moments_kernel", "weights_kernel", "pull_kernel"):
        assert "LDGSTS" in compiled.sass
        assert ("HGMMA" if chip == 90 else "HMMA") in compiled.sass


@not_interpreted
@pytest.mark.long
@pytest.mark.parametrize("chip", [80, 90])
@pytest.mark.parametrize("name", [*IN_CACHE, *TILED])
def test_every_gram_configuration_compiles_offline(name, chip):
    half, full = ("bfloat16", "bfloat16"), ("float32", "float32")
    for types in (half, full, ("float16", "float16"), ("float32", "bfloat16"), ("bfloat16", "float32")):
        longest = 128 if "float32" not in types else 64
        for rows in (16, 32, longest) if name in IN_CACHE else (longest,):
            compile_gram(name, chip, *types, rows)
        compile_gram(name, chip, *types, longest, divisible=False)  # 312 columns: 16 bytes, but no multiple of 16
    for types, rows in ((half, 128), (full, 64)):
        compile_gram(
            name, chip, *types, rows, masked=True, pairs=3, ROW=True, ADD=True, SYMMETRIC=False, NORMALIZE=False
        )


@not_interpreted
@pytest.mark.parametrize("chip", [80, 90])
def test_row_statistics_compile_offline(chip):
    for name in ("row_stats_kernel", "weights_kernel"):
        compiled = compile_gram(name, chip, "bfloat16", "bfloat16", per_row=True)
        assert "LDGSTS" in compiled.sass
        assert ("HGMMA" if chip == 90 else "HMMA") in compiled.sass


@not_interpreted
@pytest.mark.long
@pytest.mark.parametrize("chip", [80, 90])
@pytest.mark.parametrize("name", PER_ROW)
def test_every_configuration_of_row_statistics_compiles_offline(name, chip):
    half, full = ("bfloat16", "bfloat16"), ("float32", "float32")
    for types in (half, full, ("float16", "float16"), ("float32", "bfloat16"), ("bfloat16", "float32")):
        for rows in (16, 32, 64):
            compile_gram(name, chip, *types, rows, per_row=True)
        compile_gram(name, chip, *types, 64, per_row=True, divisible=False)
    for types in (half, full):
        options = {"ADD": True, "SYMMETRIC": False, "NORMALIZE": False, "OFFICIAL": False}
        compile_gram(name, chip, *types, 64, per_row=True, masked=True, pairs=3, **options)
