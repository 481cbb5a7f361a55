"""Examples as ragged arrays of tokens, and batches of a fixed shape made of them. Pure NumPy."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

BUCKET_SHARES = (0.125, 0.25, 0.5, 0.75)  # shares of the maximum length
_BUCKET_STEP = 16  # widths are multiples of this
_SMALLEST_BUCKET = 32
_FORMAT = "trbert_jax question answering features 1"  # a new number invalidates old artifacts


@dataclasses.dataclass(frozen=True, eq=False)
class Ragged:
    """n arrays of different lengths, stored one after the other."""

    values: np.ndarray  # [total, ...]
    offsets: np.ndarray  # int64 [n + 1]; array i is `values[offsets[i]:offsets[i + 1]]`

    @classmethod
    def of(cls, arrays: Sequence[np.ndarray], dtype: Any = np.int32, width: int | None = None) -> "Ragged":
        """Concatenates arrays [k], or [k, width], each with its own k."""
        empty = np.zeros((0,) if width is None else (0, width), dtype)
        values = np.concatenate([empty, *arrays]).astype(dtype, copy=False)
        return cls(values, np.cumsum([0, *map(len, arrays)], dtype=np.int64))

    @classmethod
    def join(cls, parts: Sequence["Ragged"]) -> "Ragged":
        """The arrays of one or more parts, part after part."""
        lengths = np.concatenate([part.lengths for part in parts])
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        return cls(np.concatenate([part.values for part in parts]), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        return self.values[self.offsets[i] : self.offsets[i + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self.__getitem__, range(len(self)))

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """int64 [n]."""
        return np.diff(self.offsets)

    def members(self, arrays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns positions of the values of some arrays, and the place in `arrays` of each one's array."""
        counts = self.lengths[arrays]
        owner = np.repeat(np.arange(len(arrays)), counts)
        before = np.cumsum(counts) - counts
        return np.arange(counts.sum()) + (self.offsets[arrays] - before)[owner], owner

    def padded(self, width: int | None = None) -> np.ndarray:
        """int32 [n, width, ...], padded with -1 and cut to `width`, by default the longest length."""
        width = max(1, int(self.lengths.max(initial=0))) if width is None else width
        padded = np.full((len(self), width, *self.values.shape[1:]), -1, np.int32)
        for i, array in enumerate(self):
            padded[i, : len(array)] = array[:width]
        return padded


@dataclasses.dataclass(frozen=True)
class Counts:
    """Counts what encoding a data set cut, left out or could not find, see `_LOST`."""

    num_examples: int = 0  # records given
    num_rows: int = 0  # rows made of them
    num_truncated: int = 0
    num_questions_cut: int = 0
    num_without_answer: int = 0
    num_discarded: int = 0
    num_dropped: int = 0

    @property
    def is_lossy(self) -> bool:
        """Whether any text, row or question was lost."""
        return any(getattr(self, name) for name in _LOST)

    def describe(self) -> str:
        """Returns one line for the user."""
        lost = [f"{number} {text}" for name, text in _LOST.items() if (number := getattr(self, name))]
        return "; ".join([f"{self.num_examples} questions, {self.num_rows} inputs", *lost])


