"""`fastkd methods [NAME]`: the distillation methods, or what one of them does and its options, read from the code."""

import argparse
import inspect
import re
import sys
import textwrap

from fastkd.train import methods

WEIGHT = "The method's weight in a sum of several."


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("fastkd methods", description=__doc__)
    parser.add_argument("name", nargs="?", metavar="NAME", help="a method, for its options")
    name = parser.parse_args(argv).name
    print(describe(name) if name else overview())
    return 0


def overview() -> str:
    """A line per method: its name, what it is, and the tasks that it is for, where these are not all."""
    lines = [f"{name:{1 + max(map(len, methods.METHODS))}} {_line(name)}" for name in methods.METHODS]
    return (
        "\n".join(lines)
        + "\n\nfastkd methods NAME shows the options of a method; join methods with +: 'fcd + kd:weight=0.5'"
    )


def _line(name: str) -> str:
    first, *rest = re.split(r"(?<!al)[.:] ", " ".join(_text(methods.find(name)).split()))  # not "et al."
    summary = first if ")" not in first[-1:] or not rest else f"{first}: {rest[0]}"
    tasks = methods.named_tasks(name)
    return textwrap.shorten(summary.rstrip("."), 96, placeholder=" …") + ("" if tasks == "all" else f" [{tasks}]")


def describe(name: str) -> str:
    """The method's own documentation, then each option with its default and its meaning."""
    kind = methods.find(name)
    lines = [_text(kind), "", f"Options, as in --method '{name}:option=value':"]
    for option, (default, meaning) in options(kind).items():
        shown = f"{option}={default}"
        lines.append(textwrap.fill(f"  {shown:24} {meaning}", 100, subsequent_indent=" " * 27))
    return "\n".join(lines)


def options(kind: type[methods.Method]) -> dict[str, tuple[str, str]]:
    """Of each option its default and what it means, from the "Args:" of the method or of the losses that it is made of."""
    own = [cls for cls in kind.__mro__ if issubclass(cls, methods.Method)]
    files = [sys.modules[cls.__module__] for cls in own]
    losses = [
        x for file in files for x in vars(file).values() if getattr(x, "__module__", "").startswith("fastkd.losses.")
    ]
    meanings, defaults = {}, {}
    for source in (*reversed(losses), *reversed(own), *reversed(files)):
        meanings |= _arguments(inspect.cleandoc(source.__doc__ or ""))
    for source in filter(None, (kind.Loss, kind)):
        defaults |= {p.name: p.default for p in inspect.signature(source).parameters.values()}
    found = {name: (str(defaults[name]), meanings.get(name, "")) for name in defaults if name in kind.options()}
    return {"weight": ("1.0", WEIGHT), **found}


def _text(kind: type) -> str:
    """What is said of a method: in its class, or at the top of its file."""
    return inspect.cleandoc(kind.__doc__ or sys.modules[kind.__module__].__doc__ or "").split("\n\nArgs:")[0]


def _arguments(doc: str) -> dict[str, str]:
    """The entries of a docstring's "Args:": name -> meaning. "a, b: …" is of both."""
    _, _, section = doc.partition("Args:\n")
    section = re.split(r"\n(?=\S)", "\n" + section)[0]
    entries = re.split(r"\n {4}(?=\S)", section)
    pairs = [entry.partition(":") for entry in entries if ":" in entry]
    return {name.strip(): " ".join(text.split()) for names, _, text in pairs for name in names.split(",")}
