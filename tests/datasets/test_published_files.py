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


@pytest.mark.parametrize(
    ("archive", "file", "name", "count"),
    [
        ("squad2", "squad2/train-v2.0.json", "squad", 13_342),
        ("squad2", "squad2/dev-v2.0.json", "squad", 3_088),
        ("mrqa_subjqa", "mrqa_subjqa/train.jsonl", "newsqa", 2615),
        ("mrqa_subjqa", "mrqa_subjqa/dev.jsonl", "newsqa", 545),
        ("mrqa_subjqa", "mrqa_subjqa/test.jsonl", "newsqa", 1272),
        ("small_samples", "mrqa_newsqa_sample/sample.jsonl", "newsqa", 17),
    ],
)
def test_spans_are_the_answers(unpack: Unpack, archive: str, file: str, name: str, count: int) -> None:
    questions = DATASETS[name].read_file(unpack(archive, file) / file)
    assert len(questions) == count
    for question in questions:
        found = [question.context[span.start : span.end] for span in question.spans]
        if name == "squad":
            assert all(same_answer(*pair) for pair in zip(found, question.answers, strict=True))
        elif archive == "mrqa_subjqa":
            assert set(found) == {answer.strip() for answer in question.answers}


def test_small_samples(unpack: Unpack) -> None:
    folder = unpack("small_samples")
    questions = DATASETS["hotpotqa"].read_file(folder / "hotpot/hotpot_dev_distractor_100.json")
    assert len(questions) == 100
    for question in questions:  # an answer is yes, no, or somewhere in the paragraphs
        texts = ["".join(paragraph.sentences) for paragraph in question.paragraphs]
        assert question.answer in ("yes", "no") or any(question.answer in text for text in texts)
    (published,) = load_json(folder / "triviaqa_sample/triviaqa_sample.json")["Data"]
    # Its evidence is not part of the sample.
    answers = triviaqa.accepted_answers(published, "Answer", "NormalizedAliases")
    assert len(triviaqa.find_aliases("It opened as SUNSET\nBOULEVARD (“Sunset Blvd.”).", answers)) == 2


def test_race(unpack: Unpack) -> None:
    folder = unpack("race", r"^race/dev/(high|middle)/", limit=800) / "race/dev"
    levels = [level for level in ("high", "middle") if (folder / level).is_dir()]
    assert levels
    for level in levels:
        questions = DATASETS[f"race_{level}"].read_file(folder)
        assert len(questions) > 200
        assert {q.answer for q in questions} == {0, 1, 2, 3}
