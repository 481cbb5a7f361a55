"""Reads one's own labeled texts, or pairs of texts: `data.name: text`.

The files may have any format of `tables`, any names of fields and any classes. Without a dev set, a share of
each class of the training set serves as one. Texts without labels follow those of the training set.
"""

import abc
import dataclasses
import functools
import itertools
import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Unpack, cast

import numpy as np

from trbert_jax.datasets import reading
from trbert_jax.datasets.labels import class_index, class_name, class_names
from trbert_jax.datasets.reading import BadRecord, BadRecords
from trbert_jax.datasets.records import Example
from trbert_jax.datasets.registry import (
    DEV_SHARE,
    OWN_KEYS,
    DataSet,
    Options,
    PathLike,
    register_dataset,
    sample,
)
from trbert_jax.datasets.tables import FORMATS, Fields, Table
from trbert_jax.errors import MissingSplitError, UserError
from trbert_jax.io import find_path

logger = logging.getLogger(__name__)

TEXTS = f"rows with a text, in a file of {', '.join(FORMATS)}"
FORMAT = TEXTS.replace("text", "text and a label", 1)
# Names of a split's file or folder, in order of preference; a file may be divided, `train-00000-of-00002`.
_NAMES = {"train": ("train", "training"), "dev": ("dev", "validation", "valid", "val"), "test": ("test",)}
_ENDING = rf"\.(?:{'|'.join(FORMATS)})(?:\.gz)?"
_LISTED = 5  # empty texts of a warning
_MANY_CLASSES = 50  # more are an error if the classes have fewer than two records on average


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """A text, or a pair, with its label as the source has it."""

    example: Example  # without its class
    label: Any  # None if the row has none
    where: str  # file and line, for messages
    first: int = 0  # number of the first class, for labels that are numbers

    @property
    def is_blank(self) -> bool:
        """Whether a text of the row is empty, or white space."""
        return any(text is not None and not text.strip() for text in (self.example.text, self.example.pair))


@dataclasses.dataclass(frozen=True, slots=True)
class Rows:
    """The usable rows of a split, and the others."""

    source: str  # for messages
    rows: Sequence[Row]
    skipped: Sequence[BadRecord]
    label: str = "label"  # field of the labels, for messages


def fields_of(options: Options) -> Fields:
    """Returns the fields that the options choose."""
    text, label = options.get("text_field", Fields.text), options.get("label_field", Fields.label)
    return Fields(text, options.get("text_pair_field"), label)


def make_example(item: Any, id: str, fields: Fields, *, may_be_empty: bool = False) -> Example:
    """Returns the texts of a row, without its class. Raises `ValueError` for a missing or empty text."""
    text = reading.text(item, fields.find(item, "text"), may_be_empty=may_be_empty)
    pair = None
    if fields.pair is not None:
        pair = reading.text(item, fields.find(item, "pair"), may_be_empty=may_be_empty)
    given = item.get("id")
    return Example(id, text, -1, pair, given if isinstance(given, str | int | float) else None)


def read_file(path: Path, fields: Fields, skip: bool = False, may_be_empty: bool = False) -> Rows:
    """Reads the rows of a file. Raises `UserError` for an unreadable file or, unless `skip`, a bad record."""
    bad, rows = BadRecords(skip), []
    table = Table(path, bad, fields)
    for where, item in table:
        with bad.record(where):
            id = path.name + where.removeprefix(str(path))
            label = item.get(fields.find(item, "label"))
            example = make_example(item, id, fields, may_be_empty=may_be_empty)
            rows.append(Row(example, label, where, table.first_label))
    return Rows(str(path), rows, bad.skipped, fields.label)


def with_classes(rows: Rows, labels: Sequence[str], bad: BadRecords, expected: str = FORMAT) -> list[Example]:
    """Returns the examples of rows with their classes; a label that is none of them is a bad record."""

    def examples() -> Iterator[Example]:
        for error in rows.skipped:
            bad.add(error)
        for row in rows.rows:
            with bad.record(row.where), reading.within(rows.label):
                yield dataclasses.replace(row.example, label=class_index(row.label, labels, row.first))

    return reading.collect(examples(), rows.source, bad, expected)


def without_classes(rows: Rows, bad: BadRecords) -> list[Example]:
    """Returns the examples of rows whose labels are not read, and hands over the bad records."""
    for error in rows.skipped:
        bad.add(error)
    return [row.example for row in rows.rows]


