"""Compiles Triton kernels without a GPU and reads what came out: shared memory, registers, spills, instructions.

Only in a process without TRITON_INTERPRET: there the kernels are Python functions, and there is nothing to compile.
"""

import re
import subprocess
import tempfile
from functools import cached_property
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Per chip: bytes of shared memory a program can use, registers and threads of a multiprocessor.
SHARED = {80: 163 * 1024, 90: 227 * 1024}
REGISTERS = 65536
THREADS = 2048
TENSOR_CORES = {80: "HMMA", 90: "HGMMA"}

_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Compiled:
    """One kernel for one chip. `stack` is local memory per thread, in bytes: more than 0 means that registers spilled."""

    def __init__(self, kernel, chip: int):
        self._kernel = kernel
        self.chip = chip
        self.warps = kernel.metadata.num_warps
        self.shared = kernel.metadata.shared
        usage = self._cuobjdump("-res-usage")
        self.registers = int(re.search(r"REG:(\d+)", usage)[1])
        self.stack = int(re.search(r"STACK:(\d+)", usage)[1])

    def _cuobjdump(self, what: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self._kernel.asm["cubin"])
            file.flush()
            return subprocess.run([_CUOBJDUMP, what, file.name], capture_output=True, text=True, check=True).stdout

    @cached_property
    def sass(self) -> str:
        return self._cuobjdump("-sass")

    @property
    def ptx(self) -> str:
        return self._kernel.asm["ptx"]

    def count(self, instruction: str) -> int:
        """How often a SASS instruction occurs, by the beginning of its name."""
        return len(re.findall(rf"(?<![A-Z]){instruction}\b", self.sass))

    @property
    def uses_tf32(self) -> bool:
        return "TF32" in self.sass or ".tf32" in self.ptx

    @property
    def programs_per_multiprocessor(self) -> int:
        """How many of its programs one multiprocessor holds at a time."""
        threads = 32 * self.warps
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * threads)
        by_shared = SHARED[self.chip] // self.shared if self.shared else THREADS
        return min(by_registers, by_shared, THREADS // threads)

    def __repr__(self):
        return (
            f"sm_{self.chip}: {self.registers} registers, {self.stack} bytes of stack, {self.shared} of shared memory, "
            f"{self.programs_per_multiprocessor} programs of {self.warps} warps per multiprocessor"
        )


def compile_kernel(kernel, signature: dict, constants: dict, chip: int, divisible: tuple = (), **options) -> Compiled:
    """`kernel`: a @triton.jit function. signature: Triton's type of each argument at run time ("*bf16", "i32", "fp32");
    constants: the rest, None for an absent tensor; divisible: integers that are multiples of 16 (pointers always are);
    options: num_warps, num_stages, enable_fp_fusion …"""
    names = kernel.arg_names
    missing = set(names) - set(signature) - set(constants)
    assert not missing, f"{kernel.__name__}: neither a type nor a value for {sorted(missing)}"
    aligned = [i for i, name in enumerate(names) if signature.get(name, "").startswith("*") or name in divisible]
    source = ASTSource(
        kernel,
        {name: signature.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    return Compiled(triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options), chip)
