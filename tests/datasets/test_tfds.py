from __future__ import annotations

import logging
import subprocess
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_qa_files import SAMPLES

from trbert_jax.datasets import BadRecords, find_dataset
from trbert_jax.datasets.records import ChoiceQuestion, Span, SpanQuestion
from trbert_jax.errors import UserError

LABELS = types.SimpleNamespace(names=["world", "sports"])


class Source(list[dict[str, Any]]):
    """What `tfds.data_source` returns for a split: a sequence that knows about its data set."""

    def __init__(self, rows: list[dict[str, Any]], label: object = LABELS) -> None:
        super().__init__(rows)
        self.read: list[int] = []
        features = {"text": object(), "label": label, "title": object()}
        self.dataset_info = types.SimpleNamespace(features=features)

    def __getitem__(self, index: Any) -> Any:
        self.read.append(index)
        return super().__getitem__(index)


def rows(count: int) -> list[dict[str, Any]]:
    return [{"text": f"é {i}".encode(), "label": i % 2, "title": f"t {i}".encode()} for i in range(count)]


def install(monkeypatch: pytest.MonkeyPatch, sources: Mapping[str, Source] | Exception) -> list[Any]:
    calls = list[Any]()

    def data_source(name: str, *, data_dir: str | None) -> Mapping[str, Source]:
        calls.append((name, data_dir))
        if isinstance(sources, Exception):
            raise sources
        return sources

    module = types.ModuleType("tensorflow_datasets")
    monkeypatch.setattr(module, "data_source", data_source, raising=False)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", module)
    return calls


NEWS = find_dataset("tfds:news/small")


def test_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install(
        monkeypatch, {"train": Source(rows(6)), "validation": Source(rows(3)), "test": Source(rows(2))}
    )
    for split, count in (("train", 6), ("dev", 3), ("test", 2)):
        assert NEWS.read_labels("somewhere") == ("world", "sports")
        assert [(e.id, e.text, e.label) for e in NEWS.read_split("somewhere", split)] == [
            (f"{split}:{i}", f"é {i}", i % 2) for i in range(count)
        ]
    assert set(calls) == {("news/small", "somewhere")}


def test_dev_is_held_out_of_train(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    install(monkeypatch, {"train": Source(rows(30)), "test": Source(rows(2))})
    caplog.set_level(logging.INFO)
    train, dev = (NEWS.read_split(None, split) for split in ("train", "dev"))
    assert (len(train), len(dev)) == (27, 3)
    assert {e.text for e in train + dev} == {f"é {i}" for i in range(30)}
    assert ["3 of 30" in message for message in caplog.messages] == [True, True]


def test_other_field_and_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(rows(1000))
    install(monkeypatch, {"train": source, "dev": source})
    examples = NEWS.read_split(None, "train", text_field="title", limit=5, seed=3)
    assert [e.text for e in examples] == [f"t {i}" for i in source.read]
    assert source.read == sorted(source.read)
    assert len(source.read) == 5  # no other record is read


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": b"\xe9", "label": 0}, "UTF-8"),
        ({"text": b" ", "label": 0}, "text empty"),
        ({"text": 3, "label": 0}, "text (3)"),
        ({"text": b"a", "label": -1}, "label -1 0 1"),
    ],
)
def test_bad_texts(monkeypatch: pytest.MonkeyPatch, row: dict[str, Any], words: str) -> None:
    install(monkeypatch, {"test": Source([row])})
    with pytest.raises(UserError, match=r"^tfds:news/small: test example 0: ") as caught:
        NEWS.read_split(None, "test")
    for word in words.split():
        assert word in str(caught.value)


def test_bad_fields_and_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, {"train": Source(rows(3), label=object())})
    with pytest.raises(UserError, match=r"data.text_field: .*'body'.*: text, label, title"):
        NEWS.read_split(None, "train", text_field="body")
    with pytest.raises(UserError, match=r"data.label_field: 'label'"):
        NEWS.read_split(None, "train")
    with pytest.raises(UserError, match=r"test .*evaluate.split=dev"):
        NEWS.read_split(None, "test")
    install(monkeypatch, {"test": Source([])})
    with pytest.raises(UserError, match=r"tfds:news/small: .*test"):
        NEWS.read_split(None, "test")
    with pytest.raises(UserError, match=r"tfds:news/small: .*train"):
        NEWS.read_split(None, "train")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("Dataset news not found.\nAvailable datasets:"), r"\(Dataset news not found.\)"),
        (OSError(), r"\(OSError\)"),
        (ModuleNotFoundError("no", name="tensorflow"), "package tensorflow"),
    ],
)
def test_library_that_fails(monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str) -> None:
    install(monkeypatch, error)
    with pytest.raises(UserError, match=f"data.name: tfds:news/small .*{reason}"):
        NEWS.read_split(None, "test")


