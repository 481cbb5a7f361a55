"""Reads SQuAD 1.1 and 2.0 as published: one JSON file a split.

`{"data": [{"paragraphs": [{"context", "qas": [{"id", "question", "answers": [{"text",
"answer_start"}], "is_impossible"}]}]}]}`; version 1.1 has no `is_impossible`. Published at
https://rajpurkar.github.io/SQuAD-explorer/.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trbert_jax.datasets import reading
from trbert_jax.datasets.reading import BadRecords
from trbert_jax.datasets.records import Span, SpanQuestion, trim_span
from trbert_jax.datasets.registry import DataSet, each_split, register_dataset


def read(path: Path, bad: BadRecords, labels: Sequence[str] = ()) -> Iterator[SpanQuestion]:
    """Yields the questions of a file.

    Keeps every answer of a question, in order and with repetitions, as the official scorer expects them;
    `spans` and `answers` correspond. Ignores `plausible_answers`.
    """
    with reading.record(str(path)):
        articles = reading.items(reading.load_json(path), "data")
    for i, article in enumerate(articles):
        with bad.record(f"{path}: data[{i}]"):
            for j, paragraph in enumerate(reading.items(article, "paragraphs")):
                place = f"{path}: data[{i}].paragraphs[{j}]"
                with bad.record(place):
                    context = reading.text(paragraph, "context")
                    for k, item in enumerate(reading.items(paragraph, "qas")):
                        with bad.record(f"{place}.qas[{k}]", item):
                            yield make_question(item, context, f"{place}.qas[{k}]")


def make_question(item: Any, context: str, where: str) -> SpanQuestion:
    """Returns the question of an item of `qas`. Raises `ValueError` if a field is missing or wrong."""
    question_id = reading.text(item, "id")
    impossible = reading.has(item, "is_impossible") and reading.flag(item, "is_impossible")
    spans, answers = [], []
    for i, answer in enumerate(reading.items(item, "answers")):
        with reading.within(f"answers[{i}]"):
            answers.append(reading.text(answer, "text"))
            start = reading.integer(answer, "answer_start", 0, len(context) - 1)
            spans.append(_find(answers[-1], start, context))
    check_impossible(impossible, answers)
    question = reading.text(item, "question")
    return SpanQuestion(question_id, question, context, tuple(spans), tuple(answers), impossible, where)


def check_impossible(impossible: bool, answers: Sequence[str]) -> None:
    """Raises `ValueError` unless exactly the impossible questions have no answer."""
    if impossible and answers:
        raise ValueError("answers: is_impossible is true, but the list is not empty")
    if not impossible and not answers:
        raise ValueError("answers: is empty; expected at least one answer, or is_impossible: true")


def _find(answer: str, start: int, context: str) -> Span:
    """Returns the span of an answer without white space at its ends.

    White space may differ in kind and length: a context loses or gains some when it is copied.
    """
    if context.startswith(answer, start):
        end = start + len(answer)
    else:
        words = r"\s+".join(map(re.escape, answer.split()))
        match = re.compile(rf"\s*{words}").match(context, start)
        end = match.end() if match else start
    span = trim_span(context, start, end)
    if span is None:
        found = reading.shorten(context[start : start + 60])
        raise ValueError(
            f"answer_start: the context has {found!r} at character {start}; expected the answer {answer!r}"
        )
    return span


register_dataset(
    DataSet(
        name="squad",
        task="span",
        style="squad",
        read=read,
        format='{"data": [{"paragraphs": [{"context": ..., "qas": [...]}]}]}',
        files=each_split("{split}-v2.0.json", "{split}-v1.1.json"),
        dev_as_test=True,
    )
)
