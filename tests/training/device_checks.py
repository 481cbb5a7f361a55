"""What a training step does on eight devices; a program, since a process has the devices it started with.

python tests/training/device_checks.py CHECK ARGUMENT...    prints one JSON value
"""

import dataclasses
import functools
import json
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import tiny_models
from stage_steps import UPDATES, StageStep

from trbert_jax import parallel
from trbert_jax.model.packed import BACKENDS, packed_forward
from trbert_jax.model.tiles import Tiling
from trbert_jax.parallel import DeviceMesh, make_mesh, single_device
from trbert_jax.training import step as steps

TINY = dataclasses.replace(tiny_models.BERT, num_layers=2)
LAYOUTS: dict[str, Callable[[], DeviceMesh]] = {
    "one": single_device,
    "jit": make_mesh,
    "fsdp": lambda: make_mesh(fsdp=2),
    "pmap": lambda: make_mesh("pmap"),
}


def tiny_step(stage: str, execution: str) -> tuple[StageStep, Any]:
    """A step of a tiny model, which still has something to divide and more than one tile; its parameters."""
    parallel.SMALLEST_DIVIDED = 64
    tiling = Tiling(tokens=16, rest=4, group_tokens=20, width_step=4)
    BACKENDS["packed"] = functools.partial(packed_forward, tiling=tiling)
    return StageStep(stage, execution, TINY), tiny_models.tiny_params(TINY, scale=0.1)


def train(step: StageStep, params: Any, layout: DeviceMesh, passes: int) -> tuple[np.ndarray, Any]:
    """Losses of 20 updates, and the parameters after them."""
    state, frozen, rng = step.place(params, layout)
    update, losses = step.step(layout), []
    for number in range(UPDATES):
        batches = steps.place_batches(step.batch(number, passes), layout)
        state, metrics = update(state, frozen, batches, rng)
        losses.append(steps.fetch(metrics["loss"], layout))
    return np.array(losses), steps.fetch(state.trained, layout)


def differences(left: Any, right: Any) -> float:
    """The largest one between arrays of two trees."""
    found = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), left, right)
    return max(jax.tree.leaves(found))


def same(stage: str, execution: str, *ways: str) -> dict[str, Any]:
    """Largest differences to one device: of losses over 20 updates, and of the parameters after them.

    A way to train is a layout and the passes of an update: `fsdp 4`.
    """
    step, params = tiny_step(stage, execution)
    losses, after = train(step, params, single_device(), 1)
    found: dict[str, Any] = {"moved": differences(step.split(params)[0].trained, after)}
    for way in ways:
        name, passes = way.split()
        others, others_after = train(step, params, LAYOUTS[name](), int(passes))
        found[way] = [float(np.abs(losses - others).max()), differences(after, others_after)]
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


CHECKS: dict[str, Callable[..., Any]] = {check.__name__: check for check in (same, collectives, divided)}

if __name__ == "__main__":
    assert jax.device_count() == 8
    sys.stdout.write(json.dumps(CHECKS[sys.argv[1]](*sys.argv[2:])) + "\n")