# Questions: bytes, NumPy, sequences of records as records of sequences --------------------------------

CONTEXT = "Zürich, not 東京.".encode()
NAMES = ["東京".encode(), "Zürich".encode()]
SQUAD = {
    "id": b"q1",
    "context": CONTEXT,
    "question": b"Which?",
    "is_impossible": False,
    "answers": {"text": NAMES, "answer_start": [np.int32(12), np.int32(0)]},
}
NOTHING: dict[str, list[Any]] = {"text": [], "answer_start": []}
IMPOSSIBLE: dict[str, Any] = {**SQUAD, "id": b"q2", "is_impossible": True, "answers": NOTHING}
CHAR_SPANS = {
    "start": [np.array([12], np.int32), np.array([0, 0], np.int32)],
    "end": [np.array([13], np.int32), np.array([5, 5], np.int32)],
}
MRQA = {
    "context": CONTEXT,
    "qid": b"n1",
    "question": b"Which?",
    "detected_answers": {"text": NAMES, "char_spans": CHAR_SPANS, "token_spans": {"start": [], "end": []}},
    "answers": np.array([NAMES[0], b"zurich"], object),
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
    "entity_pages": {
        "filename": ["Zürich.txt".encode()],
        "wiki_context": ["Zürich, the Zürich".encode()],
    },
    "search_results": {
        "filename": [b"1/1_2.txt", b"1/1_3.txt"],
        "search_context": [b"none", "ZÜRICH".encode()],
    },
    "answer": {"normalized_aliases": ["zürich".encode()], "value": NAMES[1]},
}


def convert(monkeypatch: pytest.MonkeyPatch, name: str, *records: Any, bad: BadRecords | None = None) -> Any:
    """Reads these records as the training split of a data set of the catalog."""
    install(monkeypatch, {"train": Source(list(records)), "validation": Source([])})
    return find_dataset(f"tfds:{name}").read_split(None, "train", bad)


