"""Up to which size PyTorch's operations are faster than our kernels, or the other way round: the only such table.

`fastkd bench --calibrate` measures it on this machine and writes `file()`, which then holds; without that file the shipped values
do. FASTKD_THRESHOLDS in the environment is "kernels" or "pytorch" for one of both at every size, or the path of another file.
"""

import json
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

from fastkd import backends

NEVER, ALWAYS = 0, 1 << 62


class Threshold(NamedTuple):
    """Who computes up to a size, who beyond it, and the size for each of INSTRUCTION_SETS."""

    what: str
    unit: str
    small: str
    large: str
    shipped: tuple[int, int, int]


INSTRUCTION_SETS = ("plain", "avx2", "avx512")
INSTRUCTION_SET = INSTRUCTION_SETS[torch.ops.fastkd.instruction_set() if backends.UNAVAILABLE["cpu"] is None else 0]
KERNELS, PYTORCH = "kernels", "pytorch"

# All in float32. "pytorch" is cross_entropy, the package's original, or the library's products with a kernel between them. Measured
# on an Intel Xeon with one thread, PyTorch limited to the same instruction set; for "plain" without that limit too. In
# linear_divergence the library's products are up to 20 % faster with AVX2 or AVX-512, too, but keep the logits of more rows at
# once, in up to twice the memory: beyond 2^20 logits our tile serves.
TABLE = {
    "in_batch": Threshold("info_nce_loss whose negatives are the batch", "examples", PYTORCH, KERNELS, (512, 512, 512)),
    "bank": Threshold("info_nce_loss with a frozen bank", "scores", KERNELS, PYTORCH, (1 << 12, ALWAYS, ALWAYS)),
    "linear_divergence": Threshold("linear_divergence", "logits", PYTORCH, KERNELS, (ALWAYS, 1 << 20, 1 << 20)),
    "unit_linear": Threshold("unit_linear", "examples", KERNELS, PYTORCH, (NEVER, 16, 64)),
    "soft_labels": Threshold("soft labels of other packages", "logits", PYTORCH, KERNELS, (1 << 15, 1 << 14, 1 << 14)),
}


def file() -> Path:
    """Where the measured table of this instruction set is, or would be."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # Path.home() raises where there is none
    return Path(_asked() or Path(cache, "fastkd", f"thresholds-{INSTRUCTION_SET}.json"))


def serves(name: str, size: int, device: str = "cpu") -> str:
    """Who computes a call of this size."""
    threshold, up_to = TABLE[name], {"cpu": UP_TO, "cuda": UP_TO_ON_GPU}.get(device, {})
    return threshold.small if size <= up_to.get(name, NEVER) else threshold.large


def forced(way: str) -> dict[str, int]:
    """The table with which `way` computes at every size."""
    return {name: ALWAYS if way == threshold.small else NEVER for name, threshold in TABLE.items()}


def load() -> tuple[dict[str, int], str]:
    """The table that holds, and where it is from."""
    shipped = {name: threshold.shipped[INSTRUCTION_SETS.index(INSTRUCTION_SET)] for name, threshold in TABLE.items()}
    if _asked() in (KERNELS, PYTORCH):
        return forced(_asked()), f"FASTKD_THRESHOLDS={_asked()}"
    if not _asked() and not os.path.exists(file()):  # Path.exists() raises where it may not look
        return shipped, f"shipped for {INSTRUCTION_SET}"
    try:
        measured = {name: int(size) for name, size in json.loads(file().read_text()).items() if name in TABLE}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        wrong = f"{file()} is no table of `fastkd bench --calibrate` ({error})"
        if _asked():
            raise ValueError(f"FASTKD_THRESHOLDS: {wrong}; set {KERNELS!r}, {PYTORCH!r} or the path of one") from error
        warnings.warn(f"fastkd: {wrong}; delete it. The shipped table holds.", RuntimeWarning, stacklevel=2)
        return shipped, f"shipped for {INSTRUCTION_SET}"
    return shipped | measured, f"measured here, in {file()}"


def _asked() -> str:
    return os.environ.get("FASTKD_THRESHOLDS", "")


UP_TO, SOURCE = load()
# Computed by bench/evidence/gpu_model.py, and not measured; what is not named goes to kernels.
UP_TO_ON_GPU = forced(_asked()) if _asked() in (KERNELS, PYTORCH) else {"in_batch": 512}


def lines(device: str = "cpu") -> list[str]:
    """What `fastkd doctor` says of them."""
    up_to = {"cpu": UP_TO, "cuda": UP_TO_ON_GPU}.get(device, {})
    found = [f"On a CPU with {INSTRUCTION_SET}, by size ({SOURCE}):"]
    if device != "cpu":
        found = ["On a GPU, by size (computed by a model of a GPU, not measured):"] if up_to else []
    for name, size in up_to.items():
        threshold = TABLE[name]
        small, large = threshold.small, threshold.large
        whom = f"{small} up to {size} {threshold.unit}, then {large}"
        whom = large if size <= NEVER else small if size >= ALWAYS else whom
        found.append(f"  {threshold.what:44} -> {whom}")
    return found
