"""RACE as published: a folder a split with `high` and `middle`, a text file of JSON an article.

`{"article", "questions": [str], "options": [[str, str, str, str]], "answers": ["A".."D"]}`; published
at https://www.cs.cmu.edu/~glai1/data/race/.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from trbert_jax.datasets.bad_records import BadRecords
from trbert_jax.datasets.json_files import load_json
from trbert_jax.datasets.json_values import JsonValue, any_has
from trbert_jax.datasets.record_list import RecordList
from trbert_jax.datasets.records import ChoiceQuestion
from trbert_jax.datasets.registry import DataSet, each_split, register_dataset
from trbert_jax.errors import UserError

LETTERS = "ABCD"
LEVELS = ("high", "middle")
_FORMAT = f"files *.txt in the folders {' and '.join(LEVELS)}, a JSON object with questions in each"


def read(
    path: Path, bad: BadRecords, labels: Sequence[str] = (), *, levels: tuple[str, ...] = LEVELS
) -> list[ChoiceQuestion]:
    """Reads a split of RACE, `high` before `middle`, each by file name.

    Args:
      path: the folder of the split.
      labels: not used.
      levels: the folders to read in it.
      bad: what to do about bad records: other than four options, a letter outside A to D, an empty
        article, lists of different lengths, ...

    Raises:
      UserError: a folder is missing, a file cannot be read, there is no question, or there is a bad
        record that is not skipped.
    """
    files = [file for level in levels for file in _files(path / level)]
    articles = [load_json(file) for file in files]
    with_answers = any_has(articles, "answers")
    records = RecordList[ChoiceQuestion](path, bad)
    for file, article in zip(files, articles, strict=True):
        with bad.record():
            for question in make_questions(article, f"{file.parent.name}/{file.name}", with_answers, bad):
                records.add(question, article)
    return records.finish(_FORMAT)


def make_questions(value: JsonValue, name: str, with_answers: bool, bad: BadRecords) -> list[ChoiceQuestion]:
    """The questions of an article.

    Args:
      value: the object of the file.
      name: of the article, the first part of the questions' ids.
      with_answers: False where the source withholds the answers.
      bad: what to do about bad questions.

    Raises:
      BadRecord: the article as a whole is bad.
      UserError: a question is bad, and not skipped.
    """
    article, questions = value["article"].text(), value["questions"].items()
    options = value["options"].items(len(questions))
    answers = value["answers"].items(len(questions)) if with_answers else []
    found = []
    for number, question in enumerate(questions):
        record = f"question {number}"
        with bad.record():
            found.append(
                ChoiceQuestion(
                    id=f"{name}:{number}",
                    article=article,
                    question=question.named(record).text(may_be_empty=True),
                    options=_options(options[number].named(record)),
                    answer=_letter(answers[number].named(record)) if with_answers else None,
                    where=question.where,
                )
            )
    return found


def _options(value: JsonValue) -> tuple[str, ...]:
    value.items(len(LETTERS))
    return value.texts()


def _letter(value: JsonValue) -> int:
    letter = value.text()
    if len(letter) != 1 or letter not in LETTERS:
        raise value.bad(f"is {letter!r}; expected a letter from {LETTERS[0]} to {LETTERS[-1]}")
    return LETTERS.index(letter)


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected {_FORMAT}")
    # In the order of names, since a directory has none of its own. A name with a dot in front is none
    # of the published files.
    files = sorted(file for file in folder.glob("*.txt") if not file.name.startswith("."))
    if not files:
        raise UserError(f"{folder}: has no *.txt; expected {_FORMAT}")
    return files


for _name, _levels in (("race", LEVELS), ("race_high", ("high",)), ("race_middle", ("middle",))):
    register_dataset(
        DataSet(
            name=_name,
            task="multiple_choice",
            read=partial(read, levels=_levels),
            files=each_split("{split}"),
        )
    )
