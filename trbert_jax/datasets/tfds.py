"""Reads data sets of TensorFlow Datasets as NumPy; TensorFlow itself is not needed.

The library prepares a data set (downloads it, writes array_record files) or finds it prepared.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trbert_jax.datasets import mrqa, race, squad, text_files, tfds_records, triviaqa
from trbert_jax.datasets.bad_records import BadRecords
from trbert_jax.datasets.dataset import Example, hold_out, make_example, sample_indices
from trbert_jax.datasets.registry import FAMILIES, DataSet, sample
from trbert_jax.errors import MissingSplitError, UserError

logger = logging.getLogger(__name__)

# The catalog's names of the splits, in order of preference.
_SPLITS = {"train": ("train",), "dev": ("validation", "dev"), "test": ("test",)}
_PREPARED = 'with file_format="array_record" and set data.path to the data_dir it was written to'


class TfdsDataSet(DataSet):
    """A data set of the catalog, `tfds:NAME`; texts with a label unless the catalog's name is known."""

    def read_labels(self, path: str | Path | None, label_field: str = "label") -> tuple[str, ...]:
        if self.task != "classification":
            return ()
        source = next(iter(_open(self.name, path).values()))
        return _label_names(self.name, source, label_field)

    def read_split(
        self,
        path: str | Path | None,
        split: str,
        bad: BadRecords | None = None,
        *,
        limit: int | None = None,
        seed: int = 42,
        text_field: str = "text",
        label_field: str = "label",
    ) -> list[Any]:
        if split not in _SPLITS:
            raise UserError(f"split is {split!r}; expected one of {', '.join(_SPLITS)}")
        bad = bad or BadRecords()
        sources = _open(self.name, path)
        if self.task == "classification":
            source, indices = _find_split(self.name, sources, split)
            chosen = [indices[i] for i in sample_indices(len(indices), limit, seed, split)]
            return _examples(self.name, split, source, chosen, text_field, label_field)
        # The catalog's test sets of these come without answers, where there are any.
        published = "dev" if split == "test" and self.dev_as_test else split
        source, indices = _find_split(self.name, sources, published)
        name = self.name.removeprefix("tfds:")
        records = tfds_records.convert(name, split, (source[i] for i in indices), bad)
        if bad.skipped:
            logger.warning("%s: %s", self.name, bad.summary(len(records)))
        return sample(records, limit, seed, split)


def _make(name: str) -> DataSet:
    """Returns the entry of `tfds:NAME`. A file of a question data set is read in its published format."""
    catalog = name.partition("/")[0].partition(":")[0]
    facts = _QUESTIONS.get(catalog, {"task": "classification", "read": text_files.read, "has_fields": True})
    return TfdsDataSet(name=f"tfds:{name}", needs_path=False, **facts)


_QUESTIONS: dict[str, dict[str, Any]] = {
    "squad": {"task": "span", "style": "squad", "read": squad.read, "dev_as_test": True},
    "mrqa": {"task": "span", "style": "mrqa", "read": mrqa.read, "dev_as_test": True},
    "race": {"task": "multiple_choice", "read": race.read},
    "trivia_qa": {"task": "span", "style": "triviaqa", "read": triviaqa.read, "dev_as_test": True},
}
FAMILIES["tfds"] = _make


def _examples(
    name: str, split: str, source: Any, chosen: list[int], text_field: str, label_field: str
) -> list[Example]:
    _check_field(name, source, "text_field", text_field)
    label_names = _label_names(name, source, label_field)
    if not chosen:
        raise UserError(f"{name}: the split for {split} has no examples")
    examples = []
    for i in chosen:
        where, record = f"{name}: {split} example {i}", source[i]
        text, label = record[text_field], record[label_field]
        if isinstance(text, bytes):
            try:
                text = text.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: {text_field} is not UTF-8 text") from error
        examples.append(make_example(where, f"{split}:{i}", text, int(label), label_names))
    return examples


def _open(name: str, data_dir: str | Path | None) -> Mapping[str, Any]:
    """Returns all splits of a data set, each a sequence of records that are read on access."""
    import tensorflow_datasets as tfds

    try:
        return tfds.data_source(name.removeprefix("tfds:"), data_dir=data_dir)
    except ImportError as error:
        raise UserError(
            f"data.name: {name} cannot be prepared here, that needs the package {error.name}; install it, "
            f"or prepare the data set elsewhere {_PREPARED}"
        ) from error
    except Exception as error:  # each data set brings its own code and its own kinds of errors
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"data.name: {name} cannot be read ({reason}); check name and network, or prepare the data set "
            f"elsewhere {_PREPARED}"
        ) from error


def _find_split(name: str, sources: Mapping[str, Any], split: str) -> tuple[Any, list[int]]:
    """Returns the source that holds a split, and which of its records belong to it."""
    keys = {part: next((n for n in names if n in sources), None) for part, names in _SPLITS.items()}
    if keys["dev"] is None and split != "test" and keys["train"] is not None:
        source = sources[keys["train"]]
        train, dev = hold_out(len(source), name)
        logger.info(
            "%s: has no validation split; %d of %d training examples serve as dev",
            name,
            len(dev),
            len(source),
        )
        return source, train if split == "train" else dev
    key = keys[split]
    if key is None:
        there = ", ".join(sources) or "none"
        hint = "; set evaluate.split=dev" if split == "test" else ""
        raise MissingSplitError(f"{name}: has no split {' or '.join(_SPLITS[split])} (it has: {there}){hint}")
    return sources[key], list(range(len(sources[key])))


def _label_names(name: str, source: Any, label_field: str) -> tuple[str, ...]:
    _check_field(name, source, "label_field", label_field)
    names = getattr(source.dataset_info.features[label_field], "names", None)
    if not names:
        raise UserError(
            f"data.label_field: {label_field!r} of {name} is not a class label; choose a field that is"
        )
    return tuple(names)


def _check_field(name: str, source: Any, key: str, field: str) -> None:
    features = source.dataset_info.features
    if field not in features:
        raise UserError(f"data.{key}: {name} has no field {field!r}; it has: {', '.join(features)}")
