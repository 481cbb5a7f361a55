"""Reads questions whose answers are spans: SQuAD as published, and the format of the MRQA 2019 shared task.

SQuAD 1.1 and 2.0 (https://rajpurkar.github.io/SQuAD-explorer/) have a JSON file a split, `{"data":
[{"paragraphs": [{"context", "qas": [{"id", "question", "answers": [{"text", "answer_start"}],
"is_impossible"}]}]}]}`; version 1.1 has no `is_impossible`. Hugging Face's flat form is read too, a list,
one in `data`, or JSON lines: `{"id", "context", "question", "answers": {"text": [], "answer_start": []}}`.

MRQA (https://github.com/mrqa/MRQA-Shared-Task-2019), read for NewsQA and NaturalQuestions, has JSON
lines, plain or gzip-compressed: a header, then `{"context", "qas": [{"qid", "question", "answers": [str],
"detected_answers": [{"text", "char_spans": [[first, last]]}]}]}`. The last character belongs to the answer.
"""

import dataclasses
import itertools
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from trbert_jax.datasets import reading
from trbert_jax.datasets.reading import BadRecords
from trbert_jax.datasets.records import UNSEEN, Span, SpanQuestion, trim, trim_span
from trbert_jax.datasets.registry import DataSet, Reader, each_split, register_dataset

Make = Callable[[Any, str, str], SpanQuestion]  # item, context and place -> question

_ARTICLES = frozenset(("a", "an", "the"))


def read_context(item: Any, place: str, bad: BadRecords, make: Make) -> Iterator[SpanQuestion]:
    """Yields the questions of `{"context", "qas"}`. Raises `ValueError` if the context as a whole is bad.

    `place` comes before `qas[0]` in messages.
    """
    context = reading.text(item, "context")
    for i, qa in enumerate(reading.items(item, "qas")):
        with bad.record(f"{place}qas[{i}]", qa):
            yield make(qa, context, f"{place}qas[{i}]")


def read_squad(path: Path, bad: BadRecords, labels: Sequence[str] = ()) -> Iterator[SpanQuestion]:
    """Yields the questions of a file of SQuAD. Ignores `plausible_answers`.

    A question without an answer is impossible if it says so, or if no question of the file says anything.
    """
    unsaid, said = set[str](), False  # places of lists of answers

    def make(item: Any, context: str, where: str) -> SpanQuestion:
        nonlocal said
        said = said or reading.has(item, "is_impossible")
        if reading.has(item, "answers"):
            unsaid.add(where)
        return squad_question(item, context, where)

    found = list(_squad_questions(path, bad, make))
    yield from known_or_withheld(found, bad, set() if said else unsaid)


def _squad_questions(path: Path, bad: BadRecords, make: Make) -> Iterator[SpanQuestion]:
    for place, item in _squad_items(path, bad):
        with bad.record(place, item):
            if reading.has(item, "qas"):
                yield from read_context(item, f"{place}.", bad, make)
                continue
            if reading.has(item, "context"):
                yield make(item, reading.text(item, "context"), place)
                continue
            for k, paragraph in enumerate(reading.items(item, "paragraphs")):
                inner = f"{place}.paragraphs[{k}]"
                with bad.record(inner):
                    yield from read_context(paragraph, f"{inner}.", bad, make)


def _squad_items(path: Path, bad: BadRecords) -> Iterator[tuple[str, Any]]:
    """Yields the articles of a file, or the questions of its flat form, with their places."""
    if path.name.lower().removesuffix(".gz").endswith((".jsonl", ".ndjson")):
        yield from ((f"{path}:{number}", item) for number, item in reading.load_json_lines(path, bad))
        return
    document = reading.load_json(path)
    key = None if isinstance(document, list) else "data"
    with reading.record(str(path)):
        values = reading.items(document, key)
    yield from ((f"{path}: {key or ''}[{i}]", item) for i, item in enumerate(values))


def squad_question(item: Any, context: str, where: str) -> SpanQuestion:
    """Returns the question of an item of `qas` of SQuAD. Raises `ValueError` if a field is wrong.

    Keeps every answer, in order and with repetitions, as the official scorer expects; each has its span.
    """
    question_id, question = reading.identifier(item, "id"), reading.text(item, "question")
    impossible, given = _is_impossible(item), _given(item)
    answers = reading.each(given, "answers", lambda answer: reading.answer(answer, "text"))
    spans = reading.each(given, "answers", lambda answer: _find(answer, context))
    return SpanQuestion(question_id, question, context, spans, answers, impossible, where)


