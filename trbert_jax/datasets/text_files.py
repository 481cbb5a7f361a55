"""Reads labeled texts: JSON lines with `text` and `label`, and CSV with label and text.

The text data sets consist of one such file a split.
"""

import contextlib
import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trbert_jax.datasets import reading
from trbert_jax.datasets.reading import BadRecords
from trbert_jax.datasets.records import Example
from trbert_jax.datasets.registry import DataSet, each_split, register_dataset
from trbert_jax.errors import UserError
from trbert_jax.io import find_path

_FORMAT = '{"text": ..., "label": ...} a line of .jsonl, or label,text a line of .csv'


def read(path: Path, bad: BadRecords, labels: Sequence[str]) -> Iterator[Example]:
    """Yields the examples of a file, `.jsonl` (labels from 0) or `.csv` (labels from 1).

    The first bad record raises, whatever `bad` says.
    """
    reader = {".jsonl": _read_jsonl, ".csv": _read_csv}.get(path.suffix)
    if reader is None:
        raise UserError(f"{path}: expected a .jsonl file (text, label) or a .csv file (label, text)")
    yield from reader(path, labels)


def read_file(path: str | Path, labels: Sequence[str]) -> list[Example]:
    """Reads one file like `read`. Raises `UserError` if anything is wrong with it or it has no example."""
    path = find_path(path)
    return reading.collect(read(path, BadRecords(), labels), path, BadRecords(), _FORMAT)


def make_example(example_id: str, item: Any, labels: Sequence[str], first_label: int = 0) -> Example:
    """Returns the example of an object with `text`, and a `label` that counts from `first_label`."""
    text, last_label = reading.text(item, "text"), first_label + len(labels) - 1
    try:
        label = reading.integer(item, "label", first_label, last_label)
    except ValueError as error:
        raise ValueError(f"{error} ({reading.shorten(', '.join(labels))})") from error
    return Example(example_id, text, label - first_label)


def _read_jsonl(path: Path, labels: Sequence[str]) -> Iterator[Example]:
    """Yields the examples of `{"text": ..., "label": ...}` lines; ignores blank lines and other fields."""
    for number, item in reading.load_json_lines(path):
        with reading.record(f"{path}:{number}"):
            yield make_example(f"{path.name}:{number}", item, labels)


def _read_csv(path: Path, labels: Sequence[str]) -> Iterator[Example]:
    """Yields the examples of rows of label and text, without a header, both with or without quotes."""
    lines = (line.removesuffix("\n").removesuffix("\r") + "\n" for _, line in reading.read_lines(path))
    rows, start = csv.reader(lines, strict=True), 1
    row: list[str] | None = []
    with contextlib.ExitStack() as stack:
        # The csv module has a limit of 128 KiB a field, which holds for the whole process.
        stack.callback(csv.field_size_limit, csv.field_size_limit(2**31 - 1))
        while row is not None:
            with reading.record(f"{path}:{start}"):
                try:
                    row = next(rows, None)
                except csv.Error as error:
                    expected = 'label,"text" with quotes doubled'
                    raise ValueError(f"not a valid CSV row ({error}); expected {expected}") from error
                if row:
                    item = _csv_item(row, is_first=start == 1)
                    yield make_example(f"{path.name}:{start}", item, labels, first_label=1)
            start = rows.line_num + 1


def _csv_item(row: list[str], *, is_first: bool) -> dict[str, Any]:
    if len(row) != 2:
        hint = "; put a text with commas into double quotes" if len(row) > 2 else ""
        raise ValueError(f"{len(row)} columns; expected 2, label and text{hint}")
    digits = row[0].strip()
    is_number = digits.isascii() and digits.isdecimal() and len(digits) < 10
    if not is_number and is_first:
        raise ValueError(f"label: is {reading.describe(row[0])}; if the line is a header, remove it")
    return {"label": int(digits) if is_number else row[0], "text": row[1]}


def register(name: str, suffix: str, labels: Sequence[str], **options: Any) -> None:
    """Registers a data set with a file of texts a split, `SPLIT.jsonl` or `SPLIT.csv`."""
    options |= {"task": "classification", "read": read, "format": _FORMAT, "dev_from_train": True}
    files = each_split(f"{{split}}.{suffix}")
    register_dataset(DataSet(name=name, files=files, labels=tuple(labels), **options))


register("imdb", "jsonl", ["negative", "positive"])
register("yelp_f", "csv", ["1 star", "2 stars", "3 stars", "4 stars", "5 stars"])
register("yelp_polarity", "csv", ["negative", "positive"])
register("20news", "jsonl", [str(i) for i in range(20)], labels_file="labels.json")