@pytest.mark.parametrize("name", ["squad/v2.0", "squad/v2.0:3.0.0", "squad"])
def test_squad(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    first, second = convert(monkeypatch, name, SQUAD, IMPOSSIBLE)
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


def test_squad_1(monkeypatch: pytest.MonkeyPatch) -> None:
    record = {key: value for key, value in SQUAD.items() if key != "is_impossible"}
    (question,) = convert(monkeypatch, "squad/v1.1", record)
    assert (question.impossible, len(question.answers)) == (False, 2)


def test_mrqa(monkeypatch: pytest.MonkeyPatch) -> None:
    (question,) = convert(monkeypatch, "mrqa/news_qa", MRQA)
    assert question.id == "n1"
    assert question.answers == ("東京", "zurich")
    assert question.spans == (Span(12, 14), Span(0, 6), Span(0, 6))


def test_race(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = {**RACE, "example_id": b"high1.txt", "questions": [], "answers": [], "options": []}
    questions = convert(monkeypatch, "race/middle", RACE, empty)
    assert questions[0] == ChoiceQuestion(
        id="middle/17.txt:0",
        article="Élodie reads.",
        question="Who?",
        options=("a", "b", "c", "d"),
        answer=3,
        where="tfds:race/middle: train example 0: questions[0]",
    )
    assert [(q.id, q.answer) for q in questions[1:]] == [("middle/17.txt:1", 0)]


def test_trivia_qa(monkeypatch: pytest.MonkeyPatch) -> None:
    # Once in the web part, once in the Wikipedia part.
    questions = convert(monkeypatch, "trivia_qa/rc", TRIVIA, TRIVIA)
    assert [q.id for q in questions] == ["tc_1--Zürich.txt", "tc_1--1/1_2.txt", "tc_1--1/1_3.txt"]
    assert [q.spans for q in questions] == [(Span(0, 6), Span(12, 18)), (), (Span(0, 6),)]
    assert {q.answers for q in questions} == {("zürich",)}


def test_trivia_qa_without_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = {"normalized_aliases": [], "value": b"<unk>"}
    for question in convert(monkeypatch, "trivia_qa/rc", {**TRIVIA, "answer": answer}):
        assert (question.answers, question.spans) == ((), ())


TWO = {"text": [b"a"], "answer_start": [0, 1]}
GOOD = {"squad": IMPOSSIBLE, "mrqa": MRQA, "race": {**RACE, "example_id": b"high1.txt"}, "trivia_qa": TRIVIA}


@pytest.mark.parametrize(
    ("name", "record", "words"),
    [
        ("squad/v2.0", {**SQUAD, "context": b"\xe9"}, "context UTF-8"),
        ("squad/v2.0", {**SQUAD, "answers": TWO}, "answers 1 2"),
        ("squad/v2.0", {**SQUAD, "context": b" " * 40}, "context empty"),
        ("squad/v2.0", {**SQUAD, "context": b"a" * 40}, "'q1' answer_start 12"),
        ("squad/v2.0", RACE, "answers 'text'"),
        ("mrqa/x", {**MRQA, "context": b"a" * 40}, "'n1' char_spans[0] 'aa'"),
        ("mrqa/x", SQUAD, "detected_answers"),
        ("race/high", {**RACE, "options": [[b"a"], [b"b"]]}, "question 0 options[0] 1 4"),
        ("race/high", {**RACE, "answers": [b"A", b"F"]}, "question 1 answers[1] 'F'"),
        (
            "trivia_qa/rc",
            {**TRIVIA, "answer": {"value": b"x", "normalized_aliases": []}},
            "'tc_1' answer normalized_aliases empty",
        ),
        (
            "trivia_qa/rc",
            {**TRIVIA, "entity_pages": {"filename": [b"f"], "wiki_context": [b""]}},
            "'tc_1' entity_pages[0] wiki_context empty",
        ),
    ],
)
def test_bad_questions(monkeypatch: pytest.MonkeyPatch, name: str, record: Any, words: str) -> None:
    with pytest.raises(UserError, match=rf"^tfds:{name}: train example 1: ") as caught:
        convert(monkeypatch, name, GOOD[name.split("/")[0]], record)
    for word in words.split():
        assert word in str(caught.value)


def test_repeated_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    other = {**SQUAD, "question": b"Which other?"}
    with pytest.raises(UserError, match=r"example 1: .*'q1'.*example 0"):
        convert(monkeypatch, "squad/v2.0", SQUAD, SQUAD)
    bad = BadRecords(skip=True)
    assert len(convert(monkeypatch, "squad/v2.0", SQUAD, other, IMPOSSIBLE, bad=bad)) == 2
    assert len(bad.skipped) == 1
    with pytest.raises(UserError, match=r"'tc_1--Zürich\.txt'"):
        convert(monkeypatch, "trivia_qa/rc", TRIVIA, {**TRIVIA, "question": b"Which?"})
    with pytest.raises(UserError, match=r"tfds:squad/v2\.0: train: has no usable record"):
        convert(monkeypatch, "squad/v2.0")


def test_published_format_of_questions(tmp_path: Path) -> None:
    """`trbert evaluate` reads a file for a model that was trained on the catalog's data set."""
    path = SAMPLES["squad"].write(tmp_path / "dev.json", SAMPLES["squad"].fresh())
    assert len(find_dataset("tfds:squad/v2.0").read_file(path)) == 4


PREPARE = """
import sys
import tensorflow_datasets as tfds

class TinyNews(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    url_infos = {}  # nothing to download

    def _info(self):
        label = tfds.features.ClassLabel(names=["world", "sports"])
        features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "label": label})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, manager):
        return {"train": self._generate_examples(20), "test": self._generate_examples(4)}

    def _generate_examples(self, count):
        return ((i, {"text": f"\\u00e9 {i}", "label": i % 2}) for i in range(count))

TinyNews(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
"""
READ = """
import sys
from trbert_jax.datasets import find_dataset

news = find_dataset("tfds:tiny_news")
for split in ("train", "dev", "test"):
    data = news.read_split(sys.argv[1], split)
    print(len(data), news.read_labels(sys.argv[1]), ascii(data[-1].text), data[-1].label)
print("tensorflow" in sys.modules)
"""


def test_a_real_data_set(tmp_path: Path) -> None:
    """Prepared and read by the library itself, in processes of their own: it imports much and warns."""
    for code in (PREPARE, READ):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        r"18 ('world', 'sports') '\xe9 19' 1",
        r"2 ('world', 'sports') '\xe9 15' 1",
        r"4 ('world', 'sports') '\xe9 3' 1",
        "False",
    ]
