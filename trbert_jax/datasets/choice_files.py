"""Reads questions with given answers to choose from, as published: RACE and WikiHop.

RACE (https://www.cs.cmu.edu/~glai1/data/race/) has a folder a split with `high` and `middle`, and in them a
text file of JSON an article, `{"article", "questions": [str], "options": [[str, str, str, str]], "answers":
["A".."D"]}`. Other data in this format may have 2 to 26 options a question.

WikiHop (http://qangaroo.cs.ucl.ac.uk) has a JSON list a split, `[{"id", "query", "candidates": [str],
"supports": [str], "answer"}]`.
"""

import string
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from trbert_jax.datasets import reading
from trbert_jax.datasets.reading import BadRecords
from trbert_jax.datasets.records import CandidateQuestion, ChoiceQuestion
from trbert_jax.datasets.registry import DataSet, each_split, register_dataset
from trbert_jax.errors import UserError

LETTERS = tuple(string.ascii_uppercase)  # of the options; a question has at most this many
LEVELS = ("high", "middle")
_FORMAT = f"files *.txt in the folders {' and '.join(LEVELS)}, a JSON object with questions in each"


def read_race(
    path: Path, bad: BadRecords, labels: Sequence[str] = (), *, levels: Sequence[str] = LEVELS
) -> Iterator[ChoiceQuestion]:
    """Yields the questions in the folder of a split, `high` before `middle`, each by file name."""
    files = [file for level in levels for file in _files(path / level)]
    articles = [reading.load_json(file) for file in files]
    with_answers = reading.any_given(articles, "answers")
    for file, article in zip(files, articles, strict=True):
        with bad.record(str(file)):
            name = f"{file.parent.name}/{file.name}"
            yield from race_questions(article, name, str(file), bad, with_answers=with_answers)


def race_questions(
    item: Any, name: str, where: str, bad: BadRecords, *, with_answers: bool = True
) -> Iterator[ChoiceQuestion]:
    """Yields the questions of an article, with the ids `NAME:0` and so on.

    `with_answers` is false if the source withholds them. Raises `ValueError` if the whole article is bad.
    """
    article, questions = reading.text(item, "article"), reading.items(item, "questions")
    options = reading.items(item, "options", len(questions))
    answers = reading.items(item, "answers", len(questions)) if with_answers else []
    for i in range(len(questions)):
        with bad.record(f"{where}: question {i}"):
            with reading.within("questions"):
                question = reading.text(questions, i, may_be_empty=True)
            with reading.within("options"):
                choices = option_texts(options, i)
            with reading.within("answers"):
                letters = LETTERS[: len(choices)]
                answer = reading.one_of(answers, i, letters) if with_answers else None
            place = f"{where}: questions[{i}]"
            yield ChoiceQuestion(f"{name}:{i}", article, question, choices, answer, place)


def option_texts(item: Any, key: str | int) -> tuple[str, ...]:
    """Returns the options of a question."""
    options = reading.texts(item, key)
    if not 2 <= len(options) <= len(LETTERS):
        place = f"[{key}]" if isinstance(key, int) else key
        raise ValueError(f"{place}: has {len(options)} items; expected 2 to {len(LETTERS)}")
    return options


def _files(folder: Path) -> list[Path]:
    # By name, since a directory has no order. A name that begins with a dot is none of the published files.
    files = sorted(file for file in folder.glob("*.txt") if not file.name.startswith("."))
    if not files:
        problem = "has no *.txt" if folder.is_dir() else "no such folder"
        raise UserError(f"{folder}: {problem}; expected {_FORMAT}")
    return files


def read_wikihop(path: Path, bad: BadRecords, labels: Sequence[str] = ()) -> Iterator[CandidateQuestion]:
    """Yields the queries of a file."""
    values = reading.load_records(path)
    with_answer = reading.any_given(values, "answer")
    for i, item in enumerate(values):
        with bad.record(f"{path}: [{i}]", item):
            yield _wikihop_question(item, f"{path}: [{i}]", with_answer)


def _wikihop_question(item: Any, where: str, with_answer: bool) -> CandidateQuestion:
    question_id, query = reading.identifier(item, "id"), reading.text(item, "query")
    candidates = reading.texts(item, "candidates", some=True)
    if len(set(candidates)) != len(candidates):
        twice = next(c for i, c in enumerate(candidates) if c in candidates[:i])
        raise ValueError(f"candidates: has {twice!r} twice; expected different candidates")
    supports = reading.texts(item, "supports", may_be_empty=True)
    if not any(map(str.strip, supports)):
        raise ValueError("supports: has no text; expected at least one document")
    answer = reading.one_of(item, "answer", candidates) if with_answer else None
    return CandidateQuestion(question_id, query, candidates, supports, answer, where)


for _name, _levels in (("race", LEVELS), ("race_high", ["high"]), ("race_middle", ["middle"])):
    _read, _files_by_split = partial(read_race, levels=_levels), each_split("{split}")
    register_dataset(
        DataSet(name=_name, task="multiple_choice", read=_read, format=_FORMAT, files=_files_by_split)
    )
register_dataset(
    DataSet(
        name="wikihop",
        task="candidates",
        read=read_wikihop,
        format='[{"id": ..., "query": ..., "candidates": [...], "supports": [...], "answer": ...}]',
        files={"train": ("train.json",), "dev": ("dev.json", "dev_sort.json"), "test": ("test.json",)},
        dev_as_test=True,
    )
)
