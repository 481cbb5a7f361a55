"""Run a training stage: prepare it, update parameters batch by batch, save its model.

A run that is killed and started again resumes from the last checkpoint and ends with the same numbers: the
order of the examples and every random draw follow from the seed and the number of the update.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from trbert_jax.config import TrainingConfig
from trbert_jax.errors import PreemptedError, UserError
from trbert_jax.model.model import Params
from trbert_jax.model.pretrained import Pretrained, save_pretrained
from trbert_jax.parallel import DeviceMesh
from trbert_jax.reduction.flops import known_peak
from trbert_jax.tasks.examples import Examples, batch_rows, epoch_order, pad_batch, width_buckets
from trbert_jax.training import step as updates
from trbert_jax.training.checkpoints import CheckpointStore, DamagedCheckpointError
from trbert_jax.training.experiment import Experiment
from trbert_jax.training.logging import Profile, StageReport, StepClock
from trbert_jax.training.preemption import StopRequest
from trbert_jax.training.prepared import PreparedFeatures
from trbert_jax.training.stage_inputs import StageInputs
from trbert_jax.training.stages import Stage, objective_of
from trbert_jax.training.step import TrainState, init_state, merge_params, split_params

logger = logging.getLogger(__name__)

LOG_EVERY = 10  # updates between lines of metrics.jsonl
READERS = 4  # threads that read prepared data


@dataclasses.dataclass(frozen=True, eq=False)
class Training:
    """A training stage that is ready to run.

    Attributes:
      experiment: configuration, devices and data.
      stage: the stage.
      start: the model it starts from.
      examples: the training examples, as in epoch 0.
      inputs: outputs of earlier stages that its batches contain, by the name of their entry.
    """

    experiment: Experiment
    stage: Stage
    start: Pretrained
    examples: Examples
    inputs: StageInputs

    @property
    def name(self) -> str:
        """Name of the stage."""
        return self.stage.name

    @property
    def settings(self) -> TrainingConfig:
        """The stage's section of the configuration."""
        section: TrainingConfig = getattr(self.experiment.config, self.name)
        return section

    @property
    def directory(self) -> Path:
        """The stage's folder."""
        return self.experiment.directory(self.name)

    @property
    def devices(self) -> DeviceMesh:
        """The devices that share the work."""
        return self.experiment.devices

    @property
    def resamples(self) -> bool:
        """Whether each epoch has new inputs; outputs of earlier stages are about those of epoch 0."""
        return self.experiment.data.task.resamples and not self.inputs

    @property
    def update_size(self) -> int:
        """Examples of an update."""
        return self.settings.batch_size * self.settings.accumulation_steps

    @property
    def steps_per_epoch(self) -> int:
        """Updates of an epoch; the last one may have fewer examples."""
        return -(-len(self.examples) // self.update_size)

    @property
    def total_steps(self) -> int:
        """Updates of the whole stage."""
        return self.settings.max_steps or self.steps_per_epoch * self.settings.epochs

    @property
    def width(self) -> int:
        """Padded length of all batches, so that the update compiles once."""
        max_length = self.start.config.max_length
        # The inputs of later epochs are unknown; the published code pads to the full length.
        if self.settings.published_padding or self.resamples:
            return max_length
        longest = int(self.examples.lengths.max())
        return next(width for width in width_buckets(max_length) if width >= longest)

    @functools.lru_cache(maxsize=1)  # noqa: B019 - lives as long as the stage
    def epoch(self, epoch: int) -> tuple[Examples, np.ndarray]:
        """Returns the examples of an epoch and the order in which it takes them, int64 [n]."""
        examples = self.examples
        if self.resamples and epoch:
            examples = self.experiment.data.resample(examples, epoch)
        return examples, epoch_order(len(examples), self.experiment.config.seed, epoch)

    def trained_and_frozen(self) -> tuple[Params, Params]:
        """Splits the parameters it starts from into those it trains and the others, on the host."""
        # A device may be too small for all of them.
        params = jax.tree.map(np.asarray, self.start.params)
        return split_params(params, self.stage.trained(self.start.config))

    def optimizer(self) -> tuple[Any, Any]:
        """Returns the optimizer and its learning rate schedule."""
        settings, total = self.settings, self.total_steps
        warmup = min(settings.warmup_steps or int(settings.warmup_fraction * total), total)
        schedule = updates.linear_schedule(settings.learning_rate, total, warmup)
        options = {"weight_decay": settings.weight_decay, "clip_norm": settings.clip_norm}
        return updates.adamw(schedule, self.start.config, epsilon=settings.adam_epsilon, **options), schedule

    def update(self, adamw: Any) -> Any:
        """Returns the compiled update; see `step.update_step`."""
        config, module = self.experiment.config, self.experiment.module(self.start.config)
        objective = objective_of(self.stage, config, module, self.total_steps)
        return updates.update_step(objective, adamw, self.devices)

    def checkpoints(self) -> CheckpointStore:
        """Returns the stage's checkpoints."""
        return CheckpointStore(
            self.directory / "checkpoints",
            keep=self.settings.keep_checkpoints,
            fingerprint=self.experiment.fingerprint(self.name, self.examples),
        )

    def evaluate(self, params: Params) -> dict[str, float]:
        """Evaluates parameters on the development set."""
        experiment, model = self.experiment, self.start
        engine = experiment.engine(model.config, experiment.config.evaluate.batch_size)
        outputs = engine.run(
            params,
            experiment.features("dev", model),
            rule=self.stage.rule(experiment.config),
            backend=experiment.config.evaluate.backend,
        )
        kept = {f"kept_tokens_{point}": float(x) for point, x in enumerate(outputs.num_kept.mean(0))}
        return {**experiment.score("dev", model, outputs).metrics, **kept}


def prepare(experiment: Experiment, stage: Stage) -> Training:
    """Gathers everything that a training stage needs.

    Raises:
      UserError: an earlier stage's output is missing (the message names that stage), the data is bad, or the
        settings do not fit the model.
    """
    start = stage.start(experiment)
    shares, points = experiment.config.init.keep, start.config.num_reductions
    if shares is not None and len(shares) != points:
        raise UserError(
            f"init.keep: {list(shares)} are {len(shares)} shares, expected {points}: one for each point of "
            "reduction of this model"
        )
    examples = experiment.features("train", start)
    read = stage.inputs(getattr(experiment.config, stage.name))
    inputs = read(experiment, stage.name, examples, start.config.task) if read else {}
    experiment.features("dev", start)  # read now: mistakes in it show before the training
    return Training(experiment, stage, start, examples, inputs)


def train_stage(experiment: Experiment, stage: Stage) -> dict[str, Any]:
    """Runs a training stage and saves its model; returns its summary."""
    devices = experiment.devices
    training = devices.together(lambda: prepare(experiment, stage))
    start = training.start
    fingerprint = experiment.fingerprint(stage.name, training.examples)
    devices.check_agreement(f"what stage {stage.name} trains on (settings, data)", fingerprint)
    experiment.check_inputs(stage.name, start, ("dev",))
    params, summary = train(training)
    exclude = () if stage.reduces else ("selectors",)
    save = functools.partial(save_pretrained, training.directory / "model", start.config, exclude=exclude)
    devices.on_main(lambda: save(jax.device_get(params), start.tokenizer))
    return summary


def train(training: Training) -> tuple[Params, dict[str, Any]]:
    """Trains a stage, or the rest of it. Every process calls this; the first one writes.

    Returns:
      All parameters (of the best or the last checkpoint, as `output` asks) and a summary.

    Raises:
      PreemptedError: the process received SIGTERM; a checkpoint of the last update is saved.
      UserError: the loss or the gradient is not finite; the message names the update.
    """
    devices, settings, total = training.devices, training.settings, training.total_steps
    adamw, schedule = training.optimizer()
    trained, frozen = training.trained_and_frozen()
    store = training.checkpoints()
    like = jax.eval_shape(functools.partial(init_state, optimizer=adamw), trained)
    start, restored = latest_state(training, store, like)

    update = training.update(adamw)
    if restored is None:
        state = updates.first_state(trained, adamw, devices)
    else:
        state = updates.place_state(restored, devices)
    placed = updates.place_frozen(frozen, devices)
    rng = jax.random.fold_in(jax.random.key(training.experiment.config.seed), _stage_number(training.name))
    rng = rng if devices.strategy == "pmap" else devices.replicate(rng)
    eval_steps = settings.eval_steps or training.steps_per_epoch
    flops = functools.partial(training.stage.flops, training.experiment.config, training.start.config)
    unchecked: list[tuple[int, dict[str, jax.Array]]] = []

    def current() -> Params:
        if devices.is_single and devices.strategy == "jit":
            return merge_params(state.trained, placed)
        return merge_params(updates.fetch(state.trained, devices), frozen)

    def check() -> None:
        check_finite(training, store, unchecked)
        unchecked.clear()

    with contextlib.ExitStack() as stack:
        report = stack.enter_context(_open_report(training, start))
        stop = stack.enter_context(StopRequest())
        stack.enter_context(store)
        folder, steps = training.directory / "profile", training.experiment.profile_steps
        profile = stack.enter_context(Profile(folder, steps))
        clock = StepClock()
        batches = read_ahead(training, start)
        for step in range(start, total):
            profile.at(step)
            with clock.part("input"):
                batch = next(batches)
                arrays = updates.place_batches(batch.arrays, devices)
            state, metrics = update(state, placed, arrays, rng)
            done = step + 1
            unchecked.append((done, metrics))
            clock.count(batch.num_examples, batch.lengths)
            if done % LOG_EVERY == 0 or done in (1, total):
                values = _floats(updates.fetch(metrics, devices))
                check()
                scalars = {**values, "learning_rate": float(schedule(step))}
                devices.on_main(functools.partial(report.log, done, scalars))
                report.log_speed(done, clock.rates(values, flops, _peak(devices)))
            report.progress(done, batch.num_examples)
            evaluated = None
            if done % eval_steps == 0 or done == total:
                with clock.part("evaluation"):
                    evaluated = training.evaluate(current())
                scalars = {f"dev_{name}": value for name, value in evaluated.items()}
                devices.on_main(functools.partial(report.log, done, scalars))
            stopping = done < total and stop.requested(devices)
            if evaluated is not None or done % settings.save_steps == 0 or stopping:
                check()  # a checkpoint is always finite
                with clock.part("checkpoint"):
                    saved = checkpoint(training, updates.fetch(state, devices))
                    metric = (
                        None if evaluated is None else evaluated.get(training.experiment.data.task.metric)
                    )
                    save = functools.partial(store.save, done, saved, metrics=evaluated, metric=metric)
                    devices.on_main(save)
            if stopping:
                devices.on_main(store.wait)
                raise PreemptedError(f"{training.name}: told to stop; saved at step {done} of {total}")
        devices.on_main(store.wait)

    result, chosen = current(), total
    if settings.output == "best":
        chosen = store.best_step() or total
    if chosen != total:
        result = merge_params(restore_state(store, chosen, like).trained, frozen)
    return result, {"steps": total, "output_step": chosen, "best_step": store.best_step()}


# Batches ------------------------------------------------------------------------------------------


class UpdateBatch(NamedTuple):
    """The examples of one update.

    Attributes:
      arrays: [accumulation_steps, own examples, ...]; own are those that this process's devices compute.
      num_examples: of all processes.
      lengths: int [R], tokens of each of their rows.
    """

    arrays: dict[str, Any]
    num_examples: int
    lengths: np.ndarray


def update_batches(training: Training, step: int, width: int) -> UpdateBatch:
    """Builds the batches of an update, which follow from the seed and the number of the update.

    The last update of an epoch takes the remaining examples; padding examples, not counted, fill it up.
    """
    epoch, position = divmod(step, training.steps_per_epoch)
    examples, order = training.epoch(epoch)
    index = order[position * training.update_size :][: training.update_size]
    size = training.settings.batch_size
    own = training.devices.own_rows(size)
    passes = []
    for start in range(0, training.update_size, size):
        chosen = index[start : start + size][own]
        batch = pad_batch(examples, chosen, own.stop - own.start, width)
        rows = np.maximum(batch_rows(examples, chosen, own.stop - own.start), 0)
        numbers = np.maximum(batch["index"], 0)
        batch |= jax.tree.map(lambda x, i=numbers, r=rows: x.take(i, r, width), dict(training.inputs))
        passes.append(batch)
    rows = examples.rows(index)
    lengths = examples.row_lengths[rows[rows >= 0]]
    return UpdateBatch(jax.tree.map(lambda *x: np.stack(x), *passes), len(index), lengths)


def read_ahead(training: Training, start: int) -> Iterator[UpdateBatch]:
    """Yields the batches of all updates from `start` on; threads read prepared data ahead.

    The position in the data is the number of the update, so that a checkpoint needs no more than that.
    """
    steps = range(start, training.total_steps)
    make = functools.partial(update_batches, training, width=training.width)
    if not isinstance(training.examples, PreparedFeatures):
        yield from map(make, steps)
        return
    import grain

    source = grain.MapDataset.source(steps).map(make)
    options = grain.ReadOptions(num_threads=READERS, prefetch_buffer_size=2 * READERS)
    yield from source.to_iter_dataset(options)


# Checkpoints --------------------------------------------------------------------------------------


def checkpoint(training: Training, state: TrainState) -> dict[str, Any]:
    """Returns the arrays from which a run resumes: parameters, optimizer, seed, position in the data."""
    epoch, position = divmod(int(state.step), training.steps_per_epoch)
    numbers = {
        "seed": training.experiment.config.seed,
        "epoch": epoch,
        "position": position * training.update_size,
    }
    arrays = {
        "trained": state.trained,
        "opt_state": state.opt_state,
        "step": np.asarray(state.step, np.int32),
    }
    return arrays | {name: np.asarray(value, np.int64) for name, value in numbers.items()}


def restore_state(store: CheckpointStore, step: int, like: TrainState) -> TrainState:
    """Reads the state of a checkpoint onto the host, whatever devices wrote it; `like` has its shapes.

    Raises:
      DamagedCheckpointError: a file is missing or changed.
    """
    template = {"trained": like.trained, "opt_state": like.opt_state, "step": np.asarray(0, np.int32)}
    template |= {name: np.asarray(0, np.int64) for name in ("seed", "epoch", "position")}
    saved = store.restore(step, template)
    return TrainState(saved["step"], saved["trained"], saved["opt_state"])


def latest_state(
    training: Training, store: CheckpointStore, like: TrainState
) -> tuple[int, TrainState | None]:
    """Returns step and state of the last undamaged checkpoint; 0 and None without one.

    Damaged checkpoints are renamed, so that they are not looked at again.
    """
    devices = training.devices
    devices.barrier(f"{training.name} looks for checkpoints")
    while True:
        try:
            step = store.latest_step()
            if step is None:
                return 0, None
            restored = restore_state(store, step, like)
        except DamagedCheckpointError as error:
            devices.barrier(f"{training.name} found step {error.step} damaged")
            devices.on_main(functools.partial(_set_aside, store, error))
            continue
        logger.info("%s: going on from step %d of %d", training.name, step, training.total_steps)
        return step, restored


def _set_aside(store: CheckpointStore, error: DamagedCheckpointError) -> None:
    logger.warning("%s; set aside as %s", error.finding, store.set_aside(error.step))


def check_finite(
    training: Training, store: CheckpointStore, metrics: Sequence[tuple[int, dict[str, jax.Array]]]
) -> None:
    """Raises a UserError that names the first of these updates whose loss or gradient is not finite."""
    for step, values in metrics:
        watched = {name: values[name] for name in ("loss", "gradient_norm")}
        floats = _floats(updates.fetch(watched, training.devices))
        bad = [f"{name} is {value}" for name, value in floats.items() if not math.isfinite(value)]
        if bad:
            last = store.latest_step()
            good = f"the last good checkpoint is {store.folder(last)}" if last else "no checkpoint is there"
            raise UserError(
                f"{training.name}: {', '.join(bad)} at step {step}; {good}; a smaller "
                f"{training.name}.learning_rate or float32 may help"
            )


# Reports ------------------------------------------------------------------------------------------


def _open_report(training: Training, start: int) -> StageReport:
    """Opens the report in the first process; if that fails, all processes stop."""
    make = functools.partial(StageReport, training.directory, training.name, training.total_steps, start)
    opened: list[StageReport] = []
    training.devices.on_main(lambda: opened.append(make()))
    return opened[0] if opened else make(silent=True)


def _peak(devices: DeviceMesh) -> float | None:
    """Returns the highest FLOP/s of all devices together; None if it is unknown."""
    peak = known_peak(devices.mesh.devices.flat[0].device_kind)
    return None if peak is None else 1e12 * peak * devices.num_devices


def _stage_number(name: str) -> int:
    """Returns a number for a stage's name, so that each stage draws its own random numbers."""
    return int.from_bytes(name.encode()[:4].ljust(4, b"\0"), "big") & 0x7FFFFFFF


def _floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}
