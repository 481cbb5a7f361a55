"""Define the exceptions that are shown to users without a traceback, and check a caller's numbers."""

import contextlib
import operator
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class UserError(Exception):
    """A problem in the user's input: a file, a key, a value.

    The message names the file, key or value, what is expected, and what to do. The command line prints it
    without a traceback and exits with code 2; library callers may catch it.
    """


class MissingSplitError(UserError):
    """A split that a data set does not have. Other problems of a data set are plain `UserError`s."""


class PreemptedError(BaseException):  # like KeyboardInterrupt: no `except Exception` may stop it
    """The process received SIGTERM, or another `signal` that ends it. The message says what is saved."""

    def __init__(self, message: str, signal: int = 15) -> None:
        super().__init__(message)
        self.signal = signal


def first_lines(lines: Sequence[str], most: int = 10) -> list[str]:
    """Returns the first lines of a long list for a message, and how many more there are."""
    more = len(lines) - most
    return [*lines[:most], *([f"... and {more} more"] if more > 0 else [])]


def iterable(name: str, values: Iterable[T], example: str) -> Iterable[T]:
    """Returns an iterable of values; raises UserError for a single one, which Python may take for many."""
    # A table of pandas, of two dimensions, would be the names of its columns.
    single = isinstance(values, str | bytes | Mapping) or getattr(values, "ndim", 1) != 1
    with contextlib.suppress(TypeError):
        if not single and iter(values) is not None:
            return values
    found = f"got a {type(values).__name__}; put one into a list: {example}"
    raise UserError(f"{name}: expected a list, or another iterable; {found}")


def whole_number(name: str, value: Any, least: int, most: int = sys.maxsize) -> int:
    """Returns a whole number, Python's or NumPy's, as an int.

    Raises UserError, naming the argument, for anything else and outside of `least` to `most`.
    """
    number = None
    if not isinstance(value, bool):
        with contextlib.suppress(TypeError):  # no whole number, NumPy's bool included
            number = operator.index(value)
    if number is None or not least <= number <= most:
        shown = repr(value) if number is None else str(number)
        upper = f"at least {least}" if most == sys.maxsize else f"from {least} to {most}"
        raise UserError(f"{name} is {shown}; expected a whole number, {upper}")
    return number
