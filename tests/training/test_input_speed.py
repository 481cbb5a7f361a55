"""Reading delivers examples many times as fast as a training step takes them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from stage_steps import QUICKSTART

from trbert_jax.config import load_config
from trbert_jax.training import loop, stages
from trbert_jax.training import step as steps
from trbert_jax.training.experiment import Experiment
from trbert_jax.training.prepared import PreparedFeatures
from trbert_jax.training.step import split_params

# The step is the one that users wait for.
pytestmark = pytest.mark.usefixtures("optimized")
SECONDS = 1.0  # of reading
STEPS = 8


def quickstart(folder: Path, *overrides: str) -> Experiment:
    """The quickstart on some of its texts, often enough that reading does not end."""
    small = ["data.max_train_examples=256", "data.max_eval_examples=16", "finetune.epochs=1000"]
    return Experiment(
        load_config(QUICKSTART, [f"workdir={folder}", *small, *overrides]), announce=lambda line: None
    )


def examples_per_second(stream: Iterator[dict[str, Any]]) -> float:
    next(stream)  # threads start
    count, start = 0, time.perf_counter()
    for batch in stream:
        count += int(batch["valid"].sum())
        if time.perf_counter() - start > SECONDS:
            break
    return count / (time.perf_counter() - start)


def trained_per_second(prepared: stages.Prepared) -> float:
    """Examples of whole updates on this CPU, the batches already there."""
    training = prepared.training
    adamw, _ = training.optimizer()
    trained, frozen = split_params(jax.tree.map(jnp.asarray, prepared.start.params), training.trains)
    state = steps.init_state(trained, adamw)
    step = steps.update_step(training.make_objective(training.total_steps), adamw, training.layout)
    stream = loop.read_ahead(training, 0, loop.training_width(training))
    updates = [next(stream) for _ in range(STEPS)]
    state, _ = jax.block_until_ready(step(state, frozen, updates[0], jax.random.key(0)))
    start = time.perf_counter()
    for update in updates:
        state, _ = step(state, frozen, update, jax.random.key(0))
    jax.block_until_ready(state)
    return STEPS * training.update_size / (time.perf_counter() - start)


@pytest.mark.slow
def test_reading_is_twenty_times_as_fast_as_a_step(tmp_path: Path) -> None:
    """Of the quickstart, from memory and from shards."""
    run = quickstart(tmp_path / "work")
    run.prepare_data(tmp_path / "shards", shard_size=64, workers=1)
    in_memory = stages.prepare(run, "finetune")
    from_shards = stages.prepare(
        quickstart(tmp_path / "work", f"data.prepared={tmp_path / 'shards'}"), "finetune"
    ).training
    assert isinstance(from_shards.features, PreparedFeatures)
    needed = trained_per_second(in_memory)
    for training in (in_memory.training, from_shards):
        stream = loop.read_ahead(training, 0, loop.training_width(training))
        assert examples_per_second(stream) >= 20 * needed, type(training.features).__name__
