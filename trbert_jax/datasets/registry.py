"""Registers the data sets by name, and reads their splits."""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trbert_jax.datasets.bad_records import BadRecords
from trbert_jax.datasets.dataset import SPLITS, hold_out, sample_indices
from trbert_jax.errors import MissingSplitError, UserError
from trbert_jax.io import read_json

logger = logging.getLogger(__name__)

Reader = Callable[[Path, BadRecords, Sequence[str]], Sequence[Any]]


def each_split(*names: str) -> dict[str, tuple[str, ...]]:
    """Returns file names by split, made by putting the split into `{split}` of each name."""
    return {split: tuple(name.format(split=split) for name in names) for split in SPLITS}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set in one file a split (RACE: one folder).

    Sources of another kind override `read_labels` and `read_split`.

    Attributes:
      name: value of `data.name`.
      task: key of `trbert_jax.tasks.TASKS`.
      read: reads one file. Takes its path, the handling of bad records and the class names; returns
        records of `trbert_jax.datasets.records` in the order of the file.
      files: split -> file names relative to `data.path`, in order of preference.
      labels: class names of a text data set; empty for questions.
      labels_file: JSON list beside the files that replaces `labels`; optional.
      style: settings and official scorer of span questions, `squad`, `mrqa` or `triviaqa`.
      dev_from_train: hold out a tenth of the training examples where the folder has no dev set.
      dev_as_test: read the dev set as test where the folder has no test set, since none with answers
        is published.
      hints: (glob, advice) for a folder that holds such a file but no split. `{found}` in the advice
        becomes the file.
      needs_path: whether `data.path` has to be set.
      has_fields: whether `data.text_field` and `data.label_field` choose the fields.
    """

    name: str
    task: str
    read: Reader
    files: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    labels: tuple[str, ...] = ()
    labels_file: str | None = None
    style: str = ""
    dev_from_train: bool = False
    dev_as_test: bool = False
    hints: tuple[tuple[str, str], ...] = ()
    needs_path: bool = True
    has_fields: bool = False

    def read_labels(self, path: str | Path | None, label_field: str = "label") -> tuple[str, ...]:
        """Returns the class names, without reading examples where possible.

        Args:
          path: `data.path`.
          label_field: `data.label_field`.

        Raises:
          UserError: `labels_file` does not hold one name for each class.
        """
        if self.labels_file is None or path is None:
            return self.labels
        file, count = Path(path).expanduser() / self.labels_file, len(self.labels)
        if not file.exists():
            return self.labels
        names = read_json(file)
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise UserError(f"{file}: expected a list of {count} names")
        if len(names) != count or len(set(names)) != count:
            raise UserError(f"{file}: has {len(set(names))} different names; expected {count}, one a class")
        return tuple(names)

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
        """Reads the records of one split, in the order of the source.

        Args:
          path: `data.path`.
          split: `train`, `dev` or `test`.
          bad: how to handle bad records; by default the first one raises.
          limit: number of records at most, a random sample; None for all.
          seed: of the sample.
          text_field, label_field: fields of the source, where `has_fields`.

        Raises:
          MissingSplitError: the folder has no file for the split.
          UserError: a file cannot be read or has a bad record; the message names file and record.
        """
        bad = bad or BadRecords()
        folder = self._folder(path, split)
        file, indices = self.find_file(folder, split), None
        if file is None and self.dev_as_test and split == "test":
            file = self.find_file(folder, "dev")
            if file is not None:
                logger.warning(
                    "%s: no test set with answers is published; %s serves as test", self.name, file.name
                )
        from_train = self.dev_from_train and split != "test" and self.find_file(folder, "dev") is None
        if from_train:
            file = self.find_file(folder, "train")
        if file is None:
            raise MissingSplitError(
                f"{folder}: has no {split} split of {self.name}; expected "
                f"{' or '.join(self.files[split])} in it{self._hint(folder)}"
            )
        records = self.read_file(file, bad, self.read_labels(folder))
        if from_train:
            train, dev = hold_out(len(records), str(file))
            logger.info(
                "%s: has no dev split; %d of %d training examples serve as dev",
                folder,
                len(dev),
                len(records),
            )
            indices = train if split == "train" else dev
            records = [records[i] for i in indices]
        return sample(records, limit, seed, split)

    def read_file(
        self, path: str | Path, bad: BadRecords | None = None, labels: Sequence[str] = ()
    ) -> list[Any]:
        """Reads one file in the format of this data set, and logs how many records were skipped.

        Args:
          path: the file (RACE: the folder).
          bad: how to handle bad records; by default the first one raises.
          labels: class names; empty for `self.labels`.

        Raises:
          UserError: the file cannot be read or has a bad record.
        """
        bad = bad or BadRecords()
        before = len(bad.skipped)
        records = list(self.read(Path(path).expanduser(), bad, tuple(labels) or self.labels))
        summary = bad.summary(len(records), before)
        if summary:
            logger.warning("%s: %s", path, summary)
        return records

    def find_file(self, folder: Path, split: str) -> Path | None:
        """Returns the first of the file names of a split that exists; None if none does."""
        return next((folder / name for name in self.files[split] if (folder / name).exists()), None)

    def _folder(self, path: str | Path | None, split: str) -> Path:
        if split not in SPLITS:
            raise UserError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
        expected = f"expected the folder that holds {' or '.join(self.files[split])} of {self.name}"
        if path is None:
            raise UserError(f"data.path: missing; {expected}")
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise UserError(f"data.path: {folder}: no such folder; {expected}")
        return folder

    def _hint(self, folder: Path) -> str:
        for pattern, advice in self.hints:
            for found in sorted(folder.glob(pattern)):
                return f". It holds {found}; {advice.format(found=found)}"
        return ""


# Data sets by `data.name`, in the order of help texts.
DATASETS: dict[str, DataSet] = {}
# Open-ended families, named `PREFIX:NAME`: prefix -> what makes the entry for a NAME.
FAMILIES: dict[str, Callable[[str], DataSet]] = {}


def register_dataset(dataset: DataSet) -> DataSet:
    """Adds a data set, under its name. Raises `ValueError` if the name is taken."""
    if dataset.name in DATASETS:
        raise ValueError(f"the data set {dataset.name!r} is registered already")
    DATASETS[dataset.name] = dataset
    return dataset


def dataset_names() -> tuple[str, ...]:
    """Returns what `data.name` may be, `imdb` to `tfds:NAME`, for messages and help."""
    return (*DATASETS, *(f"{prefix}:NAME" for prefix in FAMILIES))


def find_dataset(name: str) -> DataSet:
    """Returns the data set of this name. Raises `UserError` if there is none."""
    prefix, _, rest = name.partition(":")
    if rest and prefix in FAMILIES:
        return FAMILIES[prefix](rest)
    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"{name!r} is no data set; expected {', '.join(dataset_names())}{hint}")
    return DATASETS[name]


def sample(records: Sequence[Any], limit: int | None, seed: int, split: str) -> list[Any]:
    """Returns at most `limit` records; see `sample_indices`."""
    return [records[i] for i in sample_indices(len(records), limit, seed, split)]
