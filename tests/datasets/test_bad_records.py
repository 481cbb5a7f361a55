"""A mistake in a record is named with file, record and field, and skipping loses that record alone."""

import functools
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_qa_files import SAMPLES, read_sample

from trbert_jax.datasets import BadRecords, reading
from trbert_jax.datasets.reading import BadRecord
from trbert_jax.errors import UserError

Spoil = Callable[[Any], object]


def put(*path: Any) -> Spoil:
    *keys, last, value = path
    return lambda document: operator.setitem(functools.reduce(operator.getitem, keys, document), last, value)


def drop(*path: Any) -> Spoil:
    *keys, last = path
    return lambda document: operator.delitem(functools.reduce(operator.getitem, keys, document), last)


QUESTION = ("data", 1, "paragraphs", 0, "qas", 0)  # of SQuAD
ANSWER = (*QUESTION, "answers", 0)
MRQA = (2, "qas", 0)
CHAR_SPANS = (*MRQA, "detected_answers", 0, "char_spans")
OPTIONS = ("middle/1.txt", "options", 0)
FACT = (0, "supporting_facts", 0)
NODE = (0, "node", 0)
PAGES = ("Data", 0, "EntityPages")  # of TriviaQA
FILE = ("Data", 0, "SearchResults", 0, "Filename")
LISTED = (0, "qas", 0)
# Sample, mistake, place and field that the message names, number of questions that are lost.
MISTAKES: list[tuple[str, Spoil, str, int]] = [
    ("squad", put(*ANSWER, "answer_start", 6), "data[1].paragraphs[0].qas[0] 'q4' answers[0] 'words'", 1),
    ("squad", put(*ANSWER, "text", "word s"), "'q4' answer_start 'word s'", 1),
    ("squad", put(*ANSWER, "text", "Words"), "'q4' answer_start 'Words'", 1),
    ("squad", put(*ANSWER, "answer_start", 11), "'q4' answer_start 11 0 10", 1),
    ("squad", drop(*QUESTION, "id"), "data[1].paragraphs[0].qas[0] id missing", 1),
    ("squad", put(*QUESTION, "id", "q1"), "data[1].paragraphs[0].qas[0] 'q1' data[0]", 1),
    ("squad", put(*QUESTION, "answers", []), "'q4' answers: empty is_impossible", 1),
    ("squad", put(*QUESTION[:-1], 0, []), "data[1].paragraphs[0].qas[0] ([]) 'id'", 1),
    ("squad", put("data", 0, "paragraphs", 0, "context", None), "data[0].paragraphs[0] context: null", 3),
    ("squad", drop("data", 1, "paragraphs"), "data[1] paragraphs missing 'title'", 1),
    ("mrqa", put(*CHAR_SPANS, 0, [2, 5]), ".jsonl:3: 'n3' detected_answers[0] char_spans[0][1] 5 2 4", 1),
    ("mrqa", put(*CHAR_SPANS, 0, [0, 2]), "'n3' char_spans[0] 'a b' 'b c'", 1),
    ("mrqa", put(*CHAR_SPANS, 0, [1, 1]), "'n3' char_spans[0]", 1),
    ("mrqa", put(*CHAR_SPANS, 0, [1]), "'n3' char_spans[0] 1 2", 1),
    ("mrqa", drop(*MRQA, "qid"), ":3: qas[0] qid missing", 1),
    ("mrqa", put(*MRQA, "is_impossible", True), "'n3' is_impossible", 1),
    ("mrqa", drop(*MRQA, "detected_answers"), "'n3' detected_answers missing", 1),
    ("mrqa", drop(1, "context"), ":2: context missing", 2),
    ("mrqa", put(0, {"contxt": "a", "qas": []}), ":1: context missing 'contxt' 'qas'", 0),
    ("race", put(*OPTIONS, ["Al"]), "middle/1.txt question 0 options[0] 1 2 26", 1),
    ("race", put(*OPTIONS, ["Al", "", "Cy", "Di"]), "options[0][1] empty", 1),
    ("race", put("middle/1.txt", "answers", 0, "E"), "question 0 answers[0] 'E' A D", 1),
    ("race", drop("middle/1.txt", "answers"), "middle/1.txt answers missing", 1),
    ("race", put("high/2.txt", "answers", ["A"]), "high/2.txt answers 1 3", 3),
    ("race", put("high/2.txt", "questions", 1, None), "high/2.txt question 1 questions[1] null", 1),
    ("hotpotqa", put(*FACT, ["Nikita", 3]), "[0] 'h1' supporting_facts[0] 3 'Nikita'", 1),
    ("hotpotqa", put(*FACT, ["Nikita", -1]), "'h1' supporting_facts[0][1] -1", 1),
    ("hotpotqa", put(*FACT, ["Subway", 0]), "'h1' supporting_facts[0] 'Subway'", 1),
    ("hotpotqa_fullwiki", put(*FACT, ["Nikita", 3]), "'h1' supporting_facts[0] 3 'Nikita'", 1),
    ("hotpotqa", drop(0, "answer"), "'h1' answer missing", 1),
    ("hotpotqa", put(0, "context", []), "'h1' context", 1),
    ("hotpotqa", put(0, "context", 0, ["Léon"]), "'h1' context[0] 1 2", 1),
    ("hotpotqa", put(0, "context", 0, ["Léon", ["a", 1]]), "'h1' context[0][1][1] (1)", 1),
    ("hotpotqa_graph", put(*NODE, "spans", 0, [0, 5]), ":1: node[0] spans[0][1] 5 0 4", 1),
    ("hotpotqa_graph", put(*NODE, "sent_pos", 1, [2, 6]), "node[0] sent_pos[1][1] 6 2 5", 1),
    ("hotpotqa_graph", put(*NODE, "supp_label", [1]), "node[0] supp_label 1 2", 1),
    ("hotpotqa_graph", put(*NODE, "supp_label", 0, 2), "node[0] supp_label[0] (2)", 1),
    ("hotpotqa_graph", put(1, "node", 1, "has_supp", 0), ":2: node[1] has_supp", 1),
    ("hotpotqa_graph", put(1, "node", []), ":2: node: 0", 1),
    ("hotpotqa_graph", drop(0, "node", 1), ":1: node 1 2", 1),
    ("hotpotqa_graph", put(1, "node", 2, "context", []), "node[2] context: 0", 1),
    ("hotpotqa_graph_dev", put(*NODE, "tok_to_orig_index", [0]), "tok_to_orig_index 1 5", 1),
    ("hotpotqa_graph_dev", put(*NODE, "tok_to_orig_index", 1, 5), "tok_to_orig_index[1] 5 -1 4", 1),
    ("hotpotqa_graph_dev", drop(*NODE, "doc_tokens"), ":1: 'g0' node[0] doc_tokens missing", 1),
    ("triviaqa", put(*PAGES, 0, "Filename", "No.txt"), "'tc_33' Data[0].EntityPages[0] wikipedia/No.txt", 1),
    ("triviaqa", put(*FILE, "../../qa/wikipedia-dev.json"), "Data[0].SearchResults[0] Filename inside", 1),
    ("triviaqa", put(*FILE, "/etc/hostname"), "Data[0].SearchResults[0] Filename inside", 1),
    ("triviaqa", put(*FILE, "a" * 300), "Data[0].SearchResults[0] Filename evidence", 1),
    ("triviaqa", put(*FILE, "a\0"), "Data[0].SearchResults[0] Filename evidence", 1),
    ("triviaqa", put(*PAGES, 1, "Filename", "Lloyd_Webber.txt"), "EntityPages[1] 'tc_33-- EntityPages[0]", 1),
    ("triviaqa", put("Data", 0, "QuestionId", None), "Data[0] QuestionId null", 3),
    ("triviaqa", drop("Data", 1, "Answer"), "Data[1] 'tc_34' Answer missing", 1),
    ("triviaqa_list", put(*LISTED, "detected_answers", 0, "char_spans", 0, [0, 99]), "'t1' [1] 99", 1),
    ("triviaqa_list", put(*LISTED, "answers", ["Tokyo"]), "'t1' answers 'Aliases'", 1),
    ("triviaqa_list", put(*LISTED, "answers", "Aliases", []), "'t1' Aliases empty", 1),
    ("wikihop", put(0, "answer", "spain"), "[0] 'WH_dev_0' answer 'spain' 3 france", 1),
    ("wikihop", put(0, "candidates", 1, "france"), "'WH_dev_0' candidates 'france'", 1),
    ("wikihop", put(0, "candidates", []), "'WH_dev_0' candidates: 0", 1),
    ("wikihop", put(0, "supports", [""]), "'WH_dev_0' supports", 1),
    ("wikihop", drop(0, "answer"), "'WH_dev_0' answer missing", 1),
]


