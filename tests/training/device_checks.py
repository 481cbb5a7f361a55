"""What a training step does on eight devices; a program, since a process has the devices it started with.

python tests/training/device_checks.py CHECK ARGUMENT...    prints one JSON value
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tiny_models
from stage_steps import UPDATES, StageStep

from trbert_jax import parallel
from trbert_jax.model.config import ModelConfig
from trbert_jax.model.model import init_params
from trbert_jax.model.packed import BACKENDS, packed_forward
from trbert_jax.model.tiles import Tiling
from trbert_jax.parallel import DeviceMesh, make_mesh, single_device
from trbert_jax.training import loop
from trbert_jax.training import step as steps
from trbert_jax.training.checkpoints import CheckpointStore
from trbert_jax.training.step import TrainState

TINY = dataclasses.replace(tiny_models.BERT, num_layers=2)
LAYOUTS: dict[str, Callable[[], DeviceMesh]] = {
    "one": single_device,
    "jit": make_mesh,
    "fsdp": lambda: make_mesh(fsdp=2),
    "fsdp4": lambda: make_mesh(fsdp=4),
    "pmap": lambda: make_mesh("pmap"),
}
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
EVERY_WAY = (("jit", 1), ("fsdp", 1), ("pmap", 1), ("one", 4), ("jit", 4))


def tiny_step(stage: str, execution: str) -> tuple[StageStep, Any]:
    """A step of a tiny model, which still has something to divide and more than one tile; its parameters."""
    parallel.SMALLEST_DIVIDED = 64
    tiling = Tiling(tokens=16, rest=4, group_tokens=20, width_step=4)
    BACKENDS["packed"] = functools.partial(packed_forward, tiling=tiling)
    return StageStep(stage, execution, TINY), tiny_models.tiny_params(TINY, scale=0.1)


def quickstart_step(stage: str, execution: str) -> tuple[StageStep, Any]:
    """A step of a model as large as the quickstart's, with its tiles; its parameters."""
    settings = StageStep(stage, execution, TINY).experiment.config.model
    scratch = settings.scratch
    model = ModelConfig(
        vocab_size=scratch.vocab_size,
        hidden_size=scratch.hidden_size,
        num_layers=scratch.num_layers,
        num_heads=scratch.num_heads,
        intermediate_size=scratch.intermediate_size,
        initializer_range=scratch.initializer_range,
        max_positions=settings.max_length,
        max_length=settings.max_length,
        labels=tuple("abcdefgh"),
    )
    step = StageStep(stage, execution, model, learning_rate=1e-3, num_samples=2)
    return step, jax.device_get(init_params(model, jax.random.key(0)))


def train(step: StageStep, params: Any, layout: DeviceMesh, passes: int) -> tuple[np.ndarray, Any]:
    """Losses of 20 updates, and the parameters after them."""
    state, frozen, rng = step.place(params, layout)
    _, losses, state = go_on(step, layout, state, frozen, rng, range(UPDATES), passes)
    return losses, steps.fetch(state.trained, layout)


def go_on(
    step: StageStep,
    layout: DeviceMesh,
    state: TrainState,
    frozen: Any,
    rng: Any,
    updates: range,
    passes: int = 1,
) -> tuple[Any, np.ndarray, TrainState]:
    """Some updates: the frozen parameters as they were, losses, the state after them."""
    update, losses = step.step(layout), []
    for number in updates:
        batches = steps.place_batches(step.batch(number, passes), layout)
        state, metrics = update(state, frozen, batches, rng)
        losses.append(steps.fetch(metrics["loss"], layout))
    return frozen, np.array(losses), state


def differences(left: Any, right: Any) -> float:
    """The largest one between arrays of two trees."""
    found = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), left, right)
    return max(jax.tree.leaves(found))


