"""Reads lines and JSON, checks fields, and handles bad records."""

import contextlib
import dataclasses
import gzip
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from trbert_jax.datasets.records import Identified, trim
from trbert_jax.errors import UserError
from trbert_jax.io import check_unicode, parse_json, readable

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R", bound=Identified)

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_ADVICE = "correct the record, or leave such records out with --skip-bad-records"
_LISTED = 10  # bad records of a summary
_SHOWN = 60  # characters of a value in a message
# Fields of a record's id in the published formats; the official scorer of MRQA prefers `qid` to `id`.
_ID_FIELDS = ("qid", "id", "_id", "QuestionId", "question_id")
_KINDS = {bool: "true or false", str: "a text", int: "a number", float: "a fraction", list: "a list"}


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields the 1-based number and the text, line end included, of every line of a UTF-8 file.

    The file is gzip-compressed if its name ends in `.gz`. Only a line feed ends a line: other line ends of
    Unicode, such as U+2028, occur inside texts. Raises `UserError` if the file is missing, unreadable,
    damaged or not UTF-8 (with the line).
    """
    number = 0
    try:
        zipped = path.suffix.lower() == ".gz"
        with readable(path), gzip.open(path) if zipped else path.open("rb") as stream:
            for number, line in decode_lines(stream, str(path)):
                yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        problem = f"damaged or cut short after line {number} ({error})"
        raise UserError(f"{path}: {problem}; download the file again") from error


def decode_lines(stream: Iterable[bytes], name: str) -> Iterator[tuple[int, str]]:
    """Yields the lines of an open file like `read_lines`; messages call it `name`."""
    with readable(name):
        for number, line in enumerate(stream, 1):
            yield number, decode_line(line, number, name)


def decode_line(line: bytes, number: int, name: str) -> str:
    """Returns the text of a line of the file `name`. Raises `UserError` unless it is UTF-8."""
    try:
        return line.removeprefix(_BYTE_ORDER_MARK if number == 1 else b"").decode("utf-8")
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 (byte {error.start} of the line)"
        raise UserError(f"{name}:{number}: {problem}; convert it to UTF-8 first") from error


def load_json(path: Path) -> Any:
    """Reads a JSON file, compressed if its name ends in `.gz`. Raises `UserError` if it is unreadable."""
    try:
        return parse_json("".join(line for _, line in read_lines(path)))
    except ValueError as error:
        raise UserError(f"{path}: {error}; if the file was cut short, download it again") from error


def load_records(path: Path, key: str | None = None) -> list[Any]:
    """Reads the list that a JSON file is, or has in the field `key`. Raises `UserError` if it has none."""
    with record(str(path)):
        return items(load_json(path), key)


def load_json_lines(path: Path, bad: "BadRecords | None" = None) -> Iterator[tuple[int, Any]]:
    """Yields line number and value of each line of a JSON lines file that is not blank.

    A line that is not JSON is a bad record; without `bad`, it raises `BadRecord`.
    """
    for number, line in read_lines(path):
        if line.strip():
            with (bad.record if bad else record)(f"{path}:{number}"):
                try:
                    value = parse_json(line.rstrip("\r\n"))
                except ValueError as error:
                    raise ValueError(f"{error}; expected one object a line") from error
                yield number, value


class BadRecord(UserError):
    """A record of a readable file that cannot be used. The message names file, record and field."""


class UnusableRecords(UserError):
    """Records that were read, but cannot become inputs of a model."""

    def __init__(self, found: Mapping[str, BadRecord]) -> None:
        self.found = dict(found)  # id -> what is wrong
        super().__init__(str(next(iter(self.found.values()))))


def unusable(record: Identified, field: str, reason: str) -> BadRecord:
    """Returns the error about a field of a record that was read."""
    name = "" if record.id == record.where else f"question {record.id!r}: "
    return BadRecord(f"{record.where}: {name}{field}: {reason}")


@contextlib.contextmanager
def record(where: str, item: Any = None) -> Iterator[None]:
    """Turns `KeyError`, `TypeError` and `ValueError` of the block that reads a record into `BadRecord`.

    The message names `where` (file and line, or path in the file) and the id of `item`, if it has one.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        given = (item[k] for k in _ID_FIELDS if has(item, k) and isinstance(item[k], str | int))
        name = "".join(f": question {id!r}" for id in [*given][:1])
        reason = f"no field {error}" if isinstance(error, KeyError) else error
        raise BadRecord(f"{where}{name}: {reason}") from error


