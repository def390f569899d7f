"""`fastkd bench --against <git ref> …`: the same cases at another commit, built in a worktree of its own, then compared.

Each side measures its own ratio to eager in its own process, so it does not matter which of them met the busier moments.
"""

import contextlib
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence

from fastkd.bench import compare, machine


def call(command: Sequence[str], folder: pathlib.Path) -> int:
    return subprocess.run(command, cwd=folder).returncode


def commit_of(ref: str) -> str:
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


def without(argv: Sequence[str]) -> list[str]:
    """The bench's own arguments: `--against REF` and where to write are ours to say."""
    kept, skip = [], False
    for word in argv:
        if not skip and not word.startswith(("--against=", "--out=")):
            skip = word in ("--against", "--out")
            kept += [] if skip else [word]
        else:
            skip = False
    return kept


def against(ref: str, argv: Sequence[str], tolerance: float, run: Callable = call) -> int:
    """compare's exit status; 2 where either side could not be built or measured."""
    commit, options = commit_of(ref), without(argv)
    with tempfile.TemporaryDirectory(prefix="fastkd-against-") as name:
        folder = pathlib.Path(name)
        bench = [sys.executable, "-m", "fastkd.bench.run", *options, "--out"]
        with worktree(commit, folder, run) as checkout:
            print(f"building {ref} ({commit[:12]})", flush=True)
            if run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], checkout):
                raise RuntimeError(f"against: {ref} does not build here")
            status = run([*bench, str(folder / "before")], checkout)
        status = run([*bench, str(folder / "after")], machine.ROOT) or status
        sides = [next(iter((folder / side).glob("*")), None) for side in ("before", "after")]
        if None in sides:
            print(f"nothing to compare: the bench published nothing on one of the sides (exit status {status})")
            return 2
        return compare.compare(*sides, tolerance)
