"""Reads labeled texts: JSON lines with `text` and `label`, and CSV with label and text.

The text data sets consist of one such file a split.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trbert_jax.datasets import reading
from trbert_jax.datasets.labels import class_index
from trbert_jax.datasets.reading import BadRecords
from trbert_jax.datasets.records import Example
from trbert_jax.datasets.registry import DataSet, each_split, register_dataset
from trbert_jax.datasets.tables import csv_rows
from trbert_jax.errors import UserError

_FORMAT = '{"text": ..., "label": ...} a line of .jsonl, or label,text a line of .csv'


def read(path: Path, bad: BadRecords, labels: Sequence[str]) -> Iterator[Example]:
    """Yields the examples of a file, `.jsonl` (labels from 0) or `.csv` (labels from 1, no header)."""
    if path.suffix == ".jsonl":
        for number, item in reading.load_json_lines(path, bad):
            with bad.record(f"{path}:{number}"):
                yield make_example(f"{path.name}:{number}", item, labels)
    elif path.suffix == ".csv":
        for number, row in csv_rows(str(path), reading.read_lines(path), bad):
            with bad.record(f"{path}:{number}"):
                if len(row) != 2:
                    hint = "; put a text with commas into double quotes" if len(row) > 2 else ""
                    raise ValueError(f"{len(row)} columns; expected 2, label and text{hint}")
                item = {"label": row[0], "text": row[1]}
                try:
                    example = make_example(f"{path.name}:{number}", item, labels, first_label=1)
                except ValueError as error:
                    hint = "; if the line is a header, remove it" if number == 1 else ""
                    raise ValueError(f"{error}{hint}") from error
                yield example
    else:
        raise UserError(f"{path}: expected a .jsonl file (text, label) or a .csv file (label, text)")


def make_example(example_id: str, item: Any, labels: Sequence[str], first_label: int = 0) -> Example:
    """Returns the example of an object with `text`, and a `label`, whose number counts from `first_label`."""
    text, label = reading.text(item, "text"), reading.field(item, "label")
    with reading.within("label"):
        return Example(example_id, text, class_index(label, labels, first_label))


def register(name: str, suffix: str, labels: Sequence[str], **options: Any) -> None:
    """Registers a data set with a file of texts a split, `SPLIT.jsonl` or `SPLIT.csv`."""
    options |= {"task": "classification", "read": read, "format": _FORMAT, "dev_from_train": True}
    files = each_split(f"{{split}}.{suffix}")
    register_dataset(DataSet(name=name, files=files, labels=tuple(labels), **options))


register("imdb", "jsonl", ["negative", "positive"])
register("yelp_f", "csv", ["1 star", "2 stars", "3 stars", "4 stars", "5 stars"])
register("yelp_polarity", "csv", ["negative", "positive"])
register("20news", "jsonl", [str(i) for i in range(20)], labels_file="labels.json")
