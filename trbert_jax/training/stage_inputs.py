"""Per-example outputs of earlier stages on disk: residual scores and teacher logits.

Arrays are written batch by batch and read by the rows of a batch; memory never holds a whole one.

STAGE/NAME.npy.partial   an unfinished array; its space is reserved before the first batch
STAGE/NAME.npy           a finished array
STAGE/progress.json      number of batches in the partial files, from which a killed stage resumes
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import jax
import numpy as np

from trbert_jax.errors import UserError
from trbert_jax.io import make_directory, read_json, write_json
from trbert_jax.model.model import Batch, Params
from trbert_jax.model.pretrained import Pretrained
from trbert_jax.parallel import ROWS, DeviceMesh
from trbert_jax.reduction.residual_scores import rank_targets
from trbert_jax.tasks import TASKS
from trbert_jax.tasks.examples import Examples, batch_rows, length_batches, pad_batch, width_buckets
from trbert_jax.training import objectives
from trbert_jax.training.experiment import Experiment, params_digest
from trbert_jax.training.logging import StageReport

if TYPE_CHECKING:
    from trbert_jax.training.stages import Stage

logger = logging.getLogger(__name__)

DATA_DIGEST = "data_digest"  # key of a stage's summary: digest of the examples its arrays are about
SCORES, LOGITS = "scores.npy", "logits{}.npy"
LOSSES = "losses.npy"  # of the scored examples; only their mean is kept
PROGRESS = "progress.json"
SAVE_SECONDS = 30.0  # of work that a kill may cost
CHUNK = 2**20  # bytes written at once


# Reading --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class StageInput:
    """Output of an earlier stage for the training examples."""

    read: Callable[[np.ndarray], Any]  # positions int [b] of examples (rows if `by_row`) -> entries [b, ...]
    by_row: bool = False  # whether the output has an entry per row rather than per example
    by_token: bool = False  # whether the last axis is positions, to be cut to the batch's width

    def take(self, index: np.ndarray, rows: np.ndarray, width: int) -> np.ndarray:
        """Returns the entries of a batch: examples int [B], rows int [B * G], padded length."""
        values = np.asarray(self.read(rows if self.by_row else index))
        return values[..., :width] if self.by_token else values


# Names of batch entries -> where they are read; a dict for teacher logits that are several arrays.
StageInputs = dict[str, StageInput | dict[str, StageInput]]


def guide(experiment: Experiment, stage: str, examples: Examples, task: str) -> StageInputs:
    """Returns the residual scores that the policy imitates."""
    scores = residual_scores(experiment, stage, examples)
    return {"guide": StageInput(scores, by_row=True, by_token=True)}


def ranks(experiment: Experiment, stage: str, examples: Examples, task: str) -> StageInputs:
    """Returns the ranks that initialize the selectors (`residual_scores.rank_targets`)."""
    scores = residual_scores(experiment, stage, examples)
    lengths = examples.row_targets.get("shared_length", examples.row_lengths)

    def read(rows: np.ndarray) -> np.ndarray:
        return rank_targets(scores(rows), lengths[rows])

    return {"rank": StageInput(read, by_row=True, by_token=True)}


def class_weights(labels: np.ndarray) -> StageInput:
    """Returns the weight of each example's class, n / (classes * examples of the class), 1 on average.

    Classes without an example do not count.
    """
    counts = np.bincount(labels)
    weights = len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1))
    return StageInput(weights.astype(np.float32)[labels].__getitem__)


def teacher_logits(experiment: Experiment, stage: str, examples: Examples, task: str) -> StageInputs:
    """Returns the logits of the fine-tuned model."""
    head = TASKS[task]
    count = examples.num_rows if head.by_row else len(examples)

    def one(name: str | None = None) -> StageInput:
        path = experiment.output_of("teacher", LOGITS.format(f"_{name}" if name else ""), stage)
        array = _load(experiment, path, examples, count)
        return StageInput(array.__getitem__, head.by_row, head.is_by_token(name))

    return {"teacher_logits": {name: one(name) for name in head.logits} if head.logits else one()}


def residual_scores(
    experiment: Experiment, stage: str, examples: Examples
) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a map from rows int [b] to scores float32 [b, stages, S], sums where groups share tokens."""
    path = experiment.output_of("score", SCORES, stage)
    scores = _load(experiment, path, examples, examples.num_rows)

    first_row = np.asarray(examples.first_row)

    def sums(rows: np.ndarray) -> np.ndarray:
        owners, which = np.unique(np.searchsorted(first_row, rows, side="right") - 1, return_inverse=True)
        return np.stack([scores[first_row[i] : first_row[i + 1]].sum(0) for i in owners])[which]

    return sums if "shared_length" in examples.row_targets else scores.__getitem__


def _load(experiment: Experiment, path: Path, examples: Examples, count: int) -> np.ndarray:
    stage, again = path.parent.name, f"delete {path.parent} to run stage {path.parent.name} again"
    try:
        array: np.ndarray = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: damaged ({error}); {again}") from error
    # Entries are matched by position: their number does not show that the data has another order.
    digest = (experiment.finished(stage) or {}).get(DATA_DIGEST, examples.digest)
    if len(array) != count or digest != examples.digest:
        other = f"has {len(array)} entries of other training data than the {count} of now"
        raise UserError(f"{path}: {other}; {again}, or choose another `workdir`")
    return array


