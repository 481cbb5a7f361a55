"""Tokenized examples in shards: for data that many hosts read, or that does not fit in memory.

    DIR/dataset_info.json, features.json             a data set of TensorFlow Datasets
    DIR/trbert-train.array_record-00000-of-00007     tokens and all else of some examples
    DIR/index-train.npz                              lengths, labels, targets of all of them
    DIR/provenance.json                              what it was made of, the hash of every file

`tfds.builder_from_directory(DIR)` reads it, and so does training (`data.prepared`): the index as a whole,
tokens as batches need them. `prepared_writer` writes it. Source: docs/scaling.md, "Data".
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trbert_jax.errors import UserError
from trbert_jax.io import read_json
from trbert_jax.tasks.examples import Examples

NAME, VERSION, FORMAT = "trbert", "1.0.0", 1
PROVENANCE = "provenance.json"
SHARD_SIZE = 4096  # examples of a shard
_AGAIN = "run `trbert prepare-data` again"


def shard_paths(directory: Path, split: str, num_examples: int, shard_size: int) -> list[Path]:
    """The files of a split, as TensorFlow Datasets names them."""
    count = max(1, -(-num_examples // shard_size))
    return [directory / f"{NAME}-{split}.array_record-{i:05d}-of-{count:05d}" for i in range(count)]


def hash_file(path: Path) -> dict[str, Any]:
    """Size and hash of a file."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16))
        return {"bytes": stream.tell(), "blake2b": digest.hexdigest()}


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedFeatures(Examples):
    """Examples whose tokens are read from shards when a batch needs them.

    Attributes:
      paths: the shards, in order.
      token_id: the first token of every row, [CLS].
      has_token_types: whether rows have token types.
    """

    paths: tuple[str, ...] = ()
    token_id: int = 0
    has_token_types: bool = False

    @property
    def first_token(self) -> int:
        """See `Examples.first_token`."""
        return self.token_id

    def padded_rows(self, rows: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray | None]:
        """See `Examples.padded_rows`; reads the examples that the rows belong to, each once."""
        input_ids = np.zeros((len(rows), width), np.int32)
        types = np.zeros_like(input_ids) if self.has_token_types else None
        there = np.flatnonzero(rows >= 0)
        if not len(there):  # a pass of fillers, at the end of an epoch
            return input_ids, types
        if self.first_row is None:
            owners, first = rows[there], rows[there]
        else:
            owners = np.searchsorted(self.first_row, rows[there], side="right") - 1
            first = self.first_row[owners]
        examples, which = np.unique(owners, return_inverse=True)
        records = [_parse(content) for content in _source(self.paths)[examples.tolist()]]
        for position, row, example, begin in zip(there, rows[there], which, first, strict=True):
            lengths = self.row_lengths[begin:row]
            start, length = int(lengths.sum()), int(self.row_lengths[row])
            fields = records[example]
            input_ids[position, :length] = fields["input_ids"][start : start + length]
            if types is not None:
                types[position, :length] = fields["token_type_ids"][start : start + length]
        return input_ids, types


class _Source:
    """Random access to the records of all shards, from any thread."""

    def __init__(self, paths: tuple[str, ...]) -> None:
        import grain

        self._source = grain.sources.ArrayRecordDataSource(list(paths))

    def __getitem__(self, indices: list[int]) -> list[bytes]:
        # One by one: asked for several it starts threads in each call, which takes longer than to read.
        return [self._source[index] for index in indices]


_SOURCES: dict[tuple[str, ...], _Source] = {}


def _source(paths: tuple[str, ...]) -> _Source:
    if paths not in _SOURCES:
        _SOURCES[paths] = _Source(paths)
    return _SOURCES[paths]


def _parse(content: bytes) -> dict[str, np.ndarray]:
    from tensorflow_datasets.proto import tf_example_pb2

    found = tf_example_pb2.Example.FromString(content).features.feature
    return {
        name: np.array(found[name].int64_list.value, np.int32)
        for name in ("input_ids", "token_type_ids")
        if name in found
    }


def read_provenance(directory: str | Path, split: str) -> dict[str, Any]:
    """What prepared data says of itself; no other file is read.

    Raises:
      UserError: no such folder, nothing prepared in it, not finished, no such split.
    """
    directory = Path(directory)
    path = directory / PROVENANCE
    if not directory.is_dir():
        raise UserError(
            f"data.prepared: {directory}: no such folder; make it with "
            f"`trbert prepare-data --output {directory}`"
        )
    if not path.exists():
        raise UserError(f"data.prepared: {directory} has no {PROVENANCE}; make it with `trbert prepare-data`")
    about: dict[str, Any] = read_json(path)
    if "files" not in about:
        raise UserError(f"data.prepared: {directory} is not finished; {_AGAIN}, it goes on")
    if about["format"] != FORMAT or split not in about["splits"]:
        raise UserError(f"data.prepared: {directory} has no split {split} of format {FORMAT}; {_AGAIN}")
    return about


def load_prepared(directory: str | Path, split: str, settings: Mapping[str, Any]) -> PreparedFeatures:
    """A split that `write_prepared` wrote, every file of it checked.

    Args:
      directory: where it is.
      split: its name.
      settings: what it must have been made with.

    Raises:
      UserError: no such data or split, other settings, a file that is missing or changed.
    """
    directory = Path(directory)
    about = read_provenance(directory, split)
    different = [
        f"  {key}: {about['settings'].get(key)} then, {settings.get(key)} now"
        for key in sorted({*about["settings"], *settings})
        if about["settings"].get(key) != settings.get(key)
    ]
    if different:
        raise UserError(
            f"data.prepared: {directory} was made with other settings:\n"
            + "\n".join(different)
            + "\nset them back, or prepare the data again in another folder"
        )
    count = about["splits"][split]["examples"]
    paths = shard_paths(directory, split, count, about["shard_size"])
    index = directory / f"index-{split}.npz"
    for file in [*paths, index]:
        if not file.exists():
            raise UserError(f"data.prepared: {file} is missing; {_AGAIN}")
        if hash_file(file) != about["files"][file.name]:
            raise UserError(f"data.prepared: {file} is not as it was written; {_AGAIN}, which writes it anew")
    with np.load(index, allow_pickle=False) as archive:
        arrays = dict(archive)

    def named(prefix: str) -> dict[str, np.ndarray]:
        # `row_lengths` is the set's own.
        return {
            k.removeprefix(prefix): v
            for k, v in arrays.items()
            if k.startswith(prefix) and k != "row_lengths"
        }

    return PreparedFeatures(
        tokens=np.zeros(0, np.int32),
        offsets=np.concatenate([[0], np.cumsum(arrays["row_lengths"], dtype=np.int64)]),
        token_types=None,
        labels=arrays["labels"],
        ids=[name.decode() for name in arrays["ids"]],
        num_truncated=int(arrays["num_truncated"]),
        digest=bytes(arrays["digest"]).decode(),
        first_row=arrays.get("first_row"),
        group=int(arrays["group"]),
        row_targets=named("row_"),
        targets=named("target_"),
        paths=tuple(map(str, paths)),
        token_id=int(arrays["first_token"]),
        has_token_types=bool(arrays["has_token_types"]),
    )
