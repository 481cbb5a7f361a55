"""The one exception that stands for a mistake a user can make and mend."""

from __future__ import annotations


class UserError(Exception):
    """A problem in the user's input: a file, a key, a value.

    The message names the file, key or value, says what was expected and what to do. The command
    line prints it without a traceback and exits with code 2; library callers may catch it.
    """
