"""One training stage, and the batches of its updates.

Which examples an update takes depends on nothing but the seed and its number: a run that goes on needs
no more than that number, and every process finds its own rows by itself.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from trbert_jax.config import TrainingConfig
from trbert_jax.model.config import ModelConfig
from trbert_jax.model.model import Params
from trbert_jax.parallel import DeviceMesh, single_device
from trbert_jax.tasks.batching import batch_rows, epoch_order, pad_batch, width_ladder
from trbert_jax.tasks.examples import Examples
from trbert_jax.training import optimizer as optim
from trbert_jax.training.checkpoints import CheckpointStore
from trbert_jax.training.prepared import PreparedFeatures
from trbert_jax.training.step import ObjectiveFn

Announce = Callable[[str], None]
READERS = 4  # threads that read from shards


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
    trains: optim.Trains
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

    def checkpoints(self, announce: Announce = print) -> CheckpointStore:
        """The stage's checkpoints."""
        return CheckpointStore(
            self.directory / "checkpoints",
            keep=self.config.keep_checkpoints,
            fingerprint=self.fingerprint,
            announce=announce,
        )

    def optimizer(self) -> tuple[Any, Any]:
        """The optimizer and its learning rate schedule."""
        share = int(self.config.warmup_fraction * self.total_steps)
        warmup = min(self.config.warmup_steps or share, self.total_steps)
        schedule = optim.linear_schedule(self.config.learning_rate, self.total_steps, warmup)
        adamw = optim.adamw(
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
    return next(w for w in width_ladder(training.model_config.max_length) if w >= longest)
