"""Opens JSON and JSON lines, plain or gzip-compressed. JSON lines end at a line feed, nowhere else."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from trbert_jax.datasets.bad_records import BadRecord, BadRecords, Place
from trbert_jax.datasets.json_values import JsonValue
from trbert_jax.datasets.text_files import decode_lines, read_lines
from trbert_jax.errors import UserError

_DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error)


def load_json(path: Path) -> JsonValue:
    """Reads a JSON file (`.json`, or `.gz` of one).

    Raises:
      UserError: missing, unreadable, cut short, not UTF-8 or malformed.
    """
    text = "".join(line for _, line in lines_of(path))
    try:
        return JsonValue(json.loads(text), Place(str(path)))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: not valid JSON ({error.msg} at column {error.colno}); if the file was "
            "cut short, download it again"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        raise UserError(f"{path}: not readable JSON ({error}); expected the file as published") from error


def load_json_lines(path: Path, bad: BadRecords) -> Iterator[JsonValue]:
    """Yields the values of a JSON lines file (`.jsonl`, or `.gz` of one), one a line; not blank lines.

    A line that is not JSON is a bad record.

    Raises:
      UserError: missing, unreadable, cut short, not UTF-8; a line that is not JSON, unless skipped.
    """
    for number, line in lines_of(path):
        if not line.strip():
            continue
        values: list[JsonValue] = []
        with bad.record():
            values.append(_parse_line(line, Place(str(path), number)))
        yield from values


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """As `read_lines`, of a file that is gzip-compressed if its name ends in `.gz`.

    Raises:
      UserError: missing, unreadable, not UTF-8; a compressed file that is damaged or cut short.
    """
    if path.suffix != ".gz":
        yield from read_lines(path)
        return
    number = 0
    try:
        with gzip.open(path, "rb") as stream:
            for number, line in decode_lines(stream, str(path)):
                yield number, line
    except _DAMAGED as error:
        raise UserError(
            f"{path}: damaged or cut short after line {number} ({error}); expected a whole gzip file, "
            "download it again"
        ) from error
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise UserError(f"{path}: is a directory, a file was expected") from error
    except PermissionError as error:
        raise UserError(f"{path}: no permission to read it") from error


def _parse_line(line: str, place: Place) -> JsonValue:
    try:
        return JsonValue(json.loads(line.rstrip("\r\n")), place)
    except json.JSONDecodeError as error:
        reason = f"not valid JSON ({error.msg} at column {error.colno}); expected one object a line"
        raise BadRecord(place, "", reason) from error
    except (ValueError, RecursionError) as error:
        raise BadRecord(place, "", f"not readable JSON ({error}); expected one object a line") from error
