"""Arrays with an entry a training example or row, written to disk batch by batch and never held whole.

STAGE/NAME.npy.partial   while it is written; its space is reserved before the first batch
STAGE/NAME.npy           once it is whole
STAGE/progress.json      how many batches are in the partial files, so that a killed stage goes on
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import jax
import numpy as np

from trbert_jax.errors import UserError
from trbert_jax.io import make_directory, read_json, write_json
from trbert_jax.model.model import Params
from trbert_jax.parallel import DeviceMesh

PROGRESS = "progress.json"
SAVE_SECONDS = 30.0  # of work that a kill may cost


class ResumableArrays:
    """The arrays that a stage writes; a context manager.

    The same batches in the same order fill them in every run. One that is killed has said how many it had
    finished; the next one writes the others, and ends with the same files.

    Args:
      directory: of the stage.
      fingerprint: JSON-like, what batches and results depend on; files of another one are begun anew.
      num_batches: in all.
      layout: the devices; only the main process writes.

    Attributes:
      start: batches that are there already, the same in every process.

    Raises:
      UserError: processes that do not see the same files.
    """

    def __init__(
        self, directory: Path, fingerprint: Mapping[str, Any], num_batches: int, layout: DeviceMesh
    ) -> None:
        self._directory, self._num_batches, self._layout = directory, num_batches, layout
        self._fingerprint = json.loads(json.dumps(fingerprint))  # as it is read back
        self._arrays: dict[str, np.memmap] = {}
        self.start = self._finished_batches()
        layout.check_agreement(f"how far {directory} is; they must see the same `workdir`", self.start)
        if layout.is_main and not self.start:
            # What it says is not so of the files that are made now.
            (directory / PROGRESS).unlink(missing_ok=True)
        self._saved = time.monotonic()

    def array(self, name: str, shape: tuple[int, ...]) -> Any:
        """A float32 array to write entries to, 0 where nothing is written.

        Raises:
          UserError: no room for it; no part of it is left.
        """
        if not self._layout.is_main:
            return Nowhere()
        path = self._partial(name)
        if not self.start:
            _reserve_npy(path, shape)
        self._arrays[name] = np.lib.format.open_memmap(path, mode="r+")
        return self._arrays[name]

    def progress(self, done: int) -> None:
        """To be called after each batch with how many are done; now and then notes that."""
        soon = time.monotonic() - self._saved < SAVE_SECONDS or done >= self._num_batches
        if soon or not self._layout.is_main:
            return
        self._flush()
        shapes = {name: list(array.shape) for name, array in self._arrays.items()}
        write_json(self._directory / PROGRESS, {"batches": done, "arrays": shapes, "of": self._fingerprint})
        self._saved = time.monotonic()

    def finish(self, *names: str) -> None:
        """Gives these arrays the names of whole ones, and removes all others; they stay readable."""
        self._flush()
        for name in self._arrays:
            if name in names:
                os.replace(self._partial(name), self._directory / name)
            else:
                self._partial(name).unlink()
        if self._layout.is_main:
            (self._directory / PROGRESS).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc_type is None or (self._directory / PROGRESS).exists():
            return
        for name in self._arrays:  # nothing will go on from them
            self._partial(name).unlink(missing_ok=True)

    def _partial(self, name: str) -> Path:
        return self._directory / f"{name}.partial"

    def _flush(self) -> None:
        for array in self._arrays.values():
            array.flush()

    def _finished_batches(self) -> int:
        path = self._directory / PROGRESS
        if not path.exists():
            return 0
        try:
            said = read_json(path)
            if said["of"] != self._fingerprint:
                return 0
            for name, shape in said["arrays"].items():
                if np.load(self._partial(name), mmap_mode="r").shape != tuple(shape):
                    return 0
            done = int(said["batches"])
            return done if done < self._num_batches else 0
        except (UserError, OSError, ValueError, EOFError, KeyError, TypeError, AttributeError):
            return 0  # damaged, or renamed by a process killed right then: begin anew


class Nowhere:
    """In place of an array where nobody reads what is written."""

    def __setitem__(self, where: Any, values: Any) -> None:
        pass


def params_digest(params: Params) -> str:
    """A hash of all parameters."""
    digest = hashlib.blake2b(digest_size=16)
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _reserve_npy(path: Path, shape: tuple[int, ...]) -> None:
    """A zeroed float32 .npy file that has all its blocks.

    In a file with holes a full disk would show as a bus error, when a batch is written through memory.
    """
    make_directory(path.parent)
    size = int(np.prod(shape, dtype=np.int64)) * 4
    try:
        with path.open("wb") as stream:
            header = {"descr": "<f4", "fortran_order": False, "shape": tuple(map(int, shape))}
            np.lib.format.write_array_header_1_0(stream, header)
            stream.flush()
            size += stream.tell()
            _reserve(stream, size)
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        raise UserError(
            f"{path.with_suffix('')}: cannot be written, {error.strerror}; it takes {size:,} bytes. "
            "Make room, or choose another `workdir`"
        ) from error


def _reserve(stream: IO[bytes], size: int) -> None:
    """Gives a file this many bytes, all of them on the disk."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(stream.fileno(), 0, size)
            return
        except OSError as error:  # a file system that cannot do that
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    chunk = 1 << 20
    for begin in range(stream.tell(), size, chunk):
        stream.write(bytes(min(chunk, size - begin)))
    stream.flush()
    os.fsync(stream.fileno())