def compare(step: StageStep, params: Any, ways: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """Largest differences to one device: of losses over 20 updates, and of the parameters after them."""
    losses, after = train(step, params, single_device(), 1)
    before = step.split(params)[0].trained
    found: dict[str, Any] = {"moved": differences(before, after)}
    for name, passes in ways:
        others, others_after = train(step, params, LAYOUTS[name](), passes)
        found[f"{name} {passes}"] = [float(np.abs(losses - others).max()), differences(after, others_after)]
    return found


def same(stage: str, execution: str) -> dict[str, Any]:
    """Every way to train a tiny model."""
    return compare(*tiny_step(stage, execution), EVERY_WAY)


def same_quickstart(stage: str, execution: str) -> dict[str, Any]:
    """Few ways to train the quickstart's model, for time: with the second axis and accumulation at once."""
    step, params = quickstart_step(stage, execution)
    found = compare(step, params, (("fsdp", 4), ("pmap", 1)))
    state = step.place(params, make_mesh(fsdp=2))[0]
    specs = [x.sharding.spec for x in jax.tree.leaves(state.trained)]
    return {**found, "divided": sum(parallel.FSDP in spec for spec in specs)}


def restored() -> dict[str, Any]:
    """A state saved by eight devices of which four share it, restored onto others, which go on with it."""
    step, params = tiny_step("joint", "masked")
    layout = LAYOUTS["fsdp4"]()
    state, frozen, rng = step.place(params, layout)
    frozen, _, state = go_on(step, layout, state, frozen, rng, range(8))
    saved = steps.fetch(state, layout)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = CheckpointStore(Path(folder), keep=1, fingerprint={})
        position = dict.fromkeys(("seed", "epoch", "position"), np.asarray(0, np.int64))
        arrays = {"trained": saved.trained, "opt_state": saved.opt_state, "step": saved.step}
        store.save(8, {**arrays, **position})
        store.wait()
        expected = go_on(step, layout, state, frozen, rng, range(8, UPDATES))[1]
        for name in ("pmap", "one", "jit", "fsdp"):
            other = LAYOUTS[name]()
            like = step.split(params)[0]
            state = steps.place_state(loop.restore_state(store, 8, like), other)
            there = differences(saved, steps.fetch(state, other))
            _, frozen, rng = step.place(params, other)
            losses = go_on(step, other, state, frozen, rng, range(8, UPDATES))[1]
            found[name] = [there, float(np.abs(losses - expected).max())]
    return found


def collectives(stage: str, execution: str) -> dict[str, list[str]]:
    """Shapes that a sharded update sends between devices, by operation, and those of its parameters."""
    step, params = tiny_step(stage, execution)
    layout = make_mesh(fsdp=2)
    state, frozen, rng = step.place(params, layout)
    arguments = (state, frozen, steps.place_batches(step.batch(0), layout), rng)
    text = step.step(layout).lower(*arguments).compile().as_text()
    found = {
        name: _results(text, name)
        for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute")
    }
    arrays = jax.tree.leaves((state.trained, frozen))
    return {**found, "parameters": sorted({f"f32[{','.join(map(str, x.shape))}]" for x in arrays})}


def _results(text: str, operation: str) -> list[str]:
    """Shapes of the results of an operation in an HLO program, a tuple's joined by spaces."""
    # An asynchronous one has its results where it is done; where it starts, its operands too.
    lines = re.findall(rf"^ *(?:ROOT )?%?\S+ = (.*?) {operation}(?:-done)?\(", text, re.MULTILINE)
    return [" ".join(re.findall(r"[a-z]+[0-9a-z]*\[[\d,]*\]", line)) for line in lines]


def divided() -> dict[str, float]:
    """Bytes of the state on one device, with and without the second axis."""
    step, params = tiny_step("joint", "masked")

    def size(layout: DeviceMesh) -> float:
        state = step.place(params, layout)[0]
        return float(sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state)))

    return {"data": size(make_mesh()), "fsdp": size(make_mesh(fsdp=8))}


CHECKS: dict[str, Callable[..., Any]] = {
    check.__name__: check for check in (same, same_quickstart, restored, collectives, divided)
}

if __name__ == "__main__":
    assert jax.device_count() == 8
    sys.stdout.write(json.dumps(CHECKS[sys.argv[1]](*sys.argv[2:])) + "\n")
