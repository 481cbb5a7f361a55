"""Every mistake in a record is named with file, record and field; `skip` leaves out that record alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_qa_files import SAMPLES, read_sample

from trbert_jax.datasets import BadRecord, BadRecords
from trbert_jax.datasets.bad_records import Place
from trbert_jax.errors import UserError

Spoil = Callable[[Any], object]


def put(*path: Any) -> Spoil:
    """Sets what the path leads to; its last item is the value."""
    *keys, last, value = path

    def spoil(document: Any) -> None:
        for key in keys:
            document = document[key]
        document[last] = value

    return spoil


def drop(*path: Any) -> Spoil:
    *keys, last = path

    def spoil(document: Any) -> None:
        for key in keys:
            document = document[key]
        del document[last]

    return spoil


FIRST, OTHER = ("data", 0, "paragraphs", 0), ("data", 1, "paragraphs", 0)  # of SQuAD
QUESTION = (*OTHER, "qas", 0)
AT_SQUAD = r"data\[1\].paragraphs\[0\].qas\[0\]"
LONE = "half \ud83d of a pair"
TEXT = r"expected a text$"
# Format, mistake, what is said of it, how many of the questions are lost.
# fmt: off
MISTAKES: list[tuple[str, Spoil, str, int]] = [
    ("squad", put(*QUESTION, "answers", 0, "answer_start", 6),
     rf": question 'q4': {AT_SQUAD}.answers\[0\].answer_start: the context has 'ords.' at character "
     rf"6; expected the answer 'words'$", 1),
    ("squad", put(*QUESTION, "answers", 0, "text", "word s"),
     rf"{AT_SQUAD}.answers\[0\].answer_start: the context has", 1),
    ("squad", put(*QUESTION, "answers", 0, "text", "Words"), "expected the answer 'Words'$", 1),
    ("squad", put(*QUESTION, "answers", 0, "text", " "), r"answers\[0\].text: is empty; expected a text$", 1),
    ("squad", put(*QUESTION, "answers", 0, "answer_start", -1),
     "is -1; expected a whole number from 0 to 10$", 1),
    ("squad", put(*QUESTION, "answers", 0, "answer_start", 11),
     "is 11; expected a whole number from 0 to 10$", 1),
    ("squad", put(*QUESTION, "answers", 0, "answer_start", 5.0),
     r"is a fraction \(5.0\); expected a whole number", 1),
    ("squad", put(*QUESTION, "answers", 0, "answer_start", True),
     r"is true or false \(True\); expected a whole", 1),
    ("squad", drop(*QUESTION, "answers", 0, "answer_start"),
     r"answer_start: missing \(the fields are: 'text'\)$", 1),
    ("squad", drop(*QUESTION, "id"),
     rf"{AT_SQUAD}.id: missing \(the fields are: 'question', 'answers'\)$", 1),
    ("squad", put(*QUESTION, "id", 4), rf"{AT_SQUAD}.id: is a number \(4\); {TEXT}", 1),
    ("squad", put(*QUESTION, "id", "q1"),
     rf"{AT_SQUAD}: has the id 'q1', which is also that of .*: data\[0\].paragraphs\[0\].qas\[0\]; "
     rf"expected an id of its own$", 1),
    ("squad", put(*QUESTION, "question", ""), rf": question 'q4': {AT_SQUAD}.question: is empty; {TEXT}", 1),
    ("squad", put(*QUESTION, "question", LONE),
     "question: is not valid Unicode, .* surrogate pair at character 5$", 1),
    ("squad", drop(*QUESTION, "answers"), rf": question 'q4': {AT_SQUAD}.answers: missing", 1),
    ("squad", put(*QUESTION, "answers", []),
     "answers: is empty; expected at least one answer, or is_impossible: true$", 1),
    ("squad", put(*QUESTION, "answers", {}), r"answers: is an object \({}\); expected a list$", 1),
    ("squad", put(*QUESTION, "is_impossible", True),
     "answers: is_impossible is true, but there are answers", 1),
    ("squad", put(*QUESTION, "is_impossible", "no"),
     r"is_impossible: is a text \('no'\); expected true or false$", 1),
    ("squad", put(*QUESTION[:-1], 0, []),
     rf"{AT_SQUAD}: is a list \(\[\]\); expected an object with the field 'id'$", 1),
    ("squad", put(*OTHER, "context", " \n"),
     r"data\[1\].paragraphs\[0\].context: is empty; expected a text$", 1),
    ("squad", put(*OTHER, "context", LONE), "context: is not valid Unicode", 1),
    ("squad", put(*FIRST, "context", None), rf"data\[0\].paragraphs\[0\].context: is null; {TEXT}", 3),
    ("squad", drop("data", 1, "paragraphs"),
     r"data\[1\].paragraphs: missing \(the fields are: 'title'\)$", 1),
    ("mrqa", put(2, "qas", 0, "detected_answers", 0, "char_spans", 0, [2, 5]),
     r".jsonl:3: question 'n3': qas\[0\].detected_answers\[0\].char_spans\[0\]\[1\]: is 5; expected "
     r"a whole number from 2 to 4$", 1),
    ("mrqa", put(2, "qas", 0, "detected_answers", 0, "char_spans", 0, [2, 1]),
     r"\[1\]: is 1; expected .* from 2 to 4$", 1),
    ("mrqa", put(2, "qas", 0, "detected_answers", 0, "char_spans", 0, [0, 2]),
     r"char_spans\[0\]: the context has 'a b' there; expected the answer 'b c'$", 1),
    ("mrqa", put(2, "qas", 0, "detected_answers", 0, "char_spans", 0, [1, 1]),
     "nothing but white space of the context", 1),
    ("mrqa", put(2, "qas", 0, "detected_answers", 0, "char_spans", 0, [1]),
     r"char_spans\[0\]: has 1 items; expected 2$", 1),
    ("mrqa", drop(2, "qas", 0, "qid"), r":3: qas\[0\].qid: missing", 1),
    ("mrqa", put(2, "qas", 0, "qid", "n1"),
     r":3: qas\[0\]: has the id 'n1', which is also that of .*:2: qas\[0\]; expected", 1),
    ("mrqa", put(2, "qas", 0, "answers", []), ":3: .*answers: is empty; expected at least one answer$", 1),
    ("mrqa", put(2, "qas", 0, "answers", ["b", 3]), rf"answers\[1\]: is a number \(3\); {TEXT}", 1),
    ("mrqa", put(2, "qas", 0, "is_impossible", True),
     "answers: is_impossible is true, but there are answers", 1),
    ("mrqa", drop(2, "qas", 0, "detected_answers"), "detected_answers: missing", 1),
    ("mrqa", put(2, "context", ""), ":3: context: is empty; expected a text$", 1),
    ("mrqa", drop(1, "context"), ":2: context: missing", 2),
    ("mrqa", put(1, ["a"]), r":2: is a list \(\['a'\]\); expected an object with the field 'context'$", 2),
    ("mrqa", put(0, {"contxt": "a", "qas": []}),
     r":1: context: missing \(the fields are: 'contxt', 'qas'\)$", 0),
    ("race", put("middle/1.txt", "options", 0, ["Al", "Bo", "Cy"]),
     r"middle/1.txt: question 0: options\[0\]: has 3 items; expected 4$", 1),
    ("race", put("middle/1.txt", "options", 0, list("ABCDE")), r"options\[0\]: has 5 items; expected 4$", 1),
    ("race", put("middle/1.txt", "options", 0, ["Al", "", "Cy", "Di"]),
     r"options\[0\]\[1\]: is empty; expected a text$", 1),
    ("race", put("middle/1.txt", "answers", 0, "E"),
     r"question 0: answers\[0\]: is 'E'; expected a letter from A to D$", 1),
    ("race", put("middle/1.txt", "answers", 0, "AB"), "is 'AB'; expected a letter from A to D$", 1),
    ("race", put("middle/1.txt", "answers", 0, 1), r"is a number \(1\); expected a text$", 1),
    ("race", drop("middle/1.txt", "answers"), "middle/1.txt: answers: missing", 1),
    ("race", put("high/2.txt", "answers", ["A"]), "high/2.txt: answers: has 1 items; expected 3$", 3),
    ("race", put("high/2.txt", "article", " "), "high/2.txt: article: is empty; expected a text$", 3),
    ("race", put("high/2.txt", "questions", 1, None),
     r"question 1: questions\[1\]: is null; expected a text$", 1),
    ("hotpotqa", put(0, "supporting_facts", 0, ["Nikita", 3]),
     r": question 'h1': \[0\].supporting_facts\[0\]: sentence 3 of 'Nikita' does not exist; "
     r"expected one of 3, counted from 0$", 1),
    ("hotpotqa", put(0, "supporting_facts", 0, ["Nikita", -1]),
     r"supporting_facts\[0\]\[1\]: is -1; expected a whole", 1),
    ("hotpotqa", put(0, "supporting_facts", 0, ["Subway", 0]),
     "no paragraph is titled 'Subway'; expected", 1),
    ("hotpotqa", put(0, "supporting_facts", 0, "Nikita"), r"is a text \('Nikita'\); expected a list$", 1),
    ("hotpotqa_fullwiki", put(0, "supporting_facts", 0, ["Nikita", 3]),
     "sentence 3 of 'Nikita' does not exist", 1),
    ("hotpotqa", drop(0, "_id"), r"\[0\]._id: missing", 1),
    ("hotpotqa", put(1, "_id", "h1"),
     r"\[1\]: has the id 'h1', which is also that of .*: \[0\]; expected", 1),
    ("hotpotqa", drop(0, "answer"), "question 'h1': .*answer: missing", 1),
    ("hotpotqa", put(0, "context", []), r": question 'h1': \[0\].context: has no text; expected", 1),
    ("hotpotqa", put(0, "context", 0, ["Léon"]), r"context\[0\]: has 1 items; expected 2$", 1),
    ("hotpotqa", put(0, "context", 0, ["Léon", ["a", 1]]),
     rf"context\[0\]\[1\]\[1\]: is a number \(1\); {TEXT}", 1),
    ("hotpotqa_graph", put(0, "node", 0, "spans", 0, [0, 5]),
     r":1: node\[0\].spans\[0\]\[1\]: is 5; expected .* from 0 to 4$", 1),
    ("hotpotqa_graph", put(0, "node", 0, "sent_pos", 1, [2, 6]),
     r"sent_pos\[1\]\[1\]: is 6; expected .* from 2 to 5$", 1),
    ("hotpotqa_graph", put(0, "node", 0, "supp_label", [1]), r"supp_label: has 1 items; expected 2$", 1),
    ("hotpotqa_graph", put(0, "node", 0, "supp_label", 0, 2),
     r"supp_label\[0\]: is a number \(2\); expected true or", 1),
    ("hotpotqa_graph", put(1, "node", 1, "has_supp", 0),
     r":2: node\[1\].has_supp: is false; expected the 2 gold", 1),
    ("hotpotqa_graph", put(1, "node", []), ":2: node: is empty; expected paragraphs$", 1),
    ("hotpotqa_graph", drop(0, "node", 1), ":1: node: has 1 paragraph; expected the 2 gold ones first$", 1),
    ("hotpotqa_graph", put(1, "node", 2, "context", []),
     r"node\[2\].context: is empty; expected wordpieces$", 1),
    ("hotpotqa_graph", put(0, "node", 0, "context", 2, ""),
     r"node\[0\].context\[2\]: is empty; expected a text$", 1),
    ("hotpotqa_graph", drop(0, "answer"), ":1: answer: missing", 1),
    ("hotpotqa_graph_dev", put(1, "qid", "g0"), r":2: has the id 'g0', .* that of .*:1; expected", 1),
    ("hotpotqa_graph_dev", put(0, "node", 0, "tok_to_orig_index", [0]),
     "tok_to_orig_index: has 1 items; expected 5$", 1),
    ("hotpotqa_graph_dev", put(0, "node", 0, "tok_to_orig_index", 1, 5),
     r"\[1\]: is 5; expected .* from -1 to 4$", 1),
    ("hotpotqa_graph_dev", drop(0, "node", 0, "doc_tokens"),
     r":1: question 'g0': node\[0\].doc_tokens: missing", 1),
    ("triviaqa", put("Data", 0, "EntityPages", 0, "Filename", "Gone.txt"),
     r": question 'tc_33': Data\[0\].EntityPages\[0\].Filename: the evidence cannot be read "
     r"\(.*evidence/wikipedia/Gone.txt: no such file\); expected a text file there$", 1),
    ("triviaqa", put("Data", 0, "SearchResults", 0, "Filename", "../../qa/wikipedia-dev.json"),
     "expected a file inside", 1),
    ("triviaqa", put("Data", 0, "SearchResults", 0, "Filename", "/etc/hostname"),
     "expected a file inside", 1),
    ("triviaqa", put("Data", 0, "SearchResults", 0, "Filename", "a" * 300), "the evidence cannot be read", 1),
    ("triviaqa", put("Data", 0, "SearchResults", 0, "Filename", "a\0"), "the evidence cannot be read", 1),
    ("triviaqa", drop("Data", 0, "EntityPages", 1, "Filename"), r"EntityPages\[1\].Filename: missing", 1),
    ("triviaqa", put("Data", 0, "EntityPages", 1, "Filename", "Lloyd_Webber.txt"),
     r"EntityPages\[1\]: has the id 'tc_33--Lloyd_Webber.txt', which is also that of "
     r".*\[0\].Filename; expected", 1),
    ("triviaqa", put("Data", 0, "QuestionId", None), r"Data\[0\].QuestionId: is null; expected a text$", 3),
    ("triviaqa", put("Data", 0, "Question", " "),
     r"question 'tc_33': Data\[0\].Question: is empty; expected a text$", 3),
    ("triviaqa", drop("Data", 1, "Answer"), r"question 'tc_34': Data\[1\].Answer: missing", 1),
    ("triviaqa", put("Data", 1, "Answer", {"NormalizedAliases": []}),
     "NormalizedAliases: is empty; expected at least", 1),
    ("triviaqa_list", put(0, "qas", 0, "detected_answers", 0, "char_spans", 0, [0, 99]),
     r"\[1\]: is 99; expected", 1),
    ("triviaqa_list", put(0, "qas", 0, "detected_answers", 0, {"text": "東京", "char_spans": [[0, 4]]}),
     r"char_spans\[0\]: the context has '東京 is' there; expected the answer '東京'$", 1),
    ("triviaqa_list", put(0, "qas", 0, "answers", ["Tokyo"]),
     "answers: is a list .* the field 'Aliases'$", 1),
    ("triviaqa_list", put(0, "qas", 0, "answers", "Aliases", []),
     "Aliases: is empty; expected at least one alias$", 1),
    ("triviaqa_list", drop(0, "qas", 0, "qid"), r"\[0\].qas\[0\].qid: missing", 1),
    ("triviaqa_list", put(1, "qas", 0, "qid", "t1"),
     r"\[1\].qas\[0\]: has the id 't1', which is also that of", 1),
    ("triviaqa_list", put(0, "context", ""), r"\[0\].context: is empty; expected a text$", 1),
    ("wikihop", put(0, "answer", "spain"),
     r": question 'WH_dev_0': \[0\].answer: 'spain' is not among the 3 candidates \(france, ", 1),
    ("wikihop", put(0, "candidates", 1, "france"),
     "candidates: has 'france' twice; expected different candidates$", 1),
    ("wikihop", put(0, "candidates", []), "candidates: is empty; expected at least one candidate$", 1),
    ("wikihop", put(0, "supports", [""]), "supports: has no text; expected at least one document$", 1),
    ("wikihop", put(0, "query", ""), r"\[0\].query: is empty; expected a text$", 1),
    ("wikihop", drop(0, "id"), r"\[0\].id: missing", 1),
    ("wikihop", put(1, "id", "WH_dev_0"),
     r"\[1\]: has the id 'WH_dev_0', which is also that of .*: \[0\]; expected", 1),
    ("wikihop", drop(0, "answer"), "question 'WH_dev_0': .*answer: missing", 1),
]
# fmt: on


@pytest.mark.parametrize(("name", "spoil", "message", "lost"), MISTAKES)
def test_bad_record(tmp_path: Path, name: str, spoil: Spoil, message: str, lost: int) -> None:
    good = read_sample(name, tmp_path)
    document = SAMPLES[name].fresh()
    spoil(document)
    bad = BadRecords(skip=True)
    remaining = read_sample(name, tmp_path, document, bad)
    (skipped,) = bad.skipped
    assert re.search(message, str(skipped))
    assert skipped.place.file.startswith(str(tmp_path))
    assert len(remaining) == len(good) - lost
    assert {question.id for question in remaining} <= {question.id for question in good}
    assert bad.summary(len(remaining)) == f"1 of {len(remaining) + 1} records skipped: {skipped}"

    with pytest.raises(UserError) as caught:
        read_sample(name, tmp_path, document)
    advice = "; correct the record, or leave such records out with --skip-bad-records"
    assert str(caught.value) == f"{skipped}{advice}"


@pytest.mark.parametrize(
    ("name", "document"),
    [
        ("squad", {"data": []}),
        ("mrqa", [{"header": {}}]),
        ("race", {"high/1.txt": {}, "middle/1.txt": {"article": "a", "questions": [], "options": []}}),
        ("hotpotqa", []),
        ("hotpotqa_graph", []),
        ("triviaqa", {"Data": []}),
        ("triviaqa_list", []),
        ("wikihop", []),
    ],
)
def test_nothing_there(tmp_path: Path, name: str, document: Any) -> None:
    with pytest.raises(UserError, match=r"has no usable record; (expected|1 of 1 records skipped)"):
        read_sample(name, tmp_path, document, BadRecords(skip=True))


@pytest.mark.parametrize(
    ("name", "document", "message"),
    [
        ("squad", {"version": "2.0"}, r"dev-v2.0.json: data: missing \(the fields are: 'version'\)$"),
        ("squad", [], r"dev-v2.0.json: is a list \(\[\]\); expected an object with the field 'data'$"),
        ("hotpotqa", {}, r"is an object \({}\); expected a list$"),
        ("triviaqa", {"data": []}, r"Data: missing \(the fields are: 'data'\)$"),
        ("wikihop", {}, r"is an object \({}\); expected a list$"),
    ],
)
def test_another_format(tmp_path: Path, name: str, document: Any, message: str) -> None:
    """The file as a whole is no record, so it is not skipped."""
    with pytest.raises(UserError, match=message):
        read_sample(name, tmp_path, document, BadRecords(skip=True))


def test_summary_is_short() -> None:
    bad = BadRecords(skip=True)
    assert bad.summary(5) is None
    for number in range(12):
        with bad.record():
            raise BadRecord(Place("f", number), "field", f"reason {number}")
    summary = bad.summary(88)
    assert summary is not None
    assert summary.startswith("12 of 100 records skipped: f:0: field: reason 0; f:1: field: reason 1; ")
    assert summary.endswith("; f:9: field: reason 9; and 2 more")
    assert bad.summary(3, start=11) == "1 of 4 records skipped: f:11: field: reason 11"
