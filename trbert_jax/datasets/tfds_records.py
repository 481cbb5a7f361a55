"""Records of the catalog of TensorFlow Datasets that hold the same questions.

| catalog | record | questions |
|---|---|---|
| `squad/v1.1`, `squad/v2.0` | a question | as published |
| `mrqa/news_qa`, `mrqa/natural_questions` | a question | as published for the MRQA 2019 shared task |
| `race/high`, `race/middle` | an article | as published |
| `trivia_qa/rc` | a question and its documents | web and Wikipedia together |

`mrqa` names more data sets, all of which are read. `natural_questions` is another format: whole web
pages with token offsets. WikiHop, and HotpotQA with its paragraphs and supporting facts, are not in
the catalog.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from trbert_jax.datasets import mrqa, race, squad, triviaqa
from trbert_jax.datasets.bad_records import BadRecord, BadRecords, Place
from trbert_jax.datasets.json_values import JsonValue
from trbert_jax.datasets.record_list import RecordList
from trbert_jax.datasets.records import ChoiceQuestion, SpanQuestion
from trbert_jax.errors import UserError

_TfdsQuestion = SpanQuestion | ChoiceQuestion
_Converter = Callable[[JsonValue, BadRecords], list[_TfdsQuestion]]


def convert(
    name: str, split: str, source: Iterable[Mapping[str, object]], bad: BadRecords
) -> list[_TfdsQuestion]:
    """Makes questions of the records of a split.

    Args:
      name: in the catalog, with configuration: `squad/v2.0`.
      split: for messages.
      source: what `tfds.data_source` gives for the split.
      bad: what to do about bad records.

    Raises:
      UserError: a name without a converter, a bad record that is not skipped, no question.
    """
    catalog = name.partition("/")[0].partition(":")[0]
    converter = CONVERTERS.get(catalog)
    if converter is None:
        raise UserError(
            f"tfds:{name}: no question answering data set that is known here; expected one of "
            f"{', '.join(CONVERTERS)}"
        )
    # trivia_qa lists a document of a question twice where both of its parts have it.
    records = RecordList[_TfdsQuestion](f"tfds:{name}: {split}", bad, repeats=catalog == "trivia_qa")
    for number, record in enumerate(source):
        place = Place(f"tfds:{name}: {split} example {number}")
        with bad.record():
            value = JsonValue(_plain(record, place, ""), place)
            for question in converter(value, bad):
                records.add(question, value)
    return records.finish("questions")


def _squad(value: JsonValue, bad: BadRecords) -> list[_TfdsQuestion]:
    question = {field: value[field].data for field in ("id", "question")}
    if value.has("is_impossible"):
        question["is_impossible"] = value["is_impossible"].data
    question["answers"] = _rows(value["answers"], ("text", "answer_start"))
    return [squad.make_question(JsonValue(question, value.place), value["context"].text())]


def _mrqa(value: JsonValue, bad: BadRecords) -> list[_TfdsQuestion]:
    detected = value["detected_answers"]
    columns = {"text": detected["text"].data}
    columns.update((field, detected["char_spans"][field].data) for field in ("start", "end"))
    answers = []
    for answer in _rows(dataclasses.replace(detected, data=columns), ("text", "start", "end")):
        pairs = _rows(dataclasses.replace(detected, data=answer), ("start", "end"))
        spans = [[pair["start"], pair["end"]] for pair in pairs]
        answers.append({"text": answer["text"], "char_spans": spans})
    question = {field: value[field].data for field in ("qid", "question", "answers")}
    question["detected_answers"] = answers
    return [mrqa.make_question(JsonValue(question, value.place), value["context"].text())]


def _race(value: JsonValue, bad: BadRecords) -> list[_TfdsQuestion]:
    name = value["example_id"].text()
    for level in race.LEVELS:  # high10194.txt stands for the published high/10194.txt
        if name.startswith(level):
            name = f"{level}/{name.removeprefix(level)}"
    return list(race.make_questions(value, name, True, bad))


def _trivia_qa(value: JsonValue, bad: BadRecords) -> list[_TfdsQuestion]:
    question_id = value["question_id"].text()
    value = value.named(f"question {question_id!r}")
    question, answer = value["question"].text(), value["answer"]
    # What the catalog writes for the test set, which has no answers.
    withheld = answer["value"].data == "<unk>" and not answer["normalized_aliases"].data
    answers = () if withheld else triviaqa.accepted_answers(answer, "normalized_aliases")
    questions: list[_TfdsQuestion] = []
    for field, text in (("entity_pages", "wiki_context"), ("search_results", "search_context")):
        for number, page in enumerate(_rows(value[field], ("filename", text))):
            row = JsonValue(page, value.place, value[field], number)
            with bad.record():
                document = triviaqa.Document(row["filename"].text(), row[text])
                questions.append(triviaqa.make_question(question_id, question, answers, document))
    return questions


def _rows(value: JsonValue, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    """A sequence of records, which the library gives as a record of sequences."""
    columns = [value[field].items() for field in fields]
    lengths = {len(column) for column in columns}
    if len(lengths) > 1:
        raise value.bad(
            f"has {' and '.join(map(str, sorted(lengths)))} items a field; expected as many in each"
        )
    return [dict(zip(fields, (item.data for item in row), strict=True)) for row in zip(*columns, strict=True)]


def _plain(value: object, place: Place, path: str) -> object:
    """NumPy's arrays and numbers, and texts in bytes, as JSON has them."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadRecord(place, path, f"is not UTF-8 (byte {error.start}); expected a text") from error
    if isinstance(value, Mapping):
        return {key: _plain(item, place, f"{path}.{key}" if path else key) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, place, f"{path}[{i}]") for i, item in enumerate(value)]
    return value


CONVERTERS: dict[str, _Converter] = {
    "squad": _squad,
    "mrqa": _mrqa,
    "race": _race,
    "trivia_qa": _trivia_qa,
}
