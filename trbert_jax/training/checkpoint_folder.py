"""One checkpoint: a folder that can tell whether it is whole.

    manifest.json    what the checkpoint is, the shape of every array, the hash of every file
    arrays/          an orbax PyTree checkpoint: {"trained/head/classifier/bias": array, ...}

Arrays are saved under the paths of the leaves, so any pytree that jax knows can be saved, and
orbax alone can read the values without this package's classes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from trbert_jax.errors import UserError
from trbert_jax.io import atomic_directory, read_json, write_json

FORMAT = 1  # of manifest.json
MANIFEST = "manifest.json"
ARRAYS = "arrays"


class DamagedError(Exception):
    """The folder is not as it was written; the message says in what."""


def write_folder(folder: Path, leaves: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Writes a checkpoint folder, whole or not at all.

    Args:
      folder: where; its parent exists.
      leaves: path -> array or Python number, from `named_leaves`.
      about: JSON-like values for the manifest.

    Raises:
      UserError: it cannot be written (no permission, disk full).
      TypeError: a leaf is neither an array nor a number.
    """
    descriptions = describe(leaves)
    with atomic_directory(folder) as temporary:
        try:
            _write_arrays(temporary / ARRAYS, leaves)
        except ValueError as error:
            # Tensorstore's way to report the file system's errors: "CODE: what: how: why [details]".
            text = str(error).split(" [", maxsplit=1)[0]
            if not re.match(r"[A-Z_]+: ", text):
                raise
            reason = text.rsplit(": ", maxsplit=1)[-1]
            raise UserError(
                f"{folder}: cannot be written ({reason}); free some space or choose another work directory"
            ) from error
        manifest = {"format": FORMAT, **about, "arrays": descriptions, "files": _hash_files(temporary)}
        write_json(temporary / MANIFEST, {**manifest, "digest": _digest(manifest)})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads what `write_folder` was told, with `arrays` (path -> description) and `files`.

    Raises:
      DamagedError: the manifest is missing or not as it was written.
      UserError: it is of a format that this version does not know.
    """
    path = folder / MANIFEST
    try:
        manifest = read_json(path)
    except UserError as error:
        raise DamagedError(str(error)) from error
    if isinstance(manifest, dict) and manifest.get("format", FORMAT) != FORMAT:
        raise UserError(
            f"{path}: has format {manifest['format']}, {FORMAT} was expected; "
            "use the version of trbert_jax that wrote it, or delete the folder"
        )
    if not isinstance(manifest, dict) or manifest.pop("digest", None) != _digest(manifest):
        raise DamagedError(f"{MANIFEST} is not as it was written")
    return manifest


def check_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Reads every file and compares it with its hash in the manifest.

    Raises:
      DamagedError: a file is missing, shorter, longer or changed.
      UserError: a file cannot be read.
    """
    for name, saved in files.items():
        path = folder / name
        try:
            found = _hash_file(path)
        except FileNotFoundError:
            raise DamagedError(f"{name} is missing") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read, {error.strerror}") from error
        if found["bytes"] != saved["bytes"]:
            raise DamagedError(f"{name} has {found['bytes']} bytes instead of {saved['bytes']}")
        if found != saved:
            raise DamagedError(f"{name} is not as it was written")


def read_arrays(folder: Path, like: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the leaves of a folder whose files were checked.

    Args:
      folder: a checkpoint.
      like: path -> leaf of the shape and dtype that was saved. A jax array or ShapeDtypeStruct
        gives a jax array of the same sharding; a numpy array or a Python number gives that.
    """
    import orbax.checkpoint as ocp  # half a second, for those who only list checkpoints

    template, restore_args = {}, {}
    for name, leaf in like.items():
        value = _plain(leaf)
        if isinstance(value, np.ndarray):
            args = ocp.RestoreArgs(restore_type=np.ndarray)
        else:
            default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            args = ocp.ArrayRestoreArgs(sharding=value.sharding or default)
        if value.size:
            template[name], restore_args[name] = value, args
    with _quiet(), _checkpointer() as checkpointer:
        request = ocp.args.PyTreeRestore(item=template, restore_args=restore_args)
        arrays = checkpointer.restore((folder / ARRAYS).absolute(), args=request)
    return {name: _as_kind(arrays.get(name), leaf) for name, leaf in like.items()}


def named_leaves(tree: Any) -> dict[str, Any]:
    """Path -> leaf, in the order of the tree: `opt_state/1/0/mu/head/classifier/bias`."""
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in leaves:
            raise ValueError(f"two leaves of the tree have the path {name!r}")
        leaves[name] = leaf
    return leaves


def describe(leaves: Mapping[str, Any]) -> dict[str, str]:
    """Path -> what must be equal for a leaf to be restored: `float32[128,4]`, or `int` for a number."""
    descriptions = {}
    for name, leaf in leaves.items():
        if isinstance(leaf, (np.ndarray, np.generic, jax.Array, jax.ShapeDtypeStruct)):
            descriptions[name] = f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        elif isinstance(leaf, (bool, int, float)):
            descriptions[name] = type(leaf).__name__
        else:
            raise TypeError(f"{name}: a checkpoint holds arrays and numbers, not {type(leaf).__name__}")
    return descriptions


def _write_arrays(directory: Path, leaves: Mapping[str, Any]) -> None:
    import orbax.checkpoint as ocp

    plain = {name: _plain(leaf) for name, leaf in leaves.items()}
    # Orbax refuses empty arrays; their description in the manifest says all about them.
    arrays = {name: value for name, value in plain.items() if value.size}
    with _quiet(), _checkpointer() as checkpointer:
        checkpointer.save(directory.absolute(), args=ocp.args.PyTreeSave(arrays))


def _checkpointer() -> Any:
    """Orbax's, for this process alone: a folder is written by one process and read by each for itself."""
    import orbax.checkpoint as ocp

    if jax.process_count() == 1:
        return ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    mine = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=mine, active_processes={mine}, barrier_sync_key_prefix=f"process_{mine}"
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(leaf: Any) -> Any:
    """A leaf as an array that orbax takes: a PRNG key's data, a number's array."""
    if _is_key(leaf):
        return jax.random.key_data(leaf)
    return leaf if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)) else np.asarray(leaf)


def _as_kind(array: Any, like: Any) -> Any:
    """Undoes `_plain`; `array` is None where it was empty."""
    if _is_key(like):
        return jax.random.wrap_key_data(array, impl=jax.random.key_impl(like))
    if array is None:
        empty = np.zeros(like.shape, like.dtype)
        return empty if isinstance(like, np.ndarray) else jax.numpy.asarray(empty)
    if isinstance(like, np.generic):
        return array[()]
    if isinstance(like, (bool, int, float)):
        return type(like)(array.item())
    return array


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without orbax's log of its own workings; its errors arrive as exceptions."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(manifest, sort_keys=True).encode(), digest_size=16).hexdigest()


def _hash_file(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16))
        return {"bytes": stream.tell(), "blake2b": digest.hexdigest()}


def _hash_files(directory: Path) -> dict[str, dict[str, Any]]:
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): _hash_file(path) for path in paths}
