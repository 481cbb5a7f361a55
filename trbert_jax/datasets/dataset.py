"""Labeled texts: one example, a set of them, and how a set is thinned out or divided."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from trbert_jax.errors import UserError

Announce = Callable[[str], object]  # prints a line for the user

SPLITS = ("train", "dev", "test")
# The held-out part of a training set depends on nothing but the set's size, so that runs with
# different seeds are measured on the same examples.
_HOLD_OUT_SEED = 42
_HOLD_OUT_SHARE = 10  # one in so many


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """One labeled text.

    Attributes:
      id: where it comes from, `train.jsonl:17` (the line) for files.
      text: never empty.
      label: class index, 0-based.
    """

    id: str
    text: str
    label: int


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

    def sample(self, limit: int | None, seed: int, split: str) -> Dataset:
        """At most `limit` examples, see `sample_indices`."""
        indices = sample_indices(len(self), limit, seed, split)
        return self if len(indices) == len(self) else self.pick(indices)

    def pick(self, indices: Sequence[int]) -> Dataset:
        """The examples at these positions."""
        return dataclasses.replace(self, examples=tuple(self.examples[i] for i in indices))


def make_example(
    where: str, example_id: str, text: object, label: object, label_names: Sequence[str], first_label: int = 0
) -> Example:
    """Checks one record and makes an example of it.

    Args:
      where: names the record in errors.
      example_id: see `Example.id`.
      text: must be a string with something in it.
      label: must be an int from `first_label` on.
      label_names: one name a class.
      first_label: the source's number of the first class.

    Raises:
      UserError: wrong types, an empty text, a label out of range.
    """
    if not isinstance(text, str):
        raise UserError(f"{where}: the text is {_kind(text)}; expected a string")
    if not text or text.isspace():
        raise UserError(f"{where}: the text is empty; remove the example or give it a text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: the text is not valid Unicode (half of a surrogate pair at character {error.start})"
        ) from error
    last_label = first_label + len(label_names) - 1
    if isinstance(label, bool) or not isinstance(label, int):
        raise UserError(
            f"{where}: the label is {_kind(label)}; expected a whole number {first_label}..{last_label}"
        )
    if not first_label <= label <= last_label:
        raise UserError(
            f"{where}: the label is {label}; expected {first_label}..{last_label} for "
            f"{len(label_names)} classes ({_shorten(', '.join(label_names))})"
        )
    return Example(example_id, text, label - first_label)


def sample_indices(num: int, limit: int | None, seed: int, split: str) -> list[int]:
    """Positions of a random sample without replacement, ascending.

    A source may be sorted by label, so its first examples would not do. The sample for a smaller
    limit is part of the one for a larger limit.

    Args:
      num: how many examples there are.
      limit: how many to take at most; None for all.
      seed: decides which.
      split: each split draws by itself.
    """
    if limit is None or limit >= num:
        return list(range(num))
    rng = np.random.Generator(np.random.PCG64([seed, SPLITS.index(split)]))
    return sorted(rng.permutation(num)[:limit].tolist())


def hold_out(num: int, source: str) -> tuple[list[int], list[int]]:
    """Divides the positions of a training set that came without a dev set, 9 to 1.

    Returns:
      Positions of the train and of the dev examples, ascending.

    Raises:
      UserError: there is one example only.
    """
    if num < 2:
        raise UserError(f"{source}: one example cannot be divided into train and dev; give a dev set")
    order = np.random.Generator(np.random.PCG64(_HOLD_OUT_SEED)).permutation(num)
    size = max(1, num // _HOLD_OUT_SHARE)
    return sorted(order[size:].tolist()), sorted(order[:size].tolist())


def _kind(value: object) -> str:
    names = {type(None): "null", bool: "true or false", str: "text", int: "a number", float: "a fraction"}
    name = names.get(type(value), f"a {type(value).__name__}")
    return name if value is None else f"{name} ({_shorten(repr(value), 40)})"


def _shorten(text: str, length: int = 80) -> str:
    return text if len(text) <= length else f"{text[: length - 4]} ..."
