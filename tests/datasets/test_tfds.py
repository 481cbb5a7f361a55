from __future__ import annotations

import logging
import subprocess
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from trbert_jax.datasets import find_dataset
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
    ("row", "message"),
    [
        ({"text": b"\xe9", "label": 0}, "test example 0: text is not UTF-8"),
        ({"text": b" ", "label": 0}, "test example 0: the text is empty"),
        ({"text": 3, "label": 0}, "test example 0: the text is a number"),
        ({"text": b"a", "label": -1}, "test example 0: the label is -1; expected 0..1"),
    ],
)
def test_bad_records(monkeypatch: pytest.MonkeyPatch, row: dict[str, Any], message: str) -> None:
    install(monkeypatch, {"test": Source([row])})
    with pytest.raises(UserError, match=message):
        NEWS.read_split(None, "test")


def test_bad_fields_and_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, {"train": Source(rows(3), label=object())})
    with pytest.raises(UserError, match=r"data.text_field: .* no field 'body'; it has: text, label, title"):
        NEWS.read_split(None, "train", text_field="body")
    with pytest.raises(UserError, match=r"data.label_field: 'label' of tfds:news/small is not a class label"):
        NEWS.read_split(None, "train")
    with pytest.raises(UserError, match=r"has no split test \(it has: train\); set evaluate.split=dev"):
        NEWS.read_split(None, "test")
    install(monkeypatch, {"test": Source([])})
    with pytest.raises(UserError, match="the split for test has no examples"):
        NEWS.read_split(None, "test")
    with pytest.raises(UserError, match=r"has no split train \(it has: test\)$"):
        NEWS.read_split(None, "train")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ValueError("Dataset news not found.\nAvailable datasets:"),
            r"cannot be read \(Dataset news not found.\)",
        ),
        (OSError(), r"cannot be read \(OSError\); check name and network"),
        (
            ModuleNotFoundError("no", name="tensorflow"),
            "cannot be prepared here, that needs the package tensorflow",
        ),
    ],
)
def test_a_library_that_fails(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    install(monkeypatch, error)
    with pytest.raises(UserError, match=message):
        NEWS.read_split(None, "test")


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
