"""Run a training stage: prepare it, update parameters batch by batch, save its model.

A run that is killed and started again resumes from the last checkpoint and ends with the same numbers: the
order of the examples and every random draw follow from the seed and the number of the update.
"""

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from trbert_jax.config import TrainingConfig
from trbert_jax.errors import PreemptedError, UserError
from trbert_jax.model.config import ModelConfig
from trbert_jax.model.model import Params
from trbert_jax.model.pretrained import Pretrained, save_pretrained
from trbert_jax.parallel import stop_request
from trbert_jax.reduction.flops import known_peak
from trbert_jax.reduction.rules import point_thresholds
from trbert_jax.reduction.selection import random_key
from trbert_jax.tasks.examples import Examples, batch_rows, epoch_order, pad_batch, width_buckets
from trbert_jax.training import step as updates
from trbert_jax.training.checkpoints import CheckpointStore, DamagedCheckpointError
from trbert_jax.training.experiment import Experiment
from trbert_jax.training.logging import Profile, StageReport, StepClock
from trbert_jax.training.made_from import FREE_IN_CHECKPOINT
from trbert_jax.training.prepared import PreparedFeatures
from trbert_jax.training.stage_inputs import StageInputs, class_weights
from trbert_jax.training.stages import STAGES, Stage, objective_of
from trbert_jax.training.step import TrainState, init_state, merge_params

logger = logging.getLogger(__name__)

LOG_EVERY = 10  # updates between lines of metrics.jsonl
READERS = 4  # threads that read prepared data


@dataclasses.dataclass(frozen=True, eq=False)
class Training:
    """A training stage that is ready to run."""

    experiment: Experiment
    stage: Stage
    settings: TrainingConfig  # the stage's section of the configuration
    start: Pretrained  # the model it starts from
    trained: Params  # its parameters that the stage trains, on the host
    frozen: Params  # the others
    examples: Examples  # for training, as in epoch 0
    inputs: StageInputs  # outputs of earlier stages that batches contain
    resamples: bool  # whether each epoch has new inputs
    width: int  # padded length of all batches, so that the update compiles once
    update_size: int  # examples of an update
    steps_per_epoch: int  # the last update of an epoch may have fewer examples
    total_steps: int
    hard_from: int  # the first update that leaves the selectors as they are
    schedule: Any  # learning rate
    optimizer: Any
    checkpoints: CheckpointStore

    @functools.lru_cache(maxsize=1)  # noqa: B019 - lives as long as the stage
    def epoch(self, epoch: int) -> tuple[Examples, np.ndarray]:
        """Returns the examples of an epoch and the order in which it takes them, int64 [n]."""
        examples = self.examples
        if self.resamples and epoch:
            examples = self.experiment.data.resample(examples, epoch)
        return examples, epoch_order(len(examples), self.experiment.config.seed, epoch)

    @functools.lru_cache(maxsize=2)  # noqa: B019 - lives as long as the stage
    def update(self, hard: bool = False) -> Any:
        """Returns the compiled update, or that from `hard_from` on; see `step.update_step`."""
        experiment, module = self.experiment, self.experiment.module(self.start.config)
        objective = objective_of(self.stage, experiment.config, module, self.total_steps, hard)
        rates = self.stage.rates(experiment.config, hard)
        hold = self.stage.hold(experiment.config, self.total_steps, hard)
        return updates.update_step(objective, self.optimizer, experiment.devices, rates, hold)

    def evaluate(self, params: Params) -> dict[str, float]:
        """Evaluates parameters on the development set."""
        experiment, dev = self.experiment, self.experiment.features("dev", self.start)
        engine = experiment.engine(self.start.config, experiment.config.evaluate.batch_size)
        outputs = engine.run(params, dev, **self.stage.evaluation(experiment.config))
        kept = {f"kept_tokens_{point}": float(x) for point, x in enumerate(outputs.num_kept.mean(0))}
        return {**experiment.data.task.score(dev, outputs.logits).metrics, **kept}


