"""The exceptions that are told to a user without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """A problem in the user's input: a file, a key, a value.

    The message names the file, key or value, says what was expected and what to do. The command
    line prints it without a traceback and exits with code 2; library callers may catch it.
    """


class MissingSplitError(UserError):
    """A data set that has no such split; all else that is wrong with one is a plain `UserError`."""


class PreemptedError(BaseException):  # like KeyboardInterrupt: no `except Exception` on the way may stop it
    """The process was told to stop (SIGTERM); the message says what is saved."""
