"""Which implementation of a stem runs here, and why the others do not: the only file that knows about devices.

Everything is looked up once, at import. A call asks `choose`, a plain sequence of comparisons that Dynamo can read.
"""

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

STEMS = ("gram", "relation", "layer_cost", "transport", "contrast", "divergence", "linear_divergence")
BACKENDS = ("auto", "cuda", "triton", "cpu", "reference")

# The implementations of each stem. `reference` exists for every stem, on every device and for every dtype.
WRITTEN = {
    "gram": ("cpu", "triton"),
    "relation": ("cpu", "triton"),
    "layer_cost": ("cpu", "triton"),
    "transport": ("cpu", "cuda"),
    "contrast": ("cpu", "triton"),
    "divergence": ("cpu", "triton"),
    "linear_divergence": ("cpu", "triton"),
}

# What a backend leaves to the reference.
PARTS = {
    ("relation", "triton"): "heads wider than 128",
}

# Up to how many rows "auto" takes plain PyTorch where a kernel could run: what -> device -> rows. Those of a CPU are
# measured, those of a GPU are computed by bench/evidence/gpu_model.py.
FEW = {"in-batch negatives": {"cpu": 512, "cuda": 512}}

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
_HERE = Path(__file__).resolve().parent
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _load(library: str, key: str) -> str | None:
    """Loads a compiled library once. None if its ops are registered, else the reason why not, as a clause."""
    known = torch._C._dispatch_has_kernel("fastkd::probe")
    if known and torch._C._dispatch_has_kernel_for_dispatch_key("fastkd::probe", key):
        return None  # a second copy in one process would register twice and crash
    path = _HERE / f"{library}.so"
    if not path.exists():
        return f"it is not built ({_why_not_built(library)}); reinstall with FASTKD_BUILD=cpu"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        cause = str(error.__cause__ or error).splitlines()[0]
        return f"{path.name} does not load in torch {torch.__version__}: {cause}"
    return None


def _why_not_built(library: str, otherwise: str = "FASTKD_BUILD=none, or not installed") -> str:
    """The note that setup.py wrote when a build failed, or `otherwise`."""
    note = _HERE / f"{library}.not_built"
    return note.read_text() if note.exists() else otherwise


def _cuda_reason() -> str | None:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if not (_HERE / "_cuda.so").exists():
        why = _why_not_built("_cuda", "no nvcc when fastkd was installed, or FASTKD_BUILD is none or cpu")
        return f"it is not built ({why}); reinstall with FASTKD_BUILD=cuda"
    return _load("_cuda", "CUDA")


def _triton_reason() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install 'fastkd[triton]'"
    if not (INTERPRETED or torch.cuda.is_available()):
        return "no CUDA GPU is visible, and Triton needs one (or TRITON_INTERPRET=1)"
    return None


# Why a whole implementation cannot run on this machine; None if it can.
UNAVAILABLE = {
    "cpu": _load("_cpu", "CPU"),
    "cuda": _cuda_reason(),
    "triton": _triton_reason(),
    "reference": None,
}

if (_HERE / "_cpu.not_built").exists() and not (_HERE / "_cpu.so").exists():
    warnings.warn(
        f"fastkd runs without its C++ kernels, so losses on a CPU are plain PyTorch: {_why_not_built('_cpu')}. "
        "Reinstall with FASTKD_BUILD=cpu to see the error, or with FASTKD_BUILD=none to silence this.",
        RuntimeWarning,
        stacklevel=2,
    )


def reason(stem: str, backend: str, x: Tensor) -> str | None:
    """Why `backend` cannot take `x` here, as a clause that follows "because"; None if it can."""
    if backend == "reference":
        return None
    if backend not in WRITTEN[stem]:
        return f"{stem} has no {backend} kernel yet"
    device = x.device.type
    if backend == "cpu" and device != "cpu":
        return f"the input is on {device}, and the C++ kernels are for the CPU"
    if backend == "cuda" and device != "cuda":
        return f"the input is on {device}, and the CUDA kernels need a GPU"
    if backend == "triton" and device != "cuda" and not INTERPRETED:
        return f"the input is on {device}, and Triton needs a GPU (or TRITON_INTERPRET=1)"
    if UNAVAILABLE[backend] is not None:
        return UNAVAILABLE[backend]
    if x.dtype not in _DTYPES and stem != "transport":
        return f"the input is {str(x.dtype).removeprefix('torch.')}, and kernels take float32, bfloat16 and float16"
    return None


def choose(stem: str, backend: str, x: Tensor) -> str:
    """The implementation that runs: for "auto" the first that can run, else the named one, or an error that says why it cannot."""
    if backend == "auto":
        order = ("cuda", "triton") if x.device.type == "cuda" else ("cpu",)
        for name in order:
            if reason(stem, name, x) is None:
                return name
        return "reference"
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    why_not = reason(stem, backend, x)
    if why_not is not None:
        raise RuntimeError(f"{stem}: backend='{backend}' cannot run here: {why_not}")
    return backend


