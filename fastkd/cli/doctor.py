"""`fastkd doctor`: what is installed, what is built, what runs here, and why the rest does not."""

import argparse
import importlib.metadata
import platform

import torch

import fastkd
from fastkd import backends, checks, thresholds

PACKAGES = ("triton", "numpy", "transformers", "datasets", "accelerate", "safetensors", "liger-kernel", "POT")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _build() -> str:
    try:
        from fastkd import _C
    except ImportError:
        return "unknown, since fastkd._C, which says it, is not built for this Python"
    info = _C.build_info()
    return (
        f"{info['compiler']}, against torch {info['built_against_torch']}, instruction sets: {info['instruction_sets']}"
    )


def report(device: str, dtype: torch.dtype) -> list[str]:
    """The lines `fastkd doctor` prints."""
    lines = [
        f"fastkd        {fastkd.__version__}",
        f"python        {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch         {torch.__version__}, {torch.get_num_threads()} threads",
        *(f"{package:13} {_version(package)}" for package in PACKAGES),
        f"built with    {_build()}",
        "",
    ]
    for backend, why_not in backends.UNAVAILABLE.items():
        lines.append(f"{backend:13} {'runs here' if why_not is None else f'does not run here: {why_not}'}")
    x = torch.empty(1, device=device, dtype=dtype)
    lines += ["", f"For {str(dtype).removeprefix('torch.')} on {device}:"]
    for stem in backends.STEMS:
        lines.append(f"  {stem:18} -> {backends.choose(stem, 'auto', x)}")
        for backend in backends.BACKENDS[1:]:
            why_not = backends.reason(stem, backend, x)
            if why_not is not None:
                lines.append(f"  {'':18}    not {backend}: {why_not}")
    return [*lines, "", *thresholds.lines(x.device.type)]


def self_test() -> str:
    """One real call into the compiled library."""
    if backends.UNAVAILABLE["cpu"] is not None:
        return f"C++ kernels: {backends.UNAVAILABLE['cpu']}"
    from fastkd.ops.probe import probe

    x = torch.arange(12.0).reshape(3, 4)
    agrees = bool((probe(x) == x.sum(1)).all())
    return "C++ kernels: " + (
        "loaded, and they compute" if agrees else "loaded, but they compute WRONG numbers; reinstall"
    )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("fastkd doctor", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16", "float64"))
    options = parser.parse_args(argv)
    checks.device(options.device)
    print("\n".join(report(options.device, getattr(torch, options.dtype))))
    print("\n" + self_test())
    return 0
