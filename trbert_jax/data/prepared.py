"""Tokenized examples in shards: for data that many hosts read, or that does not fit in memory.

    DIR/dataset_info.json, features.json             a data set of TensorFlow Datasets
    DIR/trbert-train.array_record-00000-of-00007     tokens and all else of some examples
    DIR/index-train.npz                              lengths, labels, targets of all of them
    DIR/provenance.json                              what it was made of, the hash of every file

`tfds.builder_from_directory(DIR)` reads it, and so does training (`data.prepared`): the index as a whole,
tokens as batches need them. Source: docs/scaling.md, "Data".
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trbert_jax.data.features import FeatureSet
from trbert_jax.errors import UserError
from trbert_jax.files import atomic_file, make_directory, read_json, write_json

NAME, VERSION, FORMAT = "trbert", "1.0.0", 1
PROVENANCE = "provenance.json"
SHARD_SIZE = 4096  # examples of a shard

Announce = Callable[[str], None]


# Writing ---------------------------------------------------------------------------------------------


def write_prepared(
    directory: str | Path,
    splits: Mapping[str, FeatureSet],
    settings: Mapping[str, Any],
    *,
    shard_size: int = SHARD_SIZE,
    workers: int = 2,
    announce: Announce = print,
) -> Path:
    """Writes a data set, or what is missing of it: stopped and called again, it ends with the same files.

    Args:
      directory: where.
      splits: name -> examples.
      settings: JSON-like, what `load_prepared` is to compare.
      shard_size: examples of a shard.
      workers: shards written at a time.
      announce: prints a line for the user.

    Returns:
      The directory.

    Raises:
      UserError: it holds something else, or cannot be written.
    """
    directory = make_directory(directory)
    about = {
        "format": FORMAT,
        "settings": dict(settings),
        "shard_size": shard_size,
        "splits": {
            name: {"examples": len(features), "digest": features.digest} for name, features in splits.items()
        },
    }
    _claim(directory, about)
    files: dict[str, dict[str, Any]] = {}
    for split, features in splits.items():
        paths = shard_paths(directory, split, len(features), shard_size)
        missing = [number for number, path in enumerate(paths) if not path.exists()]
        if len(missing) < len(paths):
            announce(f"{split}: {len(paths) - len(missing)} of {len(paths)} shards are there already")
        schema = _Schema.of(features)
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            jobs = [
                pool.submit(
                    _write_shard, paths[i], schema, features, range(i * shard_size, (i + 1) * shard_size)
                )
                for i in missing
            ]
            for done, job in enumerate(concurrent.futures.as_completed(jobs), 1):
                job.result()
                announce(f"{split}: {len(paths) - len(missing) + done} of {len(paths)} shards")
        _write_index(directory / f"index-{split}.npz", features)
        for path in [*paths, directory / f"index-{split}.npz"]:
            files[path.name] = hash_file(path)
    _write_metadata(directory, splits, shard_size)
    write_json(directory / PROVENANCE, {**about, "files": files})
    announce(f"{directory}: {sum(map(len, splits.values()))} examples in {len(files)} files")
    return directory


def shard_paths(directory: Path, split: str, num_examples: int, shard_size: int) -> list[Path]:
    """The files of a split, as TensorFlow Datasets names them."""
    count = max(1, -(-num_examples // shard_size))
    return [directory / f"{NAME}-{split}.array_record-{i:05d}-of-{count:05d}" for i in range(count)]


def hash_file(path: Path) -> dict[str, Any]:
    """Size and hash of a file."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16))
        return {"bytes": stream.tell(), "blake2b": digest.hexdigest()}


def _claim(directory: Path, about: Mapping[str, Any]) -> None:
    """The first file: shards that are found later belong to what it says."""
    path = directory / PROVENANCE
    if path.exists():
        before = {k: v for k, v in read_json(path).items() if k != "files"}
        if before != about:
            raise UserError(
                f"{directory}: holds data that was prepared otherwise (settings, data, tokenizer or shard "
                "size differ); choose another --output, or delete it"
            )
    elif any(directory.iterdir()):
        raise UserError(f"{directory}: is not empty and not prepared data; choose another --output")
    else:
        write_json(path, about)


