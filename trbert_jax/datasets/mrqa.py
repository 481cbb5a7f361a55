"""Reads the format of the MRQA 2019 shared task: JSON lines, plain or gzip-compressed.

A header line, then one line a context: `{"context", "qas": [{"qid", "question", "answers": [str],
"detected_answers": [{"text", "char_spans": [[first, last]]}]}]}`, where the last character belongs to
the answer. Published at https://github.com/mrqa/MRQA-Shared-Task-2019. NewsQA and NaturalQuestions are
read in this form.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trbert_jax.datasets import reading
from trbert_jax.datasets.reading import BadRecords
from trbert_jax.datasets.records import Span, SpanQuestion, trim_span
from trbert_jax.datasets.registry import DataSet, each_split, register_dataset
from trbert_jax.datasets.squad import check_impossible

_ARTICLES = frozenset(("a", "an", "the"))


def read(path: Path, bad: BadRecords, labels: Sequence[str] = ()) -> Iterator[SpanQuestion]:
    """Yields the questions of a file. The first line is a header unless it has `context` or `qas`."""
    for i, (number, value) in enumerate(reading.load_json_lines(path, bad)):
        if i == 0 and not reading.has(value, "context") and not reading.has(value, "qas"):
            continue
        with bad.record(f"{path}:{number}"):
            context = reading.text(value, "context")
            for k, item in enumerate(reading.items(value, "qas")):
                where = f"{path}:{number}: qas[{k}]"
                with bad.record(where, item, id_field(item)):
                    yield make_question(item, context, where)


def make_question(item: Any, context: str, where: str) -> SpanQuestion:
    """Returns the question of an item of `qas`. Raises `ValueError` if a field is missing or wrong."""
    question_id, answers = reading.text(item, id_field(item)), reading.texts(item, "answers")
    impossible = reading.has(item, "is_impossible") and reading.flag(item, "is_impossible")
    check_impossible(impossible, answers)
    question = reading.text(item, "question")
    spans = () if impossible else detected_spans(item, context, answers)
    return SpanQuestion(question_id, question, context, spans, answers, impossible, where)


def id_field(item: Any) -> str:
    """Returns the field of the id: `qid`, by which the official scorer finds predictions, or else `id`."""
    return "qid" if reading.has(item, "qid") or not reading.has(item, "id") else "id"


def detected_spans(item: Any, context: str, answers: Sequence[str]) -> tuple[Span, ...]:
    """Returns all `char_spans` of `detected_answers`, in order.

    If the answer's `text` is given too, the context must have it there, or one of `answers`. Case, accents,
    punctuation, articles and white space may differ: the detection ignored them.

    Raises:
      ValueError: a span is outside the context, or of another text.
    """
    spans = []
    for i, answer in enumerate(reading.items(item, "detected_answers")):
        with reading.within(f"detected_answers[{i}]"):
            expected = (reading.text(answer, "text"), *answers) if reading.has(answer, "text") else ()
            for k, ends in enumerate(reading.items(answer, "char_spans")):
                with reading.within(f"char_spans[{k}]"):
                    spans.append(_span(ends, context, expected))
    return tuple(spans)


def _span(ends: Any, context: str, expected: Sequence[str]) -> Span:
    reading.items(ends, count=2)
    start = reading.integer(ends, 0, 0, len(context) - 1)
    span = trim_span(context, start, reading.integer(ends, 1, start, len(context) - 1) + 1)
    if span is None:
        raise ValueError("is nothing but white space of the context; expected the answer")
    found = context[span.start : span.end]
    if expected and not any(same_answer(found, answer) for answer in expected):
        raise ValueError(f"the context has {found!r} there; expected the answer {expected[0]!r}")
    return span


def same_answer(one: str, other: str) -> bool:
    """Returns whether two texts differ at most in case, accents, punctuation, articles and white space."""
    return _essence(one) == _essence(other)


def _essence(answer: str) -> str:
    decomposed = unicodedata.normalize("NFKD", answer.casefold())
    plain = "".join(c for c in decomposed if not unicodedata.combining(c))
    return "".join(word for word in re.findall(r"\w+", plain) if word not in _ARTICLES)


def _register(name: str, published: str) -> None:
    files = (
        "{split}.jsonl",
        "{split}.jsonl.gz",
        f"{{split}}/{published}.jsonl",
        f"{{split}}/{published}.jsonl.gz",
    )
    register_dataset(
        DataSet(
            name=name,
            task="span",
            style="mrqa",
            read=read,
            format='a header line, then {"context": ..., "qas": [...]} a line',
            files=each_split(*files),
            dev_as_test=True,
        )
    )


_register("newsqa", "NewsQA")
_register("naturalqa", "NaturalQuestionsShort")
