"""What a training step does on eight devices; a program, since a process has the devices it started with.

python tests/training/device_checks.py CHECK ARGUMENT...    prints one JSON value
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tiny_models
from jax import export
from tiny_batches import random_batch

from trbert_jax import parallel, tokens
from trbert_jax.modeling.model import Batch, Params, TokenReducingModel, forward
from trbert_jax.modeling.packed import packed_forward
from trbert_jax.modeling.tiles import Tiling
from trbert_jax.parallel import KEPT, ROWS, Layout, make_layout, single_device
from trbert_jax.training import objectives, optimizer, steps
from trbert_jax.training.steps import update_step

parallel.SMALLEST_DIVIDED = 64  # so that a tiny model has something to divide
CONFIG = dataclasses.replace(tiny_models.BERT, num_layers=2)
PARAMS = tiny_models.tiny_params(CONFIG, scale=0.1)
NUM_SAMPLES, UPDATES, ROWS_AN_UPDATE = 3, 20, 32
EXECUTE: dict[str, objectives.Execute] = {
    "masked": forward,
    "packed": functools.partial(
        packed_forward, tiling=Tiling(tokens=16, rest=4, group_tokens=20, width_step=4)
    ),
}


def make_objective(stage: str, execution: str, model: TokenReducingModel) -> Callable[..., Any]:
    execute = EXECUTE[execution]

    def objective(params: Params, batch: Batch, rng: jax.Array, step: jax.Array) -> objectives.Objective:
        if stage == "finetune":
            return objectives.dense_objective(model, params, batch, execute=execute)
        if stage == "init":
            return objectives.initialization_objective(model, params, batch, execute=execute)
        imitating = step < UPDATES // 2 if stage == "policy" else False
        samples = objectives.sample_policy(
            model,
            params,
            batch if stage == "joint" else {k: v for k, v in batch.items() if k != "teacher_logits"},
            rule=objectives.sampling_rule(rng, batch, NUM_SAMPLES, imitating),
            num_samples=NUM_SAMPLES,
            alpha=1.0,
            max_length=CONFIG.max_length,
            execute=execute,
        )
        loss = objectives.joint_objective if stage == "joint" else objectives.policy_objective
        return loss(batch, samples)

    return objective


TRAINS = {
    "finetune": optimizer.trains_dense(CONFIG),
    "init": optimizer.trains_selectors(CONFIG),
    "policy": optimizer.trains_selectors(CONFIG),
    "joint": optimizer.trains_all(CONFIG),
}
LAYOUTS: dict[str, Callable[[], Layout]] = {
    "one": single_device,
    "jit": make_layout,
    "fsdp": lambda: make_layout(fsdp=2),
    "pmap": lambda: make_layout("pmap"),
}


def update_batch(number: int, accumulation_steps: int) -> dict[str, np.ndarray]:
    """The examples of an update, lengths and fillers unevenly spread over devices and micro-batches."""
    rng = np.random.default_rng(number)
    lengths = rng.integers(1, 19, ROWS_AN_UPDATE).tolist()
    batch = dict(random_batch(CONFIG, lengths, 18, seed=number))
    batch["valid"] = jnp.arange(ROWS_AN_UPDATE) < ROWS_AN_UPDATE - 5
    return {k: np.asarray(v).reshape(accumulation_steps, -1, *v.shape[1:]) for k, v in batch.items()}


def start(stage: str, layout: Layout) -> tuple[Any, Any, Any, Any]:
    adamw = optimizer.adamw(optimizer.linear_schedule(1e-2, UPDATES, 2), CONFIG, epsilon=1e-4)
    trained, frozen = optimizer.split_params(jax.tree.map(jnp.asarray, PARAMS), TRAINS[stage])
    state = steps.first_state(jax.tree.map(np.asarray, trained), adamw, layout)
    rng = jax.random.key(3)
    rng = rng if layout.strategy == "pmap" else layout.replicate(rng)
    return adamw, state, steps.place_frozen(frozen, layout), rng


def train(stage: str, layout: Layout, execution: str, accumulation_steps: int = 1) -> tuple[np.ndarray, Any]:
    adamw, state, frozen, rng = start(stage, layout)
    step = update_step(make_objective(stage, execution, TokenReducingModel(CONFIG)), adamw, layout)
    losses = []
    for number in range(UPDATES):
        batches = steps.place_batches(update_batch(number, accumulation_steps), layout)
        state, metrics = step(state, frozen, batches, rng)
        losses.append(steps.fetch(metrics["loss"], layout))
    return np.array(losses), steps.fetch(state.trained, layout)


def same(stage: str, execution: str) -> dict[str, Any]:
    """Largest differences to one device: of losses over 20 updates, and of the parameters after them."""
    losses, params = train(stage, single_device(), execution)
    found: dict[str, Any] = {"moved": float(np.abs(losses[-1] - losses[0]))}
    for name, accumulation_steps in (("jit", 1), ("fsdp", 1), ("pmap", 1), ("one", 4), ("jit", 4)):
        others, after = train(stage, LAYOUTS[name](), execution, accumulation_steps)
        differences = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), params, after)
        found[f"{name} {accumulation_steps}"] = [
            float(np.abs(losses - others).max()),
            max(jax.tree.leaves(differences)),
        ]
    return found


def step_and_arguments(stage: str, execution: str, layout: Layout) -> tuple[Any, tuple[Any, ...]]:
    adamw, state, frozen, rng = start(stage, layout)
    step = update_step(make_objective(stage, execution, TokenReducingModel(CONFIG)), adamw, layout)
    return step, (state, frozen, steps.place_batches(update_batch(0, 1), layout), rng)


def exported() -> list[list[Any]]:
    """Every update and the packed predictor, lowered for machines that are not here."""
    done = []
    for platform in ("tpu", "cuda"):
        for stage in TRAINS:
            for execution in EXECUTE:
                step, arguments = step_and_arguments(stage, execution, make_layout(fsdp=2))
                program = export.export(step, platforms=[platform])(*arguments)
                done.append([platform, stage, execution, program.nr_devices])
        layout, model = make_layout(), TokenReducingModel(CONFIG)

        def predict(params: Params, batch: Batch, model: TokenReducingModel = model) -> Any:
            output = EXECUTE["packed"](model, params, batch, rule=tokens.keep_probable)
            return output.logits, jnp.stack([s.keep for s in output.selections])

        mapped = jax.jit(layout.by_rows(predict, out_specs=(ROWS, KEPT)))
        batch = {k: v[0] for k, v in update_batch(0, 1).items()}
        arguments = (layout.replicate(PARAMS), layout.place_rows(batch))
        program = export.export(mapped, platforms=[platform])(*arguments)
        done.append([platform, "predict", "packed", program.nr_devices])
    return done


def gathers() -> dict[str, list[str]]:
    """Shapes that a sharded joint update gathers, and those of its parameters and of its state."""
    layout = make_layout(fsdp=2)
    step, arguments = step_and_arguments("joint", "packed", layout)
    text = step.lower(*arguments).compile().as_text()
    found = re.findall(r"= \(?([a-z0-9]+\[[\d,]*\])[^=]*? all-gather(?:-start)?\(", text)
    shapes = {f"f32[{','.join(map(str, x.shape))}]" for x in jax.tree.leaves(arguments[0].trained)}
    reduced = re.findall(r"all-reduce(?:-start)?\(", text)
    return {"gathered": sorted(set(found)), "parameters": sorted(shapes), "reductions": [str(len(reduced))]}


def divided() -> dict[str, float]:
    """Bytes of the state on one device, with and without the second axis."""

    def size(layout: Layout) -> float:
        _, state, _, _ = start("joint", layout)
        return float(sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state)))

    return {"data": size(make_layout()), "fsdp": size(make_layout(fsdp=8))}


CHECKS: dict[str, Callable[..., Any]] = {
    check.__name__: check for check in (same, exported, gathers, divided)
}

if __name__ == "__main__":
    assert jax.device_count() == 8
    sys.stdout.write(json.dumps(CHECKS[sys.argv[1]](*sys.argv[2:])) + "\n")
