"""Run a command: standard streams that may be closed, full or not UTF-8; signals that end it; messages."""

import contextlib
import json
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from trbert_jax.errors import PreemptedError, UserError
from trbert_jax.io.outputs import ESCAPE, explain_writing

if TYPE_CHECKING:
    from tqdm import tqdm

# Exit codes; 128 + the signal as shells report it. Launchers restart a job that SIGTERM has ended.
USER_ERROR, INTERRUPTED, BROKEN_PIPE = 2, 130, 141
PAUSE = 2.0  # seconds in which a second Ctrl-C belongs to the first
LOG_FORMATS = ("text", "json")
PACKAGE = "trbert_jax"  # the logger of all messages
_log_format = "text"  # that of `setup_logging`
_closed = list[Any]()  # the streams that stand for closed ones

# Streams ------------------------------------------------------------------------------------------


def prepare() -> None:
    """Opens closed standard streams, to nothing, and escapes what the encoding of standard output lacks."""
    # Else the next file that is opened gets the number of a closed one, and the messages of libraries.
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, this one
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            _closed.append(open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - until the process ends
            setattr(sys, name, _closed[-1])
    reconfigure: Any = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors=ESCAPE)


class StandardOutput:
    """Writes text to standard output at once. Raises `UserError` where that fails: its disk is full, say."""

    def write(self, text: str) -> None:
        """Writes; raises `BrokenPipeError` if the reader has left."""
        with explain_writing("standard output"):
            sys.stdout.write(text)
            sys.stdout.flush()

    def flush(self) -> None:
        """Does nothing: all is flushed."""


def show(*lines: str) -> None:
    """Writes lines to standard output, like `StandardOutput`."""
    StandardOutput().write("".join(f"{line}\n" for line in lines))


def check_output_is_read(option: str) -> None:
    """Raises `UserError` if standard output is closed; for commands that print their result."""
    if sys.stdout in _closed:
        raise UserError(f"standard output is closed; write to a file with {option}")


def finish(code: int) -> int:
    """Writes what standard output holds back; returns the exit code: `code`, or that of an error."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = code or BROKEN_PIPE
    except OSError as error:
        if not code:
            say(f"error: standard output: cannot be written, {error.strerror}")
        code = code or USER_ERROR
    else:
        return code
    _abandon(sys.stdout)
    return code


def in_a_folder() -> bool:
    """Returns whether the current folder exists: another process may have deleted it."""
    try:
        os.getcwd()
    except OSError:
        return False
    return True


def write_message(text: str) -> None:
    """Writes to standard error. A message that cannot be shown ends no command."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        _abandon(sys.stderr)