@pytest.mark.parametrize(("name", "spoil", "words", "lost"), MISTAKES)
def test_bad_record(tmp_path: Path, name: str, spoil: Spoil, words: str, lost: int) -> None:
    good = read_sample(name, tmp_path)
    document = SAMPLES[name].fresh()
    spoil(document)
    bad = BadRecords(skip=True)
    remaining = read_sample(name, tmp_path, document, bad)
    (skipped,) = bad.skipped
    assert str(skipped).startswith(str(tmp_path / SAMPLES[name].path))
    for word in words.split():
        assert word in str(skipped)
    assert len(remaining) == len(good) - lost
    assert {question.id for question in remaining} <= {question.id for question in good}
    assert bad.summary(len(remaining)) == f"1 of {len(remaining) + 1} records skipped: {skipped}"
    with pytest.raises(UserError) as caught:
        read_sample(name, tmp_path, document)
    assert str(caught.value).startswith(f"{skipped}; ")
    assert str(caught.value).endswith("--skip-bad-records")


@pytest.mark.parametrize(
    ("check", "value", "words"),
    [
        (reading.text, "half \ud83d of a pair", "Unicode 5"),
        (reading.integer, 5.0, "(5.0) number"),
        (reading.integer, True, "(True) number"),
    ],
)
def test_wrong_fields(check: Callable[[Any, str], Any], value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=r"^x") as caught:
        check({"x": value}, "x")
    for word in words.split():
        assert word in str(caught.value)


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("x"), ValueError("x")])
def test_plain_errors_name_the_record(error: Exception) -> None:
    with pytest.raises(BadRecord, match=r"^f:3: question 'q': .*x"), reading.record("f:3", {"id": "q"}):
        raise error


@pytest.mark.parametrize("error", [AttributeError, NameError, AssertionError, IndexError])
def test_a_mistake_of_the_program_is_no_bad_record(error: type[Exception]) -> None:
    with pytest.raises(error), BadRecords(skip=True).record("f:3"):
        raise error


def test_summary_is_short() -> None:
    bad = BadRecords(skip=True)
    assert bad.summary(5) is None
    for number in range(12):
        bad.add(BadRecord(f"reason {number}."))
    summary = bad.summary(88)
    assert summary is not None
    assert summary.startswith("12 of 100 records skipped: reason 0.; reason 1.; ")
    assert summary.endswith("; reason 9.; and 2 more")
    assert bad.summary(3, start=11) == "1 of 4 records skipped: reason 11."
