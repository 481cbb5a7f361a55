"""Holds labeled texts with the names of their classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from trbert_jax.datasets.records import Example
from trbert_jax.datasets.text_files import read_file

__all__ = ["Announce", "Dataset", "Example", "read_dataset"]

Announce = Callable[[str], object]  # prints a line for the user


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Examples in the order of their source.

    Attributes:
      examples: at least one.
      label_names: one name a class, indexed by `Example.label`; the same for every split.
    """

    examples: tuple[Example, ...]
    label_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.examples)


def read_dataset(path: str | Path, labels: Sequence[str]) -> Dataset:
    """Reads one file as a `Dataset`; see `trbert_jax.datasets.text_files.read_file`."""
    return Dataset(tuple(read_file(path, labels)), tuple(labels))
