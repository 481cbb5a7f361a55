"""Reads published files beside the repository or in TRBERT_DATA_DIR, if they exist."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from trbert_jax.datasets import DATASETS, triviaqa
from trbert_jax.datasets.reading import load_json
from trbert_jax.datasets.span_files import same_answer

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("TRBERT_DATA_DIR", ROOT.parent / "shared" / "data"))
Unpack = Callable[..., Path]


@pytest.fixture
def unpack(tmp_path: Path) -> Unpack:
    """Unpacks the members of an archive whose path matches, at most `limit` of them."""

    def unpack_archive(name: str, pattern: str = "", limit: int | None = None) -> Path:
        path, count = DATA / f"{name}.tar.xz", 0
        if not path.exists():
            pytest.skip(f"{path} does not exist")
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile() and re.search(pattern, member.name) and (limit is None or count < limit):
                    archive.extract(member, tmp_path, filter="data")
                    count += 1
        return tmp_path

    return unpack_archive


@pytest.mark.parametrize(("split", "count"), [("train", 13_342), ("dev", 3_088)])
def test_squad(unpack: Unpack, split: str, count: int) -> None:
    questions = DATASETS["squad"].read_file(unpack("squad2") / f"squad2/{split}-v2.0.json")
    assert len(questions) == count
    for question in questions:
        for span, answer in zip(question.spans, question.answers, strict=True):
            assert same_answer(question.context[span.start : span.end], answer)


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
        assert question.answer in ("yes", "no") or any(question.answer in text for text in texts)
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
