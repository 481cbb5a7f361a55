"""Run a training stage: prepare it, update parameters batch by batch, save its model.

A run that is killed and started again resumes from the last checkpoint and ends with the same numbers: the
order of the examples and every random draw follow from the seed and the number of the update.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from trbert_jax.errors import PreemptedError, UserError
from trbert_jax.model.model import Params
from trbert_jax.model.pretrained import save_pretrained
from trbert_jax.parallel import DeviceMesh
from trbert_jax.reduction.flops import known_peak
from trbert_jax.training import step as updates
from trbert_jax.training.batches import Training, prepare, read_ahead
from trbert_jax.training.checkpoints import CheckpointStore, DamagedCheckpointError
from trbert_jax.training.experiment import Experiment
from trbert_jax.training.logging import Profile, StageReport, StepClock
from trbert_jax.training.preemption import StopRequest
from trbert_jax.training.stages import Stage
from trbert_jax.training.step import TrainState, init_state, merge_params

logger = logging.getLogger(__name__)

LOG_EVERY = 10  # updates between lines of metrics.jsonl


def train_stage(experiment: Experiment, stage: Stage) -> dict[str, Any]:
    """Runs a training stage and saves its model; returns its summary."""
    devices = experiment.devices
    training = devices.together(lambda: prepare(experiment, stage))
    start = training.start
    fingerprint = experiment.fingerprint(stage.name, training.examples)
    devices.check_agreement(f"what stage {stage.name} trains on (settings, data)", fingerprint)
    experiment.check_inputs(stage.name, start, ("dev",))
    params, summary = train(training)
    folder, exclude = experiment.directory(stage.name) / "model", () if stage.reduces else ("selectors",)
    params = jax.device_get(params)
    devices.on_main(lambda: save_pretrained(folder, start.config, params, start.tokenizer, exclude=exclude))
    return summary


def train(training: Training) -> tuple[Params, dict[str, Any]]:
    """Trains a stage, or the rest of it. Every process calls this; the first one writes.

    Returns:
      All parameters (of the best or the last checkpoint, as `output` asks) and a summary.

    Raises:
      PreemptedError: the process received SIGTERM; a checkpoint of the last update is saved.
      UserError: the loss or the gradient is not finite; the message names the update.
    """
    experiment, settings, total = training.experiment, training.settings, training.total_steps
    devices, directory = experiment.devices, experiment.directory(training.name)
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
    rng = jax.random.fold_in(jax.random.key(experiment.config.seed), _stage_number(training.name))
    rng = rng if devices.strategy == "pmap" else devices.replicate(rng)
    eval_steps = settings.eval_steps or training.steps_per_epoch
    flops = functools.partial(training.stage.flops, experiment.config, training.start.config)
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
        profile = stack.enter_context(Profile(directory / "profile", experiment.profile_steps))
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
                    metric = None if evaluated is None else evaluated.get(experiment.data.task.metric)
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
    devices = training.experiment.devices
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
        logger.info("%s: resuming from step %d of %d", training.name, step, training.total_steps)
        return step, restored


def _set_aside(store: CheckpointStore, error: DamagedCheckpointError) -> None:
    logger.warning("%s; set aside as %s", error.finding, store.set_aside(error.step))


def check_finite(
    training: Training, store: CheckpointStore, metrics: Sequence[tuple[int, dict[str, jax.Array]]]
) -> None:
    """Raises a UserError that names the first of these updates whose loss or gradient is not finite."""
    for step, values in metrics:
        watched = {name: values[name] for name in ("loss", "gradient_norm")}
        floats = _floats(updates.fetch(watched, training.experiment.devices))
        bad = [f"{name} is {value}" for name, value in floats.items() if not math.isfinite(value)]
        if bad:
            last = store.latest_step()
            good = f"the last good checkpoint is {store.folder(last)}" if last else "no checkpoint exists yet"
            raise UserError(
                f"{training.name}: {', '.join(bad)} at step {step}; {good}; a smaller "
                f"{training.name}.learning_rate or float32 may help"
            )


# Reports ------------------------------------------------------------------------------------------


def _open_report(training: Training, start: int) -> StageReport:
    """Opens the report in the first process; if that fails, all processes stop."""
    experiment, name = training.experiment, training.name
    make = functools.partial(StageReport, experiment.directory(name), name, training.total_steps, start)
    opened: list[StageReport] = []
    experiment.devices.on_main(lambda: opened.append(make()))
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
