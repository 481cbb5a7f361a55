"""Reads the rows of CSV, TSV, JSON lines, JSON and Parquet files, each also compressed with gzip.

The ending of a file's name decides its format, in upper or lower case. A file of any other ending is refused.
"""

import contextlib
import csv
import dataclasses
import gzip
import io
import itertools
import re
import sys
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from trbert_jax.datasets import reading
from trbert_jax.datasets.reading import BadRecords
from trbert_jax.errors import UserError
from trbert_jax.io import parse_json, readable

FORMATS = ("csv", "tsv", "jsonl", "ndjson", "json", "parquet")
NUMBER = re.compile(r"[-+]?\d+", re.ASCII)
_DEFAULTS = {"text": "text", "pair": "text_pair", "label": "label"}
_DELIMITERS = {"csv": ",;\t", "tsv": "\t"}


@dataclasses.dataclass(frozen=True)
class Fields:
    """The fields of a row: names, or for CSV without a header the numbers of the columns, from 1."""

    text: str = "text"
    pair: str | None = None  # of a second text; None for single texts
    label: str = "label"
    # Those that a row may have under the default name instead, as a model's own predictions do.
    or_default: tuple[str, ...] = ()

    def find(self, row: Collection[Any], field: str) -> str:
        """Returns the name that the field `text`, `pair` or `label` has in a row."""
        name = getattr(self, field)
        found, default = find_field(row, name), find_field(row, _DEFAULTS[field])
        return default if field in self.or_default and found not in row and default in row else found

    def numbered(self) -> bool:
        """Whether the text is a numbered column."""
        return self.text.isascii() and self.text.isdecimal()


def format_of(path: str | Path, others: Sequence[str] = ()) -> str:
    """Returns the format that the ending of a file's name stands for: one of `FORMATS` or `others`.

    Raises `UserError` for another ending.
    """
    *stem, ending = Path(path).name.lower().removesuffix(".gz").split(".")
    if stem and ending in (*FORMATS, *others):
        return ending
    known = ", ".join(f".{name}" for name in (*FORMATS, *others))
    raise UserError(f"{path}: unknown kind of file; expected a name that ends in {known} (each also in .gz)")


def find_field(row: Collection[Any], name: str) -> str:
    """Returns the name in a row of a field: `name`, else the one that differs in case or spaces only."""
    if name in row:
        return name
    same = [key for key in row if isinstance(key, str) and key.strip().lower() == name.lower()]
    return same[0] if len(same) == 1 else name


