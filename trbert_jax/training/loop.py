"""The training loop: batches in, updates, reports, evaluations, checkpoints.

A run that is killed and started again resumes from the last checkpoint and ends with the same numbers: the
data order and every random draw follow from the seed and the number of the update.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from trbert_jax.config import TrainingConfig
from trbert_jax.errors import PreemptedError, UserError
from trbert_jax.model.config import ModelConfig
from trbert_jax.model.model import Params
from trbert_jax.parallel import DeviceMesh, single_device
from trbert_jax.reduction.flops import known_peak
from trbert_jax.tasks.examples import Examples, batch_rows, epoch_order, pad_batch, width_buckets
from trbert_jax.training import step as updates
from trbert_jax.training.checkpoints import CheckpointStore, DamagedCheckpointError
from trbert_jax.training.logging import Profile, StageReport, StepClock
from trbert_jax.training.preemption import StopRequest
from trbert_jax.training.prepared import PreparedFeatures
from trbert_jax.training.stage_inputs import StageInput
from trbert_jax.training.step import ObjectiveFn, TrainState, init_state

LOG_EVERY = 10  # updates between lines of metrics.jsonl


def run(training: Training, params: Params, announce: Announce = print) -> tuple[Params, dict[str, Any]]:
    """Trains a stage, or the rest of it, and returns the parameters the next stage takes.

    Every process of a run calls this; the first one writes.

    Args:
      training: the stage.
      params: the parameters it starts from.
      announce: prints a line for the user.

    Returns:
      All parameters (of the best or the last checkpoint, as `config.output` asks) and a summary.

    Raises:
      PreemptedError: the process was told to stop; a checkpoint of the last update is there.
      UserError: the loss or the gradient is not finite; the message says where.
    """
    layout, config = training.layout, training.config
    adamw, schedule = training.optimizer()
    # On the host until each array goes where it belongs: a device may be too small for all of them.
    trained, frozen = updates.split_params(jax.tree.map(np.asarray, params), training.trains)
    store = training.checkpoints()
    like = jax.eval_shape(functools.partial(init_state, optimizer=adamw), trained)
    start, restored = _latest_state(training, store, like, announce)
    total = training.total_steps

    step_fn = updates.update_step(training.make_objective(total), adamw, layout)
    if restored is None:
        state = updates.first_state(trained, adamw, layout)
    else:
        state = updates.place_state(restored, layout)
    placed = updates.place_frozen(frozen, layout)
    rng = jax.random.fold_in(jax.random.key(training.seed), _stage_number(training.name))
    rng = rng if layout.strategy == "pmap" else layout.replicate(rng)
    eval_steps = config.eval_steps or training.steps_per_epoch
    width = training_width(training)

    def current() -> Params:
        if layout.is_single and layout.strategy == "jit":
            return updates.merge_params(state.trained, placed)
        return updates.merge_params(updates.fetch(state.trained, layout), frozen)

    with contextlib.ExitStack() as stack:
        report = stack.enter_context(_open_report(training, start))
        stop = stack.enter_context(StopRequest())
        stack.enter_context(store)
        profile = stack.enter_context(Profile(training.directory / "profile", training.profile_steps))
        clock = StepClock()
        unchecked: list[tuple[int, dict[str, jax.Array]]] = []

        def check_finite() -> None:
            _check_finite(training, store, unchecked)
            unchecked.clear()

        def save(done: int, evaluated: dict[str, float] | None) -> None:
            check_finite()  # what is not finite is never saved
            with clock.part("checkpoint"):
                saved = _checkpoint(training, updates.fetch(state, layout))
                metric = None if evaluated is None else evaluated.get(training.metric)
                layout.on_main(functools.partial(store.save, done, saved, metrics=evaluated, metric=metric))

        batches = read_ahead(training, start, width)
        for step in range(start, total):
            profile.at(step)
            with clock.part("input"):
                there = updates.place_batches(next(batches), layout)
            state, metrics = step_fn(state, placed, there, rng)
            done = step + 1
            unchecked.append((done, metrics))
            features, index = update_examples(training, step)
            rows = features.rows(index)
            clock.count(len(index), features.row_lengths[rows[rows >= 0]])
            if done % LOG_EVERY == 0 or done in (1, total):
                values = _floats(updates.fetch(metrics, layout))
                check_finite()
                rate = float(schedule(step))
                layout.on_main(functools.partial(report.log, done, {**values, "learning_rate": rate}))
                report.log_speed(done, clock.rates(values, training.flops, _peak(layout)))
            report.progress(done, len(index))
            evaluated = None
            if done % eval_steps == 0 or done == total:
                with clock.part("evaluation"):
                    evaluated = training.evaluate(current())
                scalars = {f"dev_{k}": v for k, v in evaluated.items()}
                layout.on_main(functools.partial(report.log, done, scalars))
            stopping = done < total and stop.requested(layout)
            if evaluated is not None or done % config.save_steps == 0 or stopping:
                save(done, evaluated)
            if stopping:
                layout.on_main(store.wait)
                raise PreemptedError(f"{training.name}: told to stop; saved at step {done} of {total}")
        layout.on_main(store.wait)

    chosen = total
    if config.output == "best":
        chosen = store.best_step() or total
    result = current()
    if chosen != total:
        result = updates.merge_params(restore_state(store, chosen, like).trained, frozen)
    summary = {"steps": total, "output_step": chosen, "best_step": store.best_step()}
    return result, summary


def _open_report(training: Training, start: int) -> StageReport:
    """The first process writes it; where that cannot, none goes on."""
    make = functools.partial(StageReport, training.directory, training.name, training.total_steps, start)
    opened: list[StageReport] = []
    training.layout.on_main(lambda: opened.append(make()))
    return opened[0] if opened else make(silent=True)


def _latest_state(
    training: Training, store: CheckpointStore, like: TrainState, announce: Announce
) -> tuple[int, TrainState | None]:
    """The step to go on from and its state, of the last checkpoint that is whole; None at the beginning."""
    layout = training.layout
    layout.barrier(f"{training.name} looks for checkpoints")
    while True:
        try:
            step = store.latest_step()
            if step is None:
                return 0, None
            restored = restore_state(store, step, like)
        except DamagedCheckpointError as error:
            layout.barrier(f"{training.name} found step {error.step} damaged")
            layout.on_main(functools.partial(_set_aside, store, error, announce))
            continue
        announce(f"{training.name}: going on from step {step} of {training.total_steps}")
        return step, restored


def _set_aside(store: CheckpointStore, error: DamagedCheckpointError, announce: Announce) -> None:
    announce(f"{error.finding}; set aside as {store.set_aside(error.step)}")


def _peak(layout: DeviceMesh) -> float | None:
    """FLOP/s that all devices can do at most, None where nobody has told us."""
    peak = known_peak(layout.mesh.devices.flat[0].device_kind)
    return None if peak is None else 1e12 * peak * layout.num_devices


def _check_finite(
    training: Training, store: CheckpointStore, metrics: Sequence[tuple[int, dict[str, jax.Array]]]
) -> None:
    """Raises a UserError that names the first of these updates whose loss or gradient is not finite."""
    for step, values in metrics:
        found = _floats(updates.fetch({k: values[k] for k in ("loss", "gradient_norm")}, training.layout))
        strange = {name: value for name, value in found.items() if not math.isfinite(value)}
        if strange:
            last = store.latest_step()
            good = f"the last good checkpoint is {store.folder(last)}" if last else "no checkpoint is there"
            what = ", ".join(f"{name} is {value}" for name, value in strange.items())
            raise UserError(
                f"{training.name}: {what} at step {step}; {good}; a smaller {training.name}.learning_rate or "
                "float32 may help"
            )


def _checkpoint(training: Training, state: TrainState) -> dict[str, Any]:
    """Everything a run needs to go on: parameters, optimizer, the RNG's seed, position in the data."""
    step = int(state.step)
    epoch, position = divmod(step, training.steps_per_epoch)
    return {
        "trained": state.trained,
        "opt_state": state.opt_state,
        "step": np.asarray(step, np.int32),
        "seed": np.asarray(training.seed, np.int64),
        "epoch": np.asarray(epoch, np.int64),
        "position": np.asarray(position * training.update_size, np.int64),
    }


