"""`fastkd <command>`: each command is a module of this package, imported only when it is called."""

import importlib
import os
import sys

COMMANDS = {
    "distill": "distil a teacher into a student: --method, data, a report at the end",
    "demo": "a complete distillation on real text, with a real teacher, in under ten minutes",
    "bench": "every hot path beside its baselines and peers, on this machine",
    "profile": "where the time of a training step goes, ours beside the reference and the authors' way",
    "vocab": "count a corpus and write a smaller vocabulary: a map, a report, a tokenizer and a model",
    "doctor": "versions, what is built, and for every stem which implementation runs here and why the others do not",
}
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
    try:
        return importlib.import_module(f"fastkd.cli.{command}").main(rest)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "fastkd" or os.environ.get("FASTKD_TRACEBACK") == "1":
            raise
        extra = EXTRAS.get(command, "train")
        print(f"fastkd {command}: {error.name} is not installed; pip install 'fastkd[{extra}]'", file=sys.stderr)
        return 1
