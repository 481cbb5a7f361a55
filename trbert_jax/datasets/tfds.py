"""Reads data sets of TensorFlow Datasets as NumPy; TensorFlow itself is not needed.

The library prepares a data set (downloads it, writes array_record files) or finds it prepared. Of the
published questions its catalog has SQuAD (`squad/v1.1`, `squad/v2.0`), the MRQA 2019 shared task
(`mrqa/news_qa`, `mrqa/natural_questions`, ...), RACE (`race/high`, `race/middle`; a record an article) and
TriviaQA (`trivia_qa/rc`; a record a question with its documents, web and Wikipedia together). All others are
texts with a label; `natural_questions` is another format, whole web pages with token offsets.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Unpack

from trbert_jax.datasets import choice_files, reading, span_files, text_files, triviaqa
from trbert_jax.datasets.reading import BadRecords
from trbert_jax.datasets.records import ChoiceQuestion, Example, SpanQuestion
from trbert_jax.datasets.registry import FAMILIES, FIELD_KEYS, DataSet, Options, PathLike, hold_out, sample
from trbert_jax.errors import MissingSplitError, UserError

# The catalog's names of the splits, in order of preference.
_SPLITS = {"train": ("train",), "dev": ("validation", "dev"), "test": ("test",)}

Question = SpanQuestion | ChoiceQuestion
# Yields the questions of a record of the catalog, given its place for messages and the handling of bad ones.
Converter = Callable[[Any, str, BadRecords], Iterator[Question]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TfdsDataSet(DataSet):
    """A data set of the catalog, `tfds:NAME`. Its `read_file` reads the published format of questions."""

    convert: Converter | None = None  # None for texts with a label
    needs_path: bool = False

    def read_labels(
        self, path: PathLike, bad: BadRecords | None = None, **options: Unpack[Options]
    ) -> tuple[str, ...]:
        if self.convert is not None:
            return ()
        source, field = next(iter(_open(self.name, path).values())), options.get("label_field", "label")
        return _label_names(self.name, source, field)

    def load(self, path: PathLike, split: str, bad: BadRecords, options: Options) -> list[Any]:
        # The catalog's test sets of questions come without answers.
        published = "dev" if split == "test" and self.dev_as_test else split
        source, indices = _find_split(self.name, _open(self.name, path), published)
        place = f"{self.name}: {split}"
        if self.convert is None:
            examples = _examples(self.name, split, source, sample(indices, split, options), bad, options)
            return reading.collect(examples, place, bad, "texts")
        questions = _questions(place, (source[i] for i in indices), bad, self.convert)
        # trivia_qa lists a document of a question twice if both of its parts have it.
        repeats = self.style == "triviaqa"
        return sample(reading.collect(questions, place, bad, "questions", repeats=repeats), split, options)


def _questions(place: str, source: Iterator[Any], bad: BadRecords, convert: Converter) -> Iterator[Question]:
    for number, raw in enumerate(source):
        where = f"{place} example {number}"
        with bad.record(where):
            item = _plain(raw)
            with bad.record(where, item):
                yield from convert(item, where, bad)


def _squad(item: Any, where: str, bad: BadRecords) -> Iterator[SpanQuestion]:
    answers = _rows(item, "answers", "text", "answer_start")
    yield span_files.squad_question({**item, "answers": answers}, reading.text(item, "context"), where)


def _mrqa(item: Any, where: str, bad: BadRecords) -> Iterator[SpanQuestion]:
    detected = item["detected_answers"]
    columns = {"text": detected["text"], **detected["char_spans"]}
    answers = []
    for row in _rows({"detected_answers": columns}, "detected_answers", "text", "start", "end"):
        pairs = _rows({"char_spans": row}, "char_spans", "start", "end")
        answers.append({"text": row["text"], "char_spans": [list(pair.values()) for pair in pairs]})
    context = reading.text(item, "context")
    yield span_files.mrqa_question({**item, "detected_answers": answers}, context, where)


def _race(item: Any, where: str, bad: BadRecords) -> Iterator[ChoiceQuestion]:
    # high10194.txt is the published high/10194.txt
    name = re.sub("^(high|middle)", r"\1/", reading.text(item, "example_id"))
    return choice_files.race_questions(item, name, where, bad)


def _trivia_qa(item: Any, where: str, bad: BadRecords) -> Iterator[SpanQuestion]:
    question_id, question = reading.text(item, "question_id"), reading.text(item, "question")
    # Values of the catalog for the test set, which has no answers.
    withheld = item["answer"]["value"] == "<unk>" and not item["answer"]["normalized_aliases"]
    answers = () if withheld else triviaqa.accepted_answers(item, "answer", "normalized_aliases")
    for pages, document in (("entity_pages", "wiki_context"), ("search_results", "search_context")):
        for i, page in enumerate(_rows(item, pages, "filename", document)):
            with bad.record(f"{where}: {pages}[{i}]", item):
                name, context = reading.text(page, "filename"), reading.text(page, document)
                yield triviaqa.make_question(question_id, question, answers, name, context, where)


# Fields of the entries with questions, by the name of the data set in the catalog.
_QUESTIONS: dict[str, dict[str, Any]] = {
    "squad": {"task": "span", "style": "squad", "read": span_files.read_squad, "convert": _squad},
    "mrqa": {"task": "span", "style": "mrqa", "read": span_files.read_mrqa, "convert": _mrqa},
    "trivia_qa": {"task": "span", "style": "triviaqa", "read": triviaqa.read, "convert": _trivia_qa},
    "race": {"task": "multiple_choice", "read": choice_files.read_race, "convert": _race},
}
_TEXTS: dict[str, Any] = {"task": "classification", "read": text_files.read, "reads": frozenset(FIELD_KEYS)}


def _make(name: str) -> DataSet:
    fields = _QUESTIONS.get(re.split("[/:]", name)[0], _TEXTS)
    return TfdsDataSet(name=f"tfds:{name}", dev_as_test="style" in fields, **fields)


FAMILIES["tfds"] = _make


def _examples(
    name: str, split: str, source: Any, chosen: list[int], bad: BadRecords, options: Options
) -> Iterator[Example]:
    text_field, label_field = options.get("text_field", "text"), options.get("label_field", "label")
    pair_field = options.get("text_pair_field")
    for key, field in (("text_field", text_field), ("text_pair_field", pair_field)):
        if field is not None:
            _feature(name, source, key, field)
    labels = _label_names(name, source, label_field)
    if not chosen:
        raise UserError(f"{name}: the split for {split} has no examples")
    for i in chosen:
        with bad.record(f"{name}: {split} example {i}"):
            chosen_fields = {"text": text_field, "label": label_field, "pair": pair_field}
            record = source[i]
            item = {key: _plain(record[field]) for key, field in chosen_fields.items() if field}
            example = text_files.make_example(f"{split}:{i}", item, labels)
            yield dataclasses.replace(example, pair=reading.text(item, "pair")) if pair_field else example


def _plain(value: Any) -> Any:
    """Returns NumPy's arrays and numbers, and texts in bytes, as JSON has them."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"is not UTF-8 (byte {error.start}); expected a text") from error
    if isinstance(value, Mapping):
        plain = {}
        for key, item in value.items():
            with reading.within(key):
                plain[key] = _plain(item)
        return plain
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _rows(item: Any, key: str, *fields: str) -> list[dict[str, Any]]:
    """Returns a sequence of records, which the library gives as a record of sequences."""
    value = reading.field(item, key)
    with reading.within(key):
        columns = [reading.items(value, name) for name in fields]
        lengths = sorted(set(map(len, columns)))
        if len(lengths) > 1:
            raise ValueError(f"has {' and '.join(map(str, lengths))} items; expected as many in each field")
    return [dict(zip(fields, row, strict=True)) for row in zip(*columns, strict=True)]


