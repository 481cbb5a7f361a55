"""Texts as token ids: tokenized once, in parallel, and kept in a cache.

An example is `[CLS] tokens [SEP]`, cut to the maximum length (docs/data.md, "Tokenized examples").
Lengths are kept, nothing is padded here.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trbert_jax.datasets.dataset import Announce, Dataset
from trbert_jax.errors import UserError
from trbert_jax.io import atomic_file

_FORMAT = "trbert_jax features 1"  # a new number makes old caches unused
_CHUNK = 1000  # texts handed to the tokenizer's threads at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """n tokenized examples, one after the other.

    An example is one row of tokens, or several that belong together: the options of a multiple choice, the
    segments of a long document.

    Attributes:
      tokens: int32 [total], special tokens included.
      offsets: int64 [R + 1], row r is `tokens[offsets[r]:offsets[r + 1]]`.
      token_types: int8 [total], or None where all are 0.
      labels: int32 [n]; -1 where the answer is withheld, or is not one of a few classes.
      ids: n names, see `Example.id`.
      num_truncated: how many texts were cut; `take` keeps the number of the whole set.
      digest: identifies texts, labels, tokenizer and maximum length.
      first_row: int64 [n + 1], example i has the rows from `first_row[i]` to before `first_row[i + 1]`; None
        where each has one.
      group: rows that an example has in a batch, at least as many as it really has.
      row_targets: name -> array [R, ...], what the task's head or loss needs for each row; padded with -1.
      targets: name -> array [n, ...], the same for each example.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    token_types: np.ndarray | None
    labels: np.ndarray
    ids: list[str]
    num_truncated: int
    digest: str
    first_row: np.ndarray | None = None
    group: int = 1
    row_targets: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    targets: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    @functools.cached_property
    def has_labels(self) -> bool:
        """Whether there is any label."""
        return bool((self.labels >= 0).any())

    @property
    def num_rows(self) -> int:
        """Rows of all examples."""
        return len(self.offsets) - 1

    @functools.cached_property
    def row_lengths(self) -> np.ndarray:
        """int32 [R], tokens of each row, special ones included."""
        return np.diff(self.offsets).astype(np.int32)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """int32 [n], tokens of each example's longest row, special ones included."""
        if self.first_row is None:
            return self.row_lengths
        return np.maximum.reduceat(self.row_lengths, self.first_row[:-1])

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """The rows of some examples: int64 [b] -> int64 [b, group], -1 where an example has fewer."""
        if self.first_row is None:
            return np.asarray(indices, np.int64)[:, None]
        rows = self.first_row[indices][:, None] + np.arange(self.group)
        return np.where(rows < self.first_row[np.asarray(indices) + 1][:, None], rows, -1)

    @property
    def first_token(self) -> int:
        """The first token of every row, [CLS]."""
        return int(self.tokens[0])

    def padded_rows(self, rows: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Tokens of some rows, and their types where the set has them: int32 [b, width], 0 behind the end.

        Args:
          rows: int64 [b], none longer than `width`; -1 gives a row of zeros.
          width: columns.
        """
        columns = np.arange(width)
        mask = columns < np.where(rows >= 0, self.row_lengths[rows], 0)[:, None]
        source = np.where(mask, self.offsets[rows][:, None] + columns, 0)

        def padded(values: np.ndarray) -> np.ndarray:
            return np.where(mask, values[source], 0).astype(np.int32)

        return padded(self.tokens), None if self.token_types is None else padded(self.token_types)

    def take(self, indices: Sequence[int] | np.ndarray) -> Examples:
        """The examples at these positions, in this order."""
        chosen = np.asarray(indices, np.int64)
        rows = self.rows(chosen)
        counts = (rows >= 0).sum(1)
        rows = rows[rows >= 0]
        lengths = self.row_lengths[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        source = np.repeat(self.offsets[rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return dataclasses.replace(
            self,
            tokens=self.tokens[source],
            offsets=offsets,
            token_types=None if self.token_types is None else self.token_types[source],
            labels=self.labels[chosen],
            ids=[self.ids[i] for i in chosen],
            digest=hashlib.sha256(self.digest.encode() + chosen.tobytes()).hexdigest(),
            first_row=None if self.first_row is None else np.concatenate([[0], np.cumsum(counts)]),
            row_targets={name: values[rows] for name, values in self.row_targets.items()},
            targets={name: values[chosen] for name, values in self.targets.items()},
        )


def build_features(
    dataset: Dataset,
    tokenizer: Any,
    max_length: int,
    cache_dir: str | Path | None = None,
    announce: Announce = print,
) -> Examples:
    """Tokenizes a data set, or finds it in the cache.

    Args:
      dataset: n examples.
      tokenizer: a `transformers.PreTrainedTokenizerFast`. Truncation and padding stored with it are
        not used, and it is not changed.
      max_length: tokens of an example at most, special ones included.
      cache_dir: folder of the cache; None for none. The name of a file in it is a hash of all that
        decides its contents, so one never answers for another data set, tokenizer or length.
      announce: called with a line of text for texts that were cut, and for a damaged cache file.

    Raises:
      UserError: a tokenizer without [CLS] or [SEP], a text without tokens (names the example), a
        cache folder that cannot be written.
    """
    if max_length < 3:
        raise ValueError(f"max_length is {max_length}; [CLS], one token and [SEP] need 3")
    backend, ends = prepare_tokenizer(tokenizer)
    digest = _digest(dataset, backend, ends, max_length)
    path = None if cache_dir is None else Path(cache_dir).expanduser() / f"features-{digest[:40]}.npz"
    arrays = None if path is None else _load(path, len(dataset), announce)
    if arrays is None:
        arrays = _tokenize(dataset, backend, ends, max_length)
        if path is not None:
            with atomic_file(path, "wb") as stream:
                np.savez(stream, allow_pickle=False, **arrays)
    features = Examples(
        tokens=arrays["tokens"],
        offsets=arrays["offsets"],
        token_types=None,
        labels=np.array([example.label for example in dataset.examples], np.int32),
        ids=[example.id for example in dataset.examples],
        num_truncated=int(arrays["num_truncated"]),
        digest=digest,
    )
    if features.num_truncated:
        announce(
            f"{features.num_truncated} of {len(features)} texts are longer than {max_length} tokens and "
            "were cut"
        )
    return features


def prepare_tokenizer(tokenizer: Any) -> tuple[Any, tuple[int, int]]:
    """A tokenizer of our own that neither cuts nor pads, and the ids of [CLS] and [SEP].

    Args:
      tokenizer: a `transformers.PreTrainedTokenizerFast`; not changed.

    Raises:
      UserError: it has no [CLS] or no [SEP].
    """
    import tokenizers

    # Unset, the library warns and turns its threads off once the process has forked.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    ends = (tokenizer.cls_token_id, tokenizer.sep_token_id)
    if None in ends:
        raise UserError("the tokenizer has no [CLS] or no [SEP] token; choose one made for BERT")
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend, ends


def _digest(dataset: Dataset, backend: Any, ends: tuple[int, int], max_length: int) -> str:
    digest = hashlib.sha256()
    for part in _hashed_parts(dataset, backend, ends, max_length):
        data = part.encode("utf-8")
        digest.update(len(data).to_bytes(8, "little"))  # where one part ends and the next begins
        digest.update(data)
    return digest.hexdigest()


def _hashed_parts(dataset: Dataset, backend: Any, ends: tuple[int, int], max_length: int) -> Iterator[str]:
    yield from (_FORMAT, str(max_length), str(ends), backend.to_str())
    for example in dataset.examples:
        yield from (example.id, str(example.label), example.text)


def _tokenize(
    dataset: Dataset, backend: Any, ends: tuple[int, int], max_length: int
) -> dict[str, np.ndarray]:
    from tqdm import tqdm

    rows, num_truncated = [], 0
    # disable=None: no bar where stderr is not a terminal; delay: none for what takes a moment.
    with tqdm(total=len(dataset), desc="tokenizing", unit="text", disable=None, delay=2) as bar:
        for start in range(0, len(dataset), _CHUNK):
            some = dataset.examples[start : start + _CHUNK]
            encodings = backend.encode_batch_fast([e.text for e in some], add_special_tokens=False)
            for example, encoding in zip(some, encodings, strict=True):
                ids = encoding.ids
                if not ids:
                    raise UserError(f"{example.id}: the text has no tokens; remove the example")
                num_truncated += len(ids) > max_length - 2
                rows.append(np.array([ends[0], *ids[: max_length - 2], ends[1]], np.int32))
            bar.update(len(some))
    return {
        "tokens": np.concatenate(rows),
        "offsets": np.cumsum([0, *map(len, rows)], dtype=np.int64),
        "num_truncated": np.array(num_truncated, np.int64),
    }


def _load(path: Path, num_examples: int, announce: Announce) -> dict[str, np.ndarray] | None:
    """The arrays of a cache file; None where there is none or it is damaged."""
    if not path.exists():
        return None
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in ("tokens", "offsets", "num_truncated")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        arrays = {}
    if arrays and arrays["offsets"].shape == (num_examples + 1,):
        offsets = arrays["offsets"]
        if offsets[0] == 0 and offsets[-1] == len(arrays["tokens"]) and (np.diff(offsets) > 2).all():
            return arrays
    announce(f"{path}: this cache file is damaged; tokenizing again")
    return None
