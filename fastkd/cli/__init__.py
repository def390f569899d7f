"""`fastkd <command>`: each command is a module of this package, imported only when it is called.

A mistake is one line on stderr and exit code 2, a failure of the machine 1, Ctrl-C 130, SIGTERM 143; FASTKD_TRACEBACK=1 shows
where.
"""

import errno
import importlib
import os
import sys

from fastkd import interruption

OF_THE_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
COMMANDS = {
    "distill": "distil a teacher into a student: --method, data, a report at the end",
    "finetune": "train a model on labelled data, such as the teacher before it is distilled",
    "cache": "keep what a teacher says of the training data, so that it runs once, or elsewhere",
    "methods": "the distillation methods, or the options of one of them",
    "demo": "a complete distillation on real text, with a real teacher, in under ten minutes",
    "bench": "every hot path beside its baselines and peers, on this machine",
    "profile": "where the time of a training step goes, ours beside baselines and peers",
    "vocab": "count a corpus and write a smaller vocabulary: a map, a report, a tokenizer and a model",
    "doctor": "versions, what is built, and for every stem which implementation runs here and why the others do not",
}
LARGE_TENSORS = ("distill", "finetune", "cache")
EXTRAS = {
    "bench": "bench",
    "demo": "demo",
    "profile": "train,bench",
}  # what a command needs besides torch; else [train]


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: fastkd <command> [options]\n")
        for name, what in COMMANDS.items():
            print(f"  {name:10} {what}")
        return 0
    command, *rest = argv
    if command in ("-V", "--version"):
        from fastkd import __version__

        print(__version__)
        return 0
    if command not in COMMANDS:
        print(f"fastkd: there is no command {command!r}; there are: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    if command in LARGE_TENSORS:  # on a CPU: fewer page faults
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        with interruption.terminable():
            return importlib.import_module(f"fastkd.cli.{command}").main(rest)
    except (
        ModuleNotFoundError,
        ValueError,
        RuntimeError,
        OSError,
        KeyboardInterrupt,
        interruption.Terminated,
    ) as error:
        if os.environ.get("FASTKD_TRACEBACK") == "1":
            raise
        code, sentence = _explained(error, command)
        if sentence is None:
            raise
        if not _is_said_by_first_rank(sentence):
            print(f"fastkd {command}: {sentence}", file=sys.stderr)
        return code


def _is_said_by_first_rank(sentence: str) -> bool:
    """Whether this is one of several processes, and the first one prints the same."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return False
    from fastkd import distributed

    return distributed.is_said_by_first_rank(sentence)


def _explained(error: BaseException, command: str) -> tuple[int, str | None]:
    """The exit code and one line; no line where the traceback says more."""
    if isinstance(error, KeyboardInterrupt):
        return 130, "; ".join(["interrupted", *filter(None, map(str, error.args))])
    if isinstance(error, interruption.Terminated):
        return error.code, "; ".join(["terminated", *filter(None, [error.sentence])])
    if isinstance(error, ModuleNotFoundError):
        if error.name is None or error.name.split(".")[0] == "fastkd":
            return 1, None
        return 1, f"{error.name} is not installed; pip install 'fastkd[{EXTRAS.get(command, 'train')}]'"
    machine = isinstance(error, RuntimeError) or getattr(error, "errno", None) in OF_THE_MACHINE
    return 1 if machine else 2, " ".join(str(error).split())
