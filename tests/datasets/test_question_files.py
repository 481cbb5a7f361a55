"""Reads small files of questions. `tests/tasks/test_published_*.py` follow others from file to score."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_qa_files import SAMPLES, read_sample, write_json, write_lines, write_race

from trbert_jax.datasets import DATASETS, BadRecords, triviaqa
from trbert_jax.datasets.records import SpanQuestion, trim


def texts(question: SpanQuestion) -> list[str]:
    return [question.context[span.start : span.end] for span in question.spans]


@pytest.mark.parametrize(
    ("context", "start", "text", "found"),
    [
        ("a bc d", 2, "bc", "bc"),
        ("a  bc d", 1, " bc", "bc"),
        ("a b\u00a0 c d", 2, "b c", "b\u00a0 c"),  # the context has more of it
        ("a b c d", 2, "b  c\n", "b c"),  # or less
        ("a bc d", 1, "bc", "bc"),  # or begins with it
        ("a \u200ebc\u200f d", 2, "\u200ebc\u200f", "bc"),  # direction marks in both,
        ("a bc d", 2, "\ufeffbc\u200b", "bc"),  # or in the answer alone,
        ("a \u2067bc d", 2, "bc", "bc"),  # or in the context
    ],
)
def test_squad_ignores_what_nobody_sees(
    tmp_path: Path, context: str, start: int, text: str, found: str
) -> None:
    document = SAMPLES["squad"].fresh()
    document["data"][1]["paragraphs"][0]["context"] = context
    document["data"][1]["paragraphs"][0]["qas"][0]["answers"] = [{"text": text, "answer_start": start}]
    question = read_sample("squad", tmp_path, document)[-1]
    assert (question.answers, texts(question)) == ((trim(text),), [found])


@pytest.mark.parametrize("form", ["data", "list", "lines"])
def test_the_flat_form_of_squad(tmp_path: Path, form: str) -> None:
    """As `run_qa` reads it; ids may be numbers, and no answer means that the question has none."""
    found: Any = {"text": ["b", "c"], "answer_start": [2, 4]}
    none: Any = {"text": [], "answer_start": []}
    flat: Any = [
        {"id": i, "title": "t", "context": "a b c", "question": "which ?", "answers": answers}
        for i, answers in enumerate((found, none))
    ]
    path = tmp_path / ("dev.jsonl" if form == "lines" else "dev.json")
    if form == "lines":
        write_lines(path, flat)
    else:
        write_json(path, {"data": flat} if form == "data" else flat)
    first, second = DATASETS["squad"].read_split(tmp_path, "dev")
    assert (first.id, first.answers, texts(first), first.impossible) == ("0", ("b", "c"), ["b", "c"], False)
    assert (second.id, second.answers, second.impossible) == ("1", (), True)
    write_json(path.with_name("test.json"), {"data": [{**question, "answers": none} for question in flat]})
    assert not any(q.impossible or q.answers for q in DATASETS["squad"].read_split(tmp_path, "test"))


@pytest.mark.parametrize("name", ["mrqa", "mrqa_gz"])
def test_mrqa(tmp_path: Path, name: str) -> None:
    questions = read_sample(name, tmp_path)
    assert [question.id for question in questions] == ["n1", "n2", "n3"]  # qid before id
    spelled = [["Paris", "東京", "東京"], ["The Élysée"], ["b c"]]  # case, accents, the space after it
    assert [texts(question) for question in questions] == spelled
    document = SAMPLES["mrqa"].fresh()[1:]  # without header
    document[1]["qas"][0].update(is_impossible=True, answers=[], detected_answers=[])
    *_, last = read_sample(name, tmp_path, document)
    assert (last.id, last.impossible, last.spans) == ("n3", True, ())


def test_race_file_order(tmp_path: Path) -> None:
    article = SAMPLES["race"].fresh()["middle/1.txt"]
    names = [f"{level}/{number}.txt" for level in ("middle", "high") for number in (9, 10, 1)]
    path = write_race(tmp_path, dict.fromkeys(names, article))
    (path / "high/._1.txt").write_bytes(b"\x00")
    expected = ["high/1.txt:0", "high/10.txt:0", "high/9.txt:0", *(f"middle/{n}.txt:0" for n in (1, 10, 9))]
    for name, ids in (("race", expected), ("race_high", expected[:3]), ("race_middle", expected[3:])):
        questions = DATASETS[name].read_file(path)
        assert [q.id for q in questions] == ids
        assert questions[0].where.endswith(f"{ids[0].removesuffix(':0')}: questions[0]")


def test_triviaqa(tmp_path: Path) -> None:
    questions = read_sample("triviaqa", tmp_path)
    assert [texts(q) for q in questions] == [
        ["SUNSET  BOULEVARD", "Sunset Boulevard"],
        ["Sunset\u2019Boulevard"],
        ["west sunset boulevard", "sunset boulevard"],
        ["Lloyd Webber", "Webber"],
    ]
    assert questions[0].answers == ("sunset boulevard", "west sunset boulevard")
    assert questions[3].answers == ("lloyd webber", "Webber, the")


def test_triviaqa_list(tmp_path: Path) -> None:
    first, second = read_sample("triviaqa_list", tmp_path)
    assert (first.id, first.answers, texts(first)) == ("t1", ("Tokyo", "東京"), ["東京", "Tokyo"])
    assert (second.id, second.spans, second.impossible) == ("t2", (), False)


def numbered(document: Any) -> Any:
    """Replaces every id by a number."""
    if isinstance(document, dict):
        ids = ("id", "qid", "_id", "QuestionId")
        return {k: 10 + len(v) if k in ids and v else numbered(v) for k, v in document.items()}
    return [numbered(item) for item in document] if isinstance(document, list) else document


@pytest.mark.parametrize("name", ["squad", "mrqa", "hotpotqa", "hotpotqa_graph_dev", "triviaqa", "wikihop"])
def test_ids_may_be_numbers(tmp_path: Path, name: str) -> None:
    first = numbered(SAMPLES[name].fresh())
    found = read_sample(name, tmp_path, first, BadRecords(skip=True))[0]
    assert found.id.partition("--")[0] in {str(number) for number in range(10, 30)}


def without(fields: tuple[str, ...], document: Any) -> Any:
    if isinstance(document, dict):
        return {key: without(fields, value) for key, value in document.items() if key not in fields}
    return [without(fields, item) for item in document] if isinstance(document, list) else document


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("squad", ("answers", "is_impossible")),
        ("mrqa", ("answers", "detected_answers")),
        ("triviaqa_list", ("answers",)),
        ("hotpotqa_graph_dev", ("answer",)),
        ("race", ("answers",)),
        ("hotpotqa", ("answer", "supporting_facts")),
        ("hotpotqa_fullwiki", ("answer", "supporting_facts")),
        ("triviaqa", ("Answer",)),
        ("wikihop", ("answer",)),
    ],
)
def test_answers_withheld(tmp_path: Path, name: str, fields: tuple[str, ...]) -> None:
    for question in read_sample(name, tmp_path, without(fields, SAMPLES[name].fresh())):
        if isinstance(question, SpanQuestion):
            assert (question.answers, question.spans) == ((), ())
        else:
            assert question.answer is None
        assert getattr(question, "supporting", ()) == ()


def aliases(context: str, names: Sequence[str]) -> list[str]:
    return [context[span.start : span.end] for span in triviaqa.find_aliases(context, names)]


@pytest.mark.parametrize(
    ("context", "names", "expected"),
    [
        ("In Paris. PARIS, paris!", ("paris",), ["Paris", "PARIS", "paris"]),
        ("new\n york city", ("New York", "New York City"), ["new\n york", "new\n york city"]),
        ("東京 and Zürich.", ("zürich", "東京"), ["東京", "Zürich"]),
        ("“Sunset Blvd.”", ("sunset blvd",), ["Sunset Blvd"]),
        ("AC DC, AC–DC", ("ac–dc",), ["AC–DC"]),
        ("cafe\u0301", ("cafe",), []),
        ("na na na", ("na na",), ["na na", "na na"]),
    ],
)
def test_find_aliases(context: str, names: tuple[str, ...], expected: list[str]) -> None:
    assert aliases(context, names) == expected


WORDS = st.sampled_from(["Sun", "set", "The", "a", "SUN", "x.", "-", "_", "sun-set", "’"])
SPACES = st.sampled_from([" ", "\n", "\u00a0 ", "  "])
TEXTS = st.builds(lambda words, space: space.join(words), st.lists(WORDS, max_size=8), SPACES)


@given(TEXTS, st.lists(TEXTS, max_size=3))
def test_aliases_are_those_of_the_official_normalization(context: str, names: list[str]) -> None:
    accepted = set(map(triviaqa.normalize, names)) - {""}
    found = set(map(triviaqa.normalize, aliases(context, names)))
    assert found == {alias for alias in accepted if f" {alias} " in f" {triviaqa.normalize(context)} "}