def restore_state(store: CheckpointStore, step: int, like: TrainState) -> TrainState:
    """The state at a checkpoint, on the host, however many devices wrote it.

    `like` has its structure and shapes.

    Raises:
      DamagedCheckpointError: a file of it is not as it was written.
    """
    template = {"trained": like.trained, "opt_state": like.opt_state, "step": np.asarray(0, np.int32)}
    template |= {name: np.asarray(0, np.int64) for name in ("seed", "epoch", "position")}
    saved = store.restore(step, template)
    return TrainState(saved["step"], saved["trained"], saved["opt_state"])


def _stage_number(name: str) -> int:
    """A number for a stage's name, so that each stage draws its own random numbers."""
    return int.from_bytes(name.encode()[:4].ljust(4, b"\0"), "big") & 0x7FFFFFFF


def _floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in metrics.items()}


Announce = Callable[[str], None]
READERS = 4  # threads that read from shards


@dataclasses.dataclass(frozen=True, eq=False)
class Training:
    """One training stage, ready to run.

    Attributes:
      name: the stage's name.
      directory: its folder; checkpoints and metrics go there.
      config: batch sizes, learning rate, ...
      model_config: shape of the model.
      seed: of the data order and of every draw.
      features: training examples.
      extras: name -> what the stage adds to a batch.
      make_objective: number of updates -> what is minimized.
      trains: which parameters are updated.
      evaluate: parameters -> metrics on the development set.
      metric: which of them decides what is best, the more the better.
      fingerprint: what a checkpoint must agree with to be resumed from.
      redraw: epoch -> the training examples as inputs drawn for it; None where they are always the same.
      layout: the devices.
      flops: lengths int [R] and, as `shares`, the part of the tokens that is left after each point of
        reduction -> FLOPs of each row in this stage; None where nobody asks.
      profile_steps: updates (0-based, first and one past the last) to record a profile of; None for none.
    """

    name: str
    directory: Path
    config: TrainingConfig
    model_config: ModelConfig
    seed: int
    features: Examples
    extras: Mapping[str, StageInput]
    make_objective: Callable[[int], ObjectiveFn]
    trains: updates.Trains
    evaluate: Callable[[Params], dict[str, float]]
    metric: str
    fingerprint: Mapping[str, Any]
    redraw: Callable[[int], Examples | None] | None = None
    layout: DeviceMesh = dataclasses.field(default_factory=single_device)
    profile_steps: tuple[int, int] | None = None
    flops: Callable[..., np.ndarray] | None = None

    @functools.lru_cache(maxsize=1)  # noqa: B019 - lives as long as the stage
    def features_of(self, epoch: int) -> Examples:
        """The training examples as they are read in an epoch."""
        return (self.redraw(epoch) if self.redraw and epoch else None) or self.features

    @property
    def update_size(self) -> int:
        """Examples an update."""
        return self.config.batch_size * self.config.accumulation_steps

    @property
    def steps_per_epoch(self) -> int:
        """Updates an epoch; the last one takes what is left."""
        return -(-len(self.features) // self.update_size)

    @property
    def total_steps(self) -> int:
        """Updates in all."""
        return self.config.max_steps or self.steps_per_epoch * self.config.epochs

    def checkpoints(self) -> CheckpointStore:
        """The stage's checkpoints."""
        return CheckpointStore(
            self.directory / "checkpoints",
            keep=self.config.keep_checkpoints,
            fingerprint=self.fingerprint,
        )

    def optimizer(self) -> tuple[Any, Any]:
        """The optimizer and its learning rate schedule."""
        share = int(self.config.warmup_fraction * self.total_steps)
        warmup = min(self.config.warmup_steps or share, self.total_steps)
        schedule = updates.linear_schedule(self.config.learning_rate, self.total_steps, warmup)
        adamw = updates.adamw(
            schedule,
            self.model_config,
            weight_decay=self.config.weight_decay,
            clip_norm=self.config.clip_norm,
            epsilon=self.config.adam_epsilon,
        )
        return adamw, schedule


def update_examples(training: Training, step: int) -> tuple[Examples, np.ndarray]:
    """The set of an update's examples and their positions in it, int64 [<= update_size].

    Depends on nothing but the seed and the number of the update; the last one of an epoch takes what is left.
    """
    epoch, position = divmod(step, training.steps_per_epoch)
    features = training.features_of(epoch)
    order = epoch_order(len(features), training.seed, epoch)
    return features, order[position * training.update_size :][: training.update_size]


def update_batches(training: Training, step: int, width: int) -> dict[str, np.ndarray]:
    """The examples of one update: arrays [accumulation_steps, own examples, ...].

    Own are those that this process's devices compute: all, unless it is one of several. An update that is
    not full is filled up with rows that do not count.
    """
    features, index = update_examples(training, step)
    size, own = training.config.batch_size, training.layout.own_rows(training.config.batch_size)
    passes = []
    for start in range(0, training.update_size, size):
        chosen = index[start : start + size][own]
        batch = pad_batch(features, chosen, own.stop - own.start, width)
        rows = np.maximum(batch_rows(features, chosen, own.stop - own.start), 0)
        for name, extra in training.extras.items():
            batch[name] = extra.take(np.maximum(batch["index"], 0), rows, width)
        passes.append(batch)
    return jax.tree.map(lambda *x: np.stack(x), *passes)


def read_ahead(training: Training, start: int, width: int) -> Iterator[dict[str, np.ndarray]]:
    """The batches of all updates from `start` on, read by threads while others are computed.

    Of examples that lie in shards; those in memory are quick enough. Where a run stands in the data is the
    number of its update, so that nothing of this needs saving.
    """
    steps = range(start, training.total_steps)
    make = functools.partial(update_batches, training, width=width)
    if not isinstance(training.features, PreparedFeatures):
        yield from map(make, steps)
        return
    import grain

    source = grain.MapDataset.source(steps).map(make)
    options = grain.ReadOptions(num_threads=READERS, prefetch_buffer_size=2 * READERS)
    yield from source.to_iter_dataset(options)


def training_width(training: Training) -> int:
    """One padded length for the whole stage, so that its step compiles once."""
    # As long as the model takes: so published, or not to be known before all epochs are drawn.
    if training.config.published_padding or training.redraw:
        return training.model_config.max_length
    longest = int(training.features.lengths.max())
    return next(w for w in width_buckets(training.model_config.max_length) if w >= longest)
