"""Reads questions whose answers are spans: SQuAD as published, and the format of the MRQA 2019 shared task.

SQuAD 1.1 and 2.0 (https://rajpurkar.github.io/SQuAD-explorer/) have a JSON file a split, `{"data":
[{"paragraphs": [{"context", "qas": [{"id", "question", "answers": [{"text", "answer_start"}],
"is_impossible"}]}]}]}`; version 1.1 has no `is_impossible`.

MRQA (https://github.com/mrqa/MRQA-Shared-Task-2019), read for NewsQA and NaturalQuestions, has JSON
lines, plain or gzip-compressed: a header, then `{"context", "qas": [{"qid", "question", "answers": [str],
"detected_answers": [{"text", "char_spans": [[first, last]]}]}]}`. The last character belongs to the answer.
"""

import itertools
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from trbert_jax.datasets import reading
from trbert_jax.datasets.reading import BadRecords
from trbert_jax.datasets.records import Span, SpanQuestion, trim_span
from trbert_jax.datasets.registry import DataSet, Reader, each_split, register_dataset

_ARTICLES = frozenset(("a", "an", "the"))


def read_context(
    item: Any, place: str, bad: BadRecords, make: Callable[[Any, str, str], SpanQuestion]
) -> Iterator[SpanQuestion]:
    """Yields the questions of `{"context", "qas"}`. Raises `ValueError` if the context as a whole is bad.

    `place` comes before `qas[0]` in messages; `make` returns a question, given item, context and place.
    """
    context = reading.text(item, "context")
    for i, qa in enumerate(reading.items(item, "qas")):
        with bad.record(f"{place}qas[{i}]", qa):
            yield make(qa, context, f"{place}qas[{i}]")


def read_squad(path: Path, bad: BadRecords, labels: Sequence[str] = ()) -> Iterator[SpanQuestion]:
    """Yields the questions of a file of SQuAD. Ignores `plausible_answers`."""
    for i, article in enumerate(reading.load_records(path, "data")):
        with bad.record(f"{path}: data[{i}]"):
            for k, paragraph in enumerate(reading.items(article, "paragraphs")):
                place = f"{path}: data[{i}].paragraphs[{k}]"
                with bad.record(place):
                    yield from read_context(paragraph, f"{place}.", bad, squad_question)


def squad_question(item: Any, context: str, where: str) -> SpanQuestion:
    """Returns the question of an item of `qas` of SQuAD. Raises `ValueError` if a field is wrong.

    Keeps every answer, in order and with repetitions, as the official scorer expects; each has its span.
    """
    question_id, question = reading.text(item, "id"), reading.text(item, "question")
    impossible = _is_impossible(item)
    answers = reading.each(item, "answers", lambda answer: reading.text(answer, "text"))
    spans = reading.each(item, "answers", lambda answer: _find(answer, context))
    return SpanQuestion(question_id, question, context, spans, answers, impossible, where)


def _is_impossible(item: Any) -> bool:
    """Returns `is_impossible`. Raises `ValueError` unless exactly the impossible questions have no answer."""
    impossible = reading.has(item, "is_impossible") and reading.flag(item, "is_impossible")
    if impossible == bool(reading.items(item, "answers")):
        problem = "is_impossible is true, but the list is not empty" if impossible else "is empty"
        raise ValueError(f"answers: {problem}; expected at least one answer, or is_impossible: true")
    return impossible


def _find(item: Any, context: str) -> Span:
    """Returns the span of an answer. White space may differ: a copied context loses or gains some."""
    answer, start = item["text"], reading.integer(item, "answer_start", 0, len(context) - 1)
    if context.startswith(answer, start):
        end = start + len(answer)
    else:
        words = r"\s+".join(map(re.escape, answer.split()))
        match = re.compile(rf"\s*{words}").match(context, start)
        end = match.end() if match else start
    span = trim_span(context, start, end)
    if span is None:
        found = reading.shorten(context[start : start + 60])
        place = f"the context has {found!r} at character {start}"
        raise ValueError(f"answer_start: {place}; expected the answer {answer!r}")
    return span


def read_mrqa(path: Path, bad: BadRecords, labels: Sequence[str] = ()) -> Iterator[SpanQuestion]:
    """Yields the questions of a file of MRQA. The first line is a header unless it has `context` or `qas`."""
    for i, (number, value) in enumerate(reading.load_json_lines(path, bad)):
        if i or reading.has(value, "context") or reading.has(value, "qas"):
            with bad.record(f"{path}:{number}"):
                yield from read_context(value, f"{path}:{number}: ", bad, mrqa_question)


def mrqa_question(item: Any, context: str, where: str) -> SpanQuestion:
    """Returns the question of an item of `qas` of MRQA. Raises `ValueError` if a field is wrong."""
    question_id, answers = reading.text(item, id_field(item)), reading.texts(item, "answers")
    impossible, question = _is_impossible(item), reading.text(item, "question")
    spans = () if impossible else detected_spans(item, context, answers)
    return SpanQuestion(question_id, question, context, spans, answers, impossible, where)


def id_field(item: Any) -> str:
    """Returns the field of the id: `qid`, by which the official scorer finds predictions, or else `id`."""
    return "qid" if reading.has(item, "qid") or not reading.has(item, "id") else "id"


def detected_spans(item: Any, context: str, answers: Sequence[str]) -> tuple[Span, ...]:
    """Returns all `char_spans` of `detected_answers`, in order.

    If the answer's `text` is given too, the context must have it there, or one of `answers`. Case, accents,
    punctuation, articles and white space may differ: the detection ignored them.
    """

    def spans(answer: Any) -> tuple[Span, ...]:
        expected = (reading.text(answer, "text"), *answers) if reading.has(answer, "text") else ()
        return reading.each(answer, "char_spans", lambda ends: _span(ends, context, expected))

    return tuple(itertools.chain.from_iterable(reading.each(item, "detected_answers", spans)))


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


def register(name: str, style: str, read: Reader, form: str, *files: str) -> None:
    """Registers a data set of span questions in one file a split; without a test set, dev serves as test."""
    by_split = each_split(*files)
    register_dataset(
        DataSet(name=name, task="span", style=style, read=read, format=form, files=by_split, dev_as_test=True)
    )


_SQUAD = '{"data": [{"paragraphs": [{"context": ..., "qas": [...]}]}]}'
_MRQA = 'a header line, then {"context": ..., "qas": [...]} a line'
register("squad", "squad", read_squad, _SQUAD, "{split}-v2.0.json", "{split}-v1.1.json")
for _name, _published in (("newsqa", "NewsQA"), ("naturalqa", "NaturalQuestionsShort")):
    _files = ("{split}", f"{{split}}/{_published}")
    _names = (f"{file}.jsonl{end}" for file in _files for end in ("", ".gz"))
    register(_name, "mrqa", read_mrqa, _MRQA, *_names)
