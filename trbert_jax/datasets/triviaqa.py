"""TriviaQA: as published (questions and evidence documents), or as a list in the manner of SQuAD.

Published at https://nlp.cs.washington.edu/triviaqa/ as `triviaqa-rc.tar.gz`: questions in
`qa/wikipedia-*.json` and `qa/web-*.json`, `{"Data": [{"QuestionId", "Question", "Answer":
{"Aliases", "NormalizedAliases"}, "EntityPages": [{"Filename"}], "SearchResults": [{"Filename"}]}]}`,
documents in `evidence/wikipedia` and `evidence/web`. Each pair of a question and a document is a
question of its own, and the answer is looked for in the document. The official scorer judges these
pairs, except where the file says `"Domain": "Wikipedia"`: there a question has one answer.

The list is `[{"context", "qas": [{"qid", "question", "answers": {"Aliases"}, "detected_answers":
[{"char_spans": [[first, last]]}]}]}]`, where the last character belongs to the answer.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from trbert_jax.datasets.aliases import find_aliases
from trbert_jax.datasets.bad_records import BadRecords
from trbert_jax.datasets.json_files import load_json
from trbert_jax.datasets.json_values import JsonValue, any_has
from trbert_jax.datasets.mrqa import detected_spans, published_id
from trbert_jax.datasets.record_list import RecordList
from trbert_jax.datasets.records import SpanQuestion
from trbert_jax.datasets.registry import DataSet, each_split, register_dataset
from trbert_jax.errors import UserError
from trbert_jax.io import read_text

# What the authors' own conversion to the format of SQuAD takes of a document by default.
MAX_WORDS = 800
# Which documents of a question there are, and the folder of the evidence that holds them.
_SOURCES = {"EntityPages": "wikipedia", "SearchResults": "web"}
_FORMAT = '{"Data": [...]} with folder evidence, or [{"context": ..., "qas": [...]}]'


def read(path: Path, bad: BadRecords, labels: Sequence[str] = ()) -> list[SpanQuestion]:
    """Reads either format; an object at the top is the published one, a list the other.

    Of the published one all documents of a question are taken, each cut to `MAX_WORDS` words, and
    the evidence is looked for where the archive has it; see `read_published` for more.

    Args:
      path: the JSON file.
      bad: what to do about bad records: an evidence file that is missing or empty, a missing or
        repeated id, no alias, ...

    Raises:
      UserError: the file cannot be read, has no question, or has a bad record that is not skipped;
        no evidence folder.
    """
    document = load_json(path)
    if isinstance(document.data, list):
        return _read_list(document, path, bad)
    return _read_published(document, path, bad, _find_evidence(path), None, MAX_WORDS)


def read_published(
    path: Path,
    bad: BadRecords,
    evidence: Path | None = None,
    max_documents: int | None = None,
    max_words: int = MAX_WORDS,
) -> list[SpanQuestion]:
    """Reads the published format.

    Args:
      path: `wikipedia-train.json` or the like.
      bad: see `read`.
      evidence: folder that holds `wikipedia` and `web`; by default `evidence` beside the folder of
        `path`, or in it.
      max_documents: how many documents of a question are taken, in their order, entity pages first.
      max_words: how many words of a document are taken; the answer is looked for in these only.

    Raises:
      UserError: see `read`.
    """
    evidence = _find_evidence(path) if evidence is None else evidence
    return _read_published(load_json(path), path, bad, evidence, max_documents, max_words)


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """A document that belongs to a question.

    Attributes:
      name: of its file, as published.
      text: all of it, and the place to name in messages.
    """

    name: str
    text: JsonValue


def make_question(
    question_id: str,
    question: str,
    answers: tuple[str, ...],
    document: Document,
    max_words: int = MAX_WORDS,
    *,
    one_answer: bool = False,
) -> SpanQuestion:
    """The question that a published question and one of its documents make.

    Args:
      question_id: the published id; with the name of the document it is the id of the new question,
        `tc_33--Andrew_Lloyd_Webber.txt`.
      question: its text.
      answers: strings that the official scorer accepts; empty where they are withheld.
      document: where the answer is looked for.
      max_words: see `read_published`.
      one_answer: whether the official scorer looks predictions up by the published id, one for all
        documents, in place of the new one.

    Raises:
      BadRecord: the document is empty.
    """
    context = first_words(document.text.text(), max_words)
    return SpanQuestion(
        id=f"{question_id}--{document.name}",
        question=question,
        context=context,
        spans=find_aliases(context, answers),
        answers=answers,
        impossible=False,
        where=document.text.where,
        scored_as=question_id if one_answer else None,
    )


def accepted_answers(value: JsonValue, field: str = "NormalizedAliases") -> tuple[str, ...]:
    """What the official scorer compares with: normalized aliases, and human answers if there are.

    Args:
      value: the field `Answer`.
      field: the name of the normalized aliases.

    Raises:
      BadRecord: no alias.
    """
    # Signs are normalized to nothing (the band "!!!"), so an alias may be empty.
    answers = value[field].texts(may_be_empty=True)
    if value.has("HumanAnswers"):
        answers += value["HumanAnswers"].texts(may_be_empty=True)
    if not answers:
        raise value[field].bad("is empty; expected at least one alias")
    return answers


def first_words(text: str, count: int) -> str:
    """The beginning of a text with so many words, divided at white space, and all that is between."""
    end = 0
    for word in itertools.islice(re.finditer(r"\S+", text), count):
        end = word.end()
    return text[:end]


def _read_published(
    document: JsonValue,
    path: Path,
    bad: BadRecords,
    evidence: Path,
    max_documents: int | None,
    max_words: int,
) -> list[SpanQuestion]:
    questions = document["Data"].items()
    with_answer = any_has(questions, "Answer")
    one_answer = document.has("Domain") and document["Domain"].data == "Wikipedia"
    records = RecordList[SpanQuestion](path, bad)
    for value in questions:
        with bad.record():
            question_id = value["QuestionId"].text()
            value = value.named(f"question {question_id!r}")
            question = value["Question"].text()
            answers = accepted_answers(value["Answer"]) if with_answer else ()
            pages = [
                (page, evidence / folder)
                for field, folder in _SOURCES.items()
                if value.has(field)
                for page in value[field].items()
            ]
            for page, folder in pages[:max_documents]:
                with bad.record():
                    found = _read_evidence(page["Filename"], folder)
                    made = make_question(
                        question_id, question, answers, found, max_words, one_answer=one_answer
                    )
                    records.add(made, page)
    return records.finish(_FORMAT)


def _read_evidence(value: JsonValue, folder: Path) -> Document:
    """The document that `Filename` names."""
    name = value.text()
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise value.bad(f"is {name!r}; expected a file inside {folder}")
    try:
        text = read_text(folder / name).removeprefix("\ufeff")  # a byte order mark
    except (UserError, OSError, ValueError) as error:  # the last two for names that no file can have
        raise value.bad(f"the evidence cannot be read ({error}); expected a text file there") from error
    if not text.strip():
        raise value.bad(f"the evidence {folder / name} is empty; expected a text")
    return Document(name, dataclasses.replace(value, data=text))


def _find_evidence(path: Path) -> Path:
    """The evidence folder of the published archive, in which `path` stands in the folder `qa`."""
    folders = [path.absolute().parent.parent / "evidence", path.absolute().parent / "evidence"]
    for folder in folders:
        if folder.is_dir():
            return folder
    raise UserError(
        f"{path}: no evidence documents; expected them in {' or '.join(map(str, folders))}, unpack "
        "triviaqa-rc.tar.gz as a whole"
    )


def _read_list(document: JsonValue, path: Path, bad: BadRecords) -> list[SpanQuestion]:
    records = RecordList[SpanQuestion](path, bad)
    for item in document.items():
        with bad.record():
            context = item["context"].text()
            for value in item["qas"].items():
                with bad.record():
                    records.add(_listed_question(value, context), value)
    return records.finish(_FORMAT)


def _listed_question(value: JsonValue, context: str) -> SpanQuestion:
    question_id = published_id(value)
    value = value.named(f"question {question_id!r}")
    aliases = value["answers"]["Aliases"].texts(may_be_empty=True)
    if not aliases:
        raise value["answers"]["Aliases"].bad("is empty; expected at least one alias")
    return SpanQuestion(
        id=question_id,
        question=value["question"].text(),
        context=context,
        spans=detected_spans(value["detected_answers"], context, aliases),
        answers=aliases,
        impossible=False,
        where=value.where,
    )


for _name, _part in (("triviaqa", "wikipedia"), ("triviaqa_web", "web")):
    register_dataset(
        DataSet(
            name=_name,
            task="span",
            style="triviaqa",
            read=read,
            files=each_split(f"qa/{_part}-{{split}}.json", "{split}.json"),
            dev_as_test=True,
        )
    )
