"""What a case is: its shapes, its inputs, the fewest FLOPs and bytes beside it. The cases themselves: cases.py.

Inputs are random and seeded, made on the CPU in float32 (so that every device sees the same numbers), then cast.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import torch
from fastkd.bench.cli_errors import one_of

REGISTRY: dict[str, Callable] = {}
ON_GPU: dict[str, Callable] = {}  # on top, where there is a GPU: shapes that a CPU would take minutes for
CLAIMS: dict[str, Callable] = {}  # beside them, everywhere
SCALE: dict[str, Callable] = {}  # on top, with --scale: the far ends of the curves


def normal(*size: int, generator: torch.Generator, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*size, generator=generator) * scale


def unit(*size: int, generator: torch.Generator) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*size, generator=generator), dim=-1)


def functional():
    """Imported late, so that the bench's own parts can be read and tested without the library."""
    from fastkd import functional as public

    return public


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

    @property
    def flops(self) -> float:
        return 2.0 * self.batch * self.rows * self.inner * self.columns


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
    sweep: str = ""  # the size on the x axis of the plot, where this case is a point of a curve
    quick: bool = False
    goal: str = ""
    label: str = ""  # the model whose shape this is
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


class Inputs(dict):
    """Named tensors (or lists of them), and the case's options as attributes of `options`."""

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

        moved = {
            name: [move(name, t) for t in value] if isinstance(value, list) else move(name, value)
            for name, value in self.items()
        }
        return Inputs(moved, self.options, self.leaf_names)


def as_list(value) -> list:
    return value if isinstance(value, list) else [value]


def build(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    """The inputs of a case, in its dtype, on the device."""
    generator = torch.Generator().manual_seed(seed)
    raw = Inputs(case.make(case, generator), case.options, case.leaves)
    return raw.to(case.dtype, device, case.keep)


def stem(name: str, registry: dict[str, Callable] = REGISTRY) -> Callable:
    """Registers the function that yields the cases of a stem."""

    def register(function: Callable) -> Callable:
        registry[name] = function
        return function

    return register


def select(stems=(), kind="", name="", dtype="", quick=False, gpu=False, scale=False) -> Iterator[Case]:
    """The cases whose stem is named, whose kind is `kind`, whose name contains `name`; `scale` asks for the curves only."""
    for registered in stems or REGISTRY:
        one_of("stem", registered, REGISTRY)
        tables = [REGISTRY, CLAIMS, *([ON_GPU] if gpu else []), *([SCALE] if scale else [])]
        found = [case for table in tables if registered in table for case in table[registered]()]
        for case in sorted(found, key=lambda case: not case.goal) if gpu else found:  # there, time may run out
            wanted = (not kind or case.kind == kind) and (not dtype or case.dtype_text == dtype)
            wanted = wanted and (case.quick or not quick) and (bool(case.sweep) or not scale)
            if wanted and name in case.name:
                yield case