def prepare(experiment: Experiment, stage: Stage) -> Training:
    """Gathers everything that a training stage needs.

    Raises `UserError` if an earlier stage's output is missing, or data or settings do not fit the model.
    """
    settings: TrainingConfig = getattr(experiment.config, stage.name)
    start = stage.start(experiment)
    model, shares = start.config, experiment.config.init.keep
    if shares is not None and len(shares) != model.num_reductions:
        expected = f"{model.num_reductions}: one for each point of reduction of this model"
        raise UserError(f"init.keep: {list(shares)} are {len(shares)} shares, expected {expected}")
    for threshold in experiment.config.evaluate.thresholds:  # now rather than after the training
        point_thresholds(threshold, model.num_reductions, "evaluate.thresholds")
    examples, inputs, source = stage.examples(experiment, start), StageInputs(), stage.inputs(settings)
    if source:
        name, read = source
        inputs = read(experiment, stage.name, examples, STAGES[name].examples(experiment, start), model.task)
    if experiment.config.data.class_weights == "balanced":
        inputs["class_weight"] = class_weights(examples.labels, stage.name)
    experiment.features("dev", start)  # read now: mistakes in it show before the training

    # Outputs of earlier stages are about the inputs of epoch 0.
    resamples, width = experiment.data.task.resamples and not inputs, model.max_length
    # The inputs of later epochs are unknown; the published code pads to the full length.
    if not resamples and not settings.published_padding:
        width = next(w for w in width_buckets(width) if w >= examples.lengths.max())
    size = settings.batch_size * settings.accumulation_steps
    steps_per_epoch = -(-len(examples) // size)
    total = settings.max_steps or steps_per_epoch * settings.epochs
    warmup = min(settings.warmup_steps or int(settings.warmup_fraction * total), total)
    schedule = updates.linear_schedule(settings.learning_rate, total, warmup)
    # On the host: a device may be too small for all of them.
    params = jax.tree.map(np.asarray, start.params)
    trained, frozen = updates.split_params(params, stage.trained(model))
    fingerprint, folder = experiment.fingerprint(stage.name, examples), experiment.workdir / stage.name
    return Training(
        experiment=experiment,
        stage=stage,
        settings=settings,
        start=start,
        trained=trained,
        frozen=frozen,
        examples=examples,
        inputs=inputs,
        resamples=resamples,
        width=width,
        update_size=size,
        steps_per_epoch=steps_per_epoch,
        total_steps=total,
        hard_from=stage.hard_from(experiment.config, total),
        schedule=schedule,
        optimizer=_optimizer(settings, schedule, model),
        checkpoints=CheckpointStore(
            folder / "checkpoints", settings.keep_checkpoints, fingerprint, FREE_IN_CHECKPOINT
        ),
    )


def _optimizer(settings: TrainingConfig, schedule: Any, model: ModelConfig) -> Any:
    options = {"weight_decay": settings.weight_decay, "clip_norm": settings.clip_norm}
    return updates.adamw(schedule, model, epsilon=settings.adam_epsilon, **options)


def saved_params(
    experiment: Experiment, stage: Stage
) -> tuple[Pretrained, CheckpointStore, Callable[[int], Params]]:
    """Returns a model of a stage's shape, its checkpoints, and what reads all parameters at a step.

    Needs no training data, unless the stage is not finished and the tokenizer is trained on it.
    """
    settings, name = getattr(experiment.config, stage.name), stage.name
    # A finished model has the same frozen parameters as the one that the stage started from.
    start = stage.start(experiment) if experiment.finished(name) is None else experiment.load(name, name)
    params = jax.tree.map(np.asarray, start.params)
    trained, frozen = updates.split_params(params, stage.trained(start.config))
    schedule = updates.linear_schedule(settings.learning_rate, 1, 0)  # its form alone counts
    like = init_state(trained, _optimizer(settings, schedule, start.config), stage.control(experiment.config))
    folder, free = experiment.workdir / stage.name / "checkpoints", {*FREE_IN_CHECKPOINT, "examples", "data"}
    store = CheckpointStore(folder, settings.keep_checkpoints, experiment.fingerprint(stage.name), free)
    return start, store, lambda step: merge_params(restore_state(store, step, like).trained, frozen)


# Batches ------------------------------------------------------------------------------------------


class UpdateBatch(NamedTuple):
    """The examples of one update."""

    arrays: dict[str, Any]  # [accumulation_steps, examples of this process's devices, ...]
    num_examples: int  # of all processes
    lengths: np.ndarray  # int [R], tokens of each of their rows


def update_batches(training: Training, step: int) -> UpdateBatch:
    """Builds the batches of an update; padding examples, not counted, fill up the last one of an epoch."""
    epoch, position = divmod(step, training.steps_per_epoch)
    examples, order = training.epoch(epoch)
    index = order[position * training.update_size :][: training.update_size]
    size, width = training.settings.batch_size, training.width
    own = training.experiment.devices.own_rows(size)
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
    """Yields the batches of all updates from `start` on; threads read prepared data ahead."""
    steps = range(start, training.total_steps)
    make = functools.partial(update_batches, training)
    if not isinstance(training.examples, PreparedFeatures):
        yield from map(make, steps)
        return
    import grain

    source = grain.MapDataset.source(steps).map(make)
    options = grain.ReadOptions(num_threads=READERS, prefetch_buffer_size=2 * READERS)
    yield from source.to_iter_dataset(options)


# Training -----------------------------------------------------------------------------------------


def train_stage(experiment: Experiment, stage: Stage) -> dict[str, Any]:
    """Runs a training stage and saves its model; returns its summary."""
    devices = experiment.devices
    training = devices.together(lambda: prepare(experiment, stage))
    start = training.start
    fingerprint = experiment.fingerprint(stage.name, training.examples)
    devices.check_agreement(f"what stage {stage.name} trains on (settings, data)", fingerprint)
    experiment.check_inputs(stage.name, start, ("dev",))
    params, summary = train(training)
    folder, exclude = experiment.workdir / stage.name / "model", () if stage.reduces else ("selectors",)
    params = jax.device_get(params)
    devices.on_main(lambda: save_pretrained(folder, start.config, params, start.tokenizer, exclude=exclude))
    return summary


def train(training: Training) -> tuple[Params, dict[str, Any]]:
    """Trains a stage, or the rest of it. Every process calls this; the first one writes.

    Returns all parameters (of the best or the last checkpoint, as `output` asks) and a summary. Raises
    `PreemptedError` after SIGTERM, with the last update saved; `UserError` if loss or gradient is not finite.
    """
    experiment, stage, settings = training.experiment, training.stage, training.settings
    devices, total, store = experiment.devices, training.total_steps, training.checkpoints
    directory = experiment.workdir / stage.name
    control = stage.control(experiment.config)
    init = functools.partial(init_state, optimizer=training.optimizer, control=control)
    like = jax.eval_shape(init, training.trained)
    start, restored = latest_state(training, like)

    placed = updates.place(training.frozen, devices)
    first = functools.partial(updates.first_state, training.trained, training.optimizer, devices, control)
    state = first() if restored is None else updates.place(restored, devices)
    # Each stage draws its own random numbers: the first letters of its name are a number.
    number = int.from_bytes(stage.name.encode()[:4].ljust(4, b"\0"), "big") & 0x7FFFFFFF
    rng = jax.random.fold_in(random_key(experiment.config.seed), number)
    rng = rng if devices.strategy == "pmap" else devices.replicate(rng)
    flops = functools.partial(stage.flops, experiment.config, training.start.config)
    peak = known_peak(devices.mesh.devices.flat[0].device_kind)
    peak = None if peak is None else 1e12 * peak * devices.num_devices
    unchecked: list[tuple[int, dict[str, jax.Array]]] = []

    def current() -> Params:
        if devices.is_single and devices.strategy == "jit":
            return merge_params(state.trained, placed)
        return merge_params(updates.fetch(state.trained, devices), training.frozen)

    with contextlib.ExitStack() as stack:
        report = stack.enter_context(
            devices.together(lambda: StageReport(directory, stage.name, total, start, not devices.is_main))
        )
        stop_requested = stack.enter_context(stop_request(devices))
        stack.enter_context(store)
        profile = stack.enter_context(Profile(directory / "profile", experiment.profile_steps))
        clock = StepClock()
        batches = read_ahead(training, start)
        for step in range(start, total):
            profile.at(step)
            with clock.part("input"):
                batch = next(batches)
                arrays = updates.place_batches(batch.arrays, devices)
            update = training.update(step >= training.hard_from)
            state, metrics = update(state, placed, arrays, rng)
            done = step + 1
            unchecked.append((done, metrics))
            clock.count(batch.num_examples, batch.lengths)
            if done % LOG_EVERY == 0 or done in (1, total):
                values = {name: float(x) for name, x in updates.fetch(metrics, devices).items()}
                check_finite(training, unchecked)
                scalars = {**values, "learning_rate": float(training.schedule(step))}
                devices.on_main(functools.partial(report.log, done, scalars))
                report.log_speed(done, clock.rates(values, flops, peak))
            report.progress(done, batch.num_examples)
            evaluated = None
            if done % (settings.eval_steps or training.steps_per_epoch) == 0 or done == total:
                with clock.part("evaluation"):
                    evaluated = training.evaluate(current())
                scalars = {f"dev_{name}": value for name, value in evaluated.items()}
                devices.on_main(functools.partial(report.log, done, scalars))
            stopping = done < total and stop_requested()
            if evaluated is not None or done % settings.save_steps == 0 or stopping:
                check_finite(training, unchecked)  # a checkpoint is always finite
                with clock.part("checkpoint"):
                    saved = to_checkpoint(training, updates.fetch(state, devices))
                    metric = None if evaluated is None else evaluated.get(experiment.data.task.metric)
                    save = functools.partial(store.save, done, saved, metrics=evaluated, metric=metric)
                    devices.on_main(save)
            if stopping:
                devices.on_main(store.wait)
                raise PreemptedError(f"{stage.name}: stopped by a signal; saved at step {done} of {total}")
        devices.on_main(store.wait)

    best = store.best_step()
    chosen = best if settings.output == "best" and best else total
    result = current()
    if chosen != total:
        result = merge_params(restore_state(store, chosen, like).trained, training.frozen)
    return result, {"steps": total, "output_step": chosen, "best_step": best}


def check_finite(training: Training, unchecked: list[tuple[int, dict[str, jax.Array]]]) -> None:
    """Raises a UserError that names the first update with a loss or gradient not finite; empties the list."""
    name, store = training.stage.name, training.checkpoints
    for step, metrics in unchecked:
        watched = {metric: metrics[metric] for metric in ("loss", "gradient_norm")}
        values = updates.fetch(watched, training.experiment.devices)
        bad = [f"{metric} is {float(x)}" for metric, x in values.items() if not math.isfinite(x)]
        if bad:
            last, advice = store.latest_step(), f"a smaller {name}.learning_rate or float32 may help"
            good = f"the last good checkpoint is {store.folder(last)}" if last else "no checkpoint exists yet"
            raise UserError(f"{name}: {', '.join(bad)} at step {step}; {good}; {advice}")
    unchecked.clear()


# Checkpoints --------------------------------------------------------------------------------------


def to_checkpoint(training: Training, state: TrainState) -> dict[str, Any]:
    """Returns the arrays from which a run resumes: parameters, optimizer, seed, position in the data."""
    epoch, position = divmod(int(state.step), training.steps_per_epoch)
    return {
        "trained": state.trained,
        "opt_state": state.opt_state,
        "control": state.control,
        "step": np.asarray(state.step, np.int32),
        "seed": np.asarray(training.experiment.config.seed, np.int64),
        "epoch": np.asarray(epoch, np.int64),
        "position": np.asarray(position * training.update_size, np.int64),
    }


def restore_state(store: CheckpointStore, step: int, like: TrainState) -> TrainState:
    """Reads the state of a checkpoint onto the host, whatever devices wrote it; `like` has its shapes.

    Raises `DamagedCheckpointError` if a file is missing or changed.
    """
    template = {"trained": like.trained, "opt_state": like.opt_state, "control": like.control}
    template["step"] = np.asarray(0, np.int32)
    template |= {name: np.asarray(0, np.int64) for name in ("seed", "epoch", "position")}
    saved = store.restore(step, template)
    return TrainState(saved["step"], saved["trained"], saved["opt_state"], saved["control"])


def latest_state(training: Training, like: TrainState) -> tuple[int, TrainState | None]:
    """Returns step and state of the last undamaged checkpoint, or 0 and None; renames damaged ones."""
    devices, store, name = training.experiment.devices, training.checkpoints, training.stage.name
    devices.barrier(f"{name} looks for checkpoints")
    while True:
        try:
            step = store.latest_step()
            if step is None:
                return 0, None
            restored = restore_state(store, step, like)
        except DamagedCheckpointError as error:
            devices.barrier(f"{name} found step {error.step} damaged")
            devices.on_main(functools.partial(_set_aside, store, error))
            continue
        logger.info("%s: resuming from step %d of %d", name, step, training.total_steps)
        return step, restored


def _set_aside(store: CheckpointStore, error: DamagedCheckpointError) -> None:
    logger.warning("%s; set aside as %s", error.finding, store.set_aside(error.step))
