"""Packed execution on several devices: under shard_map each does the work of its own rows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_PROGRAM = """
import functools, json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, PartitionSpec as P
import tiny_models
from tiny_batches import random_batch
from trbert_jax.reduction import selection as tokens
from trbert_jax.tasks import losses as task
from trbert_jax.model.model import TokenReducingModel, forward
from trbert_jax.model.packed import packed_forward
from trbert_jax.model.tiles import Tiling

config = tiny_models.BERT
# Weights of a usual size: larger ones amplify the rounding in which two programs differ.
params = jax.tree.map(jnp.asarray, tiny_models.tiny_params(config, scale=0.1))
# The first device has many tokens, the second few.
batch = random_batch(config, [18, 18, 17, 1, 2, 1], width=18)
model, tiling = TokenReducingModel(config), Tiling(tokens=16, rest=4, group_tokens=20, width_step=4)

def run(execute, params, batch):
    def loss(params):
        output = execute(model, params, batch, rule=tokens.keep_probable)
        kept = jnp.stack([s.keep for s in output.selections], 1)
        return task.cross_entropy(output.logits, batch["labels"]).sum(), (output.logits, kept)
    gradient, aux = jax.grad(loss, has_aux=True)(params)
    return aux, gradient

@functools.partial(
    jax.shard_map,
    mesh=jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)),
    in_specs=(P(), P("data")),
    out_specs=(P("data"), P()),
    check_vma=False,
)
def sharded(params, batch):
    aux, gradient = run(functools.partial(packed_forward, tiling=tiling), params, batch)
    return aux, jax.lax.psum(gradient, "data")

assert jax.device_count() == 2
(logits, kept), gradient = jax.jit(sharded)(params, batch)
(expected, masks), reference = jax.jit(functools.partial(run, forward))(params, batch)
np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
np.testing.assert_array_equal(kept, masks)
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient, reference)
print("same on", jax.device_count(), "devices")
"""


def test_each_device_picks_its_own_amount_of_work() -> None:
    tests = Path(__file__).parent.parent
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(tests), os.environ.get("PYTHONPATH")])),
    }
    process = subprocess.run(
        [sys.executable, "-c", _PROGRAM], env=environment, capture_output=True, text=True, check=False
    )
    assert process.stdout == "same on 2 devices\n", process.stderr
