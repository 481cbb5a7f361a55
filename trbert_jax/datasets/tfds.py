"""Data sets of TensorFlow Datasets, read as NumPy; TensorFlow itself is not needed.

The library prepares a data set (downloads it, writes array_record files) or finds it prepared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trbert_jax.config_schema import TFDS_PREFIX, DataConfig
from trbert_jax.datasets.dataset import Announce, Dataset, hold_out, make_example, sample_indices
from trbert_jax.errors import MissingSplitError, UserError

# What the library's data sets call a split, in order of preference.
_NAMES = {"train": ("train",), "dev": ("validation", "dev"), "test": ("test",)}
_PREPARED = 'with file_format="array_record" and set data.path to the data_dir it was written to'


def read_tfds(config: DataConfig, split: str, limit: int | None, seed: int, announce: Announce) -> Dataset:
    """Reads one split; see `trbert_jax.datasets.readers.read_examples`.

    Raises:
      UserError: no such data set, split or field; a label that is not a class; a data set that
        cannot be prepared here.
    """
    name = config.name.removeprefix(TFDS_PREFIX)
    sources = open_sources(name, config.path)
    source, indices = find_split(config.name, sources, split, announce)
    label_names = _label_names(config, source)
    chosen = [indices[i] for i in sample_indices(len(indices), limit, seed, split)]
    if not chosen:
        raise UserError(f"{config.name}: the split for {split} has no examples")
    examples = []
    for i in chosen:
        where, record = f"{config.name}: {split} example {i}", source[i]
        text, label = record[config.text_field], record[config.label_field]
        if isinstance(text, bytes):
            try:
                text = text.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: {config.text_field} is not UTF-8 text") from error
        examples.append(make_example(where, f"{split}:{i}", text, int(label), label_names))
    return Dataset(tuple(examples), label_names)


def open_sources(name: str, data_dir: str | None) -> Mapping[str, Any]:
    """All splits of a data set, each a sequence of records that are read when asked for."""
    import tensorflow_datasets as tfds

    try:
        return tfds.data_source(name, data_dir=data_dir)
    except ImportError as error:
        raise UserError(
            f"data.name: {TFDS_PREFIX}{name} cannot be prepared here, that needs the package {error.name}; "
            f"install it, or prepare the data set elsewhere {_PREPARED}"
        ) from error
    except Exception as error:  # each data set brings its own code and its own kinds of errors
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"data.name: {TFDS_PREFIX}{name} cannot be read ({reason}); check name and network, or prepare "
            f"the data set elsewhere {_PREPARED}"
        ) from error


def find_split(
    name: str, sources: Mapping[str, Any], split: str, announce: Announce
) -> tuple[Any, list[int]]:
    """The source that holds a split, and which of its records belong to it."""
    found = {part: next((n for n in names if n in sources), None) for part, names in _NAMES.items()}
    if found["dev"] is None and split != "test" and found["train"] is not None:
        source = sources[found["train"]]
        parts = dict(zip(("train", "dev"), hold_out(len(source), name), strict=True))
        announce(
            f"{name}: has no validation split; {len(parts['dev'])} of the {len(source)} training examples "
            "serve as dev"
        )
        return source, parts[split]
    key = found[split]
    if key is None:
        there = ", ".join(sources) or "none"
        hint = "; set evaluate.split=dev" if split == "test" else ""
        raise MissingSplitError(f"{name}: has no split {' or '.join(_NAMES[split])} (it has: {there}){hint}")
    return sources[key], list(range(len(sources[key])))


def _label_names(config: DataConfig, source: Any) -> tuple[str, ...]:
    features = source.dataset_info.features
    for key in ("text_field", "label_field"):
        field = getattr(config, key)
        if field not in features:
            there = ", ".join(features)
            raise UserError(f"data.{key}: {config.name} has no field {field!r}; it has: {there}")
    names = getattr(features[config.label_field], "names", None)
    if not names:
        raise UserError(
            f"data.label_field: {config.label_field!r} of {config.name} is not a class label; choose a field "
            "that is"
        )
    return tuple(names)
