"""Which file is read for a split of each data set, and what is announced."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_qa_files import SAMPLES, mrqa_document, race_document, write_json, write_lines, write_race

from trbert_jax.datasets.qa_formats import QA_FORMATS, BadRecords, find_split, read_split
from trbert_jax.errors import UserError

# Data set, sample, where it lies as published, how many questions it has.
PUBLISHED = [
    ("squad", "squad", "{}-v2.0.json", ("train", "dev"), 4),
    ("squad", "squad", "{}-v1.1.json", ("train", "dev"), 4),
    ("newsqa", "mrqa", "{}.jsonl", ("train", "dev"), 3),
    ("newsqa", "mrqa", "{}.jsonl.gz", ("train", "dev"), 3),
    ("newsqa", "mrqa", "{}/NewsQA.jsonl.gz", ("train", "dev"), 3),
    ("naturalqa", "mrqa", "{}.jsonl.gz", ("train", "dev"), 3),
    ("naturalqa", "mrqa", "{}/NaturalQuestionsShort.jsonl", ("train", "dev"), 3),
    ("race", "race", "{}", ("train", "dev", "test"), 4),
    ("race_high", "race", "{}", ("train", "dev", "test"), 3),
    ("race_middle", "race", "{}", ("train", "dev", "test"), 1),
    ("hotpotqa", "hotpotqa", "hotpot_{}_v1.json", ("train_v1.1", "dev_distractor"), 2),
    ("hotpotqa_fullwiki", "hotpotqa", "hotpot_{}_v1.json", ("train_v1.1", "dev_fullwiki"), 2),
    ("hotpotqa_graph", "hotpotqa_graph", "{}.json", ("hotpot_train_graph", "rerank_dev_tok"), 2),
    ("triviaqa", "triviaqa", "qa/wikipedia-{}.json", ("train", "dev"), 4),
    ("triviaqa", "triviaqa_list", "{}.json", ("train", "dev"), 2),
    ("triviaqa_web", "triviaqa_web", "qa/web-{}.json", ("train", "dev"), 4),
    ("wikihop", "wikihop", "{}.json", ("train", "dev"), 2),
    ("wikihop", "wikihop", "{}.json", ("train", "dev_sort"), 2),
]


@pytest.mark.parametrize(("name", "sample", "pattern", "parts", "count"), PUBLISHED)
def test_published_names(
    tmp_path: Path, name: str, sample: str, pattern: str, parts: tuple[str, ...], count: int
) -> None:
    said = list[str]()
    for part in parts:
        file = pattern.format(part).replace("_v1.1_v1", "_v1.1")
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        SAMPLES[sample].write(path, SAMPLES[sample].fresh())
    for split, _ in zip(("train", "dev", "test"), parts, strict=False):
        assert len(read_split(name, tmp_path, split, BadRecords(), said.append)) == count
    assert said == []
    if len(parts) == 2:
        dev = find_split(name, tmp_path, "dev")
        assert find_split(name, tmp_path, "test", said.append) == dev
        assert said == [f"{name}: no test set with answers is published; {dev.name} serves as test"]


def test_every_data_set_is_tested() -> None:
    assert {name for name, *_ in PUBLISHED} == set(QA_FORMATS)


def test_a_test_set_of_ones_own(tmp_path: Path) -> None:
    for split in ("dev", "test"):
        write_lines(tmp_path / f"{split}.jsonl", mrqa_document())
    assert find_split("newsqa", tmp_path, "test", pytest.fail).name == "test.jsonl"


def test_skipped_records_are_announced(tmp_path: Path) -> None:
    document = race_document()
    document["high/2.txt"]["answers"][1] = "E"
    write_race(tmp_path / "dev", document)
    said, bad = list[str](), BadRecords(skip=True)
    for _ in range(2):  # two readings with one policy: each is announced by itself
        assert len(read_split("race", tmp_path, "dev", bad, said.append)) == 3
    assert len(set(said)) == 1
    assert said[0].startswith(
        f"{tmp_path}/dev: 1 of 4 records skipped: {tmp_path}/dev/high/2.txt: question 1: "
    )
    with pytest.raises(UserError, match="expected a letter from A to D; correct the record"):
        read_split("race", tmp_path, "dev", BadRecords())


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'squat' is no question answering data set; expected squad, newsqa,"):
        find_split("squat", tmp_path, "dev")
    with pytest.raises(UserError, match="split is 'val'; expected one of train, dev, test"):
        find_split("squad", tmp_path, "val")
    with pytest.raises(
        UserError, match=r"nowhere: no such folder; expected one that holds dev-v2.0.json or dev"
    ):
        find_split("squad", tmp_path / "nowhere", "dev")
    write_json(tmp_path / "dev-v2.0.json", {})
    with pytest.raises(
        UserError, match=r"nothing to read for train of squad; expected train-v2.0.json or train"
    ):
        find_split("squad", tmp_path, "train")
    with pytest.raises(UserError, match="nothing to read for test of race; expected test in it"):
        find_split("race", tmp_path, "test")
