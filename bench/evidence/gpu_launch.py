"""What one launch costs on an H200: the arithmetic of gpu_model.py.

Bytes, FLOPs, instructions and exponentials come from the machine code, given its loops' ITERATIONS; memory is
read once, and what is read again comes from the cache. A launch takes the largest of what each of them takes, times its waves
rounded up; in a wave that is not full, times the multiprocessors for each that has a program.
"""

import dataclasses
import math
from collections.abc import Iterator
from types import SimpleNamespace

import torch
from fastkd.bench.evidence.machine_code import Compiled

MULTIPROCESSORS, MEMORY, CACHE = 132, 4.3e12, 2.5 * 4.3e12  # bytes per second
TENSOR, OF_MMA, FLOAT = 790e12, 0.6, 60e12  # FLOP per second; the share of the first that mma.sync reaches
ISSUED, EXPONENTIALS = 132 * 4 * 1.9e9, 4.2e12  # per second


def ratio(a: float, b: float) -> int:
    return math.ceil(a / b)


def again(a) -> int:
    """Iterations of the second pass of divergence over a row: forward_kl and soft_ce need none, unless their sums cancel."""
    return 0 if a.KIND in (0, 5) else a.V // a.BLOCK


# kernel -> which of its loops are counted (those with this instruction, outer ones first), their iterations, and the
# elements that "instructions per element" divides by.
ITERATIONS = {
    "divergence.logits.forward_kernel": ("LDGSTS", lambda a: (1, a.V // a.BLOCK, again(a)), lambda a: a.programs * a.V),
    "divergence.logits.backward_kernel": ("", lambda a: (), lambda a: a.programs * a.BLOCK),
    "linear_divergence.row_kernel": (
        "innermost LDG", lambda a: (1, a.V // a.BLOCK, 1, bool(again(a)), again(a), ratio(a.V, a.BLOCK)),
        lambda a: a.programs * a.V,
    ),
    "relation.forward_kernel": ("MMA", lambda a: (ratio(a.L, a.BLOCK),), lambda a: a.programs * a.BLOCK * a.L),
    "relation.backward_kernel": ("MMA", lambda a: (ratio(a.L, a.BLOCK),), lambda a: a.programs * a.BLOCK * a.L),
    "gram.in_cache.forward_kernel": (
        "MMA", lambda a: (ratio(a.D_t, a.BLOCK_D), ratio(a.D_s, a.BLOCK_D)), lambda a: a.programs * a.R**2,
    ),
    "gram.in_cache.backward_kernel": (
        "MMA", lambda a: (ratio(a.D_t, a.BLOCK_D), *2 * (ratio(a.D_s, a.BLOCK_D),)), lambda a: a.programs * a.R**2,
    ),
    "gram.rows.rows_kernel": (
        "LDG", lambda a: (*2 * (ratio(a.D_s, a.BLOCK_D),), *2 * (ratio(a.D_t, a.BLOCK_D),)),
        lambda a: a.programs * 32 * (a.D_s + a.D_t),
    ),
    "gram.rows.means_kernel": (
        "LDG", lambda a: (ratio(a.D_s, a.BLOCK_D), ratio(a.blocks, a.BLOCK)), lambda a: a.programs * a.blocks * a.D_s,
    ),
    "gram.tiled.moments_kernel": (
        "MMA", lambda a: (ratio(a.D_t, a.BLOCK_D), ratio(a.D_s, a.BLOCK_D)), lambda a: a.programs * a.BLOCK**2,
    ),
    "gram.tiled.weights_kernel": (
        "MMA", lambda a: (ratio(a.D_t, a.BLOCK_D), ratio(a.D_s, a.BLOCK_D)), lambda a: a.programs * a.BLOCK**2,
    ),
    "gram.tiled.conclude_kernel": ("LDG", lambda a: 5 * (ratio(a.places, a.BLOCK),), lambda a: a.programs * a.places),
    "gram.tiled.pull_kernel": (
        "LDG", lambda a: (a.tiles // 4, a.tiles % 4, ratio(a.R, a.BLOCK_J)), lambda a: a.programs * a.BLOCK * a.BLOCK_D,
    ),
    "layer_cost.hidden.partial_kernel": (
        "LDG", lambda a: (a.units / a.programs,), lambda a: a.units * a.BLOCK * (a.N_TILE + a.M_TILE),
    ),
    "layer_cost.hidden.total_kernel": ("LDG", lambda a: (ratio(a.programs, a.BLOCK),), lambda a: a.NM * a.programs),
    "layer_cost.hidden.gradient_kernel": ("", lambda a: (), lambda a: a.programs * a.BLOCK * (a.N_TILE + a.M_TILE)),
    "contrast.loss.shared_kernel": (
        "LDG", lambda a: (a.blocks / a.splits, ratio(a.D, a.INNER)), lambda a: a.B * a.K,
    ),
    "contrast.tiles.forward_kernel": (
        "LDG", lambda a: (*2 * (ratio(a.K, a.BLOCK),), ratio(a.D, a.BLOCK)), lambda a: a.programs * a.K,
    ),
    "contrast.tiles.parts_kernel": ("", lambda a: (), lambda a: a.n),
    "contrast.tiles.backward_kernel": ("LDG", lambda a: (ratio(a.K, a.BLOCK),), lambda a: a.programs * a.K),
    "contrast.loss.gathered_kernel": (  # z, where it is given, is set
        "LDG", lambda a: (a.blocks / a.splits if a.z_ptr is None else 0,), lambda a: a.B * a.count * a.D,
    ),
    "contrast.nce.normaliser_kernel": ("LDG", lambda a: (0,), lambda a: 1),
    "contrast.loss.merge_kernel": (
        "LDG", lambda a: (ratio(a.D, a.WIDTH), *2 * (ratio(a.splits, a.SPLITS),)), lambda a: a.splits * a.B * a.D,
    ),
    "contrast.bank.update_kernel": ("LDG", lambda a: (ratio(a.B, a.SCAN),), lambda a: a.B * a.D),
}  # fmt: skip


def branches(kernel: str, a) -> float:
    """The part of a kernel's code that one program runs: one of two forms of a block, the teachers that have a weight."""
    if kernel == "divergence.logits.backward_kernel":
        return 0.5
    if kernel == "layer_cost.hidden.gradient_kernel":
        return (a.N_TILE + a.M_TILE - 1) / (a.N_TILE * a.M_TILE)
    return 1.0


@dataclasses.dataclass
class Launch:
    """A kernel launched, or an operation of PyTorch: what it moves and computes, in total."""

    kernel: str
    bytes: float
    flops: float = 0.0
    tensor: float = 0.0  # FLOPs of tensor cores
    compiled: Compiled | None = None
    programs: int = 0
    more: dict = dataclasses.field(default_factory=dict)  # cached, issued, exponentials, per_element

    @property
    def waves(self) -> float:
        return self.programs / (MULTIPROCESSORS * self.compiled.programs_per_multiprocessor) if self.compiled else 1.0

    @property
    def seconds(self) -> tuple[float, str]:
        """And what it waits for."""
        needs = {
            "memory": self.bytes / MEMORY, "cache": self.more.get("cached", 0) / CACHE, "tensor cores": self.tensor / TENSOR,
            "FMA": self.flops / FLOAT, "instructions": self.more.get("issued", 0) / ISSUED,
            "exponentials": self.more.get("exponentials", 0) / EXPONENTIALS,
        }  # fmt: skip
        bound = max(needs, key=needs.get)
        idle = MULTIPROCESSORS / self.programs if self.programs else 1.0  # in a wave that is not full
        return needs[bound] * max(math.ceil(self.waves) / self.waves if self.waves > 1 else 1.0, idle), bound


def kernel_launch(kernel, grid, arguments: dict, compiled: Compiled) -> Launch:
    name = f"{kernel.fn.__module__.removeprefix('fastkd.kernels.')}.{kernel.fn.__name__}"
    programs = math.prod(grid)
    a = SimpleNamespace(**arguments)
    a.programs = arguments.get("programs", programs)
    has, iterations, elements = ITERATIONS[name]
    each, share = compiled.work(has, iterations(a)), branches(name, a)
    total = {what: share * programs * compiled.warps * amount for what, amount in each.items()}
    threads = {what: 32 * total.get(what, 0) for what in ("loaded", "stored", "exponentials", "instructions")}
    issued = threads["loaded"] + threads["stored"]
    tensors = {x.untyped_storage(): min(x.untyped_storage().nbytes(), x.nbytes) for x in flat(arguments.values())}
    return Launch(
        name, min(sum(tensors.values()), issued), total.get("fma", 0),
        total.get("HGMMA", 0) + total.get("HMMA", 0) / OF_MMA, compiled, programs,
        {"cached": issued, "issued": total["instructions"], "exponentials": threads["exponentials"],
         "per_element": threads["instructions"] / elements(a)},
    )  # fmt: skip


def flat(values) -> Iterator[torch.Tensor]:
    for x in values:
        if isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, list | tuple):
            yield from flat(x)
