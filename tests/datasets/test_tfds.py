import subprocess
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_qa_files import DOCUMENTS, SAMPLES, read_sample

from trbert_jax.datasets import BadRecords, find_dataset
from trbert_jax.errors import UserError

LABELS = types.SimpleNamespace(names=["world", "sports"])


class Source(list[dict[str, Any]]):
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


def install(monkeypatch: pytest.MonkeyPatch, sources: Mapping[str, Source] | Exception) -> None:
    def data_source(name: str, *, data_dir: str | None) -> Mapping[str, Source]:
        assert data_dir in (None, "somewhere")
        if isinstance(sources, Exception):
            raise sources
        return sources

    module = types.ModuleType("tensorflow_datasets")
    monkeypatch.setattr(module, "data_source", data_source, raising=False)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", module)


NEWS = find_dataset("tfds:news/small")


def test_validation_serves_as_dev(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, {"train": Source(rows(30)), "validation": Source(rows(3)), "test": Source(rows(2))})
    assert NEWS.read_labels("somewhere") == ("world", "sports")
    for split, count in {"train": 30, "dev": 3, "test": 2}.items():
        examples = [(e.id, e.text, e.label) for e in NEWS.read_split("somewhere", split)]
        assert examples == [(f"{split}:{i}", f"é {i}", i % 2) for i in range(count)]


def test_other_field_and_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(rows(1000))
    install(monkeypatch, {"train": source, "dev": source})
    examples = NEWS.read_split(None, "train", text_field="title", limit=5, seed=3)
    assert [e.text for e in examples] == [f"t {i}" for i in source.read]
    assert source.read == sorted(source.read)
    assert len(source.read) == 5  # no other record is read


@pytest.mark.parametrize(
    ("sources", "split", "options", "message"),
    [
        ({"train": Source(rows(3))}, "dev", {"text_field": "body"}, "data.text_field: .*'body'.*: text"),
        ({"train": Source(rows(3), label=object())}, "train", {}, "data.label_field: 'label'"),
        ({"train": Source(rows(3))}, "test", {}, "tfds:news/small: .*test .*evaluate.split=dev"),
        ({"test": Source([])}, "test", {}, "tfds:news/small: .*test"),
        ({"test": Source([])}, "train", {}, "tfds:news/small: .*train"),
        ({"test": Source([{"text": b"\xe9", "label": 0}])}, "test", {}, "small: test example 0: .*UTF-8"),
        ({"test": Source([{"text": b"a", "label": -1}])}, "test", {}, "example 0: label: .*-1.* 0 to 1"),
        (ValueError("news not found.\nAvailable:"), "test", {}, r"small .*\(news not found.\)"),
        (OSError(), "test", {}, r"data.name: tfds:news/small .*\(OSError\)"),
        (ModuleNotFoundError("no", name="tensorflow"), "test", {}, "data.name: .*package tensorflow"),
    ],
)
def test_unreadable_splits(
    monkeypatch: pytest.MonkeyPatch, sources: Any, split: str, options: Any, message: str
) -> None:
    install(monkeypatch, sources)
    with pytest.raises(UserError, match=message):
        NEWS.read_split(None, split, **options)


# Questions are bytes, NumPy, sequences of records as records of sequences.


def stored(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: stored(item) for key, item in value.items()}
    if isinstance(value, list):
        return np.array(value, np.int32) if value and type(value[0]) is int else list(map(stored, value))
    return value.encode() if isinstance(value, str) else value


def squad_records() -> Iterator[Any]:
    articles = SAMPLES["squad"].fresh()["data"]
    for paragraph in (paragraph for article in articles for paragraph in article["paragraphs"]):
        for qa in paragraph["qas"]:
            columns = {name: [answer[name] for answer in qa["answers"]] for name in ("text", "answer_start")}
            yield {**qa, "context": paragraph["context"], "answers": columns}


def mrqa_records() -> Iterator[Any]:
    for line in SAMPLES["mrqa"].fresh()[1:]:
        for qa in line["qas"]:
            detected = qa["detected_answers"]
            start, end = ([[ends[i] for ends in answer["char_spans"]] for answer in detected] for i in (0, 1))
            texts = [answer["text"] for answer in detected]
            columns = {"text": texts, "char_spans": {"start": start, "end": end}, "token_spans": {}}
            qid = qa.get("qid", qa.get("id"))
            yield {**qa, "qid": qid, "context": line["context"], "detected_answers": columns}


def triviaqa_records() -> Iterator[Any]:
    for item in SAMPLES["triviaqa_web"].fresh()["Data"]:
        aliases = item["Answer"]["NormalizedAliases"] + item["Answer"].get("HumanAnswers", [])
        answer = {"normalized_aliases": aliases, "value": item["Answer"]["Value"]}
        record = {"question": item["Question"], "question_id": item["QuestionId"], "answer": answer}
        for field, folder, pages, document in (
            ("EntityPages", "wikipedia", "entity_pages", "wiki_context"),
            ("SearchResults", "web", "search_results", "search_context"),
        ):
            names = [page["Filename"] for page in item.get(field, [])]
            texts = [DOCUMENTS[f"{folder}/{name}"] for name in names]
            record[pages] = {"filename": names, document: texts}
        yield record


