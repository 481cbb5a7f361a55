"""Texts to be labeled, read one by one: a file of any size is never in memory as a whole."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from trbert_jax.datasets.reading import decode_lines, read_lines
from trbert_jax.errors import UserError


def read_input(path: Path | None) -> Iterator[tuple[str, str]]:
    """Yields the lines of a file, or of standard input, each with its place for messages.

    A line ends at a line feed and nowhere else. Of a `.jsonl` file, which holds an object in each line, blank
    lines are left out, as `trbert evaluate` does.

    Args:
      path: the file; None reads standard input.

    Raises:
      UserError: a missing, unreadable or empty file, a `.jsonl` file of blank lines.
    """
    name = str(path or "standard input")
    lines = _lines(path, name)
    return not_blank(lines, name) if name.endswith(".jsonl") else lines


def _lines(path: Path | None, name: str) -> Iterator[tuple[str, str]]:
    empty = True
    for number, line in read_lines(path) if path else decode_lines(sys.stdin.buffer, name):
        empty = False
        yield f"{name}:{number}", line.removesuffix("\n")
    if empty:
        raise UserError(f"{name}: is empty; one text a line was expected")


def not_blank(lines: Iterable[tuple[str, str]], name: str) -> Iterator[tuple[str, str]]:
    """The lines with something in them.

    Args:
      lines: place and text of each.
      name: of what they are from, for a message.

    Raises:
      UserError: at the end, where there was none.
    """
    found = False
    for where, line in lines:
        if line.strip():
            found = True
            yield where, line
    if not found:
        raise UserError(f"{name}: has nothing but blank lines; one JSON object a line was expected")


def read_texts(path: Path | None) -> Iterator[str]:
    """Yields the texts of a file, or of standard input, one a line.

    A `.jsonl` file holds an object with a string `text` in each line.

    Args:
      path: the file; None reads standard input.

    Raises:
      UserError: a missing, unreadable or empty file, a malformed line (with its number).
    """
    return texts_of(path, read_input(path))


def texts_of(path: Path | None, lines: Iterable[tuple[str, str]]) -> Iterator[str]:
    """The texts of lines that `read_input` gave for this file; see `read_texts`."""
    in_records = str(path).endswith(".jsonl")
    return (_text_of_record(where, line) if in_records else line for where, line in lines)


def _text_of_record(where: str, line: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # the latter: brackets without end
        raise UserError(f"{where}: not valid JSON ({error}); one object a line was expected") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise UserError(f'{where}: an object with a string "text" was expected')
    text = record["text"]
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # half of an escaped pair: JSON allows it, Unicode does not
        raise UserError(
            f"{where}: text is not valid Unicode (character {error.start}: {error.reason})"
        ) from error
    return text
