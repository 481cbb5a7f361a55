"""AdamW with linear warm-up and decay, clipping, and which parameters a stage trains.

Source: docs/method.md, "Optimizer".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from trbert_jax.model.config import ModelConfig
from trbert_jax.model.model import Params

Trains = Callable[[str], bool]  # name of a component of the encoder ("layer_3", "head") -> trained?


def linear_schedule(peak: float, total_steps: int, warmup_steps: int) -> optax.Schedule:
    """Learning rate of update t (0-based): from 0 up to `peak` over the warm-up, then down to 0.

    With a warm-up the first update has rate 0, as published.
    """
    decay = optax.linear_schedule(peak, 0.0, max(total_steps - warmup_steps, 1))
    if not warmup_steps:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup_steps), decay], [warmup_steps])


def adamw(
    schedule: optax.Schedule,
    config: ModelConfig,
    *,
    weight_decay: float = 0.0,
    clip_norm: float = 1.0,
    epsilon: float = 1e-8,
) -> optax.GradientTransformation:
    """Clipping by the global norm of all trained parameters, then AdamW (betas 0.9 and 0.999)."""
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        scale_by_published_adam(epsilon),
        optax.add_decayed_weights(weight_decay, mask=lambda params: decay_mask(params, config)),
        optax.scale_by_learning_rate(schedule),
    )


def scale_by_published_adam(
    epsilon: float, beta1: float = 0.9, beta2: float = 0.999
) -> optax.GradientTransformation:
    """Adam with epsilon added to the root of the uncorrected second moment.

    `sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + epsilon)`: against `optax.scale_by_adam`
    this makes epsilon 30 times larger in the first update, which shows wherever gradients are
    small, as in word embeddings.
    """

    def init(params: Params) -> optax.ScaleByAdamState:
        # Two trees of zeros, not one twice: a training step donates their buffers.
        mu, nu = optax.tree.zeros_like(params), optax.tree.zeros_like(params)
        return optax.ScaleByAdamState(count=jnp.zeros((), jnp.int32), mu=mu, nu=nu)

    def update(grads: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(grads, state.mu, beta1, 1)
        nu = optax.tree.update_moment_per_elem_norm(grads, state.nu, beta2, 2)
        scale = jnp.sqrt(1 - beta2**count) / (1 - beta1**count)
        updates = jax.tree.map(lambda m, v: scale * m / (jnp.sqrt(v) + epsilon), mu, nu)
        return updates, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformation(init, update)


def decay_mask(params: Params, config: ModelConfig) -> Any:
    """True where weight decay applies: not to biases, nor to LayerNorm scales.

    DistilBERT's own layers name their LayerNorms differently, and the published exclusion by name
    misses them: there the scales are decayed. Kept, since the default decay is 0 anyway.
    """

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        names = [entry.key for entry in path]
        if names[-1] == "scale":
            return config.model_type == "distilbert" and "embeddings" not in names
        return names[-1] != "bias"

    return jax.tree_util.tree_map_with_path(decays, params)


def split_params(params: Params, trains: Trains) -> tuple[Params, Params]:
    """Splits a parameter tree into (trained, frozen), so that no gradient is ever computed for the rest."""
    trained: Params = {"encoder": {}}
    frozen: Params = {"encoder": {}}
    for name, value in params["encoder"].items():
        (trained if trains(name) else frozen)["encoder"][name] = value
    for name, value in params.items():
        if name != "encoder":
            (trained if trains(name) else frozen)[name] = value
    return trained, frozen


def merge_params(trained: Params, frozen: Params) -> Params:
    """Undoes `split_params`."""
    return {**frozen, **trained, "encoder": {**frozen["encoder"], **trained["encoder"]}}


def trains_dense(config: ModelConfig) -> Trains:
    """Fine-tuning: everything but the selectors, which take no part."""
    return lambda name: not name.startswith("selector_")


def trains_selectors(config: ModelConfig) -> Trains:
    """Policy and selector initialization: the selectors that are asked, all else frozen."""
    asked = {f"selector_{stage}" for stage in range(config.num_reductions)}
    return lambda name: name in asked


def trains_all(config: ModelConfig) -> Trains:
    """Joint training: everything that takes part (a shallow model's second selector does not)."""
    asked = trains_selectors(config)
    return lambda name: not name.startswith("selector_") or asked(name)
