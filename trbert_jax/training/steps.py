"""One optimizer update: gradients of a stage's objective, accumulated over micro-batches.

Pure functions of arrays, tested without the loop. Source: docs/method.md, "Optimiser".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from trbert_jax.modeling.model import Batch, Params
from trbert_jax.training.objectives import Objective, mean_over_examples
from trbert_jax.training.optimizer import merge_params

# (all parameters, micro-batch, PRNG key of the update, number of the update) -> Objective
ObjectiveFn = Callable[[Params, Batch, jax.Array, jax.Array], Objective]


@struct.dataclass
class TrainState:
    """What an update changes.

    Attributes:
      step: int32 scalar, updates done.
      trained: the parameters this stage trains (see `optimizer.split_params`).
      opt_state: the optimizer's state.
    """

    step: jax.Array
    trained: Params
    opt_state: Any


def init_state(trained: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update."""
    return TrainState(jnp.zeros((), jnp.int32), trained, optimizer.init(trained))


def train_step(
    objective: ObjectiveFn,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    frozen: Params,
    batches: Batch,
    rng: jax.Array,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Updates the trained parameters once.

    The loss is the mean over all real examples of the update, however they are divided into
    micro-batches.

    Args:
      objective: the stage's objective.
      optimizer: its optimizer.
      state: before the update.
      frozen: parameters that are only read.
      batches: arrays [accumulation_steps, batch_size, ...].
      rng: the stage's key; the update's own is derived from it and `state.step`.

    Returns:
      The state after the update, and metrics: means over examples and the gradient's global norm.
    """
    update_rng = jax.random.fold_in(rng, state.step)

    def micro_step(batch: Batch) -> tuple[Params, dict[str, jax.Array]]:
        def loss(trained: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
            params = merge_params(trained, frozen)
            sums = objective(params, batch, update_rng, state.step).sums()
            return sums["loss"], sums

        grads, sums = jax.grad(loss, has_aux=True)(state.trained)
        return grads, sums

    first = jax.tree.map(lambda x: x[0], batches)
    if next(iter(batches.values())).shape[0] == 1:
        grads, sums = micro_step(first)
    else:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(micro_step, first))

        def accumulate(carry: Any, batch: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, carry, micro_step(batch)), None

        (grads, sums), _ = jax.lax.scan(accumulate, zeros, batches)

    grads = jax.tree.map(lambda g: g / jnp.maximum(sums["weight"], 1.0), grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
    metrics = {**mean_over_examples(sums), "gradient_norm": optax.tree.norm(grads)}
    return TrainState(state.step + 1, optax.apply_updates(state.trained, updates), opt_state), metrics
