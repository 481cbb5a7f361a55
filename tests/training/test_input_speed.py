"""Reading delivers examples many times as fast as a training step takes them."""

import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from stage_steps import QUICKSTART

from trbert_jax.config import load_config
from trbert_jax.training import loop
from trbert_jax.training import step as steps
from trbert_jax.training.experiment import Experiment
from trbert_jax.training.prepared import PreparedFeatures
from trbert_jax.training.stages import STAGES

# The step is the one that users wait for.
pytestmark = pytest.mark.usefixtures("optimized")
SECONDS = 1.0  # of reading
STEPS = 8


def quickstart(folder: Path, *overrides: str) -> Experiment:
    """The quickstart on some of its texts, for so many epochs that reading does not end."""
    small = ["data.max_train_examples=256", "data.max_eval_examples=16", "finetune.epochs=1000"]
    return Experiment(load_config(QUICKSTART, [f"workdir={folder}", *small, *overrides]))


def examples_per_second(stream: Iterator[loop.UpdateBatch]) -> float:
    next(stream)  # threads start
    count, start = 0, time.perf_counter()
    for batch in stream:
        count += batch.num_examples
        if time.perf_counter() - start > SECONDS:
            break
    return count / (time.perf_counter() - start)


def trained_per_second(training: loop.Training) -> float:
    """Examples of whole updates on this CPU, without reading."""
    trained, frozen = jax.tree.map(jnp.asarray, (training.trained, training.frozen))
    state, step = steps.init_state(trained, training.optimizer), training.update()
    stream = loop.read_ahead(training, 0)
    updates = [next(stream).arrays for _ in range(STEPS)]
    state, _ = jax.block_until_ready(step(state, frozen, updates[0], jax.random.key(0)))
    start = time.perf_counter()
    for update in updates:
        state, _ = step(state, frozen, update, jax.random.key(0))
    jax.block_until_ready(state)
    return STEPS * training.update_size / (time.perf_counter() - start)


@pytest.mark.slow
def test_reading_is_twenty_times_as_fast_as_a_step(tmp_path: Path) -> None:
    """Of the quickstart, from memory and from prepared data."""
    run, stage = quickstart(tmp_path / "work"), STAGES["finetune"]
    run.prepare_data(tmp_path / "shards", shard_size=64, workers=1)
    in_memory = loop.prepare(run, stage)
    overrides = f"data.prepared={tmp_path / 'shards'}"
    from_shards = loop.prepare(quickstart(tmp_path / "work", overrides), stage)
    assert isinstance(from_shards.examples, PreparedFeatures)
    needed = trained_per_second(in_memory)
    for training in (in_memory, from_shards):
        assert examples_per_second(loop.read_ahead(training, 0)) >= 20 * needed
