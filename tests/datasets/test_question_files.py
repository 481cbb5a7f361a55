"""Reads small files of questions in each published format."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_qa_files import (
    DOCUMENTS,
    MOUNTAIN,
    SAMPLES,
    mrqa_document,
    race_document,
    read_sample,
    squad_document,
    triviaqa_document,
    write_lines,
    write_race,
    write_triviaqa,
)

from trbert_jax.datasets import DATASETS, BadRecords, reading, triviaqa
from trbert_jax.datasets.mrqa import same_answer
from trbert_jax.datasets.reading import BadRecord, load_json, load_json_lines
from trbert_jax.datasets.records import Paragraph, Span, SpanQuestion
from trbert_jax.errors import UserError


def texts(question: SpanQuestion) -> list[str]:
    return [question.context[span.start : span.end] for span in question.spans]


# Good files -------------------------------------------------------------------------------------------


def test_squad(tmp_path: Path) -> None:
    first, second, third, fourth = read_sample("squad", tmp_path)
    assert (first.id, first.question, first.context) == ("q1", "How high is it?", MOUNTAIN)
    assert first.answers == ("4,808 m", "4,808", "4,808")
    assert texts(first) == list(first.answers)
    assert first.where.endswith("dev-v2.0.json: data[0].paragraphs[0].qas[0]")
    assert (second.answers, texts(second)) == (("東京",), ["東京"])
    assert (third.impossible, third.answers, third.spans) == (True, (), ())
    assert (fourth.impossible, texts(fourth)) == (False, ["words"])  # no is_impossible, as in version 1.1


@pytest.mark.parametrize(
    ("context", "start", "text", "found"),
    [
        ("a bc d", 2, "bc", "bc"),
        ("a  bc d", 1, " bc", "bc"),  # white space belongs to the published answer
        ("a b\u00a0 c d", 2, "b c", "b\u00a0 c"),  # the context has more of it
        ("a b c d", 2, "b  c\n", "b c"),  # or less
        ("a bc d", 1, "bc", "bc"),  # or begins with it
    ],
)
def test_squad_ignores_white_space(tmp_path: Path, context: str, start: int, text: str, found: str) -> None:
    document = squad_document()
    document["data"][1]["paragraphs"][0]["context"] = context
    document["data"][1]["paragraphs"][0]["qas"][0]["answers"] = [{"text": text, "answer_start": start}]
    question = read_sample("squad", tmp_path, document)[-1]
    assert (question.answers, texts(question)) == ((text,), [found])


@pytest.mark.parametrize("name", ["mrqa", "mrqa_gz"])
def test_mrqa(tmp_path: Path, name: str) -> None:
    first, second, third = read_sample(name, tmp_path)
    assert (first.id, second.id, third.id) == ("n1", "n2", "n3")  # qid before id
    assert (first.answers, texts(first)) == (("Paris", "東京"), ["Paris", "東京", "東京"])
    assert texts(second) == ["The Élysée"]  # case, accents, the space after it
    assert (third.context, third.spans, third.impossible) == ("a b c", (Span(2, 5),), False)
    assert third.where.endswith(f"{SAMPLES[name].path}:3: qas[0]")
    document = mrqa_document()[1:]  # without header
    document[1]["qas"][0].update(is_impossible=True, answers=[], detected_answers=[])
    *_, last = read_sample(name, tmp_path, document)
    assert (last.id, last.impossible, last.spans) == ("n3", True, ())


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("The Élysée,", "elysee", True),
        ("1,000 m", "1000m", True),
        ("Cats", "cat", False),
        ("東京", "東", False),
    ],
)
def test_same_answer(one: str, other: str, same: bool) -> None:
    assert same_answer(one, other) is same


def test_race(tmp_path: Path) -> None:
    questions = read_sample("race", tmp_path)
    # High first; 10.txt, which has no question, before 2.txt.
    assert [q.id for q in questions] == ["high/2.txt:0", "high/2.txt:1", "high/2.txt:2", "middle/1.txt:0"]
    assert [q.answer for q in questions] == [0, 3, 0, 1]
    assert questions[0].options == ("Élodie", "Bo", "Cy", "Di")
    assert (questions[0].article, questions[1].question) == ("Élodie reads.", "")
    assert questions[0].where.endswith("high/2.txt: questions[0]")


def test_race_file_order(tmp_path: Path) -> None:
    article = race_document()["middle/1.txt"]
    names = [f"{level}/{number}.txt" for level in ("middle", "high") for number in (9, 10, 1)]
    path = write_race(tmp_path, dict.fromkeys(names, article))
    (path / "high/._1.txt").write_bytes(b"\x00")
    expected = ["high/1.txt:0", "high/10.txt:0", "high/9.txt:0", *(f"middle/{n}.txt:0" for n in (1, 10, 9))]
    for name, ids in (("race", expected), ("race_high", expected[:3]), ("race_middle", expected[3:])):
        assert [q.id for q in DATASETS[name].read_file(path)] == ids


def test_hotpotqa(tmp_path: Path) -> None:
    first, second = read_sample("hotpotqa", tmp_path)
    assert (first.id, first.answer, second.answer) == ("h1", "1990", "yes")
    assert first.paragraphs[1] == Paragraph("Nikita", ("Nikita is older.", "", " It is from 1990."))
    assert (first.supporting, second.supporting) == ((("Nikita", 2), ("Léon", 1)), (("Léon", 0),))


def test_hotpotqa_fullwiki_keeps_facts_of_missing_paragraphs(tmp_path: Path) -> None:
    document = SAMPLES["hotpotqa"].fresh()
    document[0]["supporting_facts"].append(["Subway", 7])
    first, _ = read_sample("hotpotqa_fullwiki", tmp_path, document)
    assert first.supporting[-1] == ("Subway", 7)


def test_hotpotqa_graph(tmp_path: Path) -> None:
    first, second = read_sample("hotpotqa_graph", tmp_path)
    assert (first.id, second.id) == ("hotpot_train_graph.json:1", "hotpot_train_graph.json:2")
    assert [len(q.paragraphs) for q in (first, second)] == [2, 3]
    gold = first.paragraphs[0]
    assert (gold.title, gold.wordpieces) == ("Léon_(film)", ("le", "##on", "is", "a", "film"))
    assert (gold.sentences, gold.supporting) == ((Span(0, 2), Span(2, 5)), (True, False))
    assert gold.answers == (Span(0, 2), Span(4, 5))  # the last piece belongs to a published span
    assert (gold.words, gold.word_of) == ((), ())
    assert second.paragraphs[2].sentences[1] == Span(2, 2)
    first, second = read_sample("hotpotqa_graph_dev", tmp_path)
    assert (first.id, second.id) == ("g0", "g1")
    paragraph = first.paragraphs[0]
    assert (paragraph.words, paragraph.word_of) == (("w",) * 5, (-1, 1, 2, 3, 4))
    assert (paragraph.answers, paragraph.supporting) == ((), (True, False))


def test_triviaqa(tmp_path: Path) -> None:
    questions = read_sample("triviaqa", tmp_path)
    assert [q.id for q in questions] == [
        "tc_33--Lloyd_Webber.txt",
        "tc_33--Élysée.txt",
        "tc_33--35/35_995.txt",
        "tc_34--Lloyd_Webber.txt",
    ]
    assert [texts(q) for q in questions] == [
        ["SUNSET  BOULEVARD", "Sunset Boulevard"],
        ["Sunset\u2019Boulevard"],
        ["west sunset boulevard", "sunset boulevard"],
        ["Lloyd Webber", "Webber"],
    ]
    assert questions[0].answers == ("sunset boulevard", "west sunset boulevard")
    assert questions[3].answers == ("lloyd webber", "Webber, the")
    assert questions[1].where.endswith("qa/wikipedia-dev.json: Data[0].EntityPages[1]")
    assert [q.scored_id for q in questions] == ["tc_33"] * 3 + ["tc_34"]
    web = read_sample("triviaqa_web", tmp_path)
    assert [q.scored_id for q in web] == [q.id for q in web] == [q.id for q in questions]


def test_triviaqa_documents_are_cut(tmp_path: Path) -> None:
    path = write_triviaqa(tmp_path / "qa/web-dev.json", triviaqa_document())
    document = tmp_path / "evidence/wikipedia/Lloyd_Webber.txt"
    document.write_text("Sunset Boulevard " * 500)
    question = DATASETS["triviaqa_web"].read_file(path)[0]
    assert question.context.count("Boulevard") == triviaqa.MAX_WORDS / 2 == len(question.spans)


def test_triviaqa_list(tmp_path: Path) -> None:
    first, second = read_sample("triviaqa_list", tmp_path)
    assert (first.id, first.answers, texts(first)) == ("t1", ("Tokyo", "東京"), ["東京", "Tokyo"])
    assert (second.id, second.spans, second.impossible) == ("t2", (), False)


def test_wikihop(tmp_path: Path) -> None:
    first, second = read_sample("wikihop", tmp_path)
    assert (first.id, first.query) == ("WH_dev_0", "country élan vital")
    assert (first.candidates[first.answer], second.answer) == ("côte d'ivoire", 0)
    assert first.supports == ("Élan vital is from Côte d'Ivoire.", "")


def without(fields: tuple[str, ...], document: Any) -> Any:
    if isinstance(document, dict):
        return {key: without(fields, value) for key, value in document.items() if key not in fields}
    return [without(fields, item) for item in document] if isinstance(document, list) else document


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("race", ("answers",)),
        ("hotpotqa", ("answer", "supporting_facts")),
        ("hotpotqa_fullwiki", ("answer", "supporting_facts")),
        ("triviaqa", ("Answer",)),
        ("wikihop", ("answer",)),
    ],
)
def test_answers_withheld(tmp_path: Path, name: str, fields: tuple[str, ...]) -> None:
    """No record has one, as in test sets."""
    for question in read_sample(name, tmp_path, without(fields, SAMPLES[name].fresh())):
        if isinstance(question, SpanQuestion):
            assert (question.answers, question.spans) == ((), ())
        else:
            assert question.answer is None
        assert getattr(question, "supporting", ()) == ()


# Aliases of TriviaQA ----------------------------------------------------------------------------------


def aliases(context: str, *names: str) -> list[str]:
    return [context[span.start : span.end] for span in triviaqa.find_aliases(context, names)]


@pytest.mark.parametrize(
    ("context", "names", "expected"),
    [
        ("In Paris. PARIS, paris!", ("paris",), ["Paris", "PARIS", "paris"]),
        ("Parisian comparisons", ("paris",), []),
        ("the_Beatles; Beatles", ("The Beatles",), ["Beatles", "Beatles"]),
        ("War and the Peace", ("war and peace",), ["War and the Peace"]),
        ("U.S. forces", ("u s",), ["U.S"]),
        ("new\n york city", ("New York", "New York City"), ["new\n york", "new\n york city"]),
        ("東京 and Zürich.", ("zürich", "東京"), ["東京", "Zürich"]),
        ("a the !!! an", ("The", "!!!", ""), []),
        ("“Sunset Blvd.”", ("sunset blvd",), ["Sunset Blvd"]),
        ("AC DC, AC–DC", ("ac–dc",), ["AC–DC"]),
        ("5 or £5", ("£5",), ["£5"]),
        ("cafe\u0301", ("cafe",), []),
        ("na na na", ("na na",), ["na na", "na na"]),
        ("", ("x",), []),
    ],
)
def test_find_aliases(context: str, names: tuple[str, ...], expected: list[str]) -> None:
    assert aliases(context, *names) == expected


@pytest.mark.parametrize(
    ("text", "normal"),
    [("The_Cat's  ‘hat’\n", "cat s hat"), ("A.B.", "b"), ("Another an", "another"), ("“The”", "“ ”")],
)
def test_normalization(text: str, normal: str) -> None:
    assert triviaqa.normalize(text) == normal


WORDS = st.lists(
    st.sampled_from(["Sun", "set", "The", "a", "SUN", "x.", "-", "_", "sun-set", "’"]), max_size=8
)
TEXTS = st.builds(
    lambda words, space: space.join(words), WORDS, st.sampled_from([" ", "\n", "\u00a0 ", "  "])
)


@given(TEXTS, st.lists(TEXTS, max_size=3))
def test_aliases_are_those_of_the_official_normalization(context: str, names: list[str]) -> None:
    accepted = set(map(triviaqa.normalize, names)) - {""}
    found = set(map(triviaqa.normalize, aliases(context, *names)))
    assert found == {alias for alias in accepted if f" {alias} " in f" {triviaqa.normalize(context)} "}


@pytest.mark.parametrize(
    ("count", "expected"), [(0, ""), (1, " a"), (2, " a\n\u2003b"), (9, " a\n\u2003b c")]
)
def test_first_words(count: int, expected: str) -> None:
    assert triviaqa.first_words(" a\n\u2003b c ", count) == expected


# Bad records ------------------------------------------------------------------------------------------

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
    ("squad", put(*ANSWER, "answer_start", -1), "'q4' answer_start -1 0 10", 1),
    ("squad", put(*ANSWER, "answer_start", 11), "'q4' answer_start 11 0 10", 1),
    ("squad", drop(*QUESTION, "id"), "data[1].paragraphs[0].qas[0] id missing", 1),
    ("squad", put(*QUESTION, "id", "q1"), "data[1].paragraphs[0].qas[0] 'q1' data[0]", 1),
    ("squad", put(*QUESTION, "answers", []), "'q4' answers: empty is_impossible", 1),
    ("squad", put(*QUESTION, "is_impossible", True), "'q4' is_impossible", 1),
    ("squad", put(*QUESTION[:-1], 0, []), "data[1].paragraphs[0].qas[0] ([]) 'id'", 1),
    ("squad", put("data", 0, "paragraphs", 0, "context", None), "data[0].paragraphs[0] context: null", 3),
    ("squad", drop("data", 1, "paragraphs"), "data[1] paragraphs missing 'title'", 1),
    ("mrqa", put(*CHAR_SPANS, 0, [2, 5]), ".jsonl:3: 'n3' detected_answers[0] char_spans[0][1] 5 2 4", 1),
    ("mrqa", put(*CHAR_SPANS, 0, [2, 1]), "'n3' char_spans[0][1] 1 2 4", 1),
    ("mrqa", put(*CHAR_SPANS, 0, [0, 2]), "'n3' char_spans[0] 'a b' 'b c'", 1),
    ("mrqa", put(*CHAR_SPANS, 0, [1, 1]), "'n3' char_spans[0]", 1),
    ("mrqa", put(*CHAR_SPANS, 0, [1]), "'n3' char_spans[0] 1 2", 1),
    ("mrqa", drop(*MRQA, "qid"), ":3: qas[0] qid missing", 1),
    ("mrqa", put(*MRQA, "qid", "n1"), ":3: qas[0] 'n1' :2: qas[0]", 1),
    ("mrqa", put(*MRQA, "answers", []), ":3: 'n3' answers: empty", 1),
    ("mrqa", put(*MRQA, "is_impossible", True), "'n3' is_impossible", 1),
    ("mrqa", drop(*MRQA, "detected_answers"), "'n3' detected_answers missing", 1),
    ("mrqa", drop(1, "context"), ":2: context missing", 2),
    ("mrqa", put(0, {"contxt": "a", "qas": []}), ":1: context missing 'contxt' 'qas'", 0),
    ("race", put(*OPTIONS, ["Al", "Bo", "Cy"]), "middle/1.txt question 0 options[0] 3 4", 1),
    ("race", put(*OPTIONS, list("ABCDE")), "question 0 options[0] 5 4", 1),
    ("race", put(*OPTIONS, ["Al", "", "Cy", "Di"]), "options[0][1] empty", 1),
    ("race", put("middle/1.txt", "answers", 0, "E"), "question 0 answers[0] 'E' A D", 1),
    ("race", put("middle/1.txt", "answers", 0, "AB"), "answers[0] 'AB'", 1),
    ("race", drop("middle/1.txt", "answers"), "middle/1.txt answers missing", 1),
    ("race", put("high/2.txt", "answers", ["A"]), "high/2.txt answers 1 3", 3),
    ("race", put("high/2.txt", "questions", 1, None), "high/2.txt question 1 questions[1] null", 1),
    ("hotpotqa", put(*FACT, ["Nikita", 3]), "[0] 'h1' supporting_facts[0] 3 'Nikita'", 1),
    ("hotpotqa", put(*FACT, ["Nikita", -1]), "'h1' supporting_facts[0][1] -1", 1),
    ("hotpotqa", put(*FACT, ["Subway", 0]), "'h1' supporting_facts[0] 'Subway'", 1),
    ("hotpotqa_fullwiki", put(*FACT, ["Nikita", 3]), "'h1' supporting_facts[0] 3 'Nikita'", 1),
    ("hotpotqa", put(1, "_id", "h1"), "[1] 'h1' [0]", 1),
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
    ("hotpotqa_graph_dev", put(1, "qid", "g0"), ":2: 'g0' :1", 1),
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
    ("triviaqa", put("Data", 1, "Answer", {"NormalizedAliases": []}), "'tc_34' NormalizedAliases empty", 1),
    ("triviaqa_list", put(*LISTED, "detected_answers", 0, "char_spans", 0, [0, 99]), "'t1' [1] 99", 1),
    ("triviaqa_list", put(*LISTED, "answers", ["Tokyo"]), "'t1' answers 'Aliases'", 1),
    ("triviaqa_list", put(*LISTED, "answers", "Aliases", []), "'t1' Aliases empty", 1),
    ("triviaqa_list", put(1, "qas", 0, "qid", "t1"), "[1].qas[0] 't1' [0].qas[0]", 1),
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
        (reading.text, 4, "(4) text"),
        (reading.text, " \n", "empty"),
        (reading.text, "half \ud83d of a pair", "Unicode 5"),
        (reading.texts, {}, "({}) list"),
        (reading.texts, ["a", None], "x[1] null"),
        (reading.texts, ["a", ""], "x[1] empty"),
        (reading.integer, 5.0, "(5.0) number"),
        (reading.integer, True, "(True) number"),
        (reading.integer, -1, "-1 0"),
        (reading.flag, "no", "('no') true"),
        (reading.flag, 2, "(2) true"),
        (reading.items, "a", "('a') list"),
    ],
)
def test_wrong_fields(check: Callable[[Any, str], Any], value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=r"^x") as caught:
        check({"x": value}, "x")
    for word in words.split():
        assert word in str(caught.value)
    for item in ({"y": 1}, ["x"]):
        with pytest.raises(ValueError, match="x"):
            check(item, "x")


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("x"), ValueError("x")])
def test_plain_errors_name_the_record(error: Exception) -> None:
    with pytest.raises(BadRecord, match=r"^f:3: question 'q': .*x"), reading.record("f:3", {"id": "q"}):
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


# Files that cannot be read raise, whether bad records are skipped or not -------------------------------


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
        ("squad", {"version": "2.0"}),
        ("squad", []),
        ("hotpotqa", {}),
        ("triviaqa", {"data": []}),
        ("wikihop", {}),
    ],
)
def test_no_records(tmp_path: Path, name: str, document: Any) -> None:
    with pytest.raises(UserError, match=str(tmp_path / SAMPLES[name].path)):
        read_sample(name, tmp_path, document, BadRecords(skip=True))


@pytest.mark.parametrize("name", [name for name in SAMPLES if name not in ("race", "mrqa_gz")])
def test_unreadable_files(tmp_path: Path, name: str) -> None:
    read_sample(name, tmp_path)
    sample = SAMPLES[name]
    path = tmp_path / sample.path
    content = path.read_bytes()

    def raises(match: str) -> None:
        with pytest.raises(UserError, match=rf"{path.name}:{match}"):
            sample.read(path, BadRecords(skip=True))

    path.write_bytes(content.replace("é".encode(), b"\xe9").replace("東".encode(), b"\xe9"))
    raises(r"\d+: not UTF-8")
    if sample.write is not write_lines:
        path.write_bytes(content[: len(content) * 7 // 10])
        raises(".*not valid JSON")
    path.unlink()
    raises(" no such file")
    path.mkdir()
    raises(" is a directory")


def test_unreadable_race(tmp_path: Path) -> None:
    read_sample("race", tmp_path)
    folder = tmp_path / SAMPLES["race"].path
    (folder / "high/2.txt").write_text('{"article"')
    with pytest.raises(UserError, match=r"high/2\.txt: not valid JSON"):
        SAMPLES["race"].read(folder, BadRecords(skip=True))
    for file in (folder / "middle").glob("*.txt"):
        file.unlink()
    with pytest.raises(UserError, match=r"dev/middle: "):
        SAMPLES["race"].read(folder, BadRecords(skip=True))
    (folder / "middle").rmdir()
    with pytest.raises(UserError, match=r"dev/middle: no such folder"):
        SAMPLES["race"].read(folder, BadRecords(skip=True))


def test_unusable_evidence(tmp_path: Path) -> None:
    read_sample("triviaqa", tmp_path)
    for name, content in zip(DOCUMENTS, (b" \n", b"caf\xe9", None), strict=True):
        path = tmp_path / "evidence" / name
        path.unlink()
        if content is not None:
            path.write_bytes(content)
    bad, sample = BadRecords(skip=True), SAMPLES["triviaqa"]
    with pytest.raises(UserError, match=r"wikipedia-dev.json: .*4 of 4 records skipped"):
        sample.read(tmp_path / sample.path, bad)
    reasons = list(map(str, bad.skipped))
    assert "Lloyd_Webber.txt is empty" in reasons[0]
    assert "Élysée.txt: not UTF-8" in reasons[1]
    assert "35_995.txt: no such file" in reasons[2]
    (tmp_path / "evidence").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"wikipedia-dev.json: no evidence"):
        sample.read(tmp_path / sample.path, bad)


@pytest.mark.parametrize("share", [0.9, 0.5, 0.02])
def test_gzip_cut_short(tmp_path: Path, share: float) -> None:
    path = write_lines(tmp_path / "dev.jsonl.gz", mrqa_document() * 50)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match=r"dev.jsonl.gz: damaged or cut short after line \d+"):
        list(load_json_lines(path, BadRecords(skip=True)))


@pytest.mark.parametrize(
    "content", [b'{"context": "not compressed"}', gzip.compress(b"{}")[:10] + b"\xff" * 20]
)
def test_damaged_gzip(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "dev.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"dev\.jsonl\.gz: damaged or cut short after line 0"):
        DATASETS["newsqa"].read_file(path, BadRecords(skip=True))


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # chmod does not stop the superuser
    monkeypatch.setattr(gzip, "open", refuse)
    for name in ("dev.jsonl", "dev.jsonl.gz"):
        with pytest.raises(UserError, match=rf"{name}: no permission"):
            DATASETS["newsqa"].read_file(tmp_path / name)


@pytest.mark.parametrize("line", ['{"context": "cut', "[" * 100_000, '{"context": ' + "1" * 5000 + "}"])
def test_line_that_is_not_json(tmp_path: Path, line: str) -> None:
    """It is one bad record among others; as a whole file it raises."""
    path = write_lines(tmp_path / "dev.jsonl", mrqa_document())
    with path.open("a", encoding="utf-8") as stream:
        stream.write(line)
    with pytest.raises(UserError, match=r"dev.jsonl:4: not valid JSON"):
        DATASETS["newsqa"].read_file(path)
    bad = BadRecords(skip=True)
    assert len(DATASETS["newsqa"].read_file(path, bad)) == 3
    assert len(bad.skipped) == 1
    path.write_text(line)
    with pytest.raises(UserError, match=r"dev.jsonl: not valid JSON"):
        load_json(path)


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json"])
def test_only_a_line_feed_ends_a_line(tmp_path: Path, suffix: str, character: str) -> None:
    text = json.dumps(f"before{character}after", ensure_ascii=character < " ")
    content = f'\n{{"a": {text}}}\r\n\n{{"a": {text}}}' if "l" in suffix else f'{{"a":\n{text}}}\n'
    path = tmp_path / f"t{suffix}"
    data = b"\xef\xbb\xbf" + content.encode()  # a byte order mark does no harm
    path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    if suffix == ".json":
        values = [(2, load_json(path))]
    else:
        values = list(load_json_lines(path, BadRecords()))
        assert [number for number, _ in values] == [2, 4]
    assert {value["a"] for _, value in values} == {f"before{character}after"}
