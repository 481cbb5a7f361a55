"""Per-example outputs of earlier stages on disk: residual scores and teacher logits.

Arrays are written batch by batch (`resumable_arrays`) and read by the rows of a batch; memory never holds a
whole one.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trbert_jax.errors import UserError
from trbert_jax.model.model import Batch, Params
from trbert_jax.model.packed import packed_forward
from trbert_jax.model.pretrained import Pretrained
from trbert_jax.parallel import ROWS
from trbert_jax.reduction.residual_scores import rank_targets
from trbert_jax.tasks import TASKS
from trbert_jax.tasks.examples import Examples, batch_rows, length_batches, pad_batch, width_buckets
from trbert_jax.tasks.losses import Rows
from trbert_jax.training import objectives
from trbert_jax.training.experiment import Experiment, params_digest
from trbert_jax.training.logging import StageReport
from trbert_jax.training.resumable_arrays import ResumableArrays

if TYPE_CHECKING:
    from trbert_jax.training.stages import Stage

logger = logging.getLogger(__name__)

DATA_DIGEST = "data_digest"  # key of a stage's summary: digest of the examples its arrays are about
SCORES, LOGITS = "scores.npy", "logits{}.npy"
STATES = "states.npy"  # of [CLS] in the last layer
LOSSES = "losses.npy"  # of the scored examples; only their mean is kept


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

# The functions that read them take the examples of the stage that reads, and those (`source`, which contain
# them) of the stage that wrote.


def guide(experiment: Experiment, stage: str, examples: Examples, source: Examples, task: str) -> StageInputs:
    """Returns the residual scores that the policy imitates."""
    scores = residual_scores(experiment, stage, examples, source)
    return {"guide": StageInput(scores, by_row=True, by_token=True)}


def ranks(experiment: Experiment, stage: str, examples: Examples, source: Examples, task: str) -> StageInputs:
    """Returns the ranks that initialize the selectors (`residual_scores.rank_targets`)."""
    scores = residual_scores(experiment, stage, examples, source)
    lengths = examples.row_targets.get("shared_length", examples.row_lengths)

    def read(rows: np.ndarray) -> np.ndarray:
        return rank_targets(scores(rows), lengths[rows])

    return {"rank": StageInput(read, by_row=True, by_token=True)}


def class_weights(labels: np.ndarray, stage: str) -> StageInput:
    """Returns the weight of each example's class, n / (classes * examples of the class), 1 on average.

    Classes without an example do not count. Raises `UserError` if an example has no label.
    """
    if (labels < 0).any():
        known = f"{stage}.max_examples to finetune.max_examples"
        without = f"{(labels < 0).sum()} examples of stage {stage} have no label"
        raise UserError(f"data.class_weights: {without}; set {known}, or remove data.class_weights")
    counts = np.bincount(labels)
    weights = len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1))
    return StageInput(weights.astype(np.float32)[labels].__getitem__)


def teacher_logits(
    experiment: Experiment, stage: str, examples: Examples, source: Examples, task: str
) -> StageInputs:
    """Returns the logits of the fine-tuned model, and its [CLS] states if the stage learns from them."""
    head = TASKS[task]

    def one(name: str | None = None) -> StageInput:
        path = experiment.output_of("teacher", LOGITS.format(f"_{name}" if name else ""), stage)
        read = _load(experiment, path, examples, source, head.by_row)
        return StageInput(read, head.by_row, head.is_by_token(name))

    inputs: StageInputs = {"teacher_logits": {x: one(x) for x in head.logits} if head.logits else one()}
    if getattr(getattr(experiment.config, stage), "distill_states", 0):
        path = experiment.output_of("teacher", STATES, stage)
        read = _load(experiment, path, examples, source, by_row=True)
        inputs["teacher_state"] = StageInput(read, by_row=True)
    return inputs


def residual_scores(
    experiment: Experiment, stage: str, examples: Examples, source: Examples
) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a map from rows int [b] to scores float32 [b, stages, S], sums where groups share tokens."""
    path = experiment.output_of("score", SCORES, stage)
    scores = _load(experiment, path, examples, source, by_row=True)

    first_row = np.asarray(examples.first_row)

    def sums(rows: np.ndarray) -> np.ndarray:
        owners, which = np.unique(np.searchsorted(first_row, rows, side="right") - 1, return_inverse=True)
        groups = (scores(np.arange(first_row[i], first_row[i + 1])) for i in owners)
        return np.stack([group.sum(0) for group in groups])[which]

    return sums if "shared_length" in examples.row_targets else scores


