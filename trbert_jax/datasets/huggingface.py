"""Reads labeled texts of the Hugging Face library `datasets`: `data.name: hf:NAME`, `hf:NAME:CONFIGURATION`.

NAME is a data set of the hub, or a folder: one of `save_to_disk`, or one of files that the library reads. A
data set that is in the library's cache, `data.path` or the default one, needs no network.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

from trbert_jax.datasets.own_texts import FORMAT, OwnTexts, Row, Rows, fields_of, make_example
from trbert_jax.datasets.reading import BadRecords
from trbert_jax.datasets.registry import FAMILIES, FIELD_KEYS, DataSet, Options, PathLike
from trbert_jax.datasets.text_files import read
from trbert_jax.errors import MissingSplitError, UserError
from trbert_jax.io import find_path

# The library's names of the splits, in order of preference.
_SPLITS = {"train": ("train",), "dev": ("validation", "dev", "valid", "val"), "test": ("test",)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class HuggingFaceTexts(OwnTexts):
    """A data set of the library. Its classes are those of a class label, else as of one's own texts."""

    needs_path: bool = False
    reads: frozenset[str] = frozenset((*FIELD_KEYS, "labels", "dev_share"))
    format: str = FORMAT

    def has_split(self, path: PathLike, split: str, options: Options) -> bool:
        return any(name in _open(self.name, path) for name in _SPLITS[split])

    def read_labels(
        self, path: PathLike, bad: BadRecords | None = None, **options: Unpack[Options]
    ) -> tuple[str, ...]:
        names = _class_names(self._split(path, "train"), fields_of(options).label)
        return names if names and not options.get("labels") else super().read_labels(path, bad, **options)

    def rows(self, path: PathLike, split: str, skip: bool, options: Options) -> Rows:
        source, fields = self._split(path, split), fields_of(options)
        for key, field in (("text_field", fields.text), ("text_pair_field", fields.pair)):
            if field is not None and field not in source.features:
                has = ", ".join(source.features)
                raise UserError(f"data.{key}: {self.name} has no field {field!r}; it has: {has}")
        names, bad, rows = _class_names(source, fields.label), BadRecords(skip), list[Row]()
        wanted = [x for x in source.features if x in (fields.text, fields.pair, fields.label, "id")]
        for i, item in enumerate(source.select_columns(wanted)):
            where, label = f"{self.name}: {split} example {i}", item.get(fields.label)
            with bad.record(where):
                if names and label is not None:  # the hub withholds labels as -1
                    label = names[label] if label >= 0 else None
                example = make_example(item, f"{split}:{i}", fields, may_be_empty=not skip)
                rows.append(Row(example, label, where))
        return Rows(f"{self.name}: {split}", rows, bad.skipped, fields.label)

    def _split(self, path: PathLike, split: str) -> Any:
        splits = _open(self.name, path)
        for name in _SPLITS[split]:
            if name in splits:
                return splits[name]
        hint = "; set evaluate.split=dev" if split == "test" else ""
        has = ", ".join(splits) or "none"
        raise MissingSplitError(
            f"{self.name}: has no split {' or '.join(_SPLITS[split])} (it has: {has}){hint}"
        )


def _class_names(source: Any, field: str) -> tuple[str, ...]:
    return tuple(getattr(source.features.get(field), "names", None) or ())


@functools.lru_cache(maxsize=1)
def _open(name: str, path: PathLike) -> Mapping[str, Any]:
    """Returns all splits of a data set."""
    try:
        import datasets
    except ImportError as error:
        advice = "pip install datasets"
        raise UserError(f"data.name: {name} needs the package {error.name}; {advice}") from error

    source, _, configuration = name.removeprefix("hf:").partition(":")
    folder = find_path(source)
    try:
        if any((folder / file).exists() for file in ("dataset_dict.json", "state.json")):
            found = datasets.load_from_disk(str(folder))
        else:
            place = str(folder) if folder.is_dir() else source
            cache = None if path is None else str(Path(path))
            found = datasets.load_dataset(place, configuration or None, cache_dir=cache)
    except Exception as error:  # the hub, each format and each data set have their own kinds of errors
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        advice = "check name, configuration (hf:NAME:CONFIGURATION) and network, or name a folder of it"
        raise UserError(f"data.name: {name} cannot be read ({reason}); {advice}") from error
    return found if isinstance(found, dict) else {"train": found}


def _make(name: str) -> DataSet:
    return HuggingFaceTexts(name=f"hf:{name}", task="classification", read=read)


FAMILIES["hf"] = _make
