"""SIGTERM and Ctrl-C: noted when they come, obeyed where nothing is lost.

Within `deferred` the first signal is only noted: the code inside asks `requested`, or calls `check`, wherever it can stop.
Within `terminable` SIGTERM raises Terminated at once, as Ctrl-C raises KeyboardInterrupt without any of this.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import NoReturn

NOTICE = b"\nstopping as soon as nothing is lost; the signal once more stops at once\n"
_noted: int | None = None
_owner: int | None = None


class Terminated(SystemExit):
    """SIGTERM, obeyed. The process ends with the code 143 and no traceback where nobody catches it; .sentence says how to
    go on."""

    def __init__(self, sentence: str = ""):
        super().__init__(143)
        self.sentence = sentence


def note(number: int = signal.SIGTERM) -> None:
    """As if the signal had come here: another process was told to stop."""
    global _noted
    _noted = _noted or number


def requested() -> bool:
    """Whether a signal has been noted."""
    return _noted is not None


def check(sentence: str = "") -> None:
    """Stop here if a signal has been noted."""
    if requested():
        stop(sentence)


def stop(sentence: str = "") -> NoReturn:
    """Raise what the noted signal asks for, KeyboardInterrupt or Terminated."""
    if _noted == signal.SIGINT:
        raise KeyboardInterrupt(sentence)
    raise Terminated(sentence)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Note signals instead of obeying them; one that nobody has obeyed inside is obeyed at the end. Nothing changes outside
    the main thread, where Python takes no signals, and within another `deferred`."""
    global _noted, _owner
    if _owner == os.getpid() or threading.current_thread() is not threading.main_thread():
        yield
        return
    _noted, _owner = None, os.getpid()
    heard = [number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, _note) for number in heard}
    try:
        yield
        check()
    except RuntimeError:
        check()  # what other processes do when one of them stops
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        _noted, _owner = None, None


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises Terminated, so that files are closed and scratch folders removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _note(number: int, frame) -> None:
    global _noted
    if os.getpid() != _owner:  # a forked worker, which the process that owns it will end
        if number == signal.SIGTERM:
            os._exit(128 + number)
        return
    if requested():
        _noted = number
        stop()
    _noted = number
    os.write(2, NOTICE)


def _terminate(number: int, frame) -> None:
    raise Terminated
