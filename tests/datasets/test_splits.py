"""Which file is read for a split of each data set, and what is logged."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny_qa_files import SAMPLES, write_race

from trbert_jax.datasets import DATASETS, BadRecords
from trbert_jax.errors import MissingSplitError, UserError

# Data set, ending of its files, number of classes.
TEXTS = [
    ("imdb", "jsonl", 2),
    ("20news", "jsonl", 20),
    ("hyperpartisan", "jsonl", 2),
    ("yelp_f", "csv", 5),
    ("yelp_polarity", "csv", 2),
]
# Data set, sample, published file names of train, dev (and test), number of questions.
QUESTIONS: list[tuple[str, str, tuple[str, ...], int]] = [
    ("squad", "squad", ("train-v2.0.json", "dev-v2.0.json"), 4),
    ("squad", "squad", ("train-v1.1.json", "dev-v1.1.json"), 4),
    ("newsqa", "mrqa", ("train.jsonl", "dev.jsonl"), 3),
    ("mrqa", "mrqa", ("train.jsonl", "dev.jsonl"), 3),
    ("newsqa", "mrqa", ("train.jsonl", "dev.jsonl", "test.jsonl"), 3),
    ("naturalqa", "mrqa", ("train/NaturalQuestionsShort.jsonl", "dev/NaturalQuestionsShort.jsonl"), 3),
    ("race", "race", ("train", "dev", "test"), 4),
    ("race_high", "race", ("train", "dev", "test"), 3),
    ("race_middle", "race", ("train", "dev", "test"), 1),
    ("hotpotqa", "hotpotqa", ("hotpot_train_v1.1.json", "hotpot_dev_distractor_v1.json"), 2),
    ("hotpotqa_fullwiki", "hotpotqa", ("hotpot_train_v1.1.json", "hotpot_dev_fullwiki_v1.json"), 2),
    ("hotpotqa_graph", "hotpotqa_graph", ("hotpot_train_graph.json", "rerank_dev_tok.json"), 2),
    ("triviaqa", "triviaqa", ("qa/wikipedia-train.json", "qa/wikipedia-dev.json"), 4),
    ("triviaqa", "triviaqa_list", ("train.json", "dev.json"), 2),
    ("triviaqa_web", "triviaqa_web", ("qa/web-train.json", "qa/web-dev.json"), 4),
    ("wikihop", "wikihop", ("train.json", "dev.json"), 2),
    ("wikihop", "wikihop", ("train.json", "dev_sort.json"), 2),
]


def write_split(folder: Path, name: str, rows: Sequence[tuple[str, int]]) -> None:
    form = '{1},"{0}"\n' if name.endswith(".csv") else '{{"text": "{0}", "label": {2}}}\n'
    (folder / name).write_text("".join(form.format(text, label + 1, label) for text, label in rows))


def texts(name: str, folder: Path, split: str, **options: Any) -> list[str]:
    return [example.text for example in DATASETS[name].read_split(folder, split, **options)]


def test_all_data_sets_are_tested() -> None:
    assert {name for name, *_ in TEXTS} | {name for name, *_ in QUESTIONS} == set(DATASETS) - {
        "stdlib",
        "text",
    }


@pytest.mark.parametrize(("name", "suffix", "classes"), TEXTS)
def test_text_splits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, suffix: str, classes: int
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    dataset = DATASETS[name]
    assert len(set(dataset.read_labels(tmp_path))) == classes
    for split in ("train", "dev", "test"):
        write_split(tmp_path, f"{split}.{suffix}", [(f"{split} {i}", i) for i in range(classes)])
    for split in ("train", "dev", "test"):
        examples = dataset.read_split("~", split)
        assert [(e.text, e.label) for e in examples] == [(f"{split} {i}", i) for i in range(classes)]
        assert examples[-1].id == f"{split}.{suffix}:{classes}"
    write_split(tmp_path, f"test.{suffix}", [("one too many", classes)])
    with pytest.raises(UserError, match=rf"test.{suffix}:1: .*label"):
        dataset.read_split(tmp_path, "test")


@pytest.mark.parametrize(("name", "sample", "files", "count"), QUESTIONS)
def test_question_splits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, sample: str, files: Any, count: int
) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        SAMPLES[sample].write(tmp_path / file, SAMPLES[sample].fresh())
    for split in ("train", "dev", "test"):
        assert len(DATASETS[name].read_split(tmp_path, split)) == count
    # Where no test set is published, dev serves as test.
    assert [Path(files[1]).name in message for message in caplog.messages] == [True] * (len(files) == 2)


def test_two_files_of_a_split_or_two_versions_are_refused(tmp_path: Path) -> None:
    document = SAMPLES["squad"].fresh()
    for file in ("train-v2.0.json", "dev-v1.1.json"):
        SAMPLES["squad"].write(tmp_path / file, document)
    for split in ("train", "dev"):
        with pytest.raises(UserError, match=r"(?=.*train-v2.0.json)(?=.*dev-v1.1.json)"):
            DATASETS["squad"].read_split(tmp_path, split)
    for file in ("dev.json", "dev_sort.json"):
        SAMPLES["wikihop"].write(tmp_path / file, SAMPLES["wikihop"].fresh())
    with pytest.raises(UserError, match="dev_sort"):
        DATASETS["wikihop"].read_split(tmp_path, "dev")


def test_skipped_records_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    document = SAMPLES["race"].fresh()
    document["high/2.txt"]["answers"][1] = "E"
    write_race(tmp_path / "dev", document)
    bad = BadRecords(skip=True)
    for _ in range(2):  # two readings with one policy: each is logged by itself
        assert len(DATASETS["race"].read_split(tmp_path, "dev", bad)) == 3
    assert len(set(caplog.messages)) == 1
    assert "1 of 4 records skipped" in caplog.messages[0]
    assert "high/2.txt" in caplog.messages[0]


def test_limits_draw_from_the_whole_file_in_its_order(tmp_path: Path) -> None:
    rows = [(f"{i:04d}", int(i >= 500)) for i in range(1000)]  # sorted by label
    for split in ("train", "dev", "test"):
        write_split(tmp_path, f"{split}.jsonl", rows)
    train = texts("imdb", tmp_path, "train", limit=100, seed=1)
    assert len(train) == 100
    assert train == sorted(set(train))
    assert 30 < sum(text >= "0500" for text in train) < 70
    assert train == texts("imdb", tmp_path, "train", limit=100, seed=1)
    assert train != texts("imdb", tmp_path, "train", limit=100, seed=2)
    assert train != texts("imdb", tmp_path, "dev", limit=100, seed=1)
    assert set(train) < set(texts("imdb", tmp_path, "train", limit=200, seed=1))
    assert texts("imdb", tmp_path, "train", limit=5000) == [text for text, _ in rows]


@pytest.mark.parametrize(("name", "suffix", "classes"), TEXTS)
def test_dev_is_held_out_of_train(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, suffix: str, classes: int
) -> None:
    caplog.set_level(logging.INFO)
    everything = [f"{i:02d}" for i in range(50)]
    write_split(tmp_path, f"train.{suffix}", [(text, i % classes) for i, text in enumerate(everything)])
    train, dev = texts(name, tmp_path, "train"), texts(name, tmp_path, "dev")
    assert (len(train), len(dev)) == (45, 5)
    assert sorted(train + dev) == everything
    assert train == sorted(train)
    assert "5 of 50" in caplog.messages[0]
    assert dev == texts(name, tmp_path, "dev", seed=7)
    with pytest.raises(MissingSplitError, match=f"test.{suffix}"):
        texts(name, tmp_path, "test")
    write_split(tmp_path, f"train.{suffix}", [("a", 0)])
    with pytest.raises(UserError, match=f"train.{suffix}"):
        texts(name, tmp_path, "train")


def test_names_of_the_newsgroups(tmp_path: Path) -> None:
    dataset, names, file = DATASETS["20news"], [f"group.{i}" for i in range(20)], tmp_path / "labels.json"
    assert dataset.read_labels(tmp_path)[3] == "3"
    file.write_text(json.dumps(names), encoding="utf-8")
    assert dataset.read_labels(tmp_path) == tuple(names)
    for content in ("{", '{"a": 1}', json.dumps([*range(20)]), json.dumps(["a"] * 20), '["a"]'):
        file.write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=r"labels.json"):
            dataset.read_labels(tmp_path)


@pytest.mark.parametrize("file", ["original_data.txt", "articles-training-byarticle-20181122.xml"])
def test_hyperpartisan_has_to_be_split_first(tmp_path: Path, file: str) -> None:
    (tmp_path / file).touch()
    with pytest.raises(UserError, match=f"trbert split-hyperpartisan --input .*{file}"):
        DATASETS["hyperpartisan"].read_split(tmp_path, "train")


def test_missing_files(tmp_path: Path) -> None:
    read = DATASETS["squad"].read_split
    with pytest.raises(UserError, match=r"data.path: .*nowhere: .*train-v2.0.json"):
        read(tmp_path / "nowhere", "train")
    with pytest.raises(UserError, match=r"data.path: missing"):
        read(None, "train")
    with pytest.raises(MissingSplitError, match=r"train-v2.0.json"):
        read(tmp_path, "train")
    with pytest.raises(UserError, match="'valid'"):
        read(tmp_path, "valid")