@dataclasses.dataclass(frozen=True)
class _Schema:
    """How an example lies in a record: name -> its type in TensorFlow Datasets."""

    features: Any
    serializer: Any

    @classmethod
    def of(cls, features: FeatureSet) -> _Schema:
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core import example_serializer

        def tensor(shape: Sequence[int | None], dtype: Any) -> Any:
            return tfds.features.Tensor(shape=tuple(shape), dtype=_stored(dtype))

        fields = {
            "id": tfds.features.Text(),
            "label": tensor((), np.int32),
            "input_ids": tensor((None,), np.int32),
            "row_lengths": tensor((None,), np.int32),
        }
        if features.token_types is not None:
            fields["token_type_ids"] = tensor((None,), np.int32)
        for name, values in features.targets.items():
            fields[f"target_{name}"] = tensor(values.shape[1:], values.dtype)
        for name, values in features.row_targets.items():
            fields[f"row_{name}"] = tensor((None, *values.shape[1:]), values.dtype)
        made = tfds.features.FeaturesDict(fields)
        return cls(made, example_serializer.ExampleSerializer(made.get_serialized_info()))

    def record(self, features: FeatureSet, index: int) -> bytes:
        from tensorflow_datasets.proto import tf_example_pb2

        rows = features.rows(np.array([index]))[0]
        rows = rows[rows >= 0]
        begin, end = features.offsets[rows[0]], features.offsets[rows[-1] + 1]
        example: dict[str, Any] = {
            "id": features.ids[index],
            "label": np.int32(features.labels[index]),
            "input_ids": features.tokens[begin:end].astype(np.int32),
            "row_lengths": features.row_lengths[rows].astype(np.int32),
        }
        if features.token_types is not None:
            example["token_type_ids"] = features.token_types[begin:end].astype(np.int32)
        for name, values in features.targets.items():
            example[f"target_{name}"] = values[index].astype(_stored(values.dtype))
        for name, values in features.row_targets.items():
            example[f"row_{name}"] = values[rows].astype(_stored(values.dtype))
        content = self.serializer.serialize_example(self.features.encode_example(example))
        # Once more, with the fields in one order: equal examples are to make equal files.
        ordered: bytes = tf_example_pb2.Example.FromString(content).SerializeToString(deterministic=True)
        return ordered


def _stored(dtype: Any) -> Any:
    return np.float32 if np.dtype(dtype).kind == "f" else np.int32


def _write_shard(path: Path, schema: _Schema, features: FeatureSet, examples: range) -> None:
    from array_record.python import array_record_module

    temporary = path.with_name(f"{path.name}.partial")
    writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
    for index in range(examples.start, min(examples.stop, len(features))):
        writer.write(schema.record(features, index))
    writer.close()
    temporary.replace(path)


def _write_index(path: Path, features: FeatureSet) -> None:
    """Everything but the tokens, which the file's reader has in memory."""
    arrays = {
        "row_lengths": features.row_lengths,
        "labels": features.labels,
        "ids": np.array([i.encode() for i in features.ids]),
        "num_truncated": np.array(features.num_truncated),
        "group": np.array(features.group),
        "first_token": np.array(features.first_token),
        "has_token_types": np.array(features.token_types is not None),
        "digest": np.array(features.digest.encode()),
        **{f"target_{name}": values for name, values in features.targets.items()},
        **{f"row_{name}": values for name, values in features.row_targets.items()},
    }
    if features.first_row is not None:
        arrays["first_row"] = features.first_row
    with atomic_file(path, "wb") as stream:
        np.savez(stream, allow_pickle=False, **arrays)


def _write_metadata(directory: Path, splits: Mapping[str, FeatureSet], shard_size: int) -> None:
    import tensorflow_datasets as tfds

    infos = []
    for split, features in splits.items():
        paths = shard_paths(directory, split, len(features), shard_size)
        lengths = [min(shard_size, len(features) - i * shard_size) for i in range(len(paths))]
        template = tfds.core.ShardedFileTemplate(
            data_dir=directory, dataset_name=NAME, split=split, filetype_suffix="array_record"
        )
        size = sum(path.stat().st_size for path in paths)
        infos.append(
            tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size, filename_template=template)
        )
    tfds.folder_dataset.write_metadata(
        data_dir=str(directory),
        features=_Schema.of(next(iter(splits.values()))).features,
        split_infos=infos,
        version=VERSION,
        check_data=False,  # that would need TensorFlow
    )


# Reading ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedFeatures(FeatureSet):
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
        """See `FeatureSet.first_token`."""
        return self.token_id

    def padded_rows(self, rows: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray | None]:
        """See `FeatureSet.padded_rows`; reads the examples that the rows belong to, each once."""
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

    def __getitem__(self, indices: list[int]) -> Sequence[bytes]:
        found: Sequence[bytes] = self._source.__getitems__(indices)
        return found


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
    path = directory / PROVENANCE
    if not path.exists():
        raise UserError(f"data.prepared: {directory} has no {PROVENANCE}; make it with `trbert prepare-data`")
    about = read_json(path)
    again = "run `trbert prepare-data` again"
    if "files" not in about:
        raise UserError(f"data.prepared: {directory} is not finished; {again}, it goes on")
    if about["format"] != FORMAT or split not in about["splits"]:
        raise UserError(f"data.prepared: {directory} has no split {split} of format {FORMAT}; {again}")
    different = [
        f"  {key}: {about['settings'].get(key)} then, {settings.get(key)} now"
        for key in sorted({*about["settings"], *settings})
        if about["settings"].get(key) != settings.get(key)
    ]
    if different:
        raise UserError(
            f"data.prepared: {directory} was made with other settings:\n"
            + "\n".join(different)
            + "\nset them "
            "back, or prepare the data again in another folder"
        )
    count = about["splits"][split]["examples"]
    paths = shard_paths(directory, split, count, about["shard_size"])
    index = directory / f"index-{split}.npz"
    for file in [*paths, index]:
        if not file.exists():
            raise UserError(f"data.prepared: {file} is missing; {again}")
        if hash_file(file) != about["files"][file.name]:
            raise UserError(f"data.prepared: {file} is not as it was written; delete it and {again}")
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
