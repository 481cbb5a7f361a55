"""Trains a stage on eight devices; a program, since a process keeps the devices it began with.

python tests/training/device_checks.py STAGE BACKEND WAY...    prints one JSON object

A way to train is a layout and the passes of an update: `fsdp 4`.
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

LAYOUTS: dict[str, Callable[[], DeviceMesh]] = {
    "one": single_device,
    "jit": make_mesh,
    "fsdp": lambda: make_mesh(fsdp=2),
    "pmap": lambda: make_mesh("pmap"),
}


def train(step: StageStep, params: Any, layout: DeviceMesh, passes: int) -> tuple[np.ndarray, Any, str]:
    """Losses of 20 updates, the parameters after them, and the program of an update."""
    state, frozen, rng = step.place(params, layout)
    batches = [steps.place_batches(step.batch(i, passes), layout) for i in range(UPDATES)]
    update, losses = step.step(layout).lower(state, frozen, batches[0], rng).compile(), []
    for batch in batches:
        state, metrics = update(state, frozen, batch, rng)
        losses.append(steps.fetch(metrics["loss"], layout))
    return np.array(losses), steps.fetch(state.trained, layout), update.as_text()


def difference(left: Any, right: Any) -> float:
    """The largest one between arrays of two trees."""
    found = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), left, right)
    return max(jax.tree.leaves(found))


def results(program: str, operation: str) -> list[str]:
    """Shapes of the results of an operation in an HLO program, a tuple's joined by spaces."""
    # An asynchronous one has its results where it is done; where it starts, its operands too.
    lines = re.findall(rf"^ *(?:ROOT )?%?\S+ = (.*?) {operation}(?:-done)?\(", program, re.MULTILINE)
    return [" ".join(re.findall(r"[a-z]+[0-9a-z]*\[[\d,]*\]", line)) for line in lines]


def check(stage: str, backend: str, *ways: str) -> dict[str, Any]:
    """How each way differs from one device, what devices send each other, bytes of the state on one."""
    # A tiny model still has something to divide and more than one tile.
    parallel.SMALLEST_DIVIDED = 64
    tiling = Tiling(tokens=16, rest=4, group_tokens=24, width_step=6)
    BACKENDS["packed"] = functools.partial(packed_forward, tiling=tiling)
    model = dataclasses.replace(tiny_models.BERT, num_layers=1 if stage == "finetune" else 2)
    step, params = StageStep(stage, backend, model), tiny_models.tiny_params(model, scale=0.1)

    before = step.split(params)[0].trained
    losses, after, _ = train(step, params, single_device(), 1)
    differences, sent = {}, {}
    for way in ways:
        name, passes = way.split()
        others, others_after, program = train(step, params, LAYOUTS[name](), int(passes))
        differences[way] = [float(np.abs(losses - others).max()), difference(after, others_after)]
        if name == "fsdp":
            operations = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
            sent = {name: results(program, name) for name in operations}

    def size(layout: DeviceMesh) -> int:
        state = step.place(params, layout)[0]
        return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))

    shapes = {f"f32[{','.join(map(str, x.shape))}]" for x in jax.tree.leaves(params)}
    return {
        "moved": difference(before, after),
        "differences": differences,
        "sent": sent,
        "parameters": sorted(shapes),
        "bytes": {"whole": size(make_mesh()), "divided": size(make_mesh(fsdp=8))},
    }


if __name__ == "__main__":
    assert jax.device_count() == 8
    sys.stdout.write(json.dumps(check(*sys.argv[1:])) + "\n")