def read_labeled(
    path: str | Path, labels: Sequence[str], bad: BadRecords, fields: Fields, may_lack_labels: bool = False
) -> list[Example]:
    """Reads a file of texts for a model with these classes.

    Raises `UserError` for an unreadable file, one without any label unless it `may_lack_labels`, or (by
    default) a bad record.
    """
    rows = read_file(find_path(path), fields, bad.skip)
    if rows.rows and may_lack_labels and not has_labels(rows):
        return without_classes(rows, bad)
    if rows.rows and not has_labels(rows):
        advice = "name the field of the labels, or label the texts with `trbert predict`"
        raise UserError(f"{path}: no record has the field {fields.label!r}; {advice}")
    return with_classes(rows, labels, bad)


def has_labels(rows: Rows) -> bool:
    """Returns whether any row has a label."""
    return any(row.label is not None for row in rows.rows)


class OwnTexts(DataSet, abc.ABC):
    """Texts whose classes are those of the training set, unless `data.labels` names them."""

    @abc.abstractmethod
    def has_split(self, path: PathLike, split: str, options: Options) -> bool:
        """Returns whether there is a set for a split."""

    @abc.abstractmethod
    def rows(self, path: PathLike, split: str, skip: bool, options: Options) -> Rows:
        """Returns the rows of a split, also those of empty texts. Raises `UserError` as `read_split` does."""

    def _with_text(
        self, path: PathLike, split: str, skip: bool, options: Options, warn: bool = False
    ) -> Rows:
        """Returns the rows that have a text: nothing can be learned from, or said of, an empty one."""
        rows = self.rows(path, split, skip, options)
        if not (blank := [row.where for row in rows.rows if row.is_blank]):
            return rows
        if warn:
            listed = ", ".join(blank[:_LISTED]) + ", ..." * (len(blank) > _LISTED)
            logger.warning(
                "%s: left out %d of %d texts, empty: %s", rows.source, len(blank), len(rows.rows), listed
            )
        return dataclasses.replace(rows, rows=[row for row in rows.rows if not row.is_blank])

    def read_labels(
        self, path: PathLike, bad: BadRecords | None = None, **options: Unpack[Options]
    ) -> tuple[str, ...]:
        if given := options.get("labels"):
            return tuple(given)
        bad, values = BadRecords(bad is not None and bad.skip), list[str]()
        rows = self._with_text(path, "train", bad.skip, options)
        for row in rows.rows:
            with bad.record(row.where), reading.within(rows.label):
                values.append(class_name(row.label))
        names = class_names(values)
        if not names:
            raise UserError(f"{rows.source}: has no usable record; expected {FORMAT}")
        if len(names) > max(_MANY_CLASSES, len(values) // 2) or 10 < len(names) == len(values):
            found = f"{len(values)} records have {len(names)} different labels, such as {names[0]!r}"
            raise UserError(f"{rows.source}: {found}; expected a few classes; check data.label_field")
        return names

    def load(self, path: PathLike, split: str, bad: BadRecords, options: Options) -> list[Any]:
        from_train = split != "test" and not self.has_split(path, "dev", options)
        source = "train" if from_train else split
        rows = self._with_text(path, source, bad.skip, options, warn=source == split)
        if split == "test" and not has_labels(rows):
            logger.warning("%s: no record has a label; texts are labeled, but not scored", rows.source)
            return sample(without_classes(rows, bad), split, options)
        examples = with_classes(rows, self.read_labels(path, bad, **options), bad)
        if from_train:
            share = options.get("dev_share", DEV_SHARE)
            examples = [examples[i] for i in stratified(examples, share, rows.source, split)]
        return sample(examples, split, options)


def stratified(examples: Sequence[Example], share: float, source: str, split: str) -> list[int]:
    """Returns the positions of `train` or `dev` in a training set without a dev set.

    Each class of two texts or more gives `share` of them to dev, at least one. Equal texts stay together. The
    choice depends on the texts alone, so that runs with different seeds are measured on the same examples.
    """
    first = dict[tuple[str, str | None], int]()
    owner = [first.setdefault((e.text, e.pair), i) for i, e in enumerate(examples)]
    members = defaultdict[int, list[int]](list)  # of each class, without repetitions
    for i in first.values():
        members[examples[i].label].append(i)
    rng, chosen = np.random.Generator(np.random.PCG64(42)), set[int]()
    for _, positions in sorted(members.items()):
        size = min(max(1, round(share * len(positions))), len(positions) - 1)
        chosen.update(rng.permutation(positions)[:size].tolist())
    if not chosen:
        problem = "no class has two different texts, so none can serve as dev; give a dev set"
        raise UserError(f"{source}: {problem}")
    dev = [i for i, o in enumerate(owner) if o in chosen]
    if split == "dev":
        logger.info("%s: no dev split; %d of %d examples serve as dev", source, len(dev), len(examples))
        return dev
    return [i for i, o in enumerate(owner) if o not in chosen]


class FileTexts(OwnTexts):
    """One's own texts in files."""

    def has_split(self, path: PathLike, split: str, options: Options) -> bool:
        return bool(_files(path, split, options))

    def rows(self, path: PathLike, split: str, skip: bool, options: Options) -> Rows:
        files = _files(path, split, options)
        if not files:
            expected = f"data.{split}: missing; expected a file of texts with labels"
            if path:
                expected = f"{path}: has no {split} set; expected {split}.csv or the like, or data.{split}"
            hint = ", or evaluate.split: dev" if split == "test" else ""
            raise MissingSplitError(f"{expected}{hint}")
        stamps = tuple((file.stat().st_mtime_ns, file.stat().st_size) for file in files)
        return _read_files(files, stamps, fields_of(options), skip)

    def load(self, path: PathLike, split: str, bad: BadRecords, options: Options) -> list[Any]:
        examples = super().load(path, split, bad, options)
        if split != "train" or not options.get("unlabeled"):
            return examples
        rows, limit = self._with_text(None, "unlabeled", bad.skip, options, warn=True), options.get("limit")
        texts = reading.collect(without_classes(rows, bad), rows.source, bad, TEXTS)
        rest: Options = {**options, "limit": None if limit is None else limit - len(examples)}
        return [*examples, *sample(texts, split, rest)]

    def read_file(
        self, path: str | Path, bad: BadRecords | None = None, labels: Sequence[str] = ()
    ) -> list[Any]:
        return read_labeled(path, labels, bad or BadRecords(), Fields())


@functools.lru_cache(maxsize=3)  # classes and examples both need the training set
def _read_files(files: tuple[Path, ...], stamps: object, fields: Fields, skip: bool) -> Rows:
    parts = [read_file(file, fields, skip, may_be_empty=not skip) for file in files]
    source = str(files[0] if len(files) == 1 else files[0].parent)
    rows, skipped = (
        [*itertools.chain(*lists)] for lists in zip(*((p.rows, p.skipped) for p in parts), strict=True)
    )
    return Rows(source, rows, skipped, fields.label)


def _files(path: PathLike, split: str, options: Options) -> tuple[Path, ...]:
    """Returns the files of a split: those named, else those of the folder `path`; empty if there are none."""
    if given := cast(dict[str, Any], options).get(split):
        file = find_path(given)
        found = tuple(sorted(f for f in file.iterdir() if _is_data(f))) if file.is_dir() else (file,)
        if not file.exists() or not found:
            problem = "no file of rows in this folder" if file.exists() else "no such file"
            expected = TEXTS if split == "unlabeled" else FORMAT
            problem = f"data.{split}: {given}: {problem}; expected {expected}"
            raise UserError(problem) from FileNotFoundError(given)
        return found
    if path is None:
        return ()
    folder = find_path(path)
    if not folder.is_dir():
        problem = f"data.path: {path}: no such folder; expected one with train.csv or the like"
        raise UserError(problem) from FileNotFoundError(path)
    for name in _NAMES[split]:
        of_split = re.compile(rf"{name}((-\d+-of-\d+[-\w]*)?{_ENDING})?", re.IGNORECASE)
        named = [
            f for f in sorted(folder.iterdir()) if of_split.fullmatch(f.name) and (f.is_dir() or f.suffix)
        ]
        shards = all("-of-" in f.name for f in named)
        if len(named) > 1 and not shards:
            both = " and ".join(f.name for f in named[:2])
            raise UserError(f"{folder}: has {both}; name the one to read in data.{split}")
        if named and named[0].is_dir():
            inner = str(named[0])
            return _files(None, split, Options(train=inner, dev=inner, test=inner))
        if named:
            return tuple(named)
    return ()


def _is_data(file: Path) -> bool:
    return bool(re.search(f"{_ENDING}$", file.name, re.IGNORECASE)) and not file.name.startswith(".")


register_dataset(
    FileTexts(
        name="text",
        task="classification",
        read=lambda path, bad, labels: iter(read_labeled(path, labels, bad, Fields())),
        format=FORMAT,
        needs_path=False,
        reads=frozenset(OWN_KEYS),
    )
)
