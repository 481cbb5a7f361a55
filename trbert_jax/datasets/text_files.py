"""Readers of single files: JSON lines with `text` and `label`, and CSV with label and text.

A line ends at a line feed and nowhere else: other characters that Unicode calls line ends, U+2028
and U+0085 among them, occur inside texts.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from trbert_jax.datasets.bad_records import BadRecords
from trbert_jax.datasets.dataset import Dataset, Example, make_example
from trbert_jax.datasets.registry import DataSet, each_split, register_dataset
from trbert_jax.errors import UserError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LONGEST_FIELD = 2**31 - 1
CSV_FIRST_LABEL = 1


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields the 1-based number and the text, line end included, of every line of a UTF-8 file.

    Raises:
      UserError: a missing or unreadable file, or one that is not UTF-8 (with the line).
    """
    try:
        with path.open("rb") as stream:
            yield from decode_lines(stream, str(path))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise UserError(f"{path}: is a directory, a file was expected") from error
    except PermissionError as error:
        raise UserError(f"{path}: no permission to read it") from error


def decode_lines(stream: Iterable[bytes], name: str) -> Iterator[tuple[int, str]]:
    """As `read_lines`, of an open file, which the messages call `name`."""
    for number, line in enumerate(stream, 1):
        try:
            text = line.removeprefix(_BYTE_ORDER_MARK if number == 1 else b"").decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{name}:{number}: not UTF-8 (byte {error.start} of the line); convert it to UTF-8 first"
            ) from error
        yield number, text


def read(path: Path, bad: BadRecords, labels: Sequence[str]) -> tuple[Example, ...]:
    """Reads one file, `.jsonl` (labels from 0) or `.csv` (labels from 1).

    Args:
      path: the file.
      bad: not used; the first bad record raises.
      labels: class names.

    Raises:
      UserError: another kind of file, or anything wrong with it (with its line).
    """
    reader = {".jsonl": read_jsonl, ".csv": read_csv}.get(path.suffix)
    if reader is None:
        raise UserError(f"{path}: expected a .jsonl file (text, label) or a .csv file (label, text)")
    return reader(path, labels)


def read_dataset(path: str | Path, labels: Sequence[str]) -> Dataset:
    """Reads one file as a `Dataset`; see `read`."""
    return Dataset(read(Path(path).expanduser(), BadRecords(), labels), tuple(labels))


def read_jsonl(path: Path, label_names: Sequence[str]) -> tuple[Example, ...]:
    """Reads `{"text": ..., "label": ...}` objects, one a line; labels are counted from 0.

    Blank lines and other fields are ignored.

    Raises:
      UserError: see `read_lines` and `make_example`; a malformed line, a missing field, no example.
    """
    examples = []
    for number, line in read_lines(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        record = _parse_json(line, where)
        for field in ("text", "label"):
            if field not in record:
                fields = ", ".join(map(repr, record)) or "none"
                raise UserError(
                    f"{where}: no field {field!r} (it has: {fields}); expected 'text' and 'label'"
                )
        examples.append(
            make_example(where, f"{path.name}:{number}", record["text"], record["label"], label_names)
        )
    return _some(examples, path, 'one {"text": ..., "label": ...} a line')


def read_csv(path: Path, label_names: Sequence[str]) -> tuple[Example, ...]:
    """Reads rows of label and text without a header; labels are counted from 1.

    A text in double quotes may hold commas, line ends, and double quotes written twice.

    Raises:
      UserError: see `read_lines` and `make_example`; a malformed row, no example.
    """
    examples, start = [], 1
    lines = (line.removesuffix("\n").removesuffix("\r") + "\n" for _, line in read_lines(path))
    rows = csv.reader(lines, strict=True)
    with _long_fields():
        while True:
            where = f"{path}:{start}"
            try:
                row = next(rows)
            except StopIteration:
                break
            except csv.Error as error:
                raise UserError(
                    f'{where}: not a valid CSV row ({error}); expected label,"text" with quotes doubled'
                ) from error
            if row:
                name = f"{path.name}:{start}"
                examples.append(_csv_example(where, name, row, label_names))
            start = rows.line_num + 1
    return _some(examples, path, "one row of label and text an example")


def _csv_example(where: str, name: str, row: list[str], label_names: Sequence[str]) -> Example:
    if len(row) != 2:
        hint = "; put a text with commas into double quotes" if len(row) > 2 else ""
        raise UserError(f"{where}: {len(row)} columns; expected 2, label and text{hint}")
    digits = row[0].strip()
    label: object = int(digits) if digits.isascii() and digits.isdecimal() and len(digits) < 10 else row[0]
    try:
        return make_example(where, name, row[1], label, label_names, CSV_FIRST_LABEL)
    except UserError as error:
        if where.endswith(":1") and isinstance(label, str):
            raise UserError(f"{error}; if the line is a header, remove it") from error
        raise


def _parse_json(line: str, where: str) -> dict[str, object]:
    expected = 'expected one object a line, {"text": ..., "label": ...}'
    try:
        record = json.loads(line.rstrip("\r\n"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not valid JSON ({error.msg} at column {error.colno}); {expected}"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        raise UserError(f"{where}: not readable JSON ({error}); {expected}") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: a JSON {type(record).__name__}; {expected}")
    return record


def _some(examples: list[Example], path: Path, expected: str) -> tuple[Example, ...]:
    if not examples:
        raise UserError(f"{path}: has no examples; expected {expected}")
    return tuple(examples)


@contextlib.contextmanager
def _long_fields() -> Iterator[None]:
    """The csv module refuses fields over 128 KiB unless told otherwise, for the whole process."""
    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


_JSONL, _CSV = each_split("{split}.jsonl"), each_split("{split}.csv")
_SPLIT_FIRST = "split it first: trbert split-hyperpartisan --input {found} --output DIR"
_STARS = ("1 star", "2 stars", "3 stars", "4 stars", "5 stars")

for _entry in (
    DataSet(name="imdb", task="classification", read=read, files=_JSONL, labels=("negative", "positive")),
    DataSet(name="yelp_f", task="classification", read=read, files=_CSV, labels=_STARS),
    DataSet(
        name="yelp_polarity", task="classification", read=read, files=_CSV, labels=("negative", "positive")
    ),
    DataSet(
        name="20news",
        task="classification",
        read=read,
        files=_JSONL,
        labels=tuple(map(str, range(20))),
        labels_file="labels.json",
    ),
    DataSet(
        name="hyperpartisan",
        task="classification",
        read=read,
        files=_JSONL,
        labels=("not hyperpartisan", "hyperpartisan"),
        hints=(("original_data.txt", _SPLIT_FIRST), ("articles-*.xml", _SPLIT_FIRST)),
    ),
):
    register_dataset(dataclasses.replace(_entry, dev_from_train=True))
