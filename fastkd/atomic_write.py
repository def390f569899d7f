"""Output folders, which may hold a user's own files: a result appears there whole or not at all, and replaces no other file."""

import contextlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def probe(folder: Path, argument: str) -> None:
    """The folder is made where there is none; ValueError where nothing can be written, before any work is done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{argument}: {folder} is no folder to write to ({error.strerror}); choose another") from error


def check_empty(folder: Path, argument: str) -> None:
    """ValueError unless the folder is new or empty: what it holds may be a teacher, or the result of another day."""
    probe(folder, argument)
    there = sorted(path.name for path in folder.iterdir())
    if there:
        named = ", ".join(there[:3]) + (", …" if len(there) > 3 else "")
        raise ValueError(
            f"{argument}: {folder} holds {named}, and nothing is written over; choose a new folder or an empty one"
        )


def next_empty(folder: Path) -> Path:
    """`folder`, or the first of folder-2, folder-3, … that is new or empty, where the user named none."""
    for number in itertools.count(1):
        path = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return path


@contextlib.contextmanager
def filling(folder: Path, argument: str) -> Iterator[Path]:
    """A scratch folder, whose files move into the new or empty `folder` when all of them are written; if not, none does."""
    check_empty(folder, argument)
    with tempfile.TemporaryDirectory(prefix=".fastkd-", dir=folder) as scratch:
        yield Path(scratch)
        for path in sorted(Path(scratch).iterdir()):
            if (folder / path.name).exists():  # another process wrote there meanwhile
                raise ValueError(f"{argument}: {folder} has got a {path.name} meanwhile, and nothing is written over")
            path.rename(folder / path.name)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A scratch path beside `path` (which is ours to replace): readers see all of the old file or all of the new one, also
    after a power failure."""
    scratch = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield scratch
        sync(scratch)
        os.replace(scratch, path)
        sync(path.parent, inside=False)
    finally:
        scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A scratch folder beside `folder` (which is ours to replace): `folder` appears whole, when all is written, or not at
    all. What a killed process left of an earlier attempt is removed."""
    scratch = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        sync(scratch)
        rename(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def rename(scratch: Path, folder: Path) -> None:
    """`scratch` becomes `folder`, in the place of an older one, which is deleted only then."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    scratch.rename(folder)
    sync(folder.parent, inside=False)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path, inside: bool = True) -> None:
    """Return when a file, or a folder with (inside=True) all that it holds, is on the disk."""
    if path.is_dir() and inside:
        for child in path.iterdir():
            sync(child)
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