def few(what: str, x: Tensor) -> bool:
    """Whether `x` has so few rows that "auto" does not take a kernel."""
    return len(x) <= FEW[what].get(x.device.type, 0)


class Function(torch.autograd.Function):
    """The base of every Function that calls a kernel: derivatives that kernels do not have raise an error, and are never 0."""

    function = ""  # the public function, for error messages
    gradient_in_forward = False  # whether the forward makes the gradient, which the backward only rescales

    def __init_subclass__(cls):
        backward = cls.backward

        @functools.wraps(backward)
        def first_order(ctx, *grads):
            if torch.is_grad_enabled():  # create_graph=True
                raise RuntimeError(
                    f"{cls.function}: the C++ and Triton kernels have no second derivative, so create_graph=True "
                    "cannot differentiate them; pass backend='reference'"
                )
            return backward(ctx, *grads)

        cls.backward = staticmethod(first_order)

    @classmethod
    def apply(cls, *args):
        # torch.compile does not call this: it traces forward and backward, and raises its own errors.
        if torch._C._are_functorch_transforms_active() or (forward_ad._current_level >= 0 and _any_tangent(args)):
            raise RuntimeError(
                f"{cls.function}: the C++ and Triton kernels take no forward-mode derivative and no torch.func transform "
                "(vmap, grad, jvp); pass backend='reference', or take gradients with .backward() or torch.autograd.grad"
            )
        return super().apply(*args)


def _any_tangent(args) -> bool:
    return any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in args)


class Kernels(NamedTuple):
    """The two host functions of a stem in one implementation."""

    fwd: Callable
    bwd: Callable


def kernels(stem: str, fwd: str, bwd: str, only=BACKENDS, mutates=()) -> dict[str, Kernels]:
    """The available implementations of `stem`: ops of the compiled libraries, host functions of fastkd.kernels.<stem>.
    only: the backends to consider. mutates: the arguments that are written to."""
    available = {}
    written = [name for name in WRITTEN[stem] if name in only]
    for library in ("cpu", "cuda"):
        if library in written and UNAVAILABLE[library] is None:
            available[library] = Kernels(_op(fwd), _op(bwd))
    if "triton" in written and UNAVAILABLE["triton"] is None:
        module = importlib.import_module(f"fastkd.kernels.{stem}")
        available["triton"] = Kernels(*(_triton_op(getattr(module, name), mutates) for name in (fwd, bwd)))
    return available


def _op(name: str) -> Callable:
    try:
        return getattr(torch.ops.fastkd, name)
    except AttributeError:
        raise ImportError(
            f"fastkd: the compiled library has no op {name}, so it is older than the sources; build it again (make build, "
            "or pip install)"
        ) from None


def _triton_op(host: Callable, mutates: tuple[str, ...]) -> Callable:
    """A Triton host function: one opaque node under torch.compile, a plain call in eager mode."""
    host = _on_the_tensors_device(host)
    op = torch.library.custom_op(f"fastkd::{host.__name__}_triton", host, mutates_args=mutates)

    def call(*args):
        return op(*args) if torch.compiler.is_compiling() else host(*args)

    return call


def _on_the_tensors_device(host: Callable) -> Callable:
    """Triton launches on the current device, which may be another one than that of the tensors."""

    @functools.wraps(host)
    def call(*args):
        lists = (x if isinstance(x, list | tuple) else (x,) for x in args)
        first = next(x for each in lists for x in each if isinstance(x, Tensor))
        with torch.cuda.device_of(first):  # does nothing for a CPU tensor
            return host(*args)

    return call


def fake(name: str, shapes: Callable, triton: Callable | None = None) -> None:
    """Tells torch.compile and export what the op `name` returns in every available implementation. triton: what Triton's
    returns, if it differs."""
    for op, returns in ((f"fastkd::{name}", shapes), (f"fastkd::{name}_triton", triton or shapes)):
        if _defined(op):
            torch.library.register_fake(op, returns)


def _defined(op: str) -> bool:
    return any(schema.name == op for schema in torch._C._jit_get_schemas_for_operator(op))


def support_table() -> str:
    """The table in docs/api.md, as Markdown."""
    rows = ["| stem | " + " | ".join(BACKENDS[1:]) + " |", "|---|" + "---|" * len(BACKENDS[1:])]
    numbers = {part: f" [{i}]" for i, part in enumerate(PARTS, 1)}
    for stem in STEMS:
        marks = (
            "✓" + numbers.get((stem, backend), "") if backend in (*WRITTEN[stem], "reference") else "–"
            for backend in BACKENDS[1:]
        )
        rows.append(f"| `{stem}` | " + " | ".join(marks) + " |")
    notes = [f"[{i}] the reference takes {what}" for i, what in enumerate(PARTS.values(), 1)]
    return "\n".join([*rows, "", ". ".join(notes) + "."])


def full_precision(x: Tensor):
    """Disables autocast, which would round the reference's matrix products to bfloat16."""
    return torch.autocast(x.device.type, enabled=False)