def places_in(source: Examples, examples: Examples) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns where examples are in a set that contains them: of the examples int [n], of their rows int [R].

    Returns None if it does not contain them with the same tokens.
    """

    def names(ids: Sequence[str]) -> list[tuple[str, int]]:
        seen = collections.Counter[str]()  # windows of one question have the same id
        return [(id, seen.update([id]) or seen[id]) for id in ids]

    found = {name: i for i, name in enumerate(names(source.ids))}
    places = np.array([found.get(name, -1) for name in names(examples.ids)], np.int64)
    if (places < 0).any():
        return None
    rows = source.rows(places)
    taken = source.take(places)
    same = np.array_equal(taken.offsets, examples.offsets) and np.array_equal(taken.tokens, examples.tokens)
    return (places, rows[rows >= 0]) if same else None


def _load(
    experiment: Experiment, path: Path, examples: Examples, source: Examples, by_row: bool
) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a map from examples, or rows, int [b] to the entries that a stage wrote about `source`."""
    stage, again = path.parent.name, f"delete {path.parent} to run stage {path.parent.name} again"
    try:
        array: np.ndarray = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: damaged ({error}); {again}") from error
    # Entries are matched by position: their number does not show that the data has another order.
    digest = (experiment.finished(stage) or {}).get(DATA_DIGEST, source.digest)
    count = source.num_rows if by_row else len(source)
    if len(array) != count or digest != source.digest:
        other = f"has {len(array)} entries of other training data than the {count} of now"
        raise UserError(f"{path}: {other}; {again}, or choose another `workdir`")
    if source.digest == examples.digest:
        return array.__getitem__
    places = places_in(source, examples)
    if places is None:
        other = "is about other inputs than those of the stage that reads it"
        raise UserError(f"{path}: {other}; give both stages the same max_examples")
    return lambda index: array[places[by_row][index]]


# Stages that write them ---------------------------------------------------------------------------


def score_stage(experiment: Experiment, stage: Stage) -> dict[str, Any]:
    """Writes scores of all training tokens, `scores.npy`, float32 [rows, stages, max_length]."""
    model, kind = stage.start(experiment), experiment.config.score.kind
    module, value = experiment.module(model.config), {"residual": "loss", "gate": "margin"}[kind]
    shape = (model.config.num_selectors, model.config.max_length)

    def compute(params: Params, batch: Batch) -> dict[str, jax.Array]:
        scores, _, loss = objectives.SCORES[kind](module, params, batch)
        return {"score": scores, value: loss}

    files = {"score": Output(SCORES, shape, by_row=True), value: Output(LOSSES)}
    return _write(experiment, stage, model, compute, files, lambda arrays: {value: _mean(arrays[value])})


def teacher_stage(experiment: Experiment, stage: Stage) -> dict[str, Any]:
    """Writes the dense logits of training examples to `logits.npy`; several arrays to `logits_NAME.npy`.

    With `teacher.states` also the last layer's states of [CLS], `states.npy`, float32 [rows, hidden_size].
    """
    model = stage.start(experiment)
    if experiment.config.teacher.states:
        return _teacher_with_states(experiment, stage, model)
    devices, examples = experiment.devices, _examples(experiment, stage, model)
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