def _open(name: str, data_dir: PathLike) -> Mapping[str, Any]:
    """Returns all splits of a data set, each a sequence of records that are read on access."""
    import tensorflow_datasets as tfds

    try:
        return tfds.data_source(name.removeprefix("tfds:"), data_dir=data_dir)
    except Exception as error:  # each data set brings its own code and its own kinds of errors
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        if isinstance(error, ImportError):
            reason = f"preparing it here needs the package {error.name}"
        advice = 'prepare it elsewhere with file_format="array_record" and set data.path to its data_dir'
        message = f"data.name: {name} cannot be read ({reason}); check name and network, or {advice}"
        raise UserError(message) from error


def _find_split(name: str, sources: Mapping[str, Any], split: str) -> tuple[Any, list[int]]:
    """Returns the source that holds a split, and which of its records belong to it."""
    found = {part: next((sources[n] for n in names if n in sources), None) for part, names in _SPLITS.items()}
    source = found[split]
    if found["dev"] is None and split != "test" and found["train"] is not None:
        return found["train"], hold_out(len(found["train"]), name, split)
    if source is None:
        has = ", ".join(sources) or "none"
        hint = "; set evaluate.split=dev" if split == "test" else ""
        raise MissingSplitError(f"{name}: has no split {' or '.join(_SPLITS[split])} (it has: {has}){hint}")
    return source, list(range(len(source)))


def _label_names(name: str, source: Any, label_field: str) -> tuple[str, ...]:
    names = getattr(_feature(name, source, "label_field", label_field), "names", None)
    if not names:
        raise UserError(f"data.label_field: {label_field!r} of {name} is no class label; choose one that is")
    return tuple(names)


def _feature(name: str, source: Any, key: str, field: str) -> Any:
    features = source.dataset_info.features
    if field not in features:
        raise UserError(f"data.{key}: {name} has no field {field!r}; it has: {', '.join(features)}")
    return features[field]
