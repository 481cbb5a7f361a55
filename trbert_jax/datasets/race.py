"""Reads RACE as published: a folder a split with `high` and `middle`, a text file of JSON an article.

`{"article", "questions": [str], "options": [[str, str, str, str]], "answers": ["A".."D"]}`. Published
at https://www.cs.cmu.edu/~glai1/data/race/.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from trbert_jax.datasets import reading
from trbert_jax.datasets.reading import BadRecords
from trbert_jax.datasets.records import ChoiceQuestion
from trbert_jax.datasets.registry import DataSet, each_split, register_dataset
from trbert_jax.errors import UserError

LETTERS = ("A", "B", "C", "D")
LEVELS = ("high", "middle")
_FORMAT = f"files *.txt in the folders {' and '.join(LEVELS)}, a JSON object with questions in each"


def read(
    path: Path, bad: BadRecords, labels: Sequence[str] = (), *, levels: Sequence[str] = LEVELS
) -> Iterator[ChoiceQuestion]:
    """Yields the questions in the folder of a split, `high` before `middle`, each by file name."""
    files = [file for level in levels for file in _files(path / level)]
    articles = [reading.load_json(file) for file in files]
    with_answers = reading.any_has(articles, "answers")
    for file, article in zip(files, articles, strict=True):
        with bad.record(str(file)):
            name = f"{file.parent.name}/{file.name}"
            yield from make_questions(article, name, str(file), bad, with_answers=with_answers)


def make_questions(
    item: Any, name: str, where: str, bad: BadRecords, *, with_answers: bool = True
) -> Iterator[ChoiceQuestion]:
    """Yields the questions of an article, whose ids are `NAME:0` and so on.

    `with_answers`: False if the source withholds the answers. Raises `ValueError` if the article as a whole
    is bad.
    """
    article, questions = reading.text(item, "article"), reading.items(item, "questions")
    options = reading.items(item, "options", len(questions))
    answers = reading.items(item, "answers", len(questions)) if with_answers else []
    for i in range(len(questions)):
        with bad.record(f"{where}: question {i}"):
            with reading.within("questions"):
                question = reading.text(questions, i, may_be_empty=True)
            with reading.within("options"):
                choices = reading.texts(options, i, len(LETTERS))
            with reading.within("answers"):
                answer = _letter(answers, i) if with_answers else None
            place = f"{where}: questions[{i}]"
            yield ChoiceQuestion(f"{name}:{i}", article, question, choices, answer, place)


def _letter(answers: list[Any], i: int) -> int:
    letter = reading.text(answers, i)
    if letter not in LETTERS:
        raise ValueError(f"[{i}]: is {letter!r}; expected a letter from {LETTERS[0]} to {LETTERS[-1]}")
    return LETTERS.index(letter)


def _files(folder: Path) -> list[Path]:
    # By name, since a directory has no order. A name that begins with a dot is none of the published files.
    files = sorted(file for file in folder.glob("*.txt") if not file.name.startswith("."))
    if not files:
        problem = "has no *.txt" if folder.is_dir() else "no such folder"
        raise UserError(f"{folder}: {problem}; expected {_FORMAT}")
    return files


for _name, _levels in (("race", LEVELS), ("race_high", ["high"]), ("race_middle", ["middle"])):
    _read, _files_by_split = partial(read, levels=_levels), each_split("{split}")
    register_dataset(
        DataSet(name=_name, task="multiple_choice", read=_read, format=_FORMAT, files=_files_by_split)
    )
