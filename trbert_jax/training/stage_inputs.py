"""Per-example outputs of earlier stages: residual scores and teacher logits, written and read by batches."""

from __future__ import annotations

import contextlib
import dataclasses
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
from trbert_jax.reduction import residual_scores as residual
from trbert_jax.tasks import TASKS
from trbert_jax.tasks.examples import Examples, batch_rows
from trbert_jax.training.experiment import Experiment


@dataclasses.dataclass(frozen=True, eq=False)
class StageInput:
    """What an earlier stage found out about the training examples.

    Attributes:
      values: array with an entry an example, or a row, in the order of the training examples, or what gives
        such entries when indexed with their numbers; or a dict of these.
      by_row: whether an entry is a row's rather than an example's.
      by_token: whether the last axis are positions, to be cut to the batch's width; of a dict, the names of
        those arrays for which it is.
    """

    values: Any
    by_row: bool = False
    by_token: bool | tuple[str, ...] = False

    def take(self, index: np.ndarray, rows: np.ndarray, width: int) -> Any:
        """The entries of a batch: its examples int [B] and rows int [B * G], fillers 0, and its width."""

        def one(values: np.ndarray, by_token: bool) -> np.ndarray:
            found = np.asarray(values[rows if self.by_row else index])
            return found[..., :width] if by_token else found

        if isinstance(self.values, Mapping):
            names = self.by_token if isinstance(self.by_token, tuple) else ()
            return {name: one(values, name in names) for name, values in self.values.items()}
        return one(self.values, bool(self.by_token))


DATA_DIGEST = "data_digest"  # in what a finished stage says of itself: the examples it was about
SCORES, LOGITS = "scores.npy", "logits{}.npy"


def load_stage_inputs(run: Experiment, stage: str, features: Examples, task: str) -> dict[str, StageInput]:
    """What a stage's batches need of earlier stages, in the order of the training examples.

    Raises:
      UserError: an earlier stage's output is missing, damaged or of other data.
    """
    if stage == "policy" and run.config.policy.guide_rate > 0:
        return {"guide": StageInput(residual_scores(run, stage, features), by_row=True, by_token=True)}
    if stage == "init":
        lengths = features.row_targets.get("shared_length", features.row_lengths)
        ranks = RankTargets(residual_scores(run, stage, features), lengths)
        return {"rank": StageInput(ranks, by_row=True, by_token=True)}
    if stage == "joint" and run.config.joint.distill:
        return {"teacher_logits": _teacher_logits(run, stage, features, task)}
    return {}


def residual_scores(run: Experiment, stage: str, features: Examples) -> Any:
    """Residual scores, to be indexed by rows; of rows that decide together on what they share, their sum."""
    scores = _load(run, run.output_of("score", SCORES, stage), features, features.num_rows)
    return GroupSums(scores, features.group) if "shared_length" in features.row_targets else scores


@dataclasses.dataclass(frozen=True)
class GroupSums:
    """Entries of rows summed over the group that each is in.

    Attributes:
      values: float32 [R, ...].
      group: rows of a group, next to each other.
    """

    values: np.ndarray
    group: int

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Rows int [b] -> [b, ...]."""
        groups, which = np.unique(np.asarray(rows) // self.group, return_inverse=True)
        members = groups[:, None] * self.group + np.arange(self.group)
        sums: np.ndarray = np.asarray(self.values[members]).sum(1)
        return sums[which]


@dataclasses.dataclass(frozen=True)
class RankTargets:
    """Targets of the selectors' initialization, see `residual.rank_targets`.

    Attributes:
      scores: float32 [R, stages, S], or what gives that when indexed by rows.
      lengths: int [R].
    """

    scores: Any
    lengths: np.ndarray

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Rows int [b] -> float32 [b, stages, S]."""
        return residual.rank_targets(np.asarray(self.scores[rows]), self.lengths[rows])


def _teacher_logits(run: Experiment, stage: str, features: Examples, task_name: str) -> StageInput:
    task = TASKS[task_name]
    count = features.num_rows if task.by_row else len(features)
    if not task.logits:
        values = _load(run, run.output_of("teacher", LOGITS.format(""), stage), features, count)
        return StageInput(values, task.by_row, by_token=task.is_by_token())
    paths = {name: run.output_of("teacher", LOGITS.format(f"_{name}"), stage) for name in task.logits}
    arrays = {name: _load(run, path, features, count) for name, path in paths.items()}
    return StageInput(arrays, task.by_row, tuple(filter(task.is_by_token, task.logits)))


def _load(run: Experiment, path: Path, features: Examples, count: int) -> np.ndarray:
    try:
        array: np.ndarray = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{path}: damaged ({error}); delete {path.parent} to run stage {path.parent.name} again"
        ) from error
    # Rows belong together by their place: data in another order would go unnoticed by its number.
    digest = (run.finished(path.parent.name) or {}).get(DATA_DIGEST, features.digest)
    if len(array) != count or digest != features.digest:
        raise UserError(
            f"{path}: has {len(array)} entries, of other training data than the {count} of now; delete "
            f"{path.parent} to run stage {path.parent.name} again, or choose another `workdir`"
        )
    return array


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


def check_finite(
    stage: str, features: Examples, index: np.ndarray, size: int, found: Mapping[str, Any]
) -> None:
    """Raises a UserError that names the first example of a batch with a value that is not finite.

    Args:
      stage: the stage.
      features: the training examples.
      index: int [b], those of the batch.
      size: b and the fillers.
      found: name -> array, or tree of arrays, [size, ...] or [rows of the batch, ...].
    """
    rows = batch_rows(features, index, size)
    for name, tree in found.items():
        for array in map(np.asarray, jax.tree.leaves(tree)):
            strange = ~np.isfinite(array).reshape(len(array), -1).all(1)
            strange &= rows >= 0 if len(array) == len(rows) else np.arange(size) < len(index)
            if strange.any():
                example = int(index[int(strange.argmax()) * size // len(array)])
                raise UserError(
                    f"{stage}: {name} of example {features.ids[example]} is not finite; the fine-tuned model "
                    "does not compute it: look at finetune/metrics.jsonl, try a smaller "
                    "finetune.learning_rate or model.dtype float32"
                )
