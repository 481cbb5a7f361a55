"""SQuAD 1.1 and 2.0 as published: one JSON file a split.

`{"data": [{"paragraphs": [{"context", "qas": [{"id", "question", "answers": [{"text",
"answer_start"}], "is_impossible"}]}]}]}`; version 1.1 has no `is_impossible`. Published at
https://rajpurkar.github.io/SQuAD-explorer/.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trbert_jax.datasets.bad_records import BadRecords
from trbert_jax.datasets.json_files import load_json
from trbert_jax.datasets.json_values import JsonValue
from trbert_jax.datasets.record_list import RecordList
from trbert_jax.datasets.records import Span, SpanQuestion
from trbert_jax.datasets.registry import DataSet, each_split, register_dataset
from trbert_jax.datasets.spans import excerpt, span_of_text

_FORMAT = '{"data": [{"paragraphs": [{"context": ..., "qas": [...]}]}]}'


def read(path: Path, bad: BadRecords, labels: Sequence[str] = ()) -> list[SpanQuestion]:
    """Reads a file of SQuAD 1.1 or 2.0.

    Every answer of a question is kept, in order and with repetitions, as the official scorer wants
    them; `spans` and `answers` correspond. `plausible_answers` are ignored.

    Args:
      path: the JSON file.
      bad: what to do about bad records: an answer that is not at its offset (white space apart), a
        missing or repeated id, an empty context, no answer though not impossible, ...

    Raises:
      UserError: the file cannot be read, has no question, or has a bad record that is not skipped.
    """
    records = RecordList[SpanQuestion](path, bad)
    for article in load_json(path)["data"].items():
        with bad.record():
            for paragraph in article["paragraphs"].items():
                with bad.record():
                    context = paragraph["context"].text()
                    for value in paragraph["qas"].items():
                        with bad.record():
                            question = make_question(value, context)
                            records.add(question, value)
    return records.finish(_FORMAT)


def make_question(value: JsonValue, context: str) -> SpanQuestion:
    """A question from an item of `qas`.

    Raises:
      BadRecord: a field is missing or wrong.
    """
    question_id = value["id"].text()
    value = value.named(f"question {question_id!r}")
    impossible = value.has("is_impossible") and value["is_impossible"].flag()
    published = value["answers"]
    answers = [_answer(item, context) for item in published.items()]
    if impossible and answers:
        raise published.bad("is_impossible is true, but there are answers; expected none")
    if not impossible and not answers:
        raise published.bad("is empty; expected at least one answer, or is_impossible: true")
    return SpanQuestion(
        id=question_id,
        question=value["question"].text(),
        context=context,
        spans=tuple(span for span, _ in answers),
        answers=tuple(text for _, text in answers),
        impossible=impossible,
        where=value.where,
    )


def _answer(value: JsonValue, context: str) -> tuple[Span, str]:
    text = value["text"].text()
    offset = value["answer_start"]
    start = offset.integer(0, len(context) - 1)
    span = span_of_text(context, start, text)
    if span is None:
        raise offset.bad(
            f"the context has {excerpt(context, start)} at character {start}; expected the answer {text!r}"
        )
    return span, text


register_dataset(
    DataSet(
        name="squad",
        task="span",
        style="squad",
        read=read,
        files=each_split("{split}-v2.0.json", "{split}-v1.1.json"),
        dev_as_test=True,
    )
)
