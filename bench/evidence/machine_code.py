"""What the compiler made of a Triton kernel: its resources, and what its code does, read from the machine code (SASS)."""

import collections
import dataclasses
import functools
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may use, per chip
WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}  # bytes per thread of a load or store; else 4


@dataclasses.dataclass(frozen=True)
class Loop:
    """Instructions [start, stop) of the code, which the last one repeats."""

    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    chip: int
    warps: int
    shared: int  # bytes per block
    registers: int  # per thread
    stack: int  # bytes per thread: what did not fit into registers
    sass: str
    ptx: str

    @property
    def programs_per_multiprocessor(self) -> int:
        """How many of its programs a multiprocessor holds at a time: 64 K registers, 2048 threads, and shared memory."""
        threads = 32 * self.warps
        by_registers = 65536 // (-(-self.registers // 8) * 8 * threads)
        return min(by_registers, 2048 // threads, SHARED_MEMORY[self.chip] // max(self.shared, 1))

    @functools.cached_property
    def code(self) -> tuple[list[str], list[Loop]]:
        """The instructions, without predicates and without those that never run; and the loops, outer ones first. No label leads
        to the blocks behind the end that stand in for a shuffle where a warp is split: their branches back are no loops."""
        instructions, labels, going = [], {}, []
        for line in self.sass.splitlines():
            label, fields = re.match(r"(LBB\d+):", line), line.split("\t")
            if label:
                labels[label[1]] = len(instructions)
            elif len(fields) > 1 and not re.match(r"@!PT |NOP|BRA 0x", fields[1]):
                going.append(not re.match(r"BRA LBB|EXIT|RET", fields[1]))  # whether the next one may follow
                instructions.append(re.sub(r"^@!?U?P\w+ ", "", fields[1]))
        branches = enumerate(re.match(r"BRA.* (LBB\d+)", instruction) for instruction in instructions)
        targets = {at: labels[branch[1]] for at, branch in branches if branch and branch[1] in labels}
        reached, left = set(), [0]
        while left:
            here = left.pop()
            if here not in reached and here < len(instructions):
                reached.add(here)
                left += ([here + 1] if going[here] else []) + ([targets[here]] if here in targets else [])
        loops = {Loop(start, at + 1) for at, start in targets.items() if start < at and at in reached}
        return instructions, sorted(loops, key=lambda loop: (loop.start, -loop.stop))

    def own(self, loop: Loop) -> list[str]:
        """A loop's instructions, without those of the loops in it."""
        inside = [
            other for other in self.code[1] if other != loop and loop.start <= other.start < other.stop <= loop.stop
        ]
        return [self.code[0][i] for i in range(loop.start, loop.stop) if not any(x.start <= i < x.stop for x in inside)]

    def work(self, has: str = "", iterations: Sequence[float] = ()) -> collections.Counter:
        """What one program does per thread, or per warp. iterations: of the loops that contain `has`, in the order of the code, per
        iteration of the loop around it; every other loop has one. "innermost LDG": of those with no loop inside, since around
        them one compiler has a loop where another has none."""
        instructions, loops = self.code
        chosen, word = self.innermost if has.startswith("innermost") else loops, has.split(" ")[-1]
        matching = [loop for loop in chosen if any(word in line for line in instructions[loop.start : loop.stop])]
        given = dict(zip(matching, iterations, strict=False))
        total = effects(self.own(Loop(0, len(instructions))))
        for loop in loops:
            around = [given.get(x, 1) for x in loops if x.start <= loop.start and loop.stop <= x.stop]
            times = functools.reduce(lambda a, b: a * b, around)
            total.update({what: times * amount for what, amount in effects(self.own(loop)).items()})
        return total

    @property
    def innermost(self) -> list[Loop]:
        loops = self.code[1]
        return [x for x in loops if not any(x != y and x.start <= y.start < y.stop <= x.stop for y in loops)]

    @property
    def main_loop(self) -> int:
        """Instructions of the longest loop that has none inside."""
        return max((loop.stop - loop.start for loop in self.innermost), default=0)


def effects(instructions: Sequence[str]) -> collections.Counter:
    """instructions, bytes loaded and stored and exponentials per thread; per warp, FLOPs of tensor cores and of FMA."""
    total = collections.Counter(instructions=len(instructions))
    for line in instructions:
        name, *parts = line.split()[0].rstrip(";").split(".")
        width = next((WIDTHS[part] for part in parts if part in WIDTHS), 4)
        if name in ("LDG", "LDGSTS"):
            total["loaded"] += width
        elif name == "STG":
            total["stored"] += width
        elif name == "MUFU":
            total["exponentials"] += 1
        elif name in ("FFMA", "FMUL", "FADD"):
            total["fma"] += 32 * (2 if name == "FFMA" else 1)
        elif name in ("HGMMA", "HMMA"):
            total[name] += tensor_flops(name, parts) * (2 if "TF32" in parts else 1)
    return total


def tensor_flops(name: str, parts: Sequence[str]) -> float:
    """Of one warp. HGMMA.64x128x16: four warps together; HMMA.16816: 16 x 8 x 16."""
    if name == "HGMMA":
        rows, columns, inner = map(int, parts[0].split("x"))
        return 2 * rows * columns * inner / 4
    return 2 * 16 * 8 * int(parts[0][3:])


def examine(kernel, chip: int) -> Compiled:
    """kernel: what triton.compile returns. Triton 3.6 reads addresses of four digits only, and so nothing behind 64 KB."""
    from triton.tools import disasm

    disasm.FLINE_RE = re.compile(disasm.FLINE_RE.pattern.replace(r"\w{4}\*", r"\w{4,}\*"))
    registers, stack = _resources(kernel.asm["cubin"])
    metadata = kernel.metadata
    return Compiled(chip, metadata.num_warps, metadata.shared, registers, stack, kernel.asm["sass"], kernel.asm["ptx"])


def _resources(cubin: bytes) -> tuple[int, int]:
    import triton

    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(folder / "cuobjdump"), "-res-usage", file.name]
        out = subprocess.run(command, capture_output=True, text=True, check=True)
    text = out.stdout + out.stderr
    return int(re.search(r"REG:(\d+)", text)[1]), int(re.search(r"STACK:(\d+)", text)[1])
