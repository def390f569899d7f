"""One wording for what a user got wrong: which argument, what came, what there is, and the nearest of it."""

import argparse
import difflib
import math
from collections.abc import Callable, Iterable


def one_of(argument: str, got: object, known: Iterable[str], more: str = "") -> None:
    """Raises unless `got` is one of the names that are known."""
    names = list(known)
    if got not in names:
        close = difflib.get_close_matches(str(got), names, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f"{argument}: there is no {got!r}; {hint}there are {', '.join(names)}{more}")


def within(kind: type, least: float, below: float = math.inf, why: str = "") -> Callable[[str], float]:
    """An argparse type: a finite number with least ≤ number < below."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value < below:
            what = "a whole number" if kind is int else "a number"
            end = f" and below {below:g}" if below < math.inf else ""
            raise argparse.ArgumentTypeError(f"expected {what} of at least {least:g}{end}{why}, got {text!r}")
        return value

    return parse


class Parser(argparse.ArgumentParser):
    """Its mistakes are ValueErrors, as all others are; an option is spelled out, since a short one may mean another."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, allow_abbrev=False, **options)

    def error(self, message: str) -> None:
        raise ValueError(f"{message}; see {self.prog} --help")
