"""Records as TensorFlow Datasets gives them (bytes, NumPy, sequences of records as records of sequences)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from trbert_jax.datasets import BadRecords
from trbert_jax.datasets.records import ChoiceQuestion, Span, SpanQuestion
from trbert_jax.datasets.tfds_records import convert
from trbert_jax.errors import UserError

CONTEXT = "Zürich, not 東京.".encode()
NOTHING: dict[str, list[Any]] = {"text": [], "answer_start": []}
SQUAD = {
    "id": b"q1",
    "title": b"Cities",
    "context": CONTEXT,
    "question": b"Which?",
    "plausible_answers": NOTHING,
    "is_impossible": False,
    "answers": {"text": ["東京".encode(), b"Z\xc3\xbcrich"], "answer_start": [np.int32(12), np.int32(0)]},
}
IMPOSSIBLE: dict[str, Any] = {**SQUAD, "id": b"q2", "is_impossible": True, "answers": NOTHING}
MRQA = {
    "subset": b"NewsQA",
    "context": CONTEXT,
    "context_tokens": {"tokens": [], "offsets": []},
    "qid": b"n1",
    "question": b"Which?",
    "detected_answers": {
        "text": ["東京".encode(), b"Z\xc3\xbcrich"],
        "char_spans": {
            "start": [np.array([12], np.int32), np.array([0, 0], np.int32)],
            "end": [np.array([13], np.int32), np.array([5, 5], np.int32)],
        },
        "token_spans": {"start": [], "end": []},
    },
    "answers": np.array(["東京".encode(), b"zurich"], object),
}
RACE = {
    "article": "Élodie reads.".encode(),
    "questions": [b"Who?", b"_"],
    "answers": [b"D", b"A"],
    "options": [np.array([b"a", b"b", b"c", b"d"], object), np.array([b"e", b"f", b"g", b"h"], object)],
    "example_id": b"middle17.txt",
}
TRIVIA: dict[str, Any] = {
    "question": b"Which city?",
    "question_id": b"tc_1",
    "question_source": b"",
    "entity_pages": {
        "doc_source": [b"TagMe"],
        "filename": ["Zürich.txt".encode()],
        "title": [b""],
        "wiki_context": ["Zürich, the Zürich".encode()],
    },
    "search_results": {
        "description": [b"", b""],
        "filename": [b"1/1_2.txt", b"1/1_3.txt"],
        "rank": np.array([0, 1], np.int32),
        "title": [b"", b""],
        "url": [b"", b""],
        "search_context": [b"none", "ZÜRICH".encode()],
    },
    "answer": {
        "aliases": ["Zürich".encode()],
        "normalized_aliases": ["zürich".encode()],
        "matched_wiki_entity_name": b"",
        "normalized_matched_wiki_entity_name": b"",
        "normalized_value": b"",
        "type": b"",
        "value": "Zürich".encode(),
    },
}


def read(name: str, *records: Any, bad: BadRecords | None = None) -> Any:
    return convert(name, "train", records, BadRecords() if bad is None else bad)


@pytest.mark.parametrize("name", ["squad/v2.0", "squad/v2.0:3.0.0", "squad"])
def test_squad(name: str) -> None:
    first, second = read(name, SQUAD, IMPOSSIBLE)
    assert first == SpanQuestion(
        id="q1",
        question="Which?",
        context="Zürich, not 東京.",
        spans=(Span(12, 14), Span(0, 6)),
        answers=("東京", "Zürich"),
        impossible=False,
        where=f"tfds:{name}: train example 0",
    )
    assert (second.impossible, second.spans, second.answers) == (True, (), ())


def test_squad_1() -> None:
    (question,) = read("squad/v1.1", {key: value for key, value in SQUAD.items() if key != "is_impossible"})
    assert (question.impossible, len(question.answers)) == (False, 2)


def test_mrqa() -> None:
    (question,) = read("mrqa/news_qa", MRQA)
    assert question.id == "n1"
    assert question.answers == ("東京", "zurich")
    assert question.spans == (Span(12, 14), Span(0, 6), Span(0, 6))


def test_race() -> None:
    empty = {**RACE, "example_id": b"high1.txt", "questions": [], "answers": [], "options": []}
    questions = read("race/middle", RACE, empty)
    assert questions[0] == ChoiceQuestion(
        id="middle/17.txt:0",
        article="Élodie reads.",
        question="Who?",
        options=("a", "b", "c", "d"),
        answer=3,
        where="tfds:race/middle: train example 0: questions[0]",
    )
    assert [(q.id, q.answer) for q in questions[1:]] == [("middle/17.txt:1", 0)]


def test_trivia_qa() -> None:
    questions = read("trivia_qa/rc", TRIVIA, TRIVIA)  # once in the web part, once in the Wikipedia part
    assert [q.id for q in questions] == ["tc_1--Zürich.txt", "tc_1--1/1_2.txt", "tc_1--1/1_3.txt"]
    assert [q.spans for q in questions] == [(Span(0, 6), Span(12, 18)), (), (Span(0, 6),)]
    assert {q.answers for q in questions} == {("zürich",)}


def test_trivia_qa_without_answers() -> None:
    answer = {**TRIVIA["answer"], "aliases": [], "normalized_aliases": [], "value": b"<unk>"}
    for question in read("trivia_qa/rc", {**TRIVIA, "answer": answer}):
        assert (question.answers, question.spans) == ((), ())


TWO = {"text": [b"a"], "answer_start": [0, 1]}


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        ("squad/v2.0", {**SQUAD, "context": b"\xe9"}, r"context: is not UTF-8 \(byte 0\); expected a text"),
        (
            "squad/v2.0",
            {**SQUAD, "answers": TWO},
            "answers: has 1 and 2 items a field; expected as many in each",
        ),
        ("squad/v2.0", {**SQUAD, "context": b" " * 40}, "context: is empty; expected a text"),
        (
            "squad/v2.0",
            {**SQUAD, "context": b"a" * 40},
            "question 'q1': .*at character 12; expected the answer",
        ),
        ("squad/v2.0", RACE, "id: missing"),
        (
            "mrqa/x",
            {**MRQA, "context": b"a" * 40},
            r"question 'n1': .*char_spans\[0\]: the context has 'aa' there",
        ),
        (
            "race/high",
            {**RACE, "options": [[b"a"], [b"b"]]},
            r"question 0: options\[0\]: has 1 items; expected 4",
        ),
        (
            "race/high",
            {**RACE, "answers": [b"A", b"F"]},
            r"question 1: answers\[1\]: is 'F'; expected a letter",
        ),
        (
            "trivia_qa/rc",
            {**TRIVIA, "answer": {"value": b"x", "normalized_aliases": []}},
            "question 'tc_1': answer.normalized_aliases: is empty; expected at least one alias",
        ),
        (
            "trivia_qa/rc",
            {**TRIVIA, "entity_pages": {"filename": [b"f"], "wiki_context": [b""]}},
            r"question 'tc_1': entity_pages\[0\].wiki_context: is empty; expected a text",
        ),
    ],
)
def test_bad_records(name: str, record: Any, message: str) -> None:
    with pytest.raises(UserError, match=rf"^tfds:{name}: train example 1: .*{message}"):
        read(
            name,
            {"squad": IMPOSSIBLE, "mrqa": MRQA, "race": RACE, "trivia_qa": TRIVIA}[name.split("/")[0]],
            record,
        )


def test_repeated_ids() -> None:
    other = {**SQUAD, "question": b"Which other?"}
    with pytest.raises(
        UserError, match=r"has the id 'q1', which is also that of tfds:squad/v2\.0: train example 0"
    ):
        read("squad/v2.0", SQUAD, SQUAD)
    bad = BadRecords(skip=True)
    assert len(read("squad/v2.0", SQUAD, other, IMPOSSIBLE, bad=bad)) == 2
    assert [skipped.place.file for skipped in bad.skipped] == ["tfds:squad/v2.0: train example 1"]
    changed = {**TRIVIA, "question": b"Which?"}
    with pytest.raises(UserError, match=r"has the id 'tc_1--Zürich\.txt', which is also that of"):
        read("trivia_qa/rc", TRIVIA, changed)


def test_unknown_data_set() -> None:
    with pytest.raises(
        UserError, match=r"tfds:coqa: no question answering .*; expected one of squad, mrqa, race"
    ):
        read("coqa", SQUAD)
    with pytest.raises(UserError, match=r"tfds:squad/v2\.0: train: has no usable record"):
        read("squad/v2.0")