def _given(item: Any) -> dict[str, Any]:
    """Returns the `answers` of a question as a list, none if they are withheld."""
    if not reading.any_given([item], "answers"):
        return {"answers": []}
    answers = item["answers"]
    if reading.has(answers, "text"):  # Hugging Face's form
        with reading.within("answers"):
            texts = reading.items(answers, "text")
            starts = reading.items(answers, "answer_start", len(texts))
        answers = [{"text": t, "answer_start": s} for t, s in zip(texts, starts, strict=True)]
    return {"answers": answers}


def _is_impossible(item: Any) -> bool:
    """Returns `is_impossible`. Raises `ValueError` if there is an answer all the same."""
    said = reading.has(item, "is_impossible") and item["is_impossible"] is not None
    impossible = said and reading.flag(item, "is_impossible")
    if impossible and _given(item)["answers"]:
        problem = "is_impossible is true, but the list is not empty"
        raise ValueError(f"answers: {problem}; expected no answer, or is_impossible: false")
    return impossible


def known_or_withheld(
    questions: Iterable[SpanQuestion], bad: BadRecords, impossible: Collection[str] = ()
) -> Iterator[SpanQuestion]:
    """Yields the questions of a file, which withholds the answers if no question has one.

    Otherwise a question without an answer is impossible if it says so, or its place is in `impossible`, or
    it is a bad record.
    """
    found = list(questions)
    known = any(question.answers for question in found)
    for question in found:
        if not known or question.answers or question.impossible:
            yield question
        elif question.where in impossible:
            yield dataclasses.replace(question, impossible=True)
        else:
            expected = "expected at least one answer, or is_impossible: true"
            bad.add(reading.unusable(question, "answers", f"is missing or empty; {expected}"))


def _find(item: Any, context: str) -> Span:
    """Returns the span of an answer, which may differ from the context in characters that are not shown."""
    answer, start = item["text"], reading.integer(item, "answer_start", 0, len(context) - 1)
    if context.startswith(answer, start):
        end = start + len(answer)
    else:
        words = r"\s+".join(map(re.escape, trim(answer).split()))
        match = re.compile(rf"(?:{UNSEEN})?{words}").match(context, start)
        end = match.end() if match else start
    span = trim_span(context, start, end)
    if span is None:
        found = reading.shorten(context[start : start + 60])
        place = f"the context has {found!r} at character {start}"
        raise ValueError(f"answer_start: {place}; expected the answer {answer!r}")
    return span


def read_mrqa(path: Path, bad: BadRecords, labels: Sequence[str] = ()) -> Iterator[SpanQuestion]:
    """Yields the questions of a file of MRQA. The first line is a header unless it has `context` or `qas`."""
    yield from known_or_withheld(_mrqa_questions(path, bad), bad)


def _mrqa_questions(path: Path, bad: BadRecords) -> Iterator[SpanQuestion]:
    for i, (number, value) in enumerate(reading.load_json_lines(path, bad)):
        if i or reading.has(value, "context") or reading.has(value, "qas"):
            with bad.record(f"{path}:{number}"):
                yield from read_context(value, f"{path}:{number}: ", bad, mrqa_question)


def mrqa_question(item: Any, context: str, where: str) -> SpanQuestion:
    """Returns the question of an item of `qas` of MRQA. Raises `ValueError` if a field is wrong."""
    question_id, question = reading.identifier(item, id_field(item)), reading.text(item, "question")
    impossible, given = _is_impossible(item), _given(item)
    answers = tuple(trim(text) or text for text in reading.texts(given, "answers"))
    spans = detected_spans(item, context, answers) if answers else ()
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


_SQUAD = '{"data": [{"paragraphs": [{"context": ..., "qas": [...]}]}]}, or {"data": [{"context": ...}]}'
_SQUAD_FILES = ("{split}-v2.0.json", "{split}-v1.1.json", "{split}.json", "{split}.jsonl")
_MRQA = 'a header line, then {"context": ..., "qas": [...]} a line'
register("squad", "squad", read_squad, _SQUAD, *_SQUAD_FILES)
register("mrqa", "mrqa", read_mrqa, _MRQA, "{split}.jsonl", "{split}.jsonl.gz")
for _name, _published in (("newsqa", "NewsQA"), ("naturalqa", "NaturalQuestionsShort")):
    _files = ("{split}", f"{{split}}/{_published}")
    _names = (f"{file}.jsonl{end}" for file in _files for end in ("", ".gz"))
    register(_name, "mrqa", read_mrqa, _MRQA, *_names)
