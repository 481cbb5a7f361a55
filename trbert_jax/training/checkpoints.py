"""Save and restore the checkpoints of a training stage, with a hash of every file.

    directory/
      step_00000040/manifest.json   settings, metrics, shape of every array, hash of every file
      step_00000040/arrays/         an orbax PyTree: {"trained/head/classifier/bias": array, ...}

Orbax writes checkpoints in the background and renames them when they are complete, so that a process killed
at any moment leaves whole checkpoints. The hashes reveal files that are changed later.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp

from trbert_jax.config import diff_configs, with_defaults
from trbert_jax.errors import UserError
from trbert_jax.io import hash_file, make_directory, read_json, write_json

FORMAT = 1  # of manifest.json
MANIFEST, ARRAYS = "manifest.json", "arrays"
_STEP_NAME = re.compile(r"step_(\d{8,})")
_DELETED = "deleted"  # folder that checkpoints are moved to before they are deleted
_MOST_LINES = 12  # of a list of differences

# Orbax logs every step of its work. Its errors arrive as exceptions.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


class DamagedCheckpointError(UserError):
    """The checkpoint of `step` changed since it was written; `finding` names its folder and the damage."""

    def __init__(self, step: int, finding: str) -> None:
        super().__init__(f"{finding}; delete this folder to resume from the checkpoint before it")
        self.step, self.finding = step, finding


class CheckpointStore:
    """The checkpoints in one directory; a context manager that waits for unfinished writes.

    One process writes; others may read at the same time. The `keep` (>= 1) latest checkpoints and the best
    one are kept. `fingerprint`, JSON-like values, must equal that of a checkpoint to restore it; keys in
    `free`, such as `settings.save_steps`, may differ.
    """

    def __init__(
        self,
        directory: str | Path,
        keep: int,
        fingerprint: Mapping[str, Any],
        free: Collection[str] = (),
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        self.directory, self._keep, self._free = Path(directory), keep, free
        self._fingerprint = json.loads(json.dumps(dict(fingerprint)))  # as read back
        self._manager: _Manager | None = None

    def folder(self, step: int) -> Path:
        """Returns the folder of a step's checkpoint, which need not exist."""
        return self.directory / f"step_{step:08d}"

    def steps(self) -> tuple[int, ...]:
        """Returns the steps of all checkpoints, ascending. Raises `DamagedCheckpointError`."""
        return tuple(self._manifests())

    def latest_step(self) -> int | None:
        """Returns the last step with a checkpoint. Raises `DamagedCheckpointError`."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """Returns the step with the largest `metric`, the first of equals; None without metrics."""
        return _best(self._manifests())

    def save(
        self, step: int, state: Any, metrics: Mapping[str, float] | None = None, metric: float | None = None
    ) -> None:
        """Writes a checkpoint in the background, then deletes old ones except the best.

        `step` is larger than that of every checkpoint. The arrays of `state` must not change until `wait`
        returns. The largest finite `metric` makes a checkpoint the best; `metrics` are saved with it. Raises
        `UserError` if this write or the one before it failed, or the directory has a damaged checkpoint.
        """
        self.wait()
        manifests = self._manifests()
        if manifests and step <= max(manifests):
            raise ValueError(f"{self.directory}: step {step} is not after the latest one, {max(manifests)}")
        leaves = _named_leaves(state)
        manifests[step] = manifest = {
            "step": step,
            "metric": _finite(metric),
            "metrics": {name: _finite(value) for name, value in (metrics or {}).items()},
            "fingerprint": self._fingerprint,
            "arrays": _describe(leaves),
        }
        # Orbax refuses empty arrays; the manifest has their shapes.
        arrays = {name: np.asarray(leaf) for name, leaf in leaves.items() if leaf.size}
        with self._failing(step):
            if self._manager is None:
                self._manager = _Manager(make_directory(self.directory).absolute())
            self._manager.handler.manifest = manifest
            self._manager.kept = {*list(manifests)[-self._keep :], _best(manifests)}
            self._manager.save(step, args=ocp.args.Composite(**{ARRAYS: ocp.args.PyTreeSave(arrays)}))

    def wait(self) -> None:
        """Waits until the last checkpoint is written. Raises `UserError` if that failed."""
        if self._manager is not None:
            with self._failing(self._manager.handler.manifest["step"]):
                self._manager.wait_until_finished()
            shutil.rmtree(self.directory / _DELETED, ignore_errors=True)

    def restore(self, step: int, like: Any) -> Any:
        """Reads a checkpoint after checking every byte of it; returns NumPy arrays in the tree of `like`.

        `like` has the saved structure, shapes and dtypes. Raises `DamagedCheckpointError` if a file changed,
        `UserError` if the checkpoint does not exist, or has another fingerprint or other arrays.
        """
        folder, manifests = self.folder(step), self._manifests()
        if step not in manifests:
            raise UserError(f"{folder}: no such checkpoint; existing steps: {sorted(manifests)}")
        manifest, leaves = manifests[step], _named_leaves(like)
        saved, now = (with_defaults(x) for x in (manifest["fingerprint"], self._fingerprint))
        lines = [x for x in diff_configs(saved, now) if x.partition(":")[0] not in self._free]
        if lines:
            advice = f"choose another work directory, or delete {self.directory} to train this stage again"
            changed = f"saved with other settings (then -> now):\n{_cut(lines)}"
            raise UserError(f"{folder}: {changed}\nset them back, {advice}")
        if lines := diff_configs(manifest["arrays"], _describe(leaves)):
            advice = "use the model and optimizer settings it was saved with, or another work directory"
            changed = f"has other arrays than this run (saved -> expected):\n{_cut(lines)}"
            raise UserError(f"{folder}: {changed}\n{advice}")
        self._check_files(step, manifest["files"])
        wanted, options = {name: leaf for name, leaf in leaves.items() if leaf.size}, _this_process()
        as_numpy = dict.fromkeys(wanted, ocp.RestoreArgs(restore_type=np.ndarray))
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
        with ocp.Checkpointer(handler, multiprocessing_options=options) as reader:
            request = ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy)
            arrays = reader.restore((folder / ARRAYS).absolute(), args=request)
        values = [np.asarray(arrays.get(k, np.zeros(leaf.shape, leaf.dtype))) for k, leaf in leaves.items()]
        return jax.tree.unflatten(jax.tree.structure(like), values)

    def set_aside(self, step: int) -> Path:
        """Renames a damaged checkpoint, so that it is ignored, and returns its new path."""
        target = self.directory / f"damaged_{self.folder(step).name}"
        shutil.rmtree(target, ignore_errors=True)
        os.replace(self.folder(step), target)
        self._close()
        return target

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        try:
            if exc_type is None:
                self.wait()
        finally:
            self._close()  # finishes the write; an error under way goes first

    def _close(self) -> None:
        manager, self._manager = self._manager, None
        if manager is not None:
            with contextlib.suppress(Exception):
                manager.close()

    @contextlib.contextmanager
    def _failing(self, step: int) -> Iterator[None]:
        """Turns errors of a write into a UserError."""
        try:
            yield
        except Exception as error:
            self._close()
            # TensorStore reports errors of the file system as "CODE: what: how: why [details]".
            text = str(error).split(" [", maxsplit=1)[0]
            if isinstance(error, UserError) or not re.match(r"[A-Z_]+: |\[Errno ", text):
                raise
            reason = getattr(error, "strerror", None) or text.rsplit(": ", maxsplit=1)[-1]
            advice = "free some space or use another workdir"
            raise UserError(f"{self.folder(step)}: cannot be written ({reason}); {advice}") from error

    def _manifests(self) -> dict[int, dict[str, Any]]:
        """Step -> manifest, ascending."""
        try:
            names = os.listdir(self.directory)
        except FileNotFoundError:
            names = []
        except OSError as error:  # do not take it for an empty directory and train from the start
            raise UserError(f"{self.directory}: checkpoints cannot be listed, {error.strerror}") from error
        manifests = {}
        for step in sorted(int(match[1]) for name in names if (match := _STEP_NAME.fullmatch(name))):
            try:
                manifests[step] = _read_manifest(self.folder(step))
            except ValueError as error:
                if self.folder(step).exists():  # else deleted by the writer in the meantime
                    raise self._damaged(step, error) from error
        return manifests

    def _check_files(self, step: int, files: Mapping[str, Mapping[str, Any]]) -> None:
        for name, saved in files.items():
            try:
                found = hash_file(self.folder(step) / name)
            except FileNotFoundError:
                raise self._damaged(step, f"{name} is missing") from None
            except OSError as error:
                raise UserError(f"{self.folder(step) / name}: cannot be read, {error.strerror}") from error
            if found != saved:
                raise self._damaged(step, f"{name} is not as it was written")

    def _damaged(self, step: int, error: object) -> DamagedCheckpointError:
        return DamagedCheckpointError(step, f"{self.folder(step)}: damaged checkpoint ({error})")


class _HashingHandler(ocp.PyTreeCheckpointHandler):
    """Adds `manifest`, with the hash of every file, before orbax completes a checkpoint."""

    manifest: dict[str, Any]

    def finalize(self, directory: Any) -> None:
        super().finalize(directory)
        folder = Path(directory)
        files = {f"{ARRAYS}/{p.relative_to(folder).as_posix()}": p for p in sorted(folder.rglob("*"))}
        hashes = {name: hash_file(path) for name, path in files.items() if path.is_file()}
        manifest = {"format": FORMAT, **self.manifest, "files": hashes}
        write_json(folder.parent / MANIFEST, {**manifest, "digest": _digest(manifest)})


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, used by one process alone; keeps the steps in `kept`."""

    kept: set[int | None]

    def __init__(self, directory: Path) -> None:
        self.handler = _HashingHandler(multiprocessing_options=_this_process())
        options = ocp.CheckpointManagerOptions(
            create=False,
            step_prefix="step",
            step_format_fixed_length=8,
            preservation_policy=self,
            todelete_subdir=_DELETED,  # a half-deleted folder must not look like a damaged checkpoint
            cleanup_tmp_directories=True,
            lightweight_initialize=True,
            save_root_metadata=False,
            multiprocessing_options=_this_process(),
        )
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        registry.add(ARRAYS, ocp.args.PyTreeSave, self.handler)
        super().__init__(directory, options=options, handler_registry=registry)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Answers as orbax's preservation policy."""
        return [checkpoint.step in self.kept for checkpoint in checkpoints]

    def reached_preemption(self, step: int) -> bool:
        """Returns False: JAX answers that question once, and training asks it (`DeviceMesh`)."""
        return False


