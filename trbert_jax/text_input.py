"""Texts to be labelled, read one by one: a file of any size is never in memory as a whole."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from trbert_jax.data.text_files import decode_lines, read_lines
from trbert_jax.errors import UserError


def read_texts(path: Path | None) -> Iterator[str]:
    """Yields the texts of a file, or of standard input, one a line.

    A `.jsonl` file holds an object with a string `text` in each line. A line ends at a line feed and
    nowhere else.

    Args:
      path: the file; None reads standard input.

    Raises:
      UserError: a missing, unreadable or empty file, a malformed line (with its number).
    """
    name = str(path or "standard input")
    empty = True
    for number, line in read_lines(path) if path else decode_lines(sys.stdin.buffer, name):
        empty = False
        text = line.removesuffix("\n")
        yield _text_of_record(f"{name}:{number}", text) if name.endswith(".jsonl") else text
    if empty:
        raise UserError(f"{name}: is empty; one text a line was expected")


def _text_of_record(where: str, line: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # the latter: brackets without end
        raise UserError(f"{where}: not valid JSON ({error}); one object a line was expected") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise UserError(f'{where}: an object with a string "text" was expected')
    return record["text"]
