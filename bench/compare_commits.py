"""`fastkd bench --against <git ref> …`: the same cases at another commit, built in a worktree of its own, then compared.

Each side measures its own ratio to eager in its own process, so it does not matter which of them met the busier moments.
"""

import contextlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence

import torch
from fastkd.bench import compare, machine, report


def call(command: Sequence[str], folder: pathlib.Path, **environment: str) -> int:
    return subprocess.run(command, cwd=folder, env={**os.environ, **environment}).returncode


def commit_of(ref: str) -> str:
    if not machine.is_checkout():
        raise ValueError(
            f"against: {machine.ROOT} is no checkout of fastkd, so it has no other commit; clone fastkd first"
        )
    found = machine.git("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}")
    if not found:
        raise ValueError(f"against: {ref!r} names no commit of {machine.ROOT}; try a branch, a tag, HEAD~1 or a hash")
    return found


@contextlib.contextmanager
def worktree(commit: str, folder: pathlib.Path, run: Callable) -> Iterator[pathlib.Path]:
    """A checkout of `commit`, gone again afterwards."""
    path = folder / "checkout"
    if run(["git", "worktree", "add", "--quiet", "--detach", str(path), commit], machine.ROOT):
        raise RuntimeError(f"against: git could not check out {commit[:12]}")
    try:
        yield path
    finally:
        run(["git", "worktree", "remove", "--force", str(path)], machine.ROOT)


def from_anywhere(word: str) -> str:
    """YAML files among the shapes by their whole path: the other side runs in another folder."""
    option, equals, value = word.rpartition("=")
    parts = (pathlib.Path(part) if part.endswith((".yaml", ".yml")) else None for part in value.split(","))
    found = (str(path.resolve()) if path else part for path, part in zip(parts, value.split(","), strict=True))
    return option + equals + ",".join(found)


def without(argv: Sequence[str]) -> list[str]:
    """The bench's own arguments: `--against REF` and where to write are ours to say."""
    kept, skip = [], False
    for word in argv:
        if not skip and not word.startswith(("--against=", "--out=")):
            skip = word in ("--against", "--out")
            kept += [] if skip else [from_anywhere(word)]
        else:
            skip = False
    return kept


def build(what: str, folder: pathlib.Path, run: Callable) -> None:
    """Named outright: with `auto`, eager would be measured where a kernel does not compile."""
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc")
    kind = "cuda" if torch.version.cuda and nvcc else "cpu"
    print(f"building {what}", flush=True)
    if run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], folder, FASTKD_BUILD=kind):
        raise RuntimeError(f"against: {what} does not build here (FASTKD_BUILD={kind})")


def against(ref: str, argv: Sequence[str], tolerance: float, run: Callable = call) -> int:
    """compare's exit status, but 1 or 2 where the bench ended with that on either side."""
    commit, options = commit_of(ref), without(argv)
    with tempfile.TemporaryDirectory(prefix="fastkd-against-") as name:
        folder = pathlib.Path(name)
        bench = [sys.executable, "-m", "fastkd.bench.run", *options, "--out"]
        with worktree(commit, folder, run) as checkout:
            build(f"{ref} ({commit[:12]})", checkout, run)
            build("this one", machine.ROOT, run)
            before = run([*bench, str(folder / "before")], checkout)
        after = run([*bench, str(folder / "after")], machine.ROOT)
        sides = [next(filter(report.results_in, (folder / x).glob("*")), None) for x in ("before", "after")]
        if None not in sides:
            verdict = compare.compare(*sides, tolerance)
        else:
            print("nothing to compare: the bench published nothing on one of the sides")
            verdict = 2
        for side, status in ((ref, before), ("this one", after)):
            if status:
                why = {1: "a check failed", 2: "the machine was busy, or an argument is unknown there"}.get(
                    status, "it died"
                )
                print(f"the bench of {side} ended with {status}: {why}; what it lacks was not compared")
        return verdict or next((2 if status != 1 else 1 for status in (after, before) if status), 0)
