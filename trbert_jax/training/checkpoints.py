"""The checkpoints of a training stage.

    directory/
      index.json        which checkpoints there are, their metrics, which is `best` and which `last`
      step_00000040/    one checkpoint, see training/checkpoint_folder.py
      step_00000060/

A checkpoint is written under a temporary name and renamed when complete, so that a process killed
at any instant leaves the previous set of checkpoints or the new one. The folders are the truth:
`index.json` follows from them, is there for people and scripts to read, and is rewritten at every
save.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from trbert_jax.config import upgrade_fingerprint
from trbert_jax.errors import UserError
from trbert_jax.io import make_directory, write_json
from trbert_jax.training import checkpoint_folder
from trbert_jax.training.checkpoint_folder import DamagedError

_STEP_NAME = re.compile(r"step_(\d{8,})")
_PARTIAL = ".partial-"  # in the names of what is not finished, see io.py
_MOST_LINES = 12  # of a list of differences


class DamagedCheckpointError(UserError):
    """A checkpoint is not as it was written.

    Attributes:
      step: which one.
      finding: its folder and what is wrong with it.
    """

    def __init__(self, step: int, finding: str, advice: str) -> None:
        super().__init__(f"{finding}; {advice}")
        self.step, self.finding = step, finding


class CheckpointStore:
    """The checkpoints in one directory, which need not exist yet.

    One process writes; others may read meanwhile.

    Args:
      directory: where the checkpoints are.
      keep: how many of the last checkpoints stay on disk (>= 1); the best one stays in any case.
      fingerprint: JSON-like values that a checkpoint must agree with to be restored, for example
        the parts of the configuration that it depends on.
      announce: prints a line for the user.
    """

    def __init__(
        self,
        directory: str | Path,
        keep: int,
        fingerprint: Mapping[str, Any],
        announce: Callable[[str], None] = print,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        self.directory = Path(directory)
        self._keep = keep
        self._fingerprint = json.loads(json.dumps(dict(fingerprint)))  # as it will be read back
        self._announce = announce
        self._announced: set[str] = set()

    def folder(self, step: int) -> Path:
        """The folder of a step's checkpoint, whether or not it exists."""
        return self.directory / f"step_{step:08d}"

    def steps(self) -> tuple[int, ...]:
        """The steps that have a checkpoint, ascending. Raises `UserError` on a damaged manifest."""
        return tuple(self._manifests())

    def latest_step(self) -> int | None:
        """The last step that has a checkpoint. Raises `UserError` on a damaged manifest."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The step of the largest `metric`, the earliest of equals; None where no step has one."""
        return _best(self._manifests())

    def metrics(self, step: int) -> dict[str, float | None]:
        """The metrics saved with a step; None stands for a value that was not finite."""
        return dict(self._manifest(step)["metrics"])

    def save(
        self,
        step: int,
        state: Any,
        metrics: Mapping[str, float] | None = None,
        metric: float | None = None,
    ) -> Path:
        """Saves a checkpoint, then deletes those that are neither the best nor among the last `keep`.

        Args:
          step: updates done; larger than that of any checkpoint there is.
          state: any pytree of jax or numpy arrays (PRNG keys too) and Python numbers.
          metrics: scalars to keep with it.
          metric: what decides which checkpoint is best; larger is better. None, or a value that is
            not finite: never the best.

        Returns:
          The checkpoint's folder.

        Raises:
          UserError: the directory cannot be written to, or holds a damaged checkpoint.
          ValueError: `step` is not larger than the latest one.
          TypeError: `state` has a leaf that is neither an array nor a number.
        """
        latest = self.latest_step()
        if latest is not None and step <= latest:
            raise ValueError(f"{self.directory}: step {step} is not after the latest one, {latest}")
        make_directory(self.directory)
        self._remove_unfinished()
        about = {
            "step": step,
            "metric": None if metric is None else _finite(metric),
            "metrics": {name: _finite(value) for name, value in (metrics or {}).items()},
            "fingerprint": self._fingerprint,
        }
        checkpoint_folder.write_folder(self.folder(step), checkpoint_folder.named_leaves(state), about)
        self._retire_old()
        return self.folder(step)

    def restore(self, step: int, like: Any) -> Any:
        """Reads a step's checkpoint, every byte of it checked.

        Args:
          step: which one.
          like: a pytree of the structure, shapes and dtypes that were saved. Where it has a jax
            array (or a ShapeDtypeStruct) the result has a jax array of the same sharding, where it
            has a numpy array or a Python number, that.

        Returns:
          A tree like `like` with the saved values.

        Raises:
          UserError: no such checkpoint, damaged, of another fingerprint, or of other arrays.
        """
        folder, manifest = self.folder(step), self._manifest(step)
        then, now = _flatten(upgrade_fingerprint(manifest["fingerprint"])), _flatten(self._fingerprint)
        if then != now:
            raise UserError(
                f"{folder}: saved by a run with other settings:\n{_differences(then, now, 'then', 'now')}\n"
                "set them back, choose another work directory, or delete "
                f"{self.directory} to train this stage again"
            )
        leaves = checkpoint_folder.named_leaves(like)
        saved, wanted = manifest["arrays"], checkpoint_folder.describe(leaves)
        if saved != wanted:
            raise UserError(
                f"{folder}: holds other arrays than this run has:\n"
                f"{_differences(saved, wanted, 'in the checkpoint', 'expected')}\n"
                "use the model and optimizer settings it was saved with, or another work directory"
            )
        try:
            checkpoint_folder.check_files(folder, manifest["files"])
        except DamagedError as error:
            raise self._damaged(step, error) from error
        values = checkpoint_folder.read_arrays(folder, leaves)
        return jax.tree.unflatten(jax.tree.structure(like), [values[name] for name in leaves])

    def _manifest(self, step: int) -> dict[str, Any]:
        manifests = self._manifests()
        if step not in manifests:
            there = ", ".join(map(str, manifests)) or "none"
            raise UserError(f"{self.folder(step)}: no such checkpoint; steps there are: {there}")
        return manifests[step]

    def _manifests(self) -> dict[int, dict[str, Any]]:
        """Step -> manifest, ascending; announces what is unfinished."""
        for name in self._names():
            if name.startswith("step_") and _PARTIAL in name and name not in self._announced:
                self._announced.add(name)
                self._announce(
                    f"{self.directory / name}: unfinished checkpoint of a run that was stopped while saving; "
                    "ignored, and removed at the next save"
                )
        manifests = {}
        for step in self._step_folders():
            try:
                manifests[step] = checkpoint_folder.read_manifest(self.folder(step))
            except DamagedError as error:
                if self.folder(step).exists():  # else retired by the writer since it was listed
                    raise self._damaged(step, error) from error
        return manifests

    def _names(self) -> list[str]:
        try:
            return sorted(os.listdir(self.directory))
        except FileNotFoundError:
            return []
        except OSError as error:
            # Not to be taken for an empty directory: training would start from the beginning.
            raise UserError(f"{self.directory}: checkpoints cannot be listed, {error.strerror}") from error

    def _step_folders(self) -> list[int]:
        return sorted(int(match[1]) for name in self._names() if (match := _STEP_NAME.fullmatch(name)))

    def _damaged(self, step: int, what: Exception) -> DamagedCheckpointError:
        others = [other for other in self._step_folders() if other != step]
        then = f"the run then goes on from step {max(others)}" if others else "the stage then starts again"
        finding = f"{self.folder(step)}: damaged checkpoint ({what})"
        return DamagedCheckpointError(step, finding, f"delete this folder, {then}")

    def set_aside(self, step: int) -> Path:
        """Renames a damaged checkpoint, so that it is no longer one; returns where it is now."""
        target = self.directory / f"damaged_{self.folder(step).name}"
        shutil.rmtree(target, ignore_errors=True)
        os.replace(self.folder(step), target)
        return target

    def _retire_old(self) -> None:
        """Writes the index, and only then deletes what it no longer names."""
        manifests = self._manifests()
        best, last = _best(manifests), max(manifests)
        kept = {*list(manifests)[-self._keep :], last if best is None else best}
        write_json(
            self.directory / "index.json",
            {
                "best": None if best is None else self.folder(best).name,
                "last": self.folder(last).name,
                "checkpoints": {
                    self.folder(step).name: {
                        key: manifests[step][key] for key in ("step", "metric", "metrics")
                    }
                    for step in sorted(kept)
                },
            },
        )
        for step in manifests.keys() - kept:
            # Renamed first: a folder half deleted must not look like a damaged checkpoint.
            doomed = self.directory / f"deleted{_PARTIAL}{self.folder(step).name}"
            os.replace(self.folder(step), doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def _remove_unfinished(self) -> None:
        for path in (self.directory / name for name in self._names() if _PARTIAL in name):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.unlink()


def _best(manifests: Mapping[int, Mapping[str, Any]]) -> int | None:
    judged = [step for step, manifest in manifests.items() if manifest["metric"] is not None]
    return max(judged, key=lambda step: (manifests[step]["metric"], -step), default=None)


def _finite(value: float) -> float | None:
    """The number, or None for NaN and infinities, which JSON does not have."""
    return float(value) if math.isfinite(value) else None


def _flatten(value: Any, name: str = "") -> dict[str, str]:
    """Nested JSON -> dotted key -> text of the value."""
    if not isinstance(value, Mapping) or (name and not value):
        return {name: json.dumps(value, ensure_ascii=False, sort_keys=True)}
    joined: dict[str, str] = {}
    for key, item in value.items():
        joined |= _flatten(item, f"{name}.{key}" if name else key)
    return joined


def _differences(left: Mapping[str, str], right: Mapping[str, str], here: str, there: str) -> str:
    """One indented line for every name that the two sides do not agree on."""
    lines = [
        f"  {name}: {left.get(name, 'nothing')} {here}, {right.get(name, 'nothing')} {there}"
        for name in [*left, *(name for name in right if name not in left)]
        if left.get(name) != right.get(name)
    ]
    if len(lines) > _MOST_LINES:
        lines[_MOST_LINES:] = [f"  ... and {len(lines) - _MOST_LINES} more"]
    return "\n".join(lines)
