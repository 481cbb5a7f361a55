"""How rows of tokens are stored, counted and identified; the same for every task."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np

_FORMAT = "trbert_jax question answering features 1"  # a new number makes old artifacts unused


@dataclasses.dataclass(frozen=True, eq=False)
class TokenRows:
    """r inputs of the encoder, one after the other, special tokens included, nothing padded.

    Attributes:
      tokens: int32 [total].
      token_types: int8 [total], 0 in a row's first part and 1 in its second.
      offsets: int64 [r + 1], row i is `tokens[offsets[i]:offsets[i + 1]]`.
    """

    tokens: np.ndarray
    token_types: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """int32 [r]."""
        return np.diff(self.offsets).astype(np.int32)

    def row(self, i: int) -> np.ndarray:
        """The tokens of row i, int32 [its length]."""
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]


RowParts = tuple[Sequence[np.ndarray], Sequence[np.ndarray]]


def join_rows(parts: Iterable[RowParts]) -> TokenRows:
    """Rows of two parts, each given in pieces; the first part has token type 0, the second 1."""
    arrays, lengths = [np.zeros(0, np.int32)], [0]
    for row in parts:
        for part in row:
            arrays.extend(part)
            lengths.append(sum(map(len, part)))
    tokens = np.concatenate(arrays).astype(np.int32, copy=False)
    ends = np.cumsum(lengths, dtype=np.int64)
    types = np.repeat(np.tile(np.array([0, 1], np.int8), len(lengths) // 2), lengths[1:])
    return TokenRows(tokens, types, ends[::2])


@dataclasses.dataclass(frozen=True)
class Counts:
    """What became of a data set, to be said and stored: nothing is lost silently.

    Attributes:
      num_examples: questions that were given.
      num_rows: inputs of the encoder made of them.
      num_truncated: questions some of whose text (article, documents, paragraphs) is in no row.
      num_questions_cut: questions cut to their maximum length.
      num_without_answer: rows that have to point at [CLS] although the source gives an answer, since
        it does not stand in them.
      num_discarded: rows left out of training for that reason.
      num_dropped: questions left out of training altogether, since no row holds their answer or the
        tokenizer keeps none of its characters.
    """

    num_examples: int = 0
    num_rows: int = 0
    num_truncated: int = 0
    num_questions_cut: int = 0
    num_without_answer: int = 0
    num_discarded: int = 0
    num_dropped: int = 0

    def describe(self) -> str:
        """One line for the user."""
        said = [f"{self.num_examples} questions, {self.num_rows} inputs"]
        for number, what in (
            (self.num_truncated, "questions with text that fits into no input"),
            (self.num_questions_cut, "questions cut"),
            (self.num_without_answer, "inputs without the answer to their question"),
            (self.num_discarded, "inputs without the answer left out"),
            (self.num_dropped, "questions left out, their answer cannot be found in the tokens"),
        ):
            if number:
                said.append(f"{number} {what}")
        return "; ".join(said)


def digest_of(*values: object) -> str:
    """sha256 of values whatever their nesting, for all that decides the contents of features.

    Args:
      values: None, bool, int, float, str, tuples, lists, NumPy arrays and dataclasses of them. The
        fields `where` and `scored_as` of a dataclass are left out: they are for messages and scores.
    """
    digest = hashlib.sha256()
    _feed(digest.update, (_FORMAT, *values))
    return digest.hexdigest()


def _feed(update: Callable[[bytes], object], value: object) -> None:
    """Every value with its type and size, so that no two different nestings give the same bytes."""
    if isinstance(value, str):
        data = value.encode("utf-8")
        update(b"s%d:" % len(data))
        update(data)
    elif value is None or isinstance(value, bool | int | float):
        update(f"{type(value).__name__}:{value!r};".encode())
    elif isinstance(value, tuple | list):
        update(b"t%d:" % len(value))
        for item in value:
            _feed(update, item)
    elif isinstance(value, np.ndarray):
        update(f"a{value.dtype.str}{value.shape}:".encode())
        update(np.ascontiguousarray(value).tobytes())
    elif dataclasses.is_dataclass(value):
        names = [
            field.name for field in dataclasses.fields(value) if field.name not in ("where", "scored_as")
        ]
        update(f"d{type(value).__name__}{len(names)}:".encode())
        for name in names:
            _feed(update, getattr(value, name))
    else:
        raise TypeError(f"{type(value).__name__} has no digest")
