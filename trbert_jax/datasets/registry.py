"""Registers the data sets by name, and reads their splits."""

import dataclasses
import difflib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, TypeVar, Unpack

import numpy as np

from trbert_jax.datasets import reading
from trbert_jax.datasets.reading import BadRecords
from trbert_jax.errors import MissingSplitError, UserError
from trbert_jax.io import find_path, read_json

logger = logging.getLogger(__name__)

SPLITS = ("train", "dev", "test")
# Keys of `data` for one's own texts; a data set of a fixed format reads none of them.
FIELD_KEYS = ("text_field", "text_pair_field", "label_field")
FILE_KEYS = (*SPLITS, "unlabeled")  # files of one's own texts
OWN_KEYS = (*FILE_KEYS, *FIELD_KEYS, "labels", "dev_share")
DEV_SHARE = 0.1  # default of `data.dev_share`

T = TypeVar("T")
PathLike = str | Path | None
# Yields the records of a file, in its order, from its path, the handling of bad records and the class names.
# Raises `UserError` if the file cannot be read.
Reader = Callable[[Path, BadRecords, Sequence[str]], Iterable[Any]]


class Options(TypedDict, total=False):
    """Options of reading a split."""

    limit: int | None  # number of records at most, a random sample; by default all
    seed: int  # of the sample; by default 42
    # Settings of `DataConfig`, if the data set `reads` them.
    train: str | None
    dev: str | None
    test: str | None
    unlabeled: str | None
    text_field: str
    text_pair_field: str | None
    label_field: str
    labels: Sequence[str] | None
    dev_share: float  # by default DEV_SHARE


