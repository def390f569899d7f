"""Old names of arguments and of their values, which are accepted for one release with a DeprecationWarning."""

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def renamed(**old: str | tuple[str, Callable] | dict[str, str]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """`@renamed(fs="student_hidden")` accepts `fs=` as `student_hidden=`; ("name", convert) also converts the value.
    `@renamed(stage={"words": "tokens"})` accepts the value "words" of `stage=` as "tokens"."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        frames = (
            4 if function.__name__ == "forward" else 2
        )  # nn.Module calls `forward` through two functions of its own

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for name, new in old.items():
                if isinstance(new, dict):
                    if (value := kwargs.get(name)) in list(new):
                        text = f"{name}={value!r} is now called {new[value]!r}; pass {name}={new[value]!r}"
                        warnings.warn(text, DeprecationWarning, stacklevel=frames)
                        kwargs[name] = new[value]
                elif name in kwargs:
                    new, convert = new if isinstance(new, tuple) else (new, lambda value: value)
                    if new in kwargs:
                        raise TypeError(f"{name} is the old name of {new}, and both were given; pass {new} only")
                    warnings.warn(f"{name} is now called {new}; pass {new}=", DeprecationWarning, stacklevel=frames)
                    kwargs[new] = convert(kwargs.pop(name))
            return function(*args, **kwargs)

        return call

    return decorate


def recompute_logits(memory):
    """The old memory="low" or "speed" as recompute_logits=True or False; anything else is left for the check."""
    return memory == "low" if memory in ("low", "speed") else memory