class Table:
    """The rows of a file, each with its place for messages, `FILE:N`.

    N is the line, of JSON and Parquet the number of the record, from 1. Values are those of JSON; of CSV they
    are texts. Malformed rows go to `bad`. `fields` tell a header of CSV from a first row. A file without one
    has two columns, a label (a whole number) and a text, as the Yelp reviews are published; or `fields` are
    numbers of columns.

    `lines` (number and text of each) replace the lines of the file. Iterating raises `UserError` for a file
    that is unreadable or lacks the fields, or a quote in CSV that does not end.
    """

    def __init__(
        self,
        path: Path,
        bad: BadRecords,
        fields: Fields | None = None,
        format: str | None = None,
        lines: Iterable[tuple[int, str]] | None = None,
    ) -> None:
        self._path, self._bad, self._fields = path, bad, fields or Fields()
        self._format, self._given = format or format_of(path), lines
        self.name = "standard input" if str(path) == "-" else str(path)
        # Number of the first class; 1 for CSV without a header, as the Yelp reviews have it.
        self.first_label = 0

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        if self._format in _DELIMITERS:
            rows = self._csv_rows()
        elif self._format == "parquet":
            rows = enumerate(self._parquet_rows(), 1)
        elif self._format == "json":
            rows = self._json_rows()
        else:
            rows = self._json_lines(self._lines())
        for number, row in rows:
            place = f"{self.name}:{number}"
            with self._bad.record(place):
                if not isinstance(row, dict):
                    fields = f"the field {self._fields.text!r}"
                    raise ValueError(f"is {reading.describe(row)}; expected an object with {fields}")
                yield place, row

    def _lines(self) -> Iterable[tuple[int, str]]:
        return reading.read_lines(self._path) if self._given is None else self._given

    # JSON ------------------------------------------------------------------------------------------

    def _json_lines(self, lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, Any]]:
        for number, line in lines:
            if line.strip():
                with self._bad.record(f"{self.name}:{number}"):
                    try:
                        value = parse_json(line.rstrip("\r\n"))
                    except ValueError as error:
                        raise ValueError(f"{error}; expected one object a line") from error
                    yield number, value

    def _json_rows(self) -> Iterator[tuple[int, Any]]:
        """Yields the objects of a list, of JSON lines, or of columns by row name, as pandas writes them."""
        lines = [*self._lines()]
        try:
            value = parse_json("".join(line for _, line in lines))
        except ValueError as error:
            first = next((line for _, line in lines if line.strip()), "")
            if not _is_json_object(first):
                raise UserError(f"{self.name}: {error}; expected a list of objects") from error
            yield from self._json_lines(lines)
            return
        if isinstance(value, dict):
            columns = [*value.values()]
            by_row = columns and all(isinstance(c, dict) and c.keys() == columns[0].keys() for c in columns)
            value = [{k: c[row] for k, c in value.items()} for row in columns[0]] if by_row else [value]
        if not isinstance(value, list):
            raise UserError(f"{self.name}: is {reading.describe(value)}; expected a list of objects")
        yield from enumerate(value, 1)

    # Parquet ---------------------------------------------------------------------------------------

    def _parquet_rows(self) -> Iterator[Any]:
        import pyarrow
        import pyarrow.parquet

        if self.name == str(self._path):
            with readable(self._path):
                source: Any = self._path.open("rb")
        else:
            source = io.BytesIO(sys.stdin.buffer.read())
        with source:
            try:
                if self.name.lower().endswith(".gz"):
                    source = io.BytesIO(gzip.decompress(source.read()))
                for batch in pyarrow.parquet.ParquetFile(source).iter_batches(1024):
                    yield from batch.to_pylist()
            except (pyarrow.ArrowException, OSError, EOFError, zlib.error) as error:
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                raise UserError(f"{self.name}: not a valid Parquet file ({reason})") from error

    # CSV -------------------------------------------------------------------------------------------

    def _csv_rows(self) -> Iterator[tuple[int, Any]]:
        lines, start, names = iter(self._lines()), list[tuple[int, str]](), list[str]()
        for line in lines:
            start.append(line)
            if line[1].strip():
                break
        delimiter = self._delimiter(start[-1][1] if start else "")
        for number, row in csv_rows(self.name, itertools.chain(start, lines), self._bad, delimiter):
            if not names:
                names, is_header = self._header(number, row)
                if is_header:
                    continue
            with self._bad.record(f"{self.name}:{number}"):
                if len(row) != len(names):
                    hint = "; put a text with commas into double quotes" if len(row) > len(names) else ""
                    columns = reading.shorten(", ".join(names))
                    raise ValueError(f"{len(row)} columns; expected {len(names)}, {columns}{hint}")
                yield number, dict(zip(names, row, strict=True))

    def _delimiter(self, line: str) -> str:
        """Returns the delimiter with which a line is a header: spreadsheets of some countries write `;`."""
        for delimiter in _DELIMITERS[self._format]:
            with contextlib.suppress(csv.Error):
                cells = next(csv.reader([line], delimiter=delimiter), [])
                if self._fields.find(cells, "text") in cells:
                    return delimiter
        return _DELIMITERS[self._format][0]

    def _header(self, number: int, row: list[str]) -> tuple[list[str], bool]:
        """Returns the names of the columns, and whether this first row has them."""
        fields, where = self._fields, f"{self.name}:{number}"
        if fields.find(row, "text") in row:
            names = [cell.strip() for cell in row]
            if twice := sorted({name for name in names if name and names.count(name) > 1}):
                raise UserError(f"{where}: column {twice[0]!r} occurs twice; give each a name of its own")
            return names, True
        columns = [str(i) for i in range(1, len(row) + 1)]
        if fields.numbered() and fields.text in columns:
            return columns, False
        is_number = [bool(NUMBER.fullmatch(cell.strip())) for cell in row]
        if not fields.numbered() and fields.pair is None and sorted(is_number) == [False, True]:
            self.first_label = 1
            return [fields.label if number else fields.text for number in is_number], False
        found = reading.shorten(", ".join(map(repr, row)))
        advice = "name that of the texts in text_field (--text-field), by number if the file has no header"
        raise UserError(f"{where}: no column {fields.text!r} among {found}; {advice}")


def csv_rows(
    name: str, lines: Iterable[tuple[int, str]], bad: BadRecords, delimiter: str = ","
) -> Iterator[tuple[int, list[str]]]:
    """Yields number of the first line, and cells, of each row of CSV that is not blank.

    A malformed row goes to `bad`; of TSV, which is often written without quoting, its quotes belong to the
    text. `name` is for messages. Raises `UserError` for a malformed row of several lines: it begins with a
    quote that is none, and the lines up to the next one would be lost.
    """
    last = ""

    def text() -> Iterator[str]:
        nonlocal last
        for _, line in lines:
            last = line.removesuffix("\n").removesuffix("\r")
            yield last + "\n"

    rows, start = csv.reader(text(), delimiter=delimiter, strict=True), 1
    expected = "texts with quotes, line ends or delimiters in double quotes, and quotes in them doubled"
    with contextlib.ExitStack() as stack:
        # The csv module has a limit of 128 KiB a field, which holds for the whole process.
        stack.callback(csv.field_size_limit, csv.field_size_limit(2**31 - 1))
        row: list[str] | None = []
        while row is not None:
            with bad.record(f"{name}:{start}"):
                try:
                    row = next(rows, None)
                    if delimiter == "\t" and any("\t" in cell and "\n" in cell for cell in row or ()):
                        raise csv.Error("a quote that ends on a later line")
                except csv.Error as error:
                    problem = f"not a valid CSV row ({error}); expected {expected}"
                    if rows.line_num > start:
                        raise UserError(f"{name}:{start}: {problem}") from error
                    row = last.split("\t") if delimiter == "\t" else []
                    if not row:
                        raise ValueError(problem) from error
            if row:
                yield start, row
            start = rows.line_num + 1


def _is_json_object(line: str) -> bool:
    with contextlib.suppress(ValueError):
        return isinstance(parse_json(line), dict)
    return False
