"""Define the exceptions that are shown to users without a traceback."""

from collections.abc import Sequence


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
