"""Read texts and questions line by line, and write predictions and answers as JSON lines.

Reads lines as they are needed, so that a file of any size fits into memory.
"""

from __future__ import annotations

import itertools
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trbert_jax.datasets.reading import decode_lines, read_lines
from trbert_jax.errors import UserError
from trbert_jax.io import check_unicode, parse_json

if TYPE_CHECKING:
    from trbert_jax.inference.predictor import Prediction, TRBert

logger = logging.getLogger(__name__)

Lines = Iterator[tuple[str, str]]  # place for messages, and text


def input_lines(texts: Sequence[str], path: Path | None) -> Lines:
    """Returns `texts`, the arguments; without any, the lines of a file, or of standard input.

    A line ends at a line feed only. Leaves out blank lines of a `.jsonl` file, as `trbert evaluate` does.
    Reads the first line at once, so that a missing or empty file fails before anything slow is loaded.
    Raises `UserError` for a missing, unreadable or empty file, or a `.jsonl` file of blank lines.
    """
    if texts:
        return ((f"argument {number}", text) for number, text in enumerate(texts, 1))
    name = str(path or "standard input")
    lines = _lines(path, name)
    if name.endswith(".jsonl"):
        lines = _not_blank(lines, name)
    return itertools.chain([next(lines)], lines)


def _lines(path: Path | None, name: str) -> Lines:
    number = 0
    for number, line in read_lines(path) if path else decode_lines(sys.stdin.buffer, name):
        yield f"{name}:{number}", line.removesuffix("\n")
    if not number:
        raise UserError(f"{name}: is empty; expected one text per line")


def _not_blank(lines: Lines, name: str) -> Lines:
    found = False
    for where, line in lines:
        if line.strip():
            found = True
            yield where, line
    if not found:
        raise UserError(f"{name}: has only blank lines; expected one JSON object per line")


def read_texts(lines: Lines, path: Path | None) -> Iterator[str]:
    """Yields the texts of lines: themselves, or `text` of the objects of a `.jsonl` file.

    Raises `UserError` for a malformed line; names it.
    """
    for where, line in lines:
        text: Any = line
        if str(path).endswith(".jsonl"):
            record = _parse(where, line, "expected one object per line")
            text = record.get("text") if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise UserError(f'{where}: expected an object with a string "text"')
            try:
                check_unicode(text)
            except ValueError as error:
                raise UserError(f"{where}: text {error}") from error
        yield text


def _parse(where: str, line: str, expected: str) -> Any:
    try:
        return parse_json(line)
    except ValueError as error:
        raise UserError(f"{where}: {error}; {expected}") from error


def output_lines(
    model: TRBert, lines: Lines, path: Path | None, with_text: bool = False, **options: Any
) -> Iterator[str]:
    """Returns one JSON object per text or question; in the end warns about texts that were cut.

    Takes lines from `input_lines` and their file, if any, and the options of `TRBert.predict_stream` or
    `TRBert.answer_stream`; `with_text` repeats the text, or the fields of the question.
    """
    if model.config.inputs.data:
        return _answers(model, _not_blank(lines, str(path or "input")), with_text, options)
    return _predictions(model, read_texts(lines, path), with_text, options)


def _predictions(
    model: TRBert, texts: Iterator[str], with_text: bool, options: dict[str, Any]
) -> Iterator[str]:
    count = cut = 0
    for prediction in model.predict_stream(texts, **options):
        count, cut = count + 1, cut + prediction.truncated
        record = {
            **({"text": prediction.text} if with_text else {}),
            "label": prediction.label,
            "label_id": prediction.label_id,
            **(_score(prediction) if prediction.label is None else {}),
            "scores": dict(zip(model.config.labels, prediction.scores.tolist(), strict=True)),
            "kept": [positions.tolist() for positions in prediction.kept],
            "num_tokens": prediction.num_tokens,
            "truncated": prediction.truncated,
        }
        yield json.dumps(record, ensure_ascii=False)
    if cut:
        longest = model.config.max_length
        logger.warning("%d of %d texts are longer than %d tokens and were cut", cut, count, longest)


def _score(prediction: Prediction) -> dict[str, float]:
    return {"score": float(prediction.scores[0]), "logit": float(prediction.logits[0])}


def _answers(model: TRBert, lines: Lines, with_text: bool, options: dict[str, Any]) -> Iterator[str]:
    model.check_use(questions=True)  # before a line is read
    hint = "this model answers questions, one JSON object per line"
    # The second iterator holds the questions that are read but not yet answered.
    requests, asked = itertools.tee((where, _parse(where, line, hint)) for where, line in lines)
    for answer, (_, request) in zip(model.answer_stream(requests, **options), asked, strict=False):
        yield json.dumps({**request, **answer} if with_text else answer, ensure_ascii=False)
