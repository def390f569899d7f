"""Triton kernels without a GPU: their machine code for chips that are not here. Their arithmetic: test_triton_interpreted.py."""

import re

import pytest

from fastkd import backends

pytest.importorskip("triton")
not_interpreted = pytest.mark.skipif(backends.INTERPRETED, reason="the interpreter does not compile")


FLOATS = "*fp32"
DENSE = ("forward_kernel", "backward_kernel", "shard_kernel")
SPARSE = ("mark_kernel", "topk_forward_kernel", "rest_backward_kernel", "topk_backward_kernel")


def compile_divergence(name, chip, kind, s, t, vocabulary, masked=False, align=8):
    from fastkd.kernels.divergence import logits as kernels

    from offline import POINTERS, assert_fits, assert_no_tensor_cores, compile_kernel

    forward, backward, _ = kernels.launch_options(vocabulary, align == 8, None if name == "shard_kernel" else kind)
    launch = dict(backward if name == "backward_kernel" else forward)
    constants = {key: launch.pop(key) for key in ("ALIGN", "BLOCK", "STAGES") if key in launch}
    signature = {"s_ptr": POINTERS[s], "t_ptr": POINTERS[t], "stats_ptr": FLOATS}
    signature |= dict.fromkeys(("inv_T", "mix", "rest"), "fp32")
    signature |= dict.fromkeys(("V", "s_stride", "t_stride"), "i32") | ({"mask_ptr": "*i1"} if masked else {})
    if name == "forward_kernel":
        signature |= {"values_ptr": FLOATS}
    elif name == "shard_kernel":
        signature |= {"terms_ptr": FLOATS}
        signature.pop("mask_ptr", None)
    else:
        signature |= {"g_ptr": FLOATS, "grad_ptr": POINTERS[s], "g_stride": "i32", "blocks": "i32"}
    constants |= {"KIND": kind} | ({} if masked or name == "shard_kernel" else {"mask_ptr": None})
    compiled = compile_kernel(getattr(kernels, name), signature, constants, chip, **launch)
    assert_fits(compiled, chip, kernels.SPILL_LIMIT[name])
    assert_no_tensor_cores(compiled)
    return compiled


def compile_sparse_divergence(name, chip, kind, s, vocabulary, k=64, tail=True, masked=False):
    from fastkd.kernels.divergence import topk as kernels

    from offline import POINTERS, assert_fits, assert_no_tensor_cores, compile_kernel

    forward, rest, tokens = kernels.geometry(vocabulary, k)
    launch = {"topk_forward_kernel": forward, "rest_backward_kernel": rest}.get(name, tokens)
    constants = {key: launch.pop(key) for key in ("BLOCK", "STAGES", "TOKENS") if key in launch}
    types = {"s_ptr": POINTERS[s], "indices_ptr": "*i64", "marks_ptr": "*i32", "tail_ptr": "*fp64", "mask_ptr": "*i1"}
    types |= {"grad_ptr": POINTERS[s]}
    types |= dict.fromkeys(("inv_T", "k_high", "k_low", "mix_high", "mix_low"), "fp32")
    types |= {"log_probs_ptr": "*fp64"} | dict.fromkeys(("values_ptr", "stats_ptr", "g_ptr"), FLOATS)
    types |= dict.fromkeys(("s_stride", "g_stride", "V", "k", "width", "blocks"), "i32")
    kernel = getattr(kernels, name)
    absent = [argument for argument, there in (("tail_ptr", tail), ("mask_ptr", masked)) if not there]
    signature = {name: types[name] for name in kernel.arg_names if name in types and name not in absent}
    more = {"KIND": kind, "SAME_MASS": tail} | dict.fromkeys(absent)
    constants |= {key: value for key, value in more.items() if key in kernel.arg_names}
    compiled = compile_kernel(kernel, signature, constants, chip, **launch)
    assert_fits(compiled, chip, kernels.SPILL_LIMIT[name])
    assert_no_tensor_cores(compiled)
    return compiled


@not_interpreted
@pytest.mark.parametrize("chip", [80, 90])
@pytest.mark.parametrize("name", DENSE)
def test_divergence_compiles_offline(name, chip):
    """The kinds that differ most in what they keep in registers. Rows of any width are read 16 bytes at a time, the
    forward's by asynchronous copies two blocks ahead; two programs at least share a multiprocessor."""
    kinds = ((0, "bfloat16"), (3, "bfloat16"), (5, "float32"))  # soft_ce would take most registers
    for kind, dtype in ((1, "float32"), (3, "float32")) if name == "shard_kernel" else kinds:
        compiled = compile_divergence(name, chip, kind, dtype, dtype, 30522)
        assert "MUFU.EX2" in compiled.sass
        assert compiled.programs_per_multiprocessor >= 2
        assert ("STG.E.128" if name == "backward_kernel" else "LDGSTS.E.BYPASS.128") in compiled.sass


@not_interpreted
@pytest.mark.parametrize("name", SPARSE)
def test_sparse_divergence_compiles_offline(name):
    compile_sparse_divergence(name, 90, 0, "bfloat16", 30522)


