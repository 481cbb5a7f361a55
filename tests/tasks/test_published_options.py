"""RACE and WikiHop from files as published to rows and segments."""

from pathlib import Path
from typing import Any

import pytest
from tiny_published import CAFE, Published, pieces, spelled, words
from tiny_qa_files import write_json, write_race

# 東 and 京 are pieces 0 and 1, the last word is 24.
ARTICLE = f"東京 🎉 {words(3, 24)}"


def race_files() -> dict[str, Any]:
    """A long article with two questions, the second of which is cut with its options; a short one."""
    options = [["Łódź", CAFE, "東京", "w3"], ["w1", "w1 w2 w3 w4", "w2", "w3"], ["w1", "w2", "w3", "Élan"]]
    high = {"article": ARTICLE, "questions": ["where is", "who is it"], "answers": ["A", "B"]}
    middle = {"article": "Élan is here", "questions": ["_ is here ?"], "answers": ["D"]}
    return {
        "high/1.txt": {**high, "options": options[:2], "id": "high1.txt"},
        "middle/2.txt": {**middle, "options": options[2:], "id": "middle2.txt"},
    }


def race(folder: Path, choices: str) -> Published:
    for split in ("train", "dev"):
        write_race(folder / split, race_files())
    return Published("race", folder, choices=choices, max_length=24, max_question_length=5)


@pytest.mark.parametrize("choices", ["pairs", "independent", "shared"])
@pytest.mark.parametrize("split", ["train", "dev"])
def test_race_rows_and_counts(tmp_path: Path, choices: str, split: str) -> None:
    """Of 24 tokens 3 are special, and 4 and 5 are taken by question and option: 17 and 16 of 25 pieces."""
    data = race(tmp_path, choices)
    first, second = pieces(spelled(ARTICLE, 0, 16)), pieces(spelled(ARTICLE, 0, 15))
    assert first.startswith("東 京 🎉 w3 ")
    assert data.rows(split) == [
        *(f"[CLS] {first} [SEP] where is {x} [SEP]" for x in ("ło ##dz", "naive cafe", "東 京", "w3")),
        *(f"[CLS] {second} [SEP] who is it {x} [SEP]" for x in ("w1", "w1 w2", "w2", "w3")),
        *(f"[CLS] elan is here [SEP] _ is here ? {x} [SEP]" for x in ("w1", "w2", "w3", "elan")),
    ]
    counts = {"num_examples": 3, "num_rows": 12, "num_truncated": 2, "num_questions_cut": 1}
    assert data.counts(split) == counts
    found = data.inputs(split)
    if choices == "pairs":
        assert found.labels.tolist() == [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1]
        assert found.ids[4:6] == ["high/1.txt:1:A", "high/1.txt:1:B"]
    else:
        assert found.labels.tolist() == [0, 1, 3]
        assert found.ids == ["high/1.txt:0", "high/1.txt:1", "middle/2.txt:0"]
        assert found.first_row is not None
        assert found.first_row.tolist() == [0, 4, 8, 12]
    if choices == "shared":  # [CLS], article, [SEP], question
        assert found.row_targets["shared_length"].tolist() == [21] * 4 + [21] * 4 + [9] * 4


CANDIDATES = ["new york city", "東京", "łódź voivodeship", CAFE]
# With their marks 16, 1 and 13 tokens, 30 in all.
SUPPORTS = [f"🎉 {words(1, 9)} New York City {words(13, 14)}", "", f"Łódź Voivodeship {words(3, 11)}"]


def wikihop(folder: Path, max_segments: int) -> Published:
    long = {"id": "WH_0", "query": "located_in Łódź", "candidates": CANDIDATES, "supports": SUPPORTS}
    short = {"id": "WH_1", "query": "genre x", "candidates": ["w1", "y"], "supports": ["x is y"]}
    queries = [{**long, "answer": "łódź voivodeship"}, {**short, "answer": "w1"}]
    for split in ("train", "dev"):
        write_json(folder / f"{split}.json", queries)
    return Published("wikihop", folder, max_length=32, max_segments=max_segments)


# [CLS], 5 pieces of the query, and candidates of 3, 2, 3 and 2 pieces behind a mark each: 20 tokens, which
# leave 11 for documents.
HEAD = (
    "[CLS] located _ in ło ##dz [unused1] new york city [unused1] 東 京 "
    "[unused1] ło ##dz voivodeship [unused1] naive cafe"
)
SEGMENTS = [
    f"{HEAD} [unused2] 🎉 {words(1, 9)} [SEP]",
    f"{HEAD} new york city w13 w14 [unused2] [unused2] ło ##dz voivodeship w3 [SEP]",
    f"{HEAD} {words(4, 11)} [SEP]",
]
SHORT = "[CLS] genre x [unused1] w1 [unused1] y [unused2] x is y [SEP]"


@pytest.mark.parametrize(("max_segments", "truncated"), [(1, 1), (2, 1), (3, 0)])
@pytest.mark.parametrize("split", ["train", "dev"])
def test_wikihop_segments(tmp_path: Path, max_segments: int, truncated: int, split: str) -> None:
    """Each segment begins with all candidates; documents go on in the next, and what is left is counted."""
    data = wikihop(tmp_path, max_segments)
    found = data.inputs(split)
    assert data.rows(split) == [*SEGMENTS[:max_segments], SHORT]
    assert found.ids == ["WH_0", "WH_1"]
    assert found.first_row is not None
    assert found.first_row.tolist() == [0, max_segments, max_segments + 1]
    counts = {"num_examples": 2, "num_rows": max_segments + 1}
    assert data.counts(split) == counts | ({"num_truncated": truncated} if truncated else {})
    # The marks of the candidates, in every segment.
    positions = found.row_targets["candidates"]
    assert (positions.shape, found.labels.tolist()) == ((max_segments + 1, 79), [2, 0])
    assert positions[:, :5].tolist() == [*[[6, 10, 13, 17, -1]] * max_segments, [3, 5, -1, -1, -1]]
