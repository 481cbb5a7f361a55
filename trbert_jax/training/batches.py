"""Prepare a training stage and build the batches of its updates."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from trbert_jax.config import TrainingConfig
from trbert_jax.errors import UserError
from trbert_jax.model.model import Params
from trbert_jax.model.pretrained import Pretrained
from trbert_jax.tasks.examples import Examples, batch_rows, epoch_order, pad_batch, width_buckets
from trbert_jax.training import step as updates
from trbert_jax.training.checkpoints import CheckpointStore
from trbert_jax.training.experiment import Experiment
from trbert_jax.training.prepared import PreparedFeatures
from trbert_jax.training.stage_inputs import StageInputs
from trbert_jax.training.stages import Stage, objective_of
from trbert_jax.training.step import split_params

READERS = 4  # threads that read prepared data


@dataclasses.dataclass(frozen=True, eq=False)
class Training:
    """A training stage that is ready to run."""

    experiment: Experiment
    stage: Stage
    start: Pretrained  # the model it starts from
    examples: Examples  # for training, as in epoch 0
    inputs: StageInputs  # outputs of earlier stages that batches contain

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
        return updates.update_step(objective, adamw, self.experiment.devices)

    def checkpoints(self) -> CheckpointStore:
        """Returns the stage's checkpoints."""
        folder = self.experiment.directory(self.name) / "checkpoints"
        fingerprint = self.experiment.fingerprint(self.name, self.examples)
        return CheckpointStore(folder, self.settings.keep_checkpoints, fingerprint)

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


class UpdateBatch(NamedTuple):
    """The examples of one update."""

    arrays: dict[str, Any]  # [accumulation_steps, examples of this process's devices, ...]
    num_examples: int  # of all processes
    lengths: np.ndarray  # int [R], tokens of each of their rows


def update_batches(training: Training, step: int, width: int) -> UpdateBatch:
    """Builds the batches of an update, which follow from the seed and the number of the update.

    The last update of an epoch takes the remaining examples; padding examples, not counted, fill it up.
    """
    epoch, position = divmod(step, training.steps_per_epoch)
    examples, order = training.epoch(epoch)
    index = order[position * training.update_size :][: training.update_size]
    size = training.settings.batch_size
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
