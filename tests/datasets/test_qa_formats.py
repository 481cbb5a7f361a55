"""What the readers make of small files in each published format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_qa_files import (
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

from trbert_jax.datasets import BadRecords, mrqa, race, triviaqa
from trbert_jax.datasets.hotpotqa_graph import PieceRange
from trbert_jax.datasets.records import Paragraph, Span, SpanQuestion


def texts(question: SpanQuestion) -> list[str]:
    return [question.context[span.start : span.end] for span in question.spans]


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
def test_white_space_of_squad_answers(
    tmp_path: Path, context: str, start: int, text: str, found: str
) -> None:
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


def test_mrqa_without_header(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "dev.jsonl", mrqa_document()[1:])
    assert [question.id for question in mrqa.read(path, BadRecords())] == ["n1", "n2", "n3"]


def test_mrqa_impossible(tmp_path: Path) -> None:
    document = mrqa_document()
    document[2]["qas"][0].update(is_impossible=True, answers=[], detected_answers=[])
    question = read_sample("mrqa", tmp_path, document)[-1]
    assert (question.impossible, question.spans) == (True, ())


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
    assert [q.id for q in race.read(path, BadRecords())] == expected
    assert [q.id for q in race.read(path, BadRecords(), levels=("high",))] == expected[:3]
    assert [q.id for q in race.read(path, BadRecords(), levels=("middle",))] == expected[3:]


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
    assert (gold.sentences, gold.supporting) == ((PieceRange(0, 2), PieceRange(2, 5)), (True, False))
    assert gold.answers == (PieceRange(0, 2), PieceRange(4, 5))  # the last piece belongs to a published span
    assert (gold.words, gold.word_of) == ((), ())
    assert second.paragraphs[2].sentences[1] == PieceRange(2, 2)


def test_hotpotqa_graph_dev(tmp_path: Path) -> None:
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
    assert questions[1].where.endswith("qa/wikipedia-dev.json: Data[0].EntityPages[1].Filename")
    assert [q.scored_id for q in questions] == ["tc_33"] * 3 + ["tc_34"]
    web = read_sample("triviaqa_web", tmp_path)
    assert [q.scored_id for q in web] == [q.id for q in web] == [q.id for q in questions]


def test_triviaqa_limits(tmp_path: Path) -> None:
    path = write_triviaqa(tmp_path / "elsewhere/dev.json", triviaqa_document())
    found = triviaqa.read_published(
        path, BadRecords(), evidence=tmp_path / "evidence", max_documents=1, max_words=4
    )
    assert [q.id for q in found] == ["tc_33--Lloyd_Webber.txt", "tc_34--Lloyd_Webber.txt"]
    assert found[0].context == "Lloyd Webber wrote\nSUNSET"
    assert found[0].spans == ()  # cut off


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
    """As in test sets: no record has one."""
    document = without(fields, SAMPLES[name].fresh())
    for question in read_sample(name, tmp_path, document):
        if isinstance(question, SpanQuestion):
            assert (question.answers, question.spans) == ((), ())
        else:
            assert question.answer is None
        assert getattr(question, "supporting", ()) == ()
