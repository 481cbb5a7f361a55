"""What `trbert predict` reads and writes: lines in, one JSON object a text or question out."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trbert_jax.errors import UserError
from trbert_jax.inference.text_input import not_blank, read_input, texts_of

if TYPE_CHECKING:
    from trbert_jax.inference.predictor import TRBert

Lines = Iterable[tuple[str, str]]  # place and text
Announce = Callable[[str], Any]


def input_lines(texts: Sequence[str], path: Path | None) -> Lines:
    """The lines of arguments, of a file, or of standard input.

    A missing or empty file shows here, before anything slow is loaded; the rest is read as needed.

    Args:
      texts: arguments; they go before the file.
      path: the file; None reads standard input.

    Raises:
      UserError: see `read_input`.
    """
    if texts:
        return [(f"argument {number}", text) for number, text in enumerate(texts, 1)]
    lines = read_input(path)
    first = next(lines)
    return itertools.chain([first], lines)


def prediction_lines(
    model: TRBert, lines: Lines, path: Path | None, with_text: bool, announce: Announce, **options: Any
) -> Iterator[str]:
    """One JSON object a text, and in the end a word on how many were cut.

    Args:
      model: of texts.
      lines: of `input_lines`.
      path: the file that they are from, if any.
      with_text: whether the text is repeated.
      announce: called with a line of text.
      options: of `TRBert.predict_stream`.
    """
    count = cut = 0
    for prediction in model.predict_stream(texts_of(path, lines), **options):
        count, cut = count + 1, cut + prediction.truncated
        record = {
            **({"text": prediction.text} if with_text else {}),
            "label": prediction.label,
            "label_id": prediction.label_id,
            "scores": dict(zip(model.config.labels, prediction.scores.tolist(), strict=True)),
            "kept": [positions.tolist() for positions in prediction.kept],
            "num_tokens": prediction.num_tokens,
            "truncated": prediction.truncated,
        }
        yield json.dumps(record, ensure_ascii=False)
    if cut:
        announce(f"{cut} of {count} texts are longer than {model.config.max_length} tokens and were cut")


def answer_lines(
    model: TRBert, lines: Lines, path: Path | None, with_text: bool, announce: Announce, **options: Any
) -> Iterator[str]:
    """One JSON object a question; arguments as for `prediction_lines`, `options` of `answer_stream`."""
    from trbert_jax.inference.answering import answer_stream

    # The second holds what is read but not yet answered.
    requests, asked = itertools.tee(_requests(not_blank(lines, str(path or "input"))))
    for answer, (_, request) in zip(answer_stream(model, requests, **options), asked, strict=False):
        yield json.dumps({**request, **answer} if with_text else answer, ensure_ascii=False)


def _requests(lines: Lines) -> Iterator[tuple[str, Any]]:
    for where, line in lines:
        try:
            request = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{where}: not valid JSON ({error}); this model answers questions, a JSON object in each line"
            ) from error
        yield where, request