@contextlib.contextmanager
def within(field: str) -> Iterator[None]:
    """Puts the name of a field in front of the messages of `ValueError`s."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{field}{'' if str(error).startswith('[') else ': '}{error}") from error


@dataclasses.dataclass
class BadRecords:
    """Handles bad records: raises the first one, or skips and lists them.

    A file that cannot be read (missing, cut short, not UTF-8, not JSON) always raises.
    """

    skip: bool = False  # set by `--skip-bad-records`
    skipped: list[BadRecord] = dataclasses.field(default_factory=list)  # one entry for a whole bad article

    @contextlib.contextmanager
    def record(self, where: str, item: Any = None) -> Iterator[None]:
        """Reads one record in the block, see the function `record`. Raises `UserError` like `add`."""
        try:
            with record(where, item):
                yield
        except BadRecord as error:
            self.add(error)

    def add(self, error: BadRecord) -> None:
        """Skips a record. Raises `UserError` if `skip` is off."""
        if not self.skip:
            raise UserError(f"{error}; {_ADVICE}") from error
        # The traceback and the cause would keep the whole file in memory.
        error.__cause__ = error.__context__ = None
        self.skipped.append(error.with_traceback(None))

    def summary(self, kept: int, start: int = 0) -> str | None:
        """Returns one line about `skipped[start:]`, beside `kept` good records; None if nothing is."""
        skipped = self.skipped[start:]
        listed = "; ".join(map(str, skipped[:_LISTED]))
        more = f"; and {len(skipped) - _LISTED} more" if len(skipped) > _LISTED else ""
        return f"{len(skipped)} of {kept + len(skipped)} records skipped: {listed}{more}" if skipped else None


def collect(
    records: Iterable[R], source: object, bad: BadRecords, expected: str, *, repeats: bool = False
) -> list[R]:
    """Returns the records of a source, in its order, and logs the skipped ones.

    A second record with the same id is bad; with `repeats` it is dropped if it equals the first one. Raises
    `UserError` if no record remains. `source` and `expected`, the format, are for messages.
    """
    found, before = dict[str, R](), len(bad.skipped)
    for item in records:
        other = found.setdefault(item.id, item)
        if other is not item and not (repeats and item == other):
            with bad.record(item.where):
                problem = f"has the id {item.id!r}, which is also that of {other.where}"
                raise ValueError(f"{problem}; expected an id of its own")
    summary = bad.summary(len(found), before)
    if not found:
        raise UserError(f"{source}: has no usable record; {summary or f'expected {expected}'}")
    if summary:
        logger.warning("%s: %s", source, summary)
    return list(found.values())


# Fields. Each function raises `ValueError` with the name of the field and what was expected. -----------


def field(item: Any, key: str | int | None) -> Any:
    """Returns a field of an object, an item of a list, or `item` itself without a key."""
    if key is None or isinstance(key, int):
        return item if key is None else item[key]
    if not isinstance(item, dict):
        raise ValueError(f"is {describe(item)}; expected an object with the field {key!r}")
    if key not in item:
        raise ValueError(f"{key}: missing (the fields are: {shorten(', '.join(map(repr, item))) or 'none'})")
    return item[key]


def text(item: Any, key: str | int, *, may_be_empty: bool = False) -> str:
    """Returns a string, in valid Unicode and with more than white space unless it may be empty."""
    value = field(item, key)
    if not isinstance(value, str):
        raise _error(key, f"is {describe(value)}; expected a text")
    with within(_name(key)):
        if not may_be_empty and (not value or value.isspace()):
            raise ValueError("is empty; expected a text")
        check_unicode(value)
    return value


def texts(
    item: Any, key: str | int, count: int | None = None, *, some: bool = False, may_be_empty: bool = False
) -> tuple[str, ...]:
    """Returns a list as `items` returns it, of strings as `text` returns them."""
    values = items(item, key, count, some=some)
    for i, value in enumerate(values):
        # Long lists of short strings are common (wordpieces).
        if not (isinstance(value, str) and value.isascii() and value.strip()):
            with within(_name(key)):
                text(values, i, may_be_empty=may_be_empty)
    return tuple(values)


def identifier(item: Any, key: str) -> str:
    """Returns an id: a text, or a whole number as a text."""
    value = field(item, key)
    return str(value) if type(value) is int else text(item, key)


def answer(item: Any, key: str | int, *, may_be_empty: bool = False) -> str:
    """Returns an answer: a text as `text` returns it, trimmed unless that leaves nothing."""
    value = text(item, key, may_be_empty=may_be_empty)
    return trim(value) or value


def one_of(item: Any, key: str | int, allowed: Sequence[str]) -> int:
    """Returns the index of a string among those allowed."""
    value = text(item, key)
    if value not in allowed:
        raise _error(key, f"is {value!r}; expected one of {len(allowed)}, {shorten(', '.join(allowed))}")
    return allowed.index(value)


def integer(item: Any, key: str | int, low: int = 0, high: int | None = None) -> int:
    """Returns a whole number from `low` to `high`, both included."""
    value = field(item, key)
    if type(value) is not int or value < low or (high is not None and value > high):
        limits = f"from {low}{'' if high is None else f' to {high}'}"
        raise _error(key, f"is {describe(value)}; expected a whole number {limits}")
    return value


def flag(item: Any, key: str | int | None = None) -> bool:
    """Returns true or false, also of the numbers 1 and 0: a field, or `item` itself without a key."""
    value = field(item, key)
    if not isinstance(value, int) or value not in (0, 1):
        raise _error(key, f"is {describe(value)}; expected true or false")
    return bool(value)


def items(
    item: Any, key: str | int | None = None, count: int | None = None, *, some: bool = False
) -> list[Any]:
    """Returns a list, of `count` items or at least of `some`: a field, or `item` itself without a key."""
    value = field(item, key)
    if not isinstance(value, list):
        raise _error(key, f"is {describe(value)}; expected a list")
    if (count is not None and len(value) != count) or (some and not value):
        raise _error(key, f"has {len(value)} items; expected {'some' if count is None else count}")
    return value


def each(item: Any, key: str, read: Callable[[Any], T], count: int | None = None) -> tuple[T, ...]:
    """Returns what `read` makes of each item of a list as `items` returns it; errors name the item."""
    result = []
    for i, value in enumerate(items(item, key, count)):
        with within(f"{key}[{i}]"):
            result.append(read(value))
    return tuple(result)


def has(item: Any, key: str) -> bool:
    """Returns whether `item` is an object with this field."""
    return isinstance(item, dict) and key in item


def any_given(values: Sequence[Any], key: str) -> bool:
    """Returns whether a record has something in a field. Test sets withhold answers: no record has any."""
    return any(has(value, key) and value[key] not in (None, "", []) for value in values)


def any_has(values: Sequence[Any], key: str) -> bool:
    """Returns whether a record has a field."""
    return any(has(value, key) for value in values)


def describe(value: object) -> str:
    """Returns the kind and the beginning of a value, for messages: `a number (7)`."""
    kind = "an object" if isinstance(value, dict) else f"a {type(value).__name__}"
    return "null" if value is None else f"{_KINDS.get(type(value), kind)} ({shorten(repr(value))})"


def shorten(value: str) -> str:
    """Returns the beginning of a long text, for messages."""
    return value if len(value) <= _SHOWN else f"{value[: _SHOWN - 4]} ..."


def _name(key: str | int | None) -> str:
    return f"[{key}]" if isinstance(key, int) else key or ""


def _error(key: str | int | None, reason: str) -> ValueError:
    return ValueError(reason if key is None else f"{_name(key)}: {reason}")