def each_split(*names: str) -> dict[str, tuple[str, ...]]:
    """Returns file names by split, made by putting the split into `{split}` of each name."""
    return {split: tuple(name.format(split=split) for name in names) for split in SPLITS}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set in one file a split (RACE: one folder); others override `read_labels` and `load`."""

    name: str  # value of `data.name`
    task: str  # key of `trbert_jax.tasks.TASKS`
    read: Reader  # of one file
    format: str = "records"  # what a file holds, for the message about one without records
    # Split -> file names relative to `data.path`, of which the folder has one.
    files: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    labels: tuple[str, ...] = ()  # class names of a text data set; empty for questions
    labels_file: str | None = None  # optional JSON list beside the files that replaces `labels`
    style: str = ""  # settings and official scorer of span questions, `squad`, `mrqa` or `triviaqa`
    dev_from_train: bool = False  # without a dev set, hold out a tenth of the training examples
    dev_as_test: bool = False  # without a test set, read the dev set; none with answers is published
    # (glob, advice) for a folder that holds such a file but no split. `{found}` becomes the file.
    hints: tuple[tuple[str, str], ...] = ()
    needs_path: bool = True  # whether `data.path` has to be set
    reads: frozenset[str] = frozenset()  # keys of `OWN_KEYS` that the data set reads

    def read_labels(
        self, path: PathLike, bad: BadRecords | None = None, **options: Unpack[Options]
    ) -> tuple[str, ...]:
        """Returns the class names, given `data.path` and the options of `read_split`."""
        file = find_path(path) / self.labels_file if path and self.labels_file else None
        if file is None or not file.exists():
            return self.labels
        names, count = read_json(file), len(self.labels)
        is_texts = isinstance(names, list) and all(isinstance(name, str) and name for name in names)
        if not is_texts or not len(set(names)) == len(names) == count:
            raise UserError(f"{file}: is {reading.describe(names)}; expected {count} different names")
        return tuple(names)

    def read_split(
        self, path: PathLike, split: str, bad: BadRecords | None = None, **options: Unpack[Options]
    ) -> list[Any]:
        """Reads the records of one split, in the order of the source; `path` is `data.path`.

        Raises `MissingSplitError` if the folder has no file for the split, `UserError`, which names file and
        record, if a file cannot be read or (by default) has a bad record.
        """
        if split not in SPLITS:
            raise UserError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
        return self.load(path, split, bad or BadRecords(), options)

    def has_split(self, path: PathLike, split: str, options: Options) -> bool:
        """Returns whether there is a set for a split, as far as that is known without reading it."""
        if path is None or not self.files:
            return True
        names = (*self.files[split], *(self.files["dev"] if split == "test" and self.dev_as_test else ()))
        return any((find_path(path) / name).exists() for name in names)

    def load(self, path: PathLike, split: str, bad: BadRecords, options: Options) -> list[Any]:
        """Reads a split for `read_split`."""
        expected = " or ".join(self.files[split])
        if path is None:
            raise UserError(f"data.path: missing; expected the folder of {self.name} with {expected}")
        folder = find_path(path)
        if not folder.is_dir():
            problem = f"data.path: {folder}: no such folder; expected one with {expected}"
            raise UserError(problem) from FileNotFoundError(folder)
        found = {part: [*filter(Path.exists, map(folder.joinpath, self.files[part]))] for part in SPLITS}
        hold_out_dev = self.dev_from_train and split != "test" and not found["dev"]
        files = found["train" if hold_out_dev else split]
        if not files and split == "test" and self.dev_as_test and found["dev"]:
            files = found["dev"]
            logger.warning("%s: no test set with answers; %s serves as test", self.name, files[0].name)
        versions = {file.name.partition("-")[2]: file for names in found.values() for file in names}
        mixed = [*versions.values()] if self.style == "squad" and len(versions) > 1 else files
        if len(mixed) > 1:
            both = " and ".join(file.name for file in mixed)
            raise UserError(f"{folder}: has both {both}; keep those to read there, and move the others away")
        if not files:
            problem = f"has no {split} split of {self.name}"
            raise MissingSplitError(f"{folder}: {problem}; expected {expected}{self._hint(folder)}")
        records = self.read_file(files[0], bad, self.read_labels(folder))
        if hold_out_dev:
            records = [records[i] for i in hold_out(len(records), str(files[0]), split)]
        return sample(records, split, options)

    def read_file(
        self, path: str | Path, bad: BadRecords | None = None, labels: Sequence[str] = ()
    ) -> list[Any]:
        """Reads one file (RACE: one folder) in the format of this data set, and logs what was skipped.

        Raises `UserError` if the file cannot be read, has a bad record (by default) or no record.
        """
        bad, file = bad or BadRecords(), find_path(path)
        return reading.collect(self.read(file, bad, labels or self.labels), file, bad, self.format)

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
        own = "" if close else "; `text` reads your own texts"
        raise UserError(f"{name!r} is no data set; expected {', '.join(dataset_names())}{hint}{own}")
    return DATASETS[name]


def sample(records: Sequence[T], split: str, options: Options) -> list[T]:
    """Returns a random sample of at most `options["limit"]` records, in their order.

    A source may be sorted by label, so its first records would not do. The sample for a smaller limit is
    part of the one for a larger limit; each split draws by itself.
    """
    limit = options.get("limit")
    if limit is None or limit >= len(records):
        return list(records)
    rng = np.random.Generator(np.random.PCG64([options.get("seed", 42), SPLITS.index(split)]))
    return [records[i] for i in sorted(rng.permutation(len(records))[:limit].tolist())]


def hold_out(num: int, source: str, split: str) -> list[int]:
    """Returns the positions of `train` (9 of 10) or `dev` (1 of 10) in a training set without a dev set.

    They depend on its size alone, so that runs with different seeds are measured on the same examples.
    """
    if num < 2:
        raise UserError(f"{source}: one example cannot be divided into train and dev; give a dev set")
    size = max(1, num // 10)
    logger.info("%s: has no dev split; %d of %d training examples serve as dev", source, size, num)
    order = np.random.Generator(np.random.PCG64(42)).permutation(num)
    return sorted((order[:size] if split == "dev" else order[size:]).tolist())
