import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models
from tiny_models import random_batch

from trbert_jax.model.model import Batch, Params, TokenReducingModel
from trbert_jax.training import objectives
from trbert_jax.training import step as optimizer
from trbert_jax.training.objectives import Objective
from trbert_jax.training.step import TrainState, init_state, train_step

CONFIG = dataclasses.replace(tiny_models.BERT, num_layers=1)  # one point of reduction, before layer 0
MODEL = TokenReducingModel(CONFIG)
PARAMS = jax.tree.map(jnp.asarray, tiny_models.tiny_params(CONFIG))
LENGTHS = [6, 1, 4, 5, 3, 6, 2, 5]
BATCH = {k: v for k, v in random_batch(CONFIG, LENGTHS, 6).items() if k != "teacher_logits"}
# Parameters after an update of plain gradient descent show the gradient itself, which Adam would
# bring to one size, rounding errors in its zeros included.
SGD = optax.sgd(0.1)


def sample(params: Params, batch: Batch, rng: jax.Array, imitating: Any) -> objectives.PolicySamples:
    rule = objectives.sampling_rule(rng, batch, 3, imitating)
    return objectives.sample_policy(
        MODEL, params, batch, rule=rule, num_samples=3, alpha=1.0, max_length=CONFIG.max_length
    )


# Objectives of (parameters, batch, key, number of the update), and the parameters that they train.
OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "finetune": lambda p, b, rng, step: objectives.dense_objective(MODEL, p, b),
    "init": lambda p, b, rng, step: objectives.initialization_objective(MODEL, p, b),
    "policy": lambda p, b, rng, step: objectives.policy_objective(b, sample(p, b, rng, step < 1)),
    "joint": lambda p, b, rng, step: objectives.joint_objective(b, sample(p, b, rng, False)),
}
dense, selectors = optimizer.trains_dense(CONFIG), optimizer.trains_selectors(CONFIG)
TRAINS = {"finetune": dense, "init": selectors, "policy": selectors, "joint": optimizer.trains_all(CONFIG)}


@functools.cache
def compiled(stage: str) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """A stage's update."""
    return jax.jit(functools.partial(train_step, OBJECTIVES[stage], SGD))


def micro_batches(steps: int, **changes: Any) -> Batch:
    """Eight examples as [steps, 8 / steps, ...] arrays."""
    return {k: v.reshape(steps, -1, *v.shape[1:]) for k, v in {**BATCH, **changes}.items()}


def update(stage: str, batches: Batch, step: int = 0, seed: int = 0) -> tuple[Params, dict[str, jax.Array]]:
    """All parameters after one update, and its metrics."""
    trained, frozen = optimizer.split_params(PARAMS, TRAINS[stage])
    state = dataclasses.replace(init_state(trained, SGD), step=jnp.int32(step))
    state, metrics = compiled(stage)(state, frozen, batches, jax.random.key(seed))
    assert state.step == step + 1
    return optimizer.merge_params(state.trained, frozen), metrics


def assert_close(left: Any, right: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), left, right)


@pytest.mark.parametrize("stage", OBJECTIVES)
def test_accumulation_changes_nothing(stage: str) -> None:
    """All at once or two at a time: the same actions and update, whatever the two padding rows hold."""
    valid = jnp.arange(8) < 6
    other = random_batch(CONFIG, LENGTHS, 6, seed=1)
    padding = {k: jnp.where(valid.reshape(-1, *[1] * (v.ndim - 1)), v, other[k]) for k, v in BATCH.items()}
    whole = update(stage, micro_batches(1, valid=valid))
    parts = update(stage, micro_batches(4, **{**padding, "valid": valid}))
    assert_close(whole, parts)
    assert whole[1]["gradient_norm"] > 1e-4
    full, _ = update(stage, micro_batches(1))
    differences = jax.tree.map(lambda a, b: np.abs(a - b).max(), full, whole[0])
    assert max(jax.tree.leaves(differences)) > 1e-5


def test_padding_alone_changes_nothing() -> None:
    params, metrics = update("joint", micro_batches(4, valid=jnp.zeros(8, bool)))
    jax.tree.map(np.testing.assert_array_equal, params, PARAMS)
    assert set(map(float, metrics.values())) == {0.0}


def test_updates_draw_anew() -> None:
    """Actions follow from the stage's key and the number of the update."""
    first, again, later, other = (
        update("joint", micro_batches(1), step, seed)[0] for step, seed in [(0, 0), (0, 0), (1, 0), (0, 1)]
    )
    jax.tree.map(np.testing.assert_array_equal, first, again)
    kernels = [p["encoder"]["selector_0"]["hidden"]["kernel"] for p in (first, later, other)]
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        assert (kernels[i] != kernels[j]).any()


def test_guide_is_followed_in_time() -> None:
    """The number of the update reaches the objective: after the warm-up the guide has no say."""
    guides = [micro_batches(1)["guide"], 1 - micro_batches(1)["guide"]]
    for step, matters in [(0, True), (1, False)]:
        one, other = (update("policy", {**micro_batches(1), "guide": guide}, step)[0] for guide in guides)
        kernels = [p["encoder"]["selector_0"]["hidden"]["kernel"] for p in (one, other)]
        assert (kernels[0] != kernels[1]).any() == matters
