"""Published files, where they lie beside the repository or in TRBERT_DATA_DIR: all of them can be read."""

from __future__ import annotations

import os
import re
import string
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from trbert_jax.datasets import DATASETS, triviaqa
from trbert_jax.datasets.reading import load_json
from trbert_jax.datasets.records import SpanQuestion

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("TRBERT_DATA_DIR", ROOT.parent / "shared" / "data"))
Unpack = Callable[..., Path]


@pytest.fixture
def unpack(tmp_path: Path) -> Unpack:
    """Unpacks the members of an archive whose path matches, at most `limit` of them."""

    def unpack_archive(name: str, pattern: str = "", limit: int | None = None) -> Path:
        path = DATA / f"{name}.tar.xz"
        if not path.exists():
            pytest.skip(f"{path} is not there")
        with tarfile.open(path) as archive:
            left = limit
            for member in archive:
                if member.isfile() and re.search(pattern, member.name):
                    archive.extract(member, tmp_path, filter="data")
                    left = None if left is None else left - 1
                    if left == 0:
                        break
        return tmp_path

    return unpack_archive


def normalize(text: str) -> str:
    """As the official SQuAD scorer describes it."""
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


# Answers that are not at their offset, after normalization: none in these files.
KNOWN_DIFFERENCES: set[str] = set()


@pytest.mark.parametrize(("split", "count"), [("train", 13_342), ("dev", 3_088)])
def test_squad(unpack: Unpack, split: str, count: int) -> None:
    questions = DATASETS["squad"].read_file(unpack("squad2") / f"squad2/{split}-v2.0.json")
    assert len(questions) == count
    answerable = [q for q in questions if not q.impossible][:1000]
    assert len(answerable) == 1000
    differing = {q.id for q in answerable if not offsets_hold(q)}
    assert differing == KNOWN_DIFFERENCES


def offsets_hold(question: SpanQuestion) -> bool:
    found = [question.context[span.start : span.end] for span in question.spans]
    return [normalize(text) for text in found] == [normalize(answer) for answer in question.answers]


@pytest.mark.parametrize(("split", "count"), [("train", 2615), ("dev", 545), ("test", 1272)])
def test_mrqa(unpack: Unpack, split: str, count: int) -> None:
    questions = DATASETS["newsqa"].read_file(unpack("mrqa_subjqa") / f"mrqa_subjqa/{split}.jsonl")
    assert len(questions) == count
    for question in questions:
        found = {question.context[span.start : span.end] for span in question.spans}
        assert found == {answer.strip() for answer in question.answers}


def test_small_samples(unpack: Unpack) -> None:
    folder = unpack("small_samples")
    assert len(DATASETS["newsqa"].read_file(folder / "mrqa_newsqa_sample/sample.jsonl")) == 17
    questions = DATASETS["hotpotqa"].read_file(folder / "hotpot/hotpot_dev_distractor_100.json")
    assert len(questions) == 100
    for question in questions:  # an answer is yes, no, or somewhere in the paragraphs
        texts = ["".join(paragraph.sentences) for paragraph in question.paragraphs]
        assert question.answer in ("yes", "no") or any(str(question.answer) in text for text in texts)
    (published,) = load_json(folder / "triviaqa_sample/triviaqa_sample.json")["Data"]
    # Its evidence is not part of the sample.
    answers = triviaqa.accepted_answers(published, "Answer", "NormalizedAliases", "HumanAnswers")
    assert len(triviaqa.find_aliases("It opened as SUNSET\nBOULEVARD (“Sunset Blvd.”).", answers)) == 2


def test_race(unpack: Unpack) -> None:
    folder = unpack("race", r"^race/dev/(high|middle)/", limit=800) / "race/dev"
    levels = [level for level in ("high", "middle") if (folder / level).is_dir()]
    assert levels
    for level in levels:
        questions = DATASETS[f"race_{level}"].read_file(folder)
        assert len(questions) > 200
        assert {q.answer for q in questions} == {0, 1, 2, 3}
