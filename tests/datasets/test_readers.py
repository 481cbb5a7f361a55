from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from trbert_jax.config import DATA_NAMES, DataConfig
from trbert_jax.datasets.qa_formats import QA_FORMATS
from trbert_jax.datasets.readers import FILE_FORMATS, Dataset, read_examples
from trbert_jax.errors import UserError


def write_split(folder: Path, name: str, rows: Sequence[tuple[str, int]]) -> None:
    """Labels 0-based; written in the format the name's ending stands for."""
    if name.endswith(".csv"):
        lines = [f'{label + 1},"{text}"' for text, label in rows]
    else:
        lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def texts(dataset: Dataset) -> list[str]:
    return [example.text for example in dataset.examples]


def silent(message: str) -> None:
    raise AssertionError(f"nothing was to be announced: {message}")


def test_every_name_of_the_configuration_has_a_reader() -> None:
    assert {*FILE_FORMATS, "stdlib", *QA_FORMATS} == set(DATA_NAMES)


@pytest.mark.parametrize(
    ("name", "suffix", "classes"),
    [
        ("imdb", "jsonl", 2),
        ("20news", "jsonl", 20),
        ("hyperpartisan", "jsonl", 2),
        ("yelp_f", "csv", 5),
        ("yelp_polarity", "csv", 2),
    ],
)
def test_each_data_set(tmp_path: Path, name: str, suffix: str, classes: int) -> None:
    config = DataConfig(name=name, path=str(tmp_path))
    for split in ("train", "dev", "test"):
        write_split(tmp_path, f"{split}.{suffix}", [(f"{split} {i}", i) for i in range(classes)])
    for split in ("train", "dev", "test"):
        data = read_examples(config, split, announce=silent)
        assert len(data.label_names) == len(set(data.label_names)) == classes
        assert [(e.text, e.label) for e in data.examples] == [(f"{split} {i}", i) for i in range(classes)]
        assert data.examples[-1].id == f"{split}.{suffix}:{classes}"
    write_split(tmp_path, f"test.{suffix}", [("one too many", classes)])
    with pytest.raises(UserError, match=f"for {classes} classes"):
        read_examples(config, "test")


def test_names_of_the_newsgroups(tmp_path: Path) -> None:
    config = DataConfig(name="20news", path=str(tmp_path))
    write_split(tmp_path, "test.jsonl", [("a", 3)])
    assert read_examples(config, "test").label_names[3] == "3"
    names = [f"group.{i}" for i in range(20)]
    (tmp_path / "labels.json").write_text(json.dumps(names), encoding="utf-8")
    assert read_examples(config, "test").label_names == tuple(names)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "labels.json:1: not valid JSON"),
        ('{"a": 1}', "labels.json: expected a list of 20 names"),
        ("[1, 2]", "labels.json: expected a list of 20 names"),
        (json.dumps(["a"] * 20), "labels.json: 1 different names; expected 20"),
        (json.dumps([str(i) for i in range(21)]), "labels.json: 21 different names; expected 20"),
    ],
)
def test_bad_names(tmp_path: Path, content: str, message: str) -> None:
    write_split(tmp_path, "test.jsonl", [("a", 3)])
    (tmp_path / "labels.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_examples(DataConfig(name="20news", path=str(tmp_path)), "test")


def test_limits_draw_from_the_whole_file_in_its_order(tmp_path: Path) -> None:
    rows = [(f"{i:04d}", int(i >= 500)) for i in range(1000)]  # sorted by label
    for split in ("train", "dev", "test"):
        write_split(tmp_path, f"{split}.jsonl", rows)

    def read(split: str, seed: int = 1, train: int | None = 100, evaluated: int | None = 60) -> list[str]:
        config = DataConfig(
            name="imdb", path=str(tmp_path), max_train_examples=train, max_eval_examples=evaluated
        )
        return texts(read_examples(config, split, seed))

    train = read("train")
    assert (len(train), len(read("dev")), len(read("test"))) == (100, 60, 60)
    assert train == sorted(set(train))
    assert 30 < sum(text >= "0500" for text in train) < 70
    assert train == read("train")
    assert train != read("train", seed=2)
    assert set(train) < set(read("train", train=200))
    assert read("dev") != read("test")
    assert read("train", train=5000) == read("train", train=None) == [text for text, _ in rows]


@pytest.mark.parametrize("name", ["imdb", "yelp_polarity"])
def test_dev_is_held_out_where_there_is_none(tmp_path: Path, name: str) -> None:
    suffix = FILE_FORMATS[name].suffix
    write_split(tmp_path, f"train{suffix}", [(f"{i:02d}", i % 2) for i in range(50)])
    config, said = DataConfig(name=name, path=str(tmp_path)), list[str]()
    train, dev = (texts(read_examples(config, split, announce=said.append)) for split in ("train", "dev"))
    assert (len(train), len(dev)) == (45, 5)
    assert sorted(train + dev) == [f"{i:02d}" for i in range(50)]
    assert train == sorted(train)
    assert said[0] == said[1]
    assert f"5 of the 50 examples of train{suffix} serve as dev" in said[0]
    assert dev == texts(read_examples(config, "dev", seed=7, announce=said.append))
    with pytest.raises(
        UserError, match=f"test{suffix}: no such file; data.path must hold train{suffix}, dev"
    ):
        read_examples(config, "test")


def test_one_example_cannot_be_divided(tmp_path: Path) -> None:
    write_split(tmp_path, "train.jsonl", [("a", 0)])
    with pytest.raises(UserError, match=r"train.jsonl: one example cannot be divided"):
        read_examples(DataConfig(name="imdb", path=str(tmp_path)), "train")


def test_wrong_folders(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"data.path: .*nowhere: no such folder; expected one that holds train"
    ):
        read_examples(DataConfig(name="imdb", path=str(tmp_path / "nowhere")), "train")
    with pytest.raises(UserError, match=r"data.path: missing"):
        read_examples(DataConfig(name="imdb"), "train")
    with pytest.raises(UserError, match=r"train.jsonl: no such file; data.path must hold .*test.jsonl$"):
        read_examples(DataConfig(name="imdb", path=str(tmp_path)), "train")
    with pytest.raises(UserError, match=r"data.name is 'imbd'; expected imdb, "):
        read_examples(DataConfig(name="imbd", path=str(tmp_path)), "train")
    with pytest.raises(UserError, match="split is 'valid'; expected one of train, dev, test"):
        read_examples(DataConfig(name="imdb", path=str(tmp_path)), "valid")


@pytest.mark.parametrize("found", ["original_data.txt", "articles-training-byarticle-20181122.xml"])
def test_hyperpartisan_that_has_not_been_split(tmp_path: Path, found: str) -> None:
    (tmp_path / found).touch()
    with pytest.raises(UserError, match=f"trbert split-hyperpartisan --input .*{found}"):
        read_examples(DataConfig(name="hyperpartisan", path=str(tmp_path)), "train")


def test_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_split(tmp_path, "test.jsonl", [("a", 0)])
    assert texts(read_examples(DataConfig(name="imdb", path="~"), "test")) == ["a"]