# Stages that write them ---------------------------------------------------------------------------


def score_stage(experiment: Experiment, stage: Stage) -> dict[str, Any]:
    """Writes residual scores of all training tokens, `scores.npy`, float32 [rows, stages, max_length]."""
    devices, model = experiment.devices, stage.start(experiment)
    experiment.check_inputs(stage.name, model, ("train",))
    examples, module = experiment.features("train", model), experiment.module(model.config)
    max_length = model.config.max_length
    size = devices.rounded(experiment.config.score.batch_size)
    batches = list(length_batches(examples, size, width_buckets(max_length)))

    def scores_and_losses(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        values, _, loss = objectives.score_tokens(module, params, batch)
        return values, loss

    mapped = devices.by_rows(scores_and_losses, out_specs=ROWS)
    score = jax.jit(mapped) if devices.is_single else jax.jit(mapped, out_shardings=devices.whole)
    params = devices.replicate(model.params)
    with _outputs(experiment, stage.name, model, examples, size, len(batches)) as (report, arrays):
        scores = arrays.array(SCORES, (examples.num_rows, model.config.num_selectors, max_length))
        losses = arrays.array(LOSSES, (len(examples),))
        for done, (index, width) in enumerate(batches[arrays.start :], arrays.start + 1):
            result = score(params, devices.place_rows(pad_batch(examples, index, size, width)))
            values, loss = jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), result)
            check_finite(examples, index, size, {"loss": loss, "score": values})
            rows = batch_rows(examples, index, size)
            scores[rows[rows >= 0], :, :width] = values[rows >= 0]
            losses[index] = loss[: len(index)]
            report.progress(done, len(index))
            arrays.progress(done)
            devices.stop_here(f"in {stage.name}")
        if not devices.is_main:  # only the main process has the arrays
            return {}
        arrays.finish(LOSSES)
        summary = {"loss": float(np.asarray(losses).mean(dtype=np.float64))}
        report.log(len(batches), summary)
    return {**summary, DATA_DIGEST: examples.digest}


def teacher_stage(experiment: Experiment, stage: Stage) -> dict[str, Any]:
    """Writes the dense logits of training examples to `logits.npy`; several arrays to `logits_NAME.npy`."""
    devices, model = experiment.devices, stage.start(experiment)
    experiment.check_inputs(stage.name, model, ("train",))
    examples = experiment.features("train", model)
    size = devices.rounded(experiment.config.teacher.batch_size)
    engine = experiment.engine(model.config, size)
    steps = engine.num_batches(examples)
    with _outputs(experiment, stage.name, model, examples, size, steps) as (report, arrays):

        def allocate(name: str, shape: tuple[int, ...]) -> Any:
            return arrays.array(LOGITS.format(f"_{name}" if name else ""), shape)

        def progress(done: int, num_examples: int) -> None:
            report.progress(done, num_examples)
            arrays.progress(done)
            devices.stop_here(f"in {stage.name}")

        outputs = engine.run(
            model.params, examples, rule="dense", progress=progress, allocate=allocate, start=arrays.start
        )
        if not devices.is_main:  # only the main process has the arrays
            return {}
        arrays.finish()
        summary = {"accuracy": outputs.accuracy} if examples.has_labels else {}
        report.log(steps, summary)
    return {**summary, DATA_DIGEST: examples.digest}


@contextlib.contextmanager
def _outputs(
    experiment: Experiment, stage: str, model: Pretrained, examples: Examples, size: int, steps: int
) -> Iterator[tuple[StageReport, ResumableArrays]]:
    """Opens the report and the arrays of a stage that computes `steps` batches of `size` examples."""
    devices, directory = experiment.devices, experiment.workdir / stage
    fingerprint = experiment.fingerprint(stage, examples) | {"of": params_digest(model.params), "batch": size}
    with (
        StageReport(directory, stage, steps, silent=not devices.is_main) as report,
        ResumableArrays(directory, fingerprint, steps, devices) as arrays,
    ):
        if arrays.start:
            logger.info("%s: resuming from batch %d of %d", stage, arrays.start, steps)
        yield report, arrays


def check_finite(examples: Examples, index: np.ndarray, size: int, results: Mapping[str, np.ndarray]) -> None:
    """Raises a UserError that names the first example of a batch with a value that is not finite.

    `index` int [b] are the examples, `size` their number with padding; `results` have an entry per example or
    per row of the padded batch.
    """
    rows = batch_rows(examples, index, size)
    for name, array in results.items():
        bad = ~np.isfinite(array).reshape(len(array), -1).all(1)
        bad &= rows >= 0 if len(array) == len(rows) else np.arange(size) < len(index)
        if bad.any():
            example = examples.ids[int(index[int(bad.argmax()) * size // len(array)])]
            wrong = f"score: {name} of example {example} is not finite, from the fine-tuned model"
            advice = "try a smaller finetune.learning_rate or model.dtype float32"
            raise UserError(f"{wrong}; look at finetune/metrics.jsonl, {advice}")


# Arrays ---------------------------------------------------------------------------------------------


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