def _this_process() -> Any:
    """Orbax's options for a process that reads or writes without the others."""
    me = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process_{me}"
    )


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Reads manifest.json; raises ValueError if it is missing or changed."""
    path = folder / MANIFEST
    try:
        manifest = read_json(path)
    except UserError as error:
        raise ValueError(str(error)) from error
    if isinstance(manifest, dict) and manifest.get("format", FORMAT) != FORMAT:
        advice = "use the version of trbert_jax that wrote it, or delete the folder"
        raise UserError(f"{path}: has format {manifest['format']}, expected {FORMAT}; {advice}")
    if not isinstance(manifest, dict) or manifest.pop("digest", None) != _digest(manifest):
        raise ValueError(f"{MANIFEST} is not as it was written")
    return manifest


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Path -> leaf, in the order of the tree: `opt_state/1/0/mu/head/classifier/bias`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _describe(leaves: Mapping[str, Any]) -> dict[str, str]:
    """Path -> dtype and shape: `float32[128,4]`."""
    return {name: f"{x.dtype}[{','.join(map(str, x.shape))}]" for name, x in leaves.items()}


def _best(manifests: Mapping[int, Mapping[str, Any]]) -> int | None:
    scored = {step: m["metric"] for step, m in manifests.items() if m["metric"] is not None}
    return max(scored, key=lambda step: (scored[step], -step), default=None)


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _cut(lines: Sequence[str]) -> str:
    more = [f"... and {len(lines) - _MOST_LINES} more"] if len(lines) > _MOST_LINES else []
    return "\n".join(f"  {line}" for line in [*lines[:_MOST_LINES], *more])


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(manifest, sort_keys=True).encode(), digest_size=16).hexdigest()
