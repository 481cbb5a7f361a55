"""Arrays on disk that a stage writes batch by batch, and resumes after a kill.

STAGE/NAME.npy.partial   an unfinished array; its space is reserved before the first batch
STAGE/NAME.npy           a finished array
STAGE/progress.json      number of batches in the partial files, from which a killed stage resumes
"""

import contextlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from trbert_jax.errors import UserError
from trbert_jax.io import make_directory, read_json, write_json
from trbert_jax.parallel import DeviceMesh

PROGRESS = "progress.json"
SAVE_SECONDS = 30.0  # of work that a kill may cost
CHUNK = 2**20  # bytes written at once


class ResumableArrays:
    """Context manager for the arrays that a stage writes batch by batch, in the same order in every run.

    A killed run has noted how many of the `num_batches` it finished (`start`); the next run writes the others
    and ends with the same files. Files of another `fingerprint`, JSON-like, are replaced. Only the main
    process writes. Raises `UserError` if the processes see different files.
    """

    def __init__(
        self, directory: Path, fingerprint: Mapping[str, Any], num_batches: int, devices: DeviceMesh
    ) -> None:
        self._directory, self._num_batches, self._devices = directory, num_batches, devices
        self._progress = directory / PROGRESS
        self._fingerprint = json.loads(json.dumps(fingerprint))  # as it is read back
        self._arrays: dict[str, np.memmap] = {}
        self.start = self._finished_batches()
        devices.check_agreement(f"how far {directory} is; they must see the same `workdir`", self.start)
        if devices.is_main and not self.start:
            self._progress.unlink(missing_ok=True)  # it describes files that are replaced now
        self._saved = time.monotonic()

    def array(self, name: str, shape: tuple[int, ...]) -> Any:
        """Opens a float32 array of zeros for writing. Raises `UserError` if the disk has no room for it."""
        if not self._devices.is_main:
            return _Discard()
        path = self._partial(name)
        if not self.start:
            _reserve_npy(path, shape)
        self._arrays[name] = np.lib.format.open_memmap(path, mode="r+")
        return self._arrays[name]

    def progress(self, done: int) -> None:
        """Records the number of finished batches every `SAVE_SECONDS`; call it after each batch."""
        soon = time.monotonic() - self._saved < SAVE_SECONDS or done >= self._num_batches
        if soon or not self._devices.is_main:
            return
        for array in self._arrays.values():
            array.flush()
        shapes = {name: list(array.shape) for name, array in self._arrays.items()}
        write_json(self._progress, {"batches": done, "arrays": shapes, "of": self._fingerprint})
        self._saved = time.monotonic()

    def finish(self, *dropped: str) -> None:
        """Renames the arrays to their final names and removes those in `dropped`; all stay readable."""
        for name, array in self._arrays.items():
            array.flush()
            if name in dropped:
                self._partial(name).unlink()
            else:
                os.replace(self._partial(name), self._directory / name)
        if self._devices.is_main:
            self._progress.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        if exc_type is not None and not self._progress.exists():
            for name in self._arrays:  # no run can resume from them
                self._partial(name).unlink(missing_ok=True)

    def _partial(self, name: str) -> Path:
        return self._directory / f"{name}.partial"

    def _finished_batches(self) -> int:
        if not self._progress.exists():
            return 0
        try:
            saved = read_json(self._progress)
            if saved["of"] != self._fingerprint:
                return 0
            for name, shape in saved["arrays"].items():
                if np.load(self._partial(name), mmap_mode="r").shape != tuple(shape):
                    return 0
            done = int(saved["batches"])
            return done if done < self._num_batches else 0
        except (UserError, OSError, ValueError, EOFError, KeyError, TypeError, AttributeError):
            return 0  # damaged, or already renamed when the process was killed


class _Discard:
    """Ignores what is written to it."""

    def __setitem__(self, where: Any, values: Any) -> None:
        pass


def _reserve_npy(path: Path, shape: tuple[int, ...]) -> None:
    """Writes a float32 .npy file of zeros with all its blocks; a sparse one may raise bus errors."""
    make_directory(path.parent)
    size = int(np.prod(shape, dtype=np.int64)) * 4
    try:
        with path.open("wb") as stream:
            header = {"descr": "<f4", "fortran_order": False, "shape": tuple(map(int, shape))}
            np.lib.format.write_array_header_1_0(stream, header)
            size += stream.tell()
            for begin in range(stream.tell(), size, CHUNK):
                stream.write(bytes(min(CHUNK, size - begin)))
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        wrong = f"cannot be written, {error.strerror}; it takes {size:,} bytes"
        advice = "Make room, or choose another `workdir`"
        raise UserError(f"{path.with_suffix('')}: {wrong}. {advice}") from error