_LOST = {
    "num_truncated": "questions with text that fits into no input",
    "num_questions_cut": "questions cut to their maximum length",
    "num_without_answer": "inputs without the answer to their question, which point at [CLS]",
    "num_discarded": "inputs left out of training for lack of the answer",
    "num_dropped": "questions left out of training, their answer cannot be found in the tokens",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """n tokenized examples, one after the other.

    An example is one row of tokens, or several: the options of a multiple choice, the segments of a document.
    """

    tokens: np.ndarray  # int32 [total], special tokens included
    offsets: np.ndarray  # int64 [R + 1]; row r is `tokens[offsets[r]:offsets[r + 1]]`
    token_types: np.ndarray | None  # int8 [total]; None if all are 0
    labels: np.ndarray  # int32 [n]; -1 if the answer is withheld or is not a class
    ids: list[str]  # n names
    num_truncated: int  # texts that were cut; `take` keeps the number of the whole set
    digest: str  # hash of records, tokenizer and settings
    # int64 [n + 1]; example i has the rows `first_row[i]` to `first_row[i + 1] - 1`; None: one row each
    first_row: np.ndarray | None = None
    group: int = 1  # rows of an example in a batch, padding rows included
    # Name -> array [R, ...] or [n, ...] that the head or the loss reads, padded with -1.
    row_targets: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    targets: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    counts: Counts | None = None  # what encoding lost; None for texts with a label
    records: Sequence[Any] = ()  # that the examples were made of, for `Task.score`
    layout: Any = None  # task-private: places of answers in the source text, for `Task.score`

    @classmethod
    def of_pairs(
        cls,
        rows: Iterable[tuple[Sequence[np.ndarray], Sequence[np.ndarray]]],
        ids: list[str],
        *,
        counts: Counts,
        labels: np.ndarray | None = None,
        **fields: Any,
    ) -> "Examples":
        """Builds examples from rows of two segments in pieces; their token types are 0 and 1."""
        pieces, lengths = [np.zeros(0, np.int32)], [0]
        for row in rows:
            for segment in row:
                pieces.extend(segment)
                lengths.append(sum(map(len, segment)))
        return cls(
            tokens=np.concatenate(pieces).astype(np.int32, copy=False),
            offsets=np.cumsum(lengths, dtype=np.int64)[::2],
            token_types=np.repeat(np.tile(np.array([0, 1], np.int8), len(lengths) // 2), lengths[1:]),
            labels=np.full(len(ids), -1, np.int32) if labels is None else labels,
            ids=ids,
            num_truncated=counts.num_truncated,
            counts=counts,
            **fields,
        )

    def __len__(self) -> int:
        return len(self.ids)

    @functools.cached_property
    def has_labels(self) -> bool:
        """Whether any example has a label."""
        return bool((self.labels >= 0).any())

    @property
    def num_rows(self) -> int:
        """Rows of all examples."""
        return len(self.offsets) - 1

    @functools.cached_property
    def row_lengths(self) -> np.ndarray:
        """int32 [R], tokens of each row, special tokens included."""
        return np.diff(self.offsets).astype(np.int32)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """int32 [n], tokens of each example's longest row, special tokens included."""
        if self.first_row is None:
            return self.row_lengths
        return np.maximum.reduceat(self.row_lengths, self.first_row[:-1])

    @property
    def is_ragged(self) -> bool:
        """Whether some example has fewer than `group` rows."""
        return self.num_rows < len(self) * self.group

    def row(self, r: int) -> np.ndarray:
        """The tokens of row r."""
        return self.tokens[self.offsets[r] : self.offsets[r + 1]]

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Returns the rows of examples: int64 [b] -> int64 [b, group], -1 for padding rows."""
        if self.first_row is None:
            return np.asarray(indices, np.int64)[:, None]
        rows = self.first_row[indices][:, None] + np.arange(self.group)
        return np.where(rows < self.first_row[np.asarray(indices) + 1][:, None], rows, -1)

    @property
    def first_token(self) -> int:
        """The first token of every row, [CLS]."""
        return int(self.tokens[0])

    def padded_rows(self, rows: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Pads the tokens of rows, and their types if the set has them, with 0: int32 [b, width] each.

        `rows` are int64 [b], none longer than `width`; -1 gives a row of zeros.
        """
        columns = np.arange(width)
        mask = columns < np.where(rows >= 0, self.row_lengths[rows], 0)[:, None]
        source = np.where(mask, self.offsets[rows][:, None] + columns, 0)

        def padded(values: np.ndarray) -> np.ndarray:
            return np.where(mask, values[source], 0).astype(np.int32)

        return padded(self.tokens), None if self.token_types is None else padded(self.token_types)

    def take(self, indices: Sequence[int] | np.ndarray) -> "Examples":
        """Returns the examples at these positions, in this order, to run but not to score."""
        chosen = np.asarray(indices, np.int64)
        rows = self.rows(chosen)
        counts = (rows >= 0).sum(1)
        rows = rows[rows >= 0]
        source, _ = Ragged(self.tokens, self.offsets).members(rows)
        return dataclasses.replace(
            self,
            tokens=self.tokens[source],
            offsets=np.concatenate([[0], np.cumsum(self.row_lengths[rows], dtype=np.int64)]),
            token_types=None if self.token_types is None else self.token_types[source],
            labels=self.labels[chosen],
            ids=[self.ids[i] for i in chosen],
            digest=hashlib.sha256(self.digest.encode() + chosen.tobytes()).hexdigest(),
            first_row=None if self.first_row is None else np.concatenate([[0], np.cumsum(counts)]),
            row_targets={name: values[rows] for name, values in self.row_targets.items()},
            targets={name: values[chosen] for name, values in self.targets.items()},
            records=(),
            layout=None,
        )


# Batches ---------------------------------------------------------------------------------------------


def width_buckets(max_length: int, shares: Sequence[float] = BUCKET_SHARES) -> tuple[int, ...]:
    """Returns the padded lengths of batches, ascending; at 512: 64, 128, 256, 384, 512.

    Each one is compiled, so they are few: `max_length`, and about these shares of it.
    """
    rounded = {-(-int(share * max_length) // _BUCKET_STEP) * _BUCKET_STEP for share in shares}
    return (*sorted(w for w in rounded if _SMALLEST_BUCKET <= w < max_length), max_length)


def epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the order in which an epoch (0-based) visits the examples, int64 [num_examples]."""
    rng = np.random.Generator(np.random.PCG64([seed, epoch]))
    return rng.permutation(num_examples).astype(np.int64, copy=False)


def length_batches(
    examples: Examples, batch_size: int, widths: Sequence[int]
) -> Iterator[tuple[np.ndarray, int]]:
    """Divides all examples into batches of similar length, so that little is padded.

    The longest come first: a batch that does not fit into memory fails at once. Yields the positions of a
    batch's examples, int64 [<= batch_size], and the smallest of the widths (ascending) that holds them.
    Raises `ValueError` if none does.
    """
    lengths = examples.lengths
    order = np.argsort(-lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        longest = int(lengths[index[0]])
        width = next((w for w in widths if w >= longest), None)
        if width is None:
            raise ValueError(f"an example has {longest} tokens; the widths are {tuple(widths)}")
        yield index, width


def pad_batch(examples: Examples, indices: np.ndarray, batch_size: int, width: int) -> dict[str, np.ndarray]:
    """Puts the examples at positions int [b], b <= B = `batch_size`, into arrays of W = `width` columns.

    Examples beyond b are padding. A padding row has one token, [CLS], so that no computation meets a row
    without tokens. G is `Examples.group`.

    Returns:
      input_ids int32 [B * G, W] (0 for padding), mask bool [B * G, W] (True = real), valid bool [B],
      index int32 [B] (-1 for padding). If the set has them: labels int32 [B], token_type_ids int32
      [B * G, W], and all targets. segment bool [B * G] (False for padding rows) if examples differ in
      their number of rows; shared bool [B * G, W] if options have a passage in common.

    Raises `ValueError` for too many examples, or one that is longer than `width`.
    """
    chosen = np.asarray(indices, np.int64)
    if len(chosen) > batch_size:
        raise ValueError(f"{len(chosen)} examples do not fit into a batch of {batch_size}")
    rows = batch_rows(examples, chosen, batch_size)
    valid_rows = rows >= 0
    lengths = np.where(valid_rows, examples.row_lengths[rows], 0)
    if lengths.max(initial=0) > width:
        raise ValueError(f"an example of {lengths.max()} tokens does not fit into a width of {width}")
    columns = np.arange(width)
    mask = columns < lengths[:, None]  # [B * G, W]

    index = np.full(batch_size, -1, np.int32)
    index[: len(chosen)] = chosen

    def at(places: np.ndarray, values: np.ndarray) -> np.ndarray:
        valid = (places >= 0).reshape(-1, *(1,) * (values.ndim - 1))
        return np.where(valid, values[places], -1 if values.dtype.kind == "i" else 0).astype(values.dtype)

    input_ids, token_types = examples.padded_rows(rows, width)
    input_ids[~valid_rows, 0] = examples.first_token
    batch = {"input_ids": input_ids, "mask": mask, "valid": index >= 0, "index": index}
    if token_types is not None:
        batch["token_type_ids"] = token_types
    if examples.has_labels:
        batch["labels"] = np.maximum(at(index, examples.labels), 0)
    batch |= {name: at(index, values) for name, values in examples.targets.items()}
    batch |= {name: at(rows, values) for name, values in examples.row_targets.items()}
    if "shared_length" in batch:
        batch["shared"] = columns < batch.pop("shared_length")[:, None]
    if examples.first_row is not None and ("shared" not in batch or examples.is_ragged):
        batch["segment"] = valid_rows.copy()
    mask[~valid_rows, 0] = True
    return batch


def batch_rows(examples: Examples, indices: np.ndarray, batch_size: int) -> np.ndarray:
    """Returns the rows of a set that a batch has: int [b] -> int64 [B * G], -1 for padding rows."""
    rows = np.full((batch_size, examples.group), -1, np.int64)
    rows[: len(indices)] = examples.rows(indices)
    return rows.reshape(-1)


# Digests ---------------------------------------------------------------------------------------------


def digest_of(*values: object) -> str:
    """Returns the sha256 of values: None, bool, int, float, str, tuples, lists, arrays, dataclasses of them.

    The fields `where` (for messages) and `scored_as` (for scores) of a dataclass are left out.
    """
    digest = hashlib.sha256()
    _feed(digest.update, (_FORMAT, *values))
    return digest.hexdigest()


def _feed(update: Callable[[bytes], object], value: object) -> None:
    """Feeds every value with its type and size, so that two different nestings differ in their bytes."""
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
        names = [f.name for f in dataclasses.fields(value) if f.name not in ("where", "scored_as")]
        update(f"d{type(value).__name__}{len(names)}:".encode())
        for name in names:
            _feed(update, getattr(value, name))
    else:
        raise TypeError(f"{type(value).__name__} has no digest")