def _teacher_with_states(experiment: Experiment, stage: Stage, model: Pretrained) -> dict[str, Any]:
    module, config = experiment.module(model.config), model.config
    task = TASKS[config.task]
    if config.reads_all_tokens:
        wrong = f"the head of {config.task} reads all tokens, not [CLS] alone"
        raise UserError(f"teacher.states: {wrong}; set it to false, and joint.distill_states to 0")

    def compute(params: Params, batch: Batch) -> dict[str, jax.Array]:
        output = packed_forward(module, params, batch, rule=None)
        logits = task.example_logits(output.logits, Rows(batch))
        return {"logits": logits, "states": output.first.astype(jnp.float32)}

    examples = stage.examples(experiment, model)
    width = examples.group if examples.group > 1 else config.num_outputs
    states = Output(STATES, (config.hidden_size,), by_row=True)
    files = {"logits": Output(LOGITS.format(""), (width,)), "states": states}

    def summary(arrays: Mapping[str, np.ndarray]) -> dict[str, float]:
        known = examples.labels >= 0
        right = np.asarray(arrays["logits"]).argmax(-1)[known] == examples.labels[known]
        return {"accuracy": float(right.mean())} if known.any() else {}

    return _write(experiment, stage, model, compute, files, summary)


class Output(NamedTuple):
    """An array that a stage writes."""

    file: str
    shape: tuple[int, ...] = ()  # of an entry
    by_row: bool = False  # whether it has an entry per row rather than per example


def _examples(experiment: Experiment, stage: Stage, model: Pretrained) -> Examples:
    part = experiment.data.part(stage.max_examples(experiment.config))
    experiment.check_inputs(stage.name, model, (part,))
    return stage.examples(experiment, model)


def _mean(values: np.ndarray) -> float:
    return float(np.asarray(values).mean(dtype=np.float64))


def _write(
    experiment: Experiment,
    stage: Stage,
    model: Pretrained,
    compute: Callable[[Params, Batch], dict[str, jax.Array]],
    files: Mapping[str, Output],
    summarize: Callable[[Mapping[str, np.ndarray]], dict[str, float]],
) -> dict[str, Any]:
    """Writes what `compute` returns of each batch of training examples; `losses.npy` only for the summary."""
    devices, examples = experiment.devices, _examples(experiment, stage, model)
    size = devices.rounded(getattr(experiment.config, stage.name).batch_size)
    batches = list(length_batches(examples, size, width_buckets(model.config.max_length)))
    mapped = devices.by_rows(compute, out_specs=ROWS)
    run = jax.jit(mapped) if devices.is_single else jax.jit(mapped, out_shardings=devices.whole)
    params = devices.replicate(model.params)
    with _outputs(experiment, stage.name, model, examples, size, len(batches)) as (report, arrays):
        count = {True: examples.num_rows, False: len(examples)}
        written = {name: arrays.array(x.file, (count[x.by_row], *x.shape)) for name, x in files.items()}
        for done, (index, width) in enumerate(batches[arrays.start :], arrays.start + 1):
            result = run(params, devices.place_rows(pad_batch(examples, index, size, width)))
            values = jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), result)
            check_finite(stage.name, examples, index, size, values)
            rows = batch_rows(examples, index, size)
            for name, output in files.items():
                places, chosen = (rows[rows >= 0], rows >= 0) if output.by_row else (index, slice(len(index)))
                found = values[name][chosen]
                written[name][(places, ..., *[slice(n) for n in found.shape[1:]])] = found
            report.progress(done, len(index))
            arrays.progress(done)
            devices.stop_here(f"in {stage.name}")
        if not devices.is_main:  # only the main process has the arrays
            return {}
        arrays.finish(*[x.file for x in files.values() if x.file == LOSSES])
        summary = summarize(written)
        report.log(len(batches), summary)
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


def check_finite(
    stage: str, examples: Examples, index: np.ndarray, size: int, results: Mapping[str, np.ndarray]
) -> None:
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
            wrong = f"{stage}: {name} of example {example} is not finite, from the fine-tuned model"
            advice = "try a smaller finetune.learning_rate or model.dtype float32"
            raise UserError(f"{wrong}; look at finetune/metrics.jsonl, {advice}")
