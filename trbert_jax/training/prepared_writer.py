"""Writes tokenized examples in shards, the data set that `data.prepared` describes.

Every shard's hash is noted when the shard is whole. A later call trusts a file with the hash that was
noted for it, and writes all others again: equal examples make equal files.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trbert_jax.errors import UserError
from trbert_jax.io import atomic_file, make_directory, read_json, write_json
from trbert_jax.tasks.examples import Examples
from trbert_jax.training.prepared import FORMAT, NAME, PROVENANCE, SHARD_SIZE, VERSION, hash_file, shard_paths
from trbert_jax.training.prepared_schema import Schema

NOTES = "unfinished.jsonl"  # hashes of the shards so far, until PROVENANCE has them

Announce = Callable[[str], None]
Hashes = dict[str, dict[str, Any]]  # file name -> see `hash_file`


def write_prepared(
    directory: str | Path,
    splits: Mapping[str, Examples],
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
    recorded = _claim(directory, about)
    schema = Schema.of(list(splits.values()))
    files: Hashes = {}
    for split, features in splits.items():
        files |= _write_split(directory, split, features, schema, shard_size, workers, recorded, announce)
    _write_metadata(directory, splits, schema, shard_size)
    write_json(directory / PROVENANCE, {**about, "files": files})
    (directory / NOTES).unlink(missing_ok=True)
    announce(f"{directory}: {sum(map(len, splits.values()))} examples in {len(files)} files")
    return directory


def _claim(directory: Path, about: Mapping[str, Any]) -> Hashes:
    """Writes the first file: what is found later belongs to what it says. The hashes noted before."""
    path = directory / PROVENANCE
    if not path.exists():
        if any(directory.iterdir()):
            raise UserError(f"{directory}: is not empty and not prepared data; choose another --output")
        write_json(path, about)
        return {}
    before = read_json(path)
    recorded: Hashes = before.pop("files", {})
    if before != about:
        raise UserError(
            f"{directory}: holds data that was prepared otherwise (settings, data, tokenizer or shard "
            "size differ); choose another --output, or delete it"
        )
    return recorded | _read_notes(directory / NOTES)


def _read_notes(path: Path) -> Hashes:
    """The hashes of the shards that a stopped call has finished; writes the file anew."""
    notes: Hashes = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                name, found = json.loads(line)
            except ValueError:  # half a line, the last of a killed process
                continue
            notes[name] = found
        with atomic_file(path) as stream:
            stream.writelines(_note(*item) for item in notes.items())
    return notes


def _note(name: str, found: dict[str, Any]) -> str:
    return json.dumps([name, found]) + "\n"


def _write_split(
    directory: Path,
    split: str,
    features: Examples,
    schema: Schema,
    shard_size: int,
    workers: int,
    recorded: Hashes,
    announce: Announce,
) -> Hashes:
    """Writes the files of a split that are not there as recorded; the hashes of all of them."""
    paths = shard_paths(directory, split, len(features), shard_size)
    index = directory / f"index-{split}.npz"
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        files: Hashes = {}
        checked = pool.map(lambda path: _is_good(path, recorded), [*paths, index])
        for path, good in zip([*paths, index], checked, strict=True):
            if good:
                files[path.name] = recorded[path.name]
            elif path.exists() and (path != index or path.name in recorded):
                why = "is not as it was written" if path.name in recorded else "has no hash on record"
                announce(f"{path}: {why}; written again")
        missing = [number for number, path in enumerate(paths) if path.name not in files]
        there = len(paths) - len(missing)
        if there:
            announce(f"{split}: {there} of {len(paths)} shards are there already")

        def write(number: int) -> dict[str, Any]:
            return _write_shard(
                paths[number], schema, features, range(number * shard_size, (number + 1) * shard_size)
            )

        jobs = {pool.submit(write, number): paths[number].name for number in missing}
        try:
            for done, job in enumerate(concurrent.futures.as_completed(jobs), there + 1):
                files[jobs[job]] = job.result()
                announce(f"{split}: {done} of {len(paths)} shards")
        except BaseException:
            pool.shutdown(cancel_futures=True)  # else an error would wait for all other shards
            raise
    if index.name not in files:
        _write_index(index, features)
        files[index.name] = hash_file(index)
    return {path.name: files[path.name] for path in [*paths, index]}


def _is_good(path: Path, recorded: Hashes) -> bool:
    return path.name in recorded and path.exists() and hash_file(path) == recorded[path.name]


def _write_shard(path: Path, schema: Schema, features: Examples, examples: range) -> dict[str, Any]:
    """Writes one shard and notes its hash."""
    from array_record.python import array_record_module

    temporary = path.with_name(f"{path.name}.partial")
    try:
        writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
        for index in range(examples.start, min(examples.stop, len(features))):
            writer.write(schema.record(features, index))
        writer.close()
        found = hash_file(temporary)
        # Noted before the file has its name: one that has it always has a hash.
        with (path.parent / NOTES).open("a", encoding="utf-8") as stream:
            stream.write(_note(path.name, found))
        temporary.replace(path)
    except (RuntimeError, OSError) as error:  # the library's way to say that the disk is full, and Python's
        with contextlib.suppress(OSError):
            temporary.unlink()
        reason = str(error).partition(";")[0]
        raise UserError(
            f"{path}: cannot be written ({reason}); make room or mend that, then the same command goes on"
        ) from error
    return found


def _write_index(path: Path, features: Examples) -> None:
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


def _write_metadata(directory: Path, splits: Mapping[str, Examples], schema: Schema, shard_size: int) -> None:
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
        features=schema.features,
        split_infos=infos,
        version=VERSION,
        check_data=False,  # that would need TensorFlow
    )