@not_interpreted
@pytest.mark.long
@pytest.mark.parametrize("chip", [80, 90])
@pytest.mark.parametrize("name", DENSE)
def test_every_divergence_configuration_compiles_offline(name, chip):
    dtypes = [("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("float16", "float16")]
    for kind in range(7):
        for s, t in dtypes:
            for vocabulary in (1000, 32000):
                compile_divergence(name, chip, kind, s, t, vocabulary, masked=t == "bfloat16")
        compile_divergence(name, chip, kind, "bfloat16", "bfloat16", 32000, align=1)


@not_interpreted
@pytest.mark.long
@pytest.mark.parametrize("chip", [80, 90])
@pytest.mark.parametrize("name", SPARSE)
def test_every_sparse_divergence_configuration_compiles_offline(name, chip):
    sizes = ((1000, 3), (32000, 100), (32000, 1000))
    for kind in range(6):  # mse has no sparse form
        for i, s in enumerate(("float32", "bfloat16", "float16")):
            for tail in (False, True):
                compile_sparse_divergence(name, chip, kind, s, *sizes[(kind + i + tail) % 3], tail, masked=tail)


def compile_layer_cost(name, s, t, counts, masked, chip):
    from fastkd.kernels.layer_cost import hidden as kernels

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


def compile_relation(name, chip, s, t, widths, causal=False, masked=False, rows=True, columns=False, **other):
    from fastkd.kernels import relation as kernels

    from offline import POINTERS, assert_fits, assert_no_tensor_cores, compile_kernel, tensor_core_instructions

    half = s != "float32" and t != "float32"
    launch = kernels.geometry(*widths, half, name == "backward_kernel") | other
    constants = {key: launch.pop(key) for key in ("BLOCK_S", "BLOCK_T", "BLOCK")} | {"CAUSAL": causal}
    signature = dict.fromkeys(("H", "L", "D_s", "D_t"), "i32") | dict.fromkeys(("scale_s", "scale_t"), "fp32")
    signature |= {"strides": (("i32", "i32", "i32"),) * 4, "stats_ptr": FLOATS}
    constants |= {} if masked else {"mask_ptr": None}
    signature |= {"mask_ptr": "*u8"} if masked else {}
    sides = ("x_s", "y_s", "x_t", "y_t") if name == "forward_kernel" else ("own_s", "other_s", "own_t", "other_t")
    signature |= {side: POINTERS[s if side.endswith("_s") else t] for side in sides}
    if name == "forward_kernel":
        signature |= {"rows_ptr": FLOATS}
    else:
        signature |= {"g_ptr": FLOATS, "out_ptr": POINTERS["float32" if s == "float16" else s]}
        constants |= {"ROWS": rows, "COLUMNS": columns}
    compiled = compile_kernel(getattr(kernels, name), signature, constants, chip, **launch)
    assert_fits(compiled, chip, kernels.SPILL_LIMIT[name])
    if half:
        assert tensor_core_instructions(compiled) > 0
    else:
        assert_no_tensor_cores(compiled)
    return compiled


@not_interpreted
@pytest.mark.parametrize("chip", [80, 90])
@pytest.mark.parametrize("name", ["forward_kernel", "backward_kernel"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_relation_compiles_offline(name, chip, dtype):
    compile_relation(name, chip, dtype, dtype, (64, 64), masked=True, columns=True)


def fused_with_a_scale(compiled):
    """The fma that take in a relation's scale: its argument that is a float."""
    scales = re.findall(r"ld\.param\.[bf]32 \t?(%\w+), \[\w+_param_(?:1[0-9]|2[0-9])\]", compiled.ptx)
    fused = re.findall(r"fma\.rn\.f32 \t?(.*);", compiled.ptx)
    return [line for line in fused if set(scales) & set(re.findall(r"%\w+", line))]


@not_interpreted
def test_scores_are_rounded_before_they_are_subtracted():
    """fma(product, scale, -score) would not be 0 where student and teacher are equal."""
    options = {"rows": True, "columns": True}
    assert not fused_with_a_scale(compile_relation("backward_kernel", 90, "bfloat16", "bfloat16", (64, 64), **options))
    free = compile_relation("backward_kernel", 90, "bfloat16", "bfloat16", (64, 64), **options, enable_fp_fusion=True)
    assert fused_with_a_scale(free)


@not_interpreted
@pytest.mark.long
@pytest.mark.parametrize("chip", [80, 90])
@pytest.mark.parametrize("name", ["forward_kernel", "backward_kernel"])
def test_every_relation_configuration_compiles_offline(name, chip):
    forms = ((True, True), (True, False), (False, True)) if name == "backward_kernel" else ((True, False),)
    for dtype in ("float32", "bfloat16", "float16"):
        for widths in ((16, 16), (32, 64), (128, 128)) if dtype != "float16" else ((64, 64),):
            for causal in (False, True):
                for rows, columns in forms:
                    compile_relation(name, chip, dtype, dtype, widths, causal, causal, rows, columns)
