"""Tokenized examples in shards, for data that many hosts read or that does not fit in memory.

    DIR/dataset_info.json, features.json             a data set of TensorFlow Datasets
    DIR/trbert-train.array_record-00000-of-00007     tokens and targets of some examples
    DIR/index-train.npz                              lengths, labels and targets of all of them
    DIR/provenance.json                              settings, and the hash of every file

`tfds.builder_from_directory(DIR)` reads it, and so does training (`data.prepared`): the index as a whole,
tokens as batches need them. Source: docs/scaling.md, "Data".
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trbert_jax.config import diff_configs
from trbert_jax.errors import UserError
from trbert_jax.io import atomic_file, hash_file, make_directory, read_json, write_json
from trbert_jax.tasks.examples import Examples

logger = logging.getLogger(__name__)

NAME, VERSION, FORMAT = "trbert", "1.0.0", 1
PROVENANCE = "provenance.json"
SHARD_SIZE = 4096  # examples of a shard
_AGAIN = "run `trbert prepare-data` again"
Hashes = dict[str, dict[str, Any]]  # file name -> see `hash_file`


def shard_paths(directory: Path, split: str, num_examples: int, shard_size: int) -> list[Path]:
    """Returns the files of a split, as TensorFlow Datasets names them."""
    count = max(1, -(-num_examples // shard_size))
    return [directory / f"{NAME}-{split}.array_record-{i:05d}-of-{count:05d}" for i in range(count)]


# Reading ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedFeatures(Examples):
    """Examples whose tokens are read from shards when a batch needs them."""

    paths: tuple[str, ...] = ()  # the shards, in order
    token_id: int = 0  # the first token of every row, [CLS]
    has_token_types: bool = False

    @property
    def first_token(self) -> int:
        """See `Examples.first_token`."""
        return self.token_id

    def padded_rows(self, rows: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray | None]:
        """See `Examples.padded_rows`; reads the examples of the rows, each once."""
        input_ids = np.zeros((len(rows), width), np.int32)
        types = np.zeros_like(input_ids) if self.has_token_types else None
        valid = np.flatnonzero(rows >= 0)
        if not len(valid):  # only padding rows, at the end of an epoch
            return input_ids, types
        first_row = np.arange(len(self)) if self.first_row is None else self.first_row
        owners = np.searchsorted(first_row, rows[valid], side="right") - 1
        examples, which = np.unique(owners, return_inverse=True)
        # Read one by one: for several at once the source would start threads in each call.
        records = [_parse(_source(self.paths)[index]) for index in examples.tolist()]
        for position, row, record, begin in zip(valid, rows[valid], which, first_row[owners], strict=True):
            start, length = int(self.row_lengths[begin:row].sum()), int(self.row_lengths[row])
            fields = records[record]
            input_ids[position, :length] = fields["input_ids"][start : start + length]
            if types is not None:
                types[position, :length] = fields["token_type_ids"][start : start + length]
        return input_ids, types


@functools.lru_cache(maxsize=8)
def _source(paths: tuple[str, ...]) -> Any:
    import grain

    return grain.sources.ArrayRecordDataSource(list(paths))


def _parse(content: bytes) -> dict[str, np.ndarray]:
    from tensorflow_datasets.proto import tf_example_pb2

    fields = tf_example_pb2.Example.FromString(content).features.feature
    names = [name for name in ("input_ids", "token_type_ids") if name in fields]
    return {name: np.array(fields[name].int64_list.value, np.int32) for name in names}


def read_provenance(directory: str | Path, split: str) -> dict[str, Any]:
    """Reads provenance.json and no other file; raises `UserError` unless it has the split, finished."""
    path = Path(directory) / PROVENANCE
    if not path.exists():
        raise UserError(
            f"data.prepared: {path}: no such file; make it with `trbert prepare-data --output {directory}`"
        )
    about: dict[str, Any] = read_json(path)
    if "files" not in about:
        raise UserError(f"data.prepared: {directory} is not finished; {_AGAIN}, it resumes")
    if about["format"] != FORMAT or split not in about["splits"]:
        raise UserError(f"data.prepared: {directory} has no split {split} of format {FORMAT}; {_AGAIN}")
    return about


def load_prepared(directory: str | Path, split: str, settings: Mapping[str, Any]) -> PreparedFeatures:
    """Loads a split that `write_prepared` wrote; raises `UserError` if settings or a file of it differ."""
    directory = Path(directory)
    about = read_provenance(directory, split)
    if lines := diff_configs(about["settings"], settings):
        advice = "\nset them back, or prepare the data again in another folder"
        changed = "\n  ".join(["was made with other settings (then -> now):", *lines])
        raise UserError(f"data.prepared: {directory} {changed}{advice}")
    paths = shard_paths(directory, split, about["splits"][split]["examples"], about["shard_size"])
    index = directory / f"index-{split}.npz"
    for file in [*paths, index]:
        if not file.exists():
            raise UserError(f"data.prepared: {file} is missing; {_AGAIN}")
        if hash_file(file) != about["files"][file.name]:
            raise UserError(f"data.prepared: {file} is not as it was written; {_AGAIN}, which rewrites it")
    with np.load(index, allow_pickle=False) as archive:
        arrays = dict(archive)
    lengths = arrays.pop("row_lengths")
    named = {
        p: {k.removeprefix(p): x for k, x in arrays.items() if k.startswith(p)} for p in ("row_", "target_")
    }
    return PreparedFeatures(
        tokens=np.zeros(0, np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        token_types=None,
        labels=arrays["labels"],
        ids=[name.decode("utf-8", "surrogatepass") for name in arrays["ids"]],
        num_truncated=int(arrays["num_truncated"]),
        digest=bytes(arrays["digest"]).decode(),
        first_row=arrays.get("first_row"),
        group=int(arrays["group"]),
        row_targets=named["row_"],
        targets=named["target_"],
        paths=tuple(map(str, paths)),
        token_id=int(arrays["first_token"]),
        has_token_types=bool(arrays["has_token_types"]),
    )


# Writing ------------------------------------------------------------------------------------------


def write_prepared(
    directory: str | Path,
    splits: Mapping[str, Examples],
    settings: Mapping[str, Any],
    made_from: Mapping[str, Any] | None = None,
    *,
    shard_size: int = SHARD_SIZE,
    workers: int = 2,
) -> Path:
    """Writes a data set, or the files of it that are missing or changed, and returns its folder.

    Equal examples make equal files, so that a repeated call resumes. `settings` are JSON-like, compared by
    `load_prepared`; `made_from` has hashes of the training records, and the labels and inputs they decide.
    Raises `UserError` if the folder holds something else or is not writable.
    """
    directory = make_directory(directory)
    sizes = {name: {"examples": len(x), "digest": x.digest} for name, x in splits.items()}
    about = {"format": FORMAT, "settings": dict(settings), "shard_size": shard_size, "splits": sizes}
    about |= {"made_from": dict(made_from)} if made_from else {}
    recorded = _claim(directory, about)
    schema = _Schema(list(splits.values()))
    files, missing = Hashes(), []
    for split, examples in splits.items():
        for number, path in enumerate(shard_paths(directory, split, len(examples), shard_size)):
            if path.exists() and hash_file(path) == recorded.get(path.name):
                files[path.name] = recorded[path.name]
                continue
            if path.exists():
                logger.warning("%s: is not as it was written; rewritten", path)
            missing.append((path, examples, range(number * shard_size, (number + 1) * shard_size)))
    total = len(files) + len(missing)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        jobs = {pool.submit(_write_shard, schema, *job): job[0].name for job in missing}
        try:
            for job in concurrent.futures.as_completed(jobs):
                files[jobs[job]] = job.result()
                write_json(directory / PROVENANCE, {**about, "unfinished": files})
                logger.info("%d of %d shards", len(files), total)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # else an error waits for all other shards
            raise
    for split, examples in splits.items():
        path = directory / f"index-{split}.npz"
        _write_index(path, examples)
        files[path.name] = hash_file(path)
    _write_metadata(directory, splits, schema, shard_size)
    write_json(directory / PROVENANCE, {**about, "files": dict(sorted(files.items()))})
    logger.info("%s: %d examples in %d files", directory, sum(map(len, splits.values())), len(files))
    return directory


def _claim(directory: Path, about: Mapping[str, Any]) -> Hashes:
    """Returns the hashes that an earlier call recorded; raises UserError if the folder is something else."""
    path = directory / PROVENANCE
    if not path.exists():
        if any(directory.iterdir()):
            raise UserError(f"{directory}: is not empty and not prepared data; choose another --output")
        write_json(path, about)
        return {}
    before = read_json(path)
    recorded: Hashes = {**before.pop("unfinished", {}), **before.pop("files", {})}
    if {**about, **before} != about:
        raise UserError(
            f"{directory}: holds data that was prepared otherwise (settings, data, tokenizer or shard size "
            "differ); choose another --output, or delete it"
        )
    return recorded


def _write_shard(schema: "_Schema", path: Path, examples: Examples, indices: range) -> dict[str, Any]:
    """Writes one shard and returns its hash."""
    from array_record.python import array_record_module

    temporary = path.with_name(f"{path.name}.partial")
    try:
        writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
        for index in range(indices.start, min(indices.stop, len(examples))):
            writer.write(schema.record(examples, index))
        writer.close()
        temporary.replace(path)
    except (RuntimeError, OSError) as error:  # the library raises the former if the disk is full
        with contextlib.suppress(OSError):
            temporary.unlink()
        reason = str(error).partition(";")[0]
        advice = f"fix that, then {_AGAIN}, it resumes"
        raise UserError(f"{path}: cannot be written ({reason}); {advice}") from error
    return hash_file(path)


def _write_index(path: Path, examples: Examples) -> None:
    """Writes everything but the tokens, which readers have in memory."""
    arrays = {
        "row_lengths": examples.row_lengths,
        "labels": examples.labels,
        "ids": np.array([i.encode("utf-8", "surrogatepass") for i in examples.ids]),
        "num_truncated": np.array(examples.num_truncated),
        "group": np.array(examples.group),
        "first_token": np.array(examples.first_token),
        "has_token_types": np.array(examples.token_types is not None),
        "digest": np.array(examples.digest.encode()),
        **_targets(examples),
    }
    if examples.first_row is not None:
        arrays["first_row"] = examples.first_row
    with atomic_file(path, "wb") as stream:
        np.savez(stream, allow_pickle=False, **arrays)


def _write_metadata(
    directory: Path, splits: Mapping[str, Examples], schema: "_Schema", shard_size: int
) -> None:
    import tensorflow_datasets as tfds

    def describe(split: str, num_examples: int) -> Any:
        paths = shard_paths(directory, split, num_examples, shard_size)
        names = {"dataset_name": NAME, "split": split, "filetype_suffix": "array_record"}
        return tfds.core.SplitInfo(
            name=split,
            shard_lengths=[min(shard_size, num_examples - i * shard_size) for i in range(len(paths))],
            num_bytes=sum(path.stat().st_size for path in paths),
            filename_template=tfds.core.ShardedFileTemplate(directory, **names),
        )

    tfds.folder_dataset.write_metadata(
        data_dir=str(directory),
        features=schema.features,
        split_infos=[describe(split, len(examples)) for split, examples in splits.items()],
        version=VERSION,
        check_data=False,  # would need TensorFlow
    )


class _Schema:
    """The fields of a record (`features`), the same in all splits: the library has one description for all.

    Targets get the widest shape of all splits; entries are padded with -1 (integers) or 0.
    """

    def __init__(self, splits: Sequence[Examples]) -> None:
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core import example_serializer

        self._padding: dict[str, np.ndarray] = {}  # an empty entry of each target
        for name, values in (target for examples in splits for target in _targets(examples).items()):
            known = self._padding.get(name, np.zeros(values.shape[1:]))
            floats = values.dtype.kind == "f"
            shape = tuple(map(max, known.shape, values.shape[1:]))
            self._padding[name] = np.full(shape, 0 if floats else -1, np.float32 if floats else np.int32)
        self._has_types = any(examples.token_types is not None for examples in splits)

        def tensor(shape: tuple[int | None, ...], dtype: Any = np.int32) -> Any:
            return tfds.features.Tensor(shape=shape, dtype=dtype)

        tokens = ["input_ids", "row_lengths", *["token_type_ids"] * self._has_types]
        fields = {"id": tfds.features.Text(), "label": tensor(()), **{x: tensor((None,)) for x in tokens}}
        for name, empty in self._padding.items():
            rows = (None,) if name.startswith("row_") else ()
            fields[name] = tensor((*rows, *empty.shape), empty.dtype.type)
        self.features = tfds.features.FeaturesDict(fields)
        self._serializer = example_serializer.ExampleSerializer(self.features.get_serialized_info())

    def record(self, examples: Examples, index: int) -> bytes:
        from tensorflow_datasets.proto import tf_example_pb2

        rows = examples.rows(np.array([index]))[0]
        rows = rows[rows >= 0]
        tokens = slice(examples.offsets[rows[0]], examples.offsets[rows[-1] + 1])
        fields: dict[str, Any] = {
            "id": examples.ids[index],
            "label": np.int32(examples.labels[index]),
            "input_ids": examples.tokens[tokens].astype(np.int32),
            "row_lengths": examples.row_lengths[rows].astype(np.int32),
        }
        if self._has_types:
            types = examples.token_types
            fields["token_type_ids"] = (
                np.zeros_like(fields["input_ids"]) if types is None else types[tokens].astype(np.int32)
            )
        targets = _targets(examples)
        for name, empty in self._padding.items():
            entries = rows if name.startswith("row_") else [index]
            padded = np.repeat(empty[None], len(entries), axis=0)
            if name in targets:
                values = targets[name][entries]
                padded[(slice(None), *map(slice, values.shape[1:]))] = values
            fields[name] = padded if name.startswith("row_") else padded[0]
        content = self._serializer.serialize_example(self.features.encode_example(fields))
        # Again with the fields in one order: equal examples must make equal files.
        ordered: bytes = tf_example_pb2.Example.FromString(content).SerializeToString(deterministic=True)
        return ordered


def _targets(examples: Examples) -> dict[str, np.ndarray]:
    rows = {f"row_{name}": values for name, values in examples.row_targets.items()}
    return {f"target_{name}": values for name, values in examples.targets.items()} | rows
