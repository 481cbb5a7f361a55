"""Read the inputs of a page: the records of its rows, their answers, and the characters of their tokens."""

from typing import Any

import numpy as np
import numpy.typing as npt

from trbert_jax.inference.outputs import Outputs
from trbert_jax.inference.predictor import TRBert
from trbert_jax.tasks.examples import Examples
from trbert_jax.tasks.text_encoder import TextEncoder
from trbert_jax.tasks.windows import Windows

Array = npt.NDArray[Any]

_SNIPPET = 90  # characters of a text in a list


def owner_of(model: TRBert, examples: Examples) -> Array:
    """Returns the record of each row, int [R]."""
    return examples.layout.question if model.answers_questions else np.arange(len(examples))


def answers(model: TRBert, examples: Examples, outputs: Outputs) -> list[dict[str, Any]]:
    """Returns the `answer` to each record, its `score`, and of a span its characters; in order."""
    if not model.answers_questions:
        return [
            {"answer": model.config.labels[row.argmax()], "score": round(float(row.max()), 4)}
            for row in outputs.probabilities
        ]
    found = model.task.answers(examples, outputs.logits)
    fields = ("answer", "score", "start", "end")
    answers = [found[record.id] for record in examples.records]
    return [
        {key: round(x[key], 4) if key == "score" else x[key] for key in fields if key in x} for x in answers
    ]


def right(model: TRBert, record: Any) -> list[str] | None:
    """Returns the right answers of a record, None if they are not known; [""]: that there is none."""
    if not model.answers_questions:
        return None if record.label < 0 else [model.config.labels[record.label]]
    return [*record.answers] if record.answers else [""] if record.impossible else None


def characters(encoder: TextEncoder, examples: Examples, row: int) -> tuple[list[str], list[list[int]], int]:
    """Returns the texts that a row was made of, the characters of its tokens, and where the last text begins.

    The texts are those of the record, or question and part of a context. The characters of a token are
    [number of the text, start, end], of a special one [-1, 0, 0].
    """
    special = [-1, 0, 0]
    if not isinstance(examples.layout, Windows):
        record, first, last = examples.records[row], *examples.offsets[row : row + 2]
        texts = [record.text] if record.pair is None else [record.text, record.pair]
        types = np.zeros(last - first, np.int8)
        if examples.token_types is not None:
            types = examples.token_types[first:last]
        counts = [int((types == k).sum()) - (2 if k == 0 else 1) for k in range(len(texts))]
        at = [special]
        for k, pieces in enumerate(encoder.encode(texts, chars=True, max_tokens=len(types)).chars):
            at += [[k, int(a), int(b)] for a, b in pieces[: counts[k]]] + [special]
        return texts, at, 0
    windows = examples.layout
    number, size, piece = windows.question[row], windows.num_pieces[row], windows.first_piece[row]
    asked = examples.records[number].question
    pieces = windows.chars[windows.context_index[number]][piece : piece + size]
    begin, end = int(pieces[0, 0]), int(pieces[-1, 1])
    longest = int(windows.context_start[row]) - 2
    query = encoder.encode([asked], chars=True, max_tokens=longest).chars[0]
    at = [special, *([0, int(a), int(b)] for a, b in query), special]
    at += [[1, int(a) - begin, int(b) - begin] for a, b in pieces] + [special]
    return [asked, windows.texts[number][begin:end]], at, begin


def snippet(text: str) -> str:
    """Returns the beginning of a text on one line."""
    text = " ".join(text[: 4 * _SNIPPET].split())
    return text if len(text) <= _SNIPPET else text[: _SNIPPET - 1] + "…"
