"""What a case is: its shapes, its inputs, and the fewest FLOPs and bytes beside it.

The floors count work that nobody can avoid: every input read once, every result written once, `both` without a recompute;
`backward` alone reads its inputs again. Inputs are random and seeded, made in float32 on the device that uses them (a CPU
would take minutes for those of a GPU), then cast.
"""

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch.utils.checkpoint import checkpoint

FP32, BF16 = torch.float32, torch.bfloat16
DTYPES = {"float32": FP32, "bfloat16": BF16, "float16": torch.float16, "float64": torch.float64}
PIECE = 512  # rows of a score matrix that an oracle holds at once
AFTER = ("backward", "both")  # the modes of a product that only the gradient needs


def normal(*size: int, generator: torch.Generator, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*size, generator=generator) * scale


def unit(*size: int, generator: torch.Generator) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*size, generator=generator), dim=-1)


@dataclasses.dataclass(frozen=True)
class Work:
    """One quantity for each mode; `loss_only` costs what `forward` costs."""

    forward: float
    backward: float
    both: float

    def of(self, mode: str) -> float:
        return self.forward if mode == "loss_only" else getattr(self, mode)


@dataclasses.dataclass(frozen=True)
class Gemm:
    """batch × [rows, inner] @ [inner, columns]: one of the bare products that this case cannot do without."""

    rows: int
    inner: int
    columns: int
    batch: int = 1
    modes: tuple[str, ...] = ("forward", "both", "loss_only")


@dataclasses.dataclass(frozen=True)
class Case:
    """One row group of the bench. `make(case, generator)` gives named CPU tensors, `ours(inputs, backend)` the loss."""

    stem: str
    kind: str
    shape: Mapping[str, int]
    dtype: torch.dtype
    make: Callable
    ours: Callable
    leaves: tuple[str, ...]
    flops: Work
    bytes: Work
    gemms: tuple[Gemm, ...] = ()
    options: Mapping = dataclasses.field(default_factory=dict)
    keep: tuple[str, ...] = ()  # names of inputs that keep their own dtype (ids, log-probabilities, weights)
    modes: tuple[str, ...] = ("forward", "backward", "both")
    quick: bool = False
    goals: Mapping[str, float] = dataclasses.field(default_factory=dict)  # evidence/performance.py says what they mean
    label: str = ""  # the model whose shape this is
    target: str = ""  # which of the targets on a GPU it stands for: G1, or G6 32k where there are several cases
    oracle: Callable | None = None  # the float64 loss of the inputs, in pieces, where the reference would not fit

    @property
    def shape_text(self) -> str:
        return "x".join(str(size) for size in self.shape.values())

    @property
    def dtype_text(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.shape_text}-{self.dtype_text}"

    @property
    def goal(self) -> str:
        return ", ".join(f"{what} {limit:g}" for what, limit in self.goals.items())


class Inputs(dict):
    """Named tensors (or lists of them), and the case's options as `options`."""

    def __init__(self, tensors: Mapping, options: Mapping, leaf_names: tuple[str, ...]):
        super().__init__(tensors)
        self.options, self.leaf_names = dict(options), leaf_names

    @property
    def leaves(self) -> list[torch.Tensor]:
        return [tensor for name in self.leaf_names for tensor in as_list(self[name])]

    def to(self, dtype: torch.dtype | None = None, device=None, keep: tuple[str, ...] = ()) -> "Inputs":
        """A detached copy; floating inputs become `dtype`, except those named in `keep` (float64 takes those too)."""

        def move(name, tensor):
            wanted = dtype if tensor.is_floating_point() and (name not in keep or dtype == torch.float64) else None
            return tensor.detach().to(device=device, dtype=wanted).clone().requires_grad_(name in self.leaf_names)

        moved = {name: [move(name, t) for t in x] if isinstance(x, list) else move(name, x) for name, x in self.items()}
        return Inputs(moved, self.options, self.leaf_names)


def as_list(value) -> list:
    return value if isinstance(value, list) else [value]


def build(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    """The inputs of a case, in its dtype, on the device."""
    with device:
        raw = Inputs(case.make(case, torch.Generator(device).manual_seed(seed)), case.options, case.leaves)
    return raw.to(case.dtype, device, case.keep)


def by_rows(function: Callable, left: torch.Tensor, right: torch.Tensor, options: dict, piece: int | None = None):
    """The mean of `function` in the reference, pieces of rows at a time, each recomputed for its gradient: whole, its
    float64 graph would take 17 times the logits, which is more than any card has."""
    options, piece = {**options, "reduction": "sum", "backend": "reference"}, piece or PIECE
    sums = [checkpoint(function, *sides, use_reentrant=False, preserve_rng_state=False, **options)
            for sides in zip(left.split(piece), right.split(piece), strict=True)]  # fmt: skip
    return sum(sums) / len(left)
