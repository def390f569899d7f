"""What a step on a GPU costs its host beside the launches, measured without one: `python -m fastkd.bench.evidence.gpu_host`.

The cases of gpu_model.py, with every axis cut short, run on the CPU through the launchers that a GPU would run, where a launch
does nothing and no value of a tensor is read. What is left is fastkd's own Python, autograd, and PyTorch's dispatch of the
other operations. CPU time of the process in microseconds: the median of many steps and the least, beside the median of eager
PyTorch. What else runs on the machine makes the median dearer, so before and after a change are measured in turns.
"""

import argparse
import contextlib
import cProfile
import dataclasses
import os
import pstats
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from unittest import mock

import torch
from fastkd.bench import baselines
from fastkd.bench.cases.case import Case, build
from fastkd.bench.evidence import gpu_model

from fastkd import backends, checks

SHORT, STEPS, ROUNDS = 16, 10, 300


def launching_nothing() -> contextlib.ExitStack:
    from triton.runtime.jit import JITFunction

    def nothing(*_, **__):  # a mock would count its calls, which takes longer than what is measured
        return nothing

    def unreadable(_):
        return False

    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(JITFunction, "__getitem__", nothing))
    stack.enter_context(mock.patch.object(checks, "looks_are_free", unreadable))
    stack.enter_context(mock.patch.object(backends, "INTERPRETED", True))
    return stack


def step_of(case: Case, provider: str) -> Callable:
    """Forward and backward of the shortened case."""
    case = dataclasses.replace(case, shape={axis: min(size, SHORT) for axis, size in case.shape.items()})
    inputs, eager = build(case, torch.device("cpu")), baselines.EAGER[case.stem]

    def step():
        loss = case.ours(inputs, "triton") if provider == "ours" else eager(inputs, inputs.options)
        torch.autograd.grad(loss, inputs.leaves)

    return step


def microseconds(step: Callable) -> tuple[float, float]:
    """The median and the least."""
    times = []
    for _ in range(ROUNDS):
        begin = time.process_time_ns()
        for _ in range(STEPS):
            step()
        times.append(time.process_time_ns() - begin)
    return tuple(x / STEPS / 1e3 for x in (statistics.median(times), min(times)))


def profile(step: Callable) -> None:
    """Where the time goes, in microseconds per step, functions that take most of it themselves first."""
    profiler = cProfile.Profile()
    for _ in range(STEPS):
        step()
    with profiler:
        for _ in range(1000):
            step()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(35)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser("fastkd.bench.evidence.gpu_host", description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("targets", nargs="*", help="G6, G9 …; all of them where none is named")
    parser.add_argument("--profile", action="store_true", help="milliseconds of 1000 steps by function, not the median")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    for name, case in gpu_model.CASES.items():
        if arguments.targets and name.split()[0] not in arguments.targets:
            continue
        with launching_nothing():
            if arguments.profile:
                profile(step_of(case, "ours"))
            else:
                (ours, least), (eager, _) = (microseconds(step_of(case, provider)) for provider in ("ours", "eager"))
                print(
                    f"{name} {case.stem} {case.kind}: {ours:.0f} µs, at least {least:.0f}; eager {eager:.0f}",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    program = gpu_model.PRETENDING.replace("gpu_model", "gpu_host")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    sys.exit(subprocess.run([sys.executable, "-c", program, *sys.argv[1:]], env=environment).returncode)
