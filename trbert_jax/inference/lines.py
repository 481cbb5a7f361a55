"""Read texts and questions from arguments, files or standard input, and write predictions and answers.

Reads records as they are needed, so that a file of any size fits into memory, and answers what a pipe has
brought before it waits for more.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import itertools
import json
import logging
import os
import select
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from trbert_jax.datasets import reading
from trbert_jax.datasets.own_texts import make_example
from trbert_jax.datasets.reading import BadRecords
from trbert_jax.datasets.tables import Fields, Table, format_of
from trbert_jax.errors import UserError
from trbert_jax.io import parse_json, readable
from trbert_jax.io.outputs import is_stream

if TYPE_CHECKING:
    from trbert_jax.inference.predictor import Prediction, TRBert

logger = logging.getLogger(__name__)

PAUSE: Any = object()  # among inputs: the next has not arrived, so those before it are to be answered
LINES = "txt"  # the format of one text a line
_BY_LINE = (LINES, "jsonl", "ndjson")  # formats of which a line is a record
_NOT_WRITTEN = (".parquet", ".xlsx", ".xls", ".gz", ".zip")


@dataclasses.dataclass(frozen=True, slots=True)
class Text:
    """A text or pair of texts to label."""

    text: str
    pair: str | None = None
    id: Any = None  # that the source gives; None for none
    is_row: bool = False  # whether it is of a file of rows


class Source:
    """Texts or questions: `texts`, the arguments; without any, a file, or standard input for None or `-`.

    `format` is one of `FORMATS` or `txt`, one text a line; by default that of the ending of the file's name,
    and `txt` for standard input and pipes. Reads the first line at once, so that a missing or empty file
    fails before anything slow is loaded. Raises `UserError` for a file that is missing, unreadable, empty or
    of an unknown kind.
    """

    def __init__(
        self, texts: Sequence[str] = (), path: Path | None = None, format: str | None = None
    ) -> None:
        self._texts, self._path, self._given = texts, path or Path("-"), format
        self._is_stdin = str(self._path) == "-"
        self.name = "standard input" if self._is_stdin else str(self._path)
        piped = self._is_stdin or is_stream(self._path)
        self.format = format or (LINES if texts else self._format(piped))
        self._lines: Iterator[Any] = iter(())
        if not texts and self.format != "parquet":
            lines = self._read_pipe() if piped else reading.read_lines(self._path)
            first = next((line for line in lines if line is not PAUSE), None)
            if first is None:
                raise UserError(f"{self.name}: is empty; expected texts or questions")
            self._lines = itertools.chain([first], lines)

    def _format(self, piped: bool) -> str:
        try:
            return format_of(self._path, (LINES,))
        except UserError:
            if not piped:
                raise
            return LINES  # as `/dev/fd/63`

    def _read_pipe(self) -> Iterator[Any]:
        """Yields number and text of each line, and `PAUSE` where the next has not arrived."""
        number = 0
        with readable(self.name):
            stream = sys.stdin.buffer if self._is_stdin else self._path.open("rb")
            for line in _arriving(stream):
                number += line is not PAUSE
                yield line if line is PAUSE else (number, reading.decode_line(line, number, self.name))

    def texts(self, fields: Fields, bad: BadRecords | None = None) -> Iterator[Any]:
        """Yields the `Text`s of rows or lines, and `PAUSE`. Malformed rows go to `bad`."""
        bad, announced = bad or BadRecords(), False
        if self._texts:
            yield from map(Text, self._texts)
            return
        for entry in self._lines if self.format == LINES else self._rows(bad, fields):
            if entry is PAUSE:
                yield PAUSE
                continue
            place, row = entry
            if self.format == LINES:
                if place == 1 and self._given is None:
                    self._check_first(row, fields)
                yield Text(row.removesuffix("\n"))
                continue
            if not announced:
                found, announced = fields.find(row, "text"), True
                logger.info("%s: read as %s, the texts from %r", self.name, self.format, found)
            with bad.record(place):
                example = make_example(row, "", fields, may_be_empty=True)
                yield Text(example.text, example.pair, example.given_id, is_row=True)

    def requests(self, bad: BadRecords | None = None) -> Iterator[Any]:
        """Yields the place of a question, for messages, and its JSON object; and `PAUSE`."""
        bad, hint = bad or BadRecords(), "this model answers questions, one JSON object per line"
        if not self._texts and self.format not in _BY_LINE:
            if self.format in ("csv", "tsv"):
                raise UserError(f"{self.name}: holds a table, and {hint}")
            yield from self._rows(bad, Fields("question"))
            return
        arguments = ((f"argument {number}", text) for number, text in enumerate(self._texts, 1))
        lines = (x if x is PAUSE else (f"{self.name}:{x[0]}", x[1]) for x in self._lines)
        for entry in arguments if self._texts else lines:
            if entry is PAUSE:
                yield PAUSE
            elif entry[1].strip():
                with bad.record(entry[0]):
                    try:
                        yield entry[0], parse_json(entry[1])
                    except ValueError as error:
                        raise ValueError(f"{error}; {hint}") from error

    def _rows(self, bad: BadRecords, fields: Fields) -> Iterator[Any]:
        if self.format not in _BY_LINE:
            lines = None if self.format == "parquet" else (line for line in self._lines if line is not PAUSE)
            yield from Table(self._path, bad, fields, self.format, lines)
            return
        for line in self._lines:
            if line is PAUSE:
                yield PAUSE
            else:
                yield from Table(self._path, bad, fields, "jsonl", [line])

    def _check_first(self, line: str, fields: Fields) -> None:
        """Raises `UserError` for JSON lines that would be taken for texts."""
        try:
            row = parse_json(line) if line.startswith("{") else None
        except ValueError:
            return
        if isinstance(row, dict) and fields.find(row, "text") in row:
            advice = f"--format jsonl to read its {fields.text!r}, or --format txt to label the line itself"
            raise UserError(f"{self.name}:1: is a JSON object; expected one text per line; add {advice}")


def _arriving(stream: IO[bytes]) -> Iterator[Any]:
    """Yields the lines of a pipe or terminal as they arrive, and `PAUSE` where the next has not arrived."""
    try:
        number = stream.fileno()
    except (OSError, ValueError):  # not a file of the system, as in a notebook
        yield from stream
        return
    rest = b""
    while True:
        try:
            if not select.select([number], [], [], 0)[0]:
                yield PAUSE
        except (OSError, ValueError):  # Windows selects sockets only
            yield from stream
            return
        chunk = os.read(number, 1 << 16)
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line + b"\n" for line in lines)
        if not chunk:
            break
    if rest:
        yield rest


def output_records(
    model: TRBert,
    source: Source,
    fields: Fields,
    bad: BadRecords | None = None,
    with_text: bool = False,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """Yields one JSON object per text or question; in the end warns about texts that were cut or skipped.

    Options are those of `TRBert.predict_stream` or `TRBert.answer_stream`; `with_text` repeats the text, or
    the fields of the question. A record that cannot be read raises `UserError` after the output for those
    before it.
    """
    bad, failed, count = bad or BadRecords(), list[UserError](), 0

    def until_error(entries: Iterator[Any]) -> Iterator[Any]:
        try:
            yield from entries
        except UserError as error:
            failed.append(error)

    if model.config.inputs.data:
        records = _answers(model, until_error(source.requests(bad)), with_text, {**options, "bad": bad})
    else:
        records = _predictions(model, until_error(source.texts(fields, bad)), with_text, options)
    for record in records:
        count += 1
        yield record
    summary = bad.summary(count)
    if failed:
        raise failed[0]
    if not count:
        raise UserError(f"{source.name}: has no usable record; {summary or 'expected texts or questions'}")
    if summary:
        logger.warning("%s: %s", source.name, summary)


def _predictions(
    model: TRBert, texts: Iterator[Any], with_text: bool, options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    waiting = collections.deque[Text]()  # read, but not yet labeled

    def asked() -> Iterator[Any]:
        for text in texts:
            if text is PAUSE:
                yield PAUSE
            else:
                waiting.append(text)
                yield text.text if text.pair is None else (text.text, text.pair)

    count = cut = 0
    for prediction in model.predict_stream(asked(), **options):
        count, cut, text = count + 1, cut + prediction.truncated, waiting.popleft()
        yield {
            **({"id": text.id} if text.is_row else {}),
            **({"text": text.text} if with_text else {}),
            **({"text_pair": text.pair} if with_text and text.pair is not None else {}),
            **prediction_record(prediction, model.config.labels),
        }
    if cut:
        longest = model.config.max_length
        logger.warning("%d of %d texts are longer than %d tokens and were cut", cut, count, longest)


def prediction_record(prediction: Prediction, labels: Sequence[str]) -> dict[str, Any]:
    """Returns the fields of a prediction for JSON."""
    score = dict[str, float]()
    if prediction.label is None:
        score = {"score": float(prediction.scores[0]), "logit": float(prediction.logits[0])}
    return {
        "label": prediction.label,
        "label_id": prediction.label_id,
        **score,
        "scores": dict(zip(labels, prediction.scores.tolist(), strict=True)),
        "kept": [positions.tolist() for positions in prediction.kept],
        "num_tokens": prediction.num_tokens,
        "truncated": prediction.truncated,
    }


def _answers(
    model: TRBert, requests: Iterator[Any], with_text: bool, options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    from trbert_jax.inference.questions import answer_pairs  # imports this module, and JAX

    model.check_use(questions=True)  # before a line is read
    for request, answer in answer_pairs(model, requests, **options):
        yield {**request, **answer} if with_text else answer


# Output -------------------------------------------------------------------------------------------


def check_kind(path: Path | None) -> None:
    """Raises `UserError` for an output whose ending names a kind of file that is not written."""
    if path is not None and path.name.lower().endswith(_NOT_WRITTEN):
        raise UserError(f"{path}: this kind of file is not written; expected .jsonl, .csv or .tsv")


class RecordWriter:
    """Writes objects to a stream: JSON lines or, if `path` ends in `.csv` or `.tsv`, a table with a header.

    In a table the columns are the fields of the first object, `scores` of two classes are the columns
    `score_bad` and `score_good`, and other lists and objects are JSON.
    """

    def __init__(self, stream: Any, path: Path | None) -> None:
        ending = "" if path is None else path.suffix.lower()
        self._stream, self._path = stream, path
        self._writer: csv.DictWriter[str] | None = None
        self._delimiter = {".csv": ",", ".tsv": "\t"}.get(ending)

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes an object. Raises `UserError` for a field that the columns of a table lack."""
        if self._delimiter is None:
            record = {key: value for key, value in record.items() if key != "id" or value is not None}
            self._stream.write(_json(record) + "\n")
            return
        row = dict[str, Any]()
        for key, value in record.items():
            if key == "scores":
                row |= {f"score_{label}": score for label, score in value.items()}
            else:
                row[key] = value if isinstance(value, str | int | float) or value is None else _json(value)
        if self._writer is None:
            options: Any = {"delimiter": self._delimiter, "lineterminator": "\n"}
            self._writer = csv.DictWriter(self._stream, [*row], **options)
            self._writer.writeheader()
        if unknown := row.keys() - {*self._writer.fieldnames}:
            more = f"a record has the field {min(unknown)!r}, which the first record lacks"
            raise UserError(f"{self._path}: {more}; write .jsonl")
        self._writer.writerow(row)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