def _abandon(stream: Any) -> None:
    """Sends to nothing what a stream holds: the interpreter writes it again at exit."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say(message: str, level: Literal["info", "error"] = "error") -> None:
    """Shows a message of the program."""
    if _log_format == "json":
        getattr(logging.getLogger(PACKAGE), level)(message.removeprefix("error: "))
    else:
        write_message(f"trbert: {message}\n")


# Signals ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def signals(ended_by_sigterm: bool, last: bool) -> Iterator[None]:
    """Raises `KeyboardInterrupt` on SIGINT, `PreemptedError` on SIGTERM and SIGHUP, to clean up files.

    Waits for the end of an import, in which other exceptions may replace these. Raises again what Python lost
    in a callback that lets no exception pass, such as jax's in the garbage collector. Ignores signals that
    follow within `PAUSE` seconds, which would end the cleaning up, and those that the process ignored before.
    `last`: the process ends after the block, and later signals end it at once.
    """
    if threading.current_thread() is not threading.main_thread():  # only it may handle signals
        yield
        return
    stopped, asked = list[float](), list[int]()

    def stop(number: int, frame: Any) -> None:
        now = time.monotonic()
        if (stopped and now - stopped[-1] < PAUSE) or (number == alarm and not asked):
            return
        if number != alarm:
            asked.append(number)
        if alarm is not None and _imports(frame):
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            return
        number = asked[-1]
        stopped.append(now)
        raise KeyboardInterrupt if number == signal.SIGINT else PreemptedError("stopped by a signal", number)

    def again(lost: Any) -> None:
        if not isinstance(lost.exc_value, KeyboardInterrupt | PreemptedError):
            report_lost(lost)
            return
        stopped.clear()
        if alarm is not None:
            signal.setitimer(signal.ITIMER_REAL, 0.05)

    def end(number: int, _: Any) -> None:
        if time.monotonic() - stopped[-1] >= PAUSE:
            os._exit(128 + number)

    names = ["SIGINT", *(["SIGTERM", "SIGHUP"] if ended_by_sigterm else []), "SIGALRM"]
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]  # Windows has fewer
    defaults = (signal.default_int_handler, signal.SIG_DFL)
    before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) in defaults}
    alarm = next((n for n in before if n == getattr(signal, "SIGALRM", None)), None)
    report_lost, sys.unraisablehook = sys.unraisablehook, again
    try:
        for number in before:
            signal.signal(number, stop)
        yield
    finally:
        sys.unraisablehook = report_lost
        if alarm is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler if not last else end if stopped else signal.SIG_DFL)


def _imports(frame: Any) -> bool:
    """Returns whether a frame is part of an import."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


# Messages -----------------------------------------------------------------------------------------


class JsonLines(logging.Formatter):
    """Formats a message as a JSON object: time, level, event, and the `fields` of the record."""

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {"time": f"{when}.{int(record.msecs):03}Z", "level": record.levelname.lower()}
        line |= {"event": record.getMessage(), **getattr(record, "fields", {})}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        infinite = {k for k, x in line.items() if isinstance(x, float) and not math.isfinite(x)}
        return json.dumps({k: None if k in infinite else x for k, x in line.items()})


class _StderrHandler(logging.Handler):
    """Writes each message once to stderr; one with fields, such as progress, each time."""

    def __init__(self) -> None:
        super().__init__()
        self._shown = set[str]()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if hasattr(record, "fields") or message not in self._shown:
            self._shown.add(message)
            write_message(self.format(record) + "\n")


def setup_logging(log_format: str = "text") -> None:
    """Shows the package's messages, INFO and above, on stderr; one that repeats is shown once."""
    global _log_format
    _log_format = log_format
    formatter = JsonLines() if log_format == "json" else None
    handler = _StderrHandler()
    handler.setFormatter(formatter)
    logger = logging.getLogger(PACKAGE)
    logger.handlers = [h for h in logger.handlers if not isinstance(h, _StderrHandler)] + [handler]
    logger.setLevel(logging.INFO)
    root = logging.getLogger()
    if not root.handlers:  # else absl, which orbax uses, adds one that shows our messages again
        others = logging.StreamHandler()
        others.addFilter(lambda record: not record.name.startswith(logger.name))
        root.addHandler(others)
    if formatter:
        logging.captureWarnings(True)
        for other in root.handlers:
            other.setFormatter(formatter)


def progress(step: int, total: int, text: str, **fields: Any) -> None:
    """Shows a line of progress: its text, or its numbers as JSON."""
    if _log_format == "json":
        fields = {"step": step, "total": total, **fields}
        logging.getLogger(PACKAGE).info("progress", extra={"fields": fields})
    else:
        write_message(text + "\n")


def shows_bars() -> bool:
    """Returns whether standard error is a terminal for people."""
    return sys.stderr.isatty() and _log_format == "text"


def bar(total: int, description: str, unit: str, shown: bool = True) -> "tqdm[Any]":
    """Returns a bar of progress, which appears after two seconds, and for people only."""
    from tqdm import tqdm

    return tqdm(total=total, desc=description, unit=unit, disable=not (shown and shows_bars()), delay=2)
