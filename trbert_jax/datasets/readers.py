"""The data sets by name: where each lies, in what format, and what its classes are called.

docs/data.md says where they are published and how to add another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from trbert_jax.config_schema import TFDS_PREFIX, DataConfig
from trbert_jax.datasets.dataset import SPLITS, Announce, Dataset, Example, hold_out
from trbert_jax.datasets.hyperpartisan import LABEL_NAMES as HYPERPARTISAN_LABELS
from trbert_jax.datasets.python_source import read_stdlib
from trbert_jax.datasets.text_files import read_csv, read_jsonl
from trbert_jax.datasets.tfds import read_tfds
from trbert_jax.errors import MissingSplitError, UserError
from trbert_jax.io import read_json

__all__ = ["FILE_FORMATS", "Dataset", "Example", "FileFormat", "read_examples", "read_file"]

_READERS = {".jsonl": read_jsonl, ".csv": read_csv}


@dataclasses.dataclass(frozen=True)
class FileFormat:
    """A data set of three files, `train`, `dev` and `test`.

    Attributes:
      suffix: `.jsonl` (labels from 0) or `.csv` (labels from 1).
      label_names: one name a class.
      names_file: a JSON list in the same folder that gives better names, optional.
      hint: what to do if the folder holds one of these other files: (glob, advice).
    """

    suffix: str
    label_names: tuple[str, ...]
    names_file: str | None = None
    hint: tuple[tuple[str, str], ...] = ()


_SPLIT_FIRST = "split it first: trbert split-hyperpartisan --input {found} --output DIR"

FILE_FORMATS = {
    "imdb": FileFormat(".jsonl", ("negative", "positive")),
    "20news": FileFormat(".jsonl", tuple(map(str, range(20))), names_file="labels.json"),
    "hyperpartisan": FileFormat(
        ".jsonl",
        HYPERPARTISAN_LABELS,
        hint=(("original_data.txt", _SPLIT_FIRST), ("articles-*.xml", _SPLIT_FIRST)),
    ),
    "yelp_f": FileFormat(".csv", ("1 star", "2 stars", "3 stars", "4 stars", "5 stars")),
    "yelp_polarity": FileFormat(".csv", ("negative", "positive")),
}


def read_examples(config: DataConfig, split: str, seed: int = 42, announce: Announce = print) -> Dataset:
    """Reads one split of a configured data set.

    Args:
      config: name, path, limits; see `DataConfig`.
      split: `train`, `dev` or `test`. Where the source has no dev split, a tenth of train serves as
        dev and is left out of train.
      seed: decides which examples are used where the configuration limits their number.
      announce: called with a line of text where a dev split had to be made.

    Returns:
      Examples in the order of the source.

    Raises:
      UserError: anything wrong with the files, the message names file and line.
    """
    if split not in SPLITS:
        raise UserError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
    limit = config.max_train_examples if split == "train" else config.max_eval_examples
    if config.name.startswith(TFDS_PREFIX):
        return read_tfds(config, split, limit, seed, announce)
    if config.name == "stdlib":
        dataset = read_stdlib(split, config.path)
    elif config.name in FILE_FORMATS:
        dataset = _read_split(config, FILE_FORMATS[config.name], split, announce)
    else:
        raise UserError(
            f"data.name is {config.name!r}; expected {', '.join(FILE_FORMATS)}, stdlib or {TFDS_PREFIX}NAME"
        )
    return dataset.sample(limit, seed, split)


def read_file(path: str | Path, label_names: Sequence[str]) -> Dataset:
    """Reads one file, `.jsonl` (labels from 0) or `.csv` (labels from 1).

    Args:
      path: the file.
      label_names: one name a class.

    Raises:
      UserError: another kind of file, or anything wrong with it (with its line).
    """
    path = Path(path).expanduser()
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise UserError(f"{path}: expected a .jsonl file (text, label) or a .csv file (label, text)")
    return Dataset(reader(path, label_names), tuple(label_names))


def _read_split(config: DataConfig, form: FileFormat, split: str, announce: Announce) -> Dataset:
    expected = ", ".join(f"{name}{form.suffix}" for name in SPLITS)
    if config.path is None:
        raise UserError(f"data.path: missing; expected the folder that holds {expected} of {config.name}")
    folder = Path(config.path).expanduser()
    if not folder.is_dir():
        raise UserError(f"data.path: {folder}: no such folder; expected one that holds {expected}")
    train, dev = folder / f"train{form.suffix}", folder / f"dev{form.suffix}"
    path = folder / f"{split}{form.suffix}"
    divide = split != "test" and train.exists() and not dev.exists()
    if divide:
        path = train
    elif not path.exists():
        raise MissingSplitError(f"{path}: no such file; data.path must hold {expected}{_hint(folder, form)}")
    dataset = read_file(path, _label_names(folder, form))
    if not divide:
        return dataset
    parts = dict(zip(("train", "dev"), hold_out(len(dataset), str(path)), strict=True))
    announce(
        f"{dev}: not there; {len(parts['dev'])} of the {len(dataset)} examples of {path.name} serve as dev"
    )
    return dataset.pick(parts[split])


def _hint(folder: Path, form: FileFormat) -> str:
    for pattern, advice in form.hint:
        for found in sorted(folder.glob(pattern)):
            return f". {found} is there; {advice.format(found=found)}"
    return ""


def _label_names(folder: Path, form: FileFormat) -> tuple[str, ...]:
    if form.names_file is None or not (folder / form.names_file).exists():
        return form.label_names
    path, count = folder / form.names_file, len(form.label_names)
    names = read_json(path)
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{path}: expected a list of {count} names")
    if len(names) != count or len(set(names)) != count:
        raise UserError(f"{path}: {len(set(names))} different names; expected {count}, one a class")
    return tuple(names)
