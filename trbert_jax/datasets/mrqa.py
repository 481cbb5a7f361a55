"""The format of the MRQA 2019 shared task: JSON lines, plain or gzip-compressed.

A header line, then a line a context: `{"context", "qas": [{"qid", "question", "answers": [str],
"detected_answers": [{"text", "char_spans": [[first, last]]}]}]}`, where the last character belongs
to the answer. Published at https://github.com/mrqa/MRQA-Shared-Task-2019; NewsQA and
NaturalQuestions are read in this form.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trbert_jax.datasets.bad_records import BadRecords
from trbert_jax.datasets.json_files import load_json_lines
from trbert_jax.datasets.json_values import JsonValue
from trbert_jax.datasets.record_list import RecordList
from trbert_jax.datasets.records import Span, SpanQuestion
from trbert_jax.datasets.registry import DataSet, each_split, register_dataset
from trbert_jax.datasets.spans import same_answer, span_of_ends

_FORMAT = 'a header line, then {"context": ..., "qas": [...]} a line'


def read(path: Path, bad: BadRecords, labels: Sequence[str] = ()) -> list[SpanQuestion]:
    """Reads an MRQA file.

    `spans` are all `char_spans` of all detected answers, in order. The first line is taken for a
    header unless it has `context` or `qas`.

    Args:
      path: `.jsonl`, or `.jsonl.gz`.
      bad: what to do about bad records: a line that is not JSON, a missing or repeated id, an empty
        context, offsets outside the context or of another text, ...

    Raises:
      UserError: the file cannot be read (a `.gz` cut short included), has no question, or has a bad
        record that is not skipped.
    """
    records = RecordList[SpanQuestion](path, bad)
    for number, line in enumerate(load_json_lines(path, bad)):
        if number == 0 and not line.has("context") and not line.has("qas"):
            continue
        with bad.record():
            context = line["context"].text()
            for value in line["qas"].items():
                with bad.record():
                    question = make_question(value, context)
                    records.add(question, value)
    return records.finish(_FORMAT)


def make_question(value: JsonValue, context: str) -> SpanQuestion:
    """A question from an item of `qas`.

    Raises:
      BadRecord: a field is missing or wrong.
    """
    question_id = published_id(value)
    value = value.named(f"question {question_id!r}")
    answers = value["answers"].texts()
    impossible = value.has("is_impossible") and value["is_impossible"].flag()
    if impossible and answers:
        raise value["answers"].bad("is_impossible is true, but there are answers; expected none")
    if not impossible and not answers:
        raise value["answers"].bad("is empty; expected at least one answer")
    return SpanQuestion(
        id=question_id,
        question=value["question"].text(),
        context=context,
        spans=() if impossible else detected_spans(value["detected_answers"], context, answers),
        answers=answers,
        impossible=impossible,
        where=value.where,
    )


def published_id(value: JsonValue) -> str:
    """The `qid`, by which the official scorer looks predictions up, or else the `id` of a question."""
    return value["qid" if value.has("qid") or not value.has("id") else "id"].text()


def detected_spans(value: JsonValue, context: str, answers: Sequence[str]) -> tuple[Span, ...]:
    """All `char_spans` of `detected_answers`.

    Where the answer's `text` is given too, the context must have it there or one of the `answers`,
    case, accents, punctuation, articles and white space apart: detection ignored these.

    Raises:
      BadRecord: a span is outside the context, or of another text.
    """
    spans = []
    for answer in value.items():
        texts = (answer["text"].text(), *answers) if answer.has("text") else ()
        for ends in answer["char_spans"].items():
            span = span_of_ends(ends, context)
            found = context[span.start : span.end]
            if texts and not any(same_answer(found, text) for text in texts):
                raise ends.bad(f"the context has {found!r} there; expected the answer {texts[0]!r}")
            spans.append(span)
    return tuple(spans)


for _name, _published in (("newsqa", "NewsQA"), ("naturalqa", "NaturalQuestionsShort")):
    _files = ("{split}.jsonl", f"{{split}}/{_published}.jsonl")
    register_dataset(
        DataSet(
            name=_name,
            task="span",
            style="mrqa",
            read=read,
            files=each_split(*(name for file in _files for name in (file, f"{file}.gz"))),
            dev_as_test=True,
        )
    )
