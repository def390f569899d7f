"""Compile a Triton kernel for a chip that is not here, and read what the compiler made of it.

Must run in a process without TRITON_INTERPRET. Used for every kernel × configuration, so that a spill, too much shared
memory or a missing tensor-core instruction shows without a GPU.
"""

import os
import re

from fastkd.bench.evidence.machine_code import SHARED_MEMORY, Compiled, examine

OF_OLDER_ONES = 512  # bytes of stack on top of a kernel's limit
POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "int64": "*i64", "bool": "*i1"}


def compile_kernel(
    kernel, signature: dict, constants: dict, chip: int, num_warps: int, num_stages: int = 3, divisible=(), **options
):
    """signature: argument -> "*fp32", "i32", "fp32", …, or a tuple of them; constants: every tl.constexpr argument, and None
    for a tensor that is absent. 16-byte alignment of pointers is assumed, as torch gives it; divisible: the integers that
    are multiples of 16, which Triton looks at when it launches. options: enable_fp_fusion …"""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    assert os.environ.get("TRITON_INTERPRET", "0") != "1", "the interpreter does not compile"
    names = kernel.arg_names
    missing = {parameter.name for parameter in kernel.params if parameter.is_constexpr} - constants.keys()
    assert not missing, f"{kernel.__name__}: no value for the tl.constexpr arguments {sorted(missing)}"
    full = {name: signature.get(name, "constexpr") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    aligned |= {path: [["tt.divisibility", 16]] for i, name in enumerate(names) for path in _pointers(full[name], (i,))}
    source = ASTSource(kernel, full, constexprs={(names.index(k),): v for k, v in constants.items()}, attrs=aligned)
    options |= {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    return examine(compiled, chip)


def _pointers(kind, path: tuple):
    """Where the pointers are: (argument,), or (argument, place) within a tuple."""
    if isinstance(kind, tuple):
        for i, part in enumerate(kind):
            yield from _pointers(part, (*path, i))
    elif kind.startswith("*"):
        yield path


def assert_fits(compiled: Compiled, chip: int, spill_limit: int):
    """Limits are those of the Triton that CI has. An older one keeps more on the stack (3.6 on sm_90: 504 bytes where 3.9
    has 224), which costs time only; with it, whether kernels compile and fit is what can be learnt."""
    limit = spill_limit + (OF_OLDER_ONES if triton_version() < (3, 9) else 0)
    assert compiled.shared <= SHARED_MEMORY[chip], f"{compiled.shared} bytes of shared memory on sm_{chip}"
    assert compiled.stack <= limit, f"{compiled.stack} bytes of stack, declared limit {limit}"


def triton_version() -> tuple[int, ...]:
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2]))


def assert_no_tensor_cores(compiled: Compiled):
    """An fp32 path without products of matrices: no tf32, no tensor-core instruction at all."""
    assert tensor_core_instructions(compiled) == 0 and "TF32" not in compiled.sass


def tensor_core_instructions(compiled: Compiled) -> int:
    return len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA)\b", compiled.sass))