SQUAD, MRQA, TRIVIAQA = (list(map(stored, f())) for f in (squad_records, mrqa_records, triviaqa_records))
ARTICLES = SAMPLES["race"].fresh().items()
RACE = [stored({**article, "example_id": name.replace("/", "")}) for name, article in ARTICLES]


def convert(monkeypatch: pytest.MonkeyPatch, name: str, *records: Any, bad: BadRecords | None = None) -> Any:
    install(monkeypatch, {"train": Source(list(records)), "validation": Source([])})
    return find_dataset(f"tfds:{name}").read_split(None, "train", bad)


@pytest.mark.parametrize(
    ("name", "records", "sample"),
    [
        ("squad/v2.0:3.0.0", SQUAD, "squad"),
        ("squad", SQUAD, "squad"),
        ("mrqa/news_qa", MRQA, "mrqa"),
        ("race/middle", RACE, "race"),
        ("trivia_qa/rc", TRIVIAQA, "triviaqa_web"),
        ("trivia_qa/rc", TRIVIAQA * 2, "triviaqa_web"),  # once in the web part, once in the Wikipedia part
    ],
)
def test_questions_are_those_of_the_published_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, records: Any, sample: str
) -> None:
    questions = convert(monkeypatch, name, *records)
    assert questions == read_sample(sample, tmp_path)
    assert questions[0].where.startswith(f"tfds:{name}: train example 0")


def test_trivia_qa_without_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = {"normalized_aliases": [], "value": b"<unk>"}
    for question in convert(monkeypatch, "trivia_qa/rc", {**TRIVIAQA[0], "answer": answer}):
        assert (question.answers, question.spans) == ((), ())


TWO_STARTS = {"text": [b"a"], "answer_start": [0, 1]}
NO_ALIAS = {"value": b"x", "normalized_aliases": []}
EMPTY_PAGE = {"filename": [b"f"], "wiki_context": [b""]}


@pytest.mark.parametrize(
    ("name", "good", "changes", "words"),
    [
        ("squad/v2.0", SQUAD, {"context": b"\xe9"}, "context UTF-8"),
        ("squad/v2.0", SQUAD, {"answers": TWO_STARTS}, "answers 1 2"),
        ("squad/v2.0", SQUAD, {"answers": [b"a"]}, "answers 'text'"),
        ("mrqa/x", MRQA, {"detected_answers": {}}, "'n1' 'text'"),
        ("trivia_qa/rc", TRIVIAQA, {"answer": NO_ALIAS}, "'tc_33' answer normalized_aliases empty"),
        ("trivia_qa/rc", TRIVIAQA, {"entity_pages": EMPTY_PAGE}, "entity_pages[0] wiki_context empty"),
    ],
)
def test_bad_questions(
    monkeypatch: pytest.MonkeyPatch, name: str, good: Any, changes: Any, words: str
) -> None:
    with pytest.raises(UserError, match=rf"^tfds:{name}: train example 1: ") as caught:
        convert(monkeypatch, name, good[-1], {**good[0], **changes})
    for word in words.split():
        assert word in str(caught.value)


def test_repeated_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = BadRecords(skip=True)
    assert len(convert(monkeypatch, "squad/v2.0", SQUAD[0], SQUAD[0], SQUAD[1], bad=bad)) == 2
    (skipped,) = bad.skipped
    assert "example 1: has the id 'q1'" in str(skipped)
    with pytest.raises(UserError, match=r"'tc_33--Lloyd_Webber\.txt'"):
        convert(monkeypatch, "trivia_qa/rc", TRIVIAQA[0], {**TRIVIAQA[0], "question": b"Which?"})
    with pytest.raises(UserError, match=r"tfds:squad/v2\.0: train: has no usable record"):
        convert(monkeypatch, "squad/v2.0")


def test_published_format_of_questions(tmp_path: Path) -> None:
    path = SAMPLES["squad"].write(tmp_path / "dev.json", SAMPLES["squad"].fresh())
    assert len(find_dataset("tfds:squad/v2.0").read_file(path)) == 4


SCRIPT = """
import sys
import tensorflow_datasets as tfds
from trbert_jax.datasets import find_dataset

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
news = find_dataset("tfds:tiny_news")
for split in ("train", "dev", "test"):
    data = news.read_split(sys.argv[1], split)
    print(len(data), news.read_labels(sys.argv[1]), ascii(data[-1].text), data[-1].label)
print("tensorflow" in sys.modules)
"""


def test_a_real_data_set(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-4:] == [
        r"18 ('world', 'sports') '\xe9 19' 1",
        r"2 ('world', 'sports') '\xe9 15' 1",
        r"4 ('world', 'sports') '\xe9 3' 1",
        "False",
    ]
