"""The point of it all, on a problem whose best policy is known: keep the one token that decides."""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import tiny_runs

from trbert_jax.model.config import ModelConfig
from trbert_jax.model.model import Batch, Params, TokenReducingModel, forward
from trbert_jax.reduction.selection import keep_probable
from trbert_jax.training import objectives
from trbert_jax.training import step as optimizer
from trbert_jax.training.objectives import Objective
from trbert_jax.training.step import ObjectiveFn, init_state, train_step

LENGTH, CLS, YES, NO = 6, 1, 2, 3
CONFIG = ModelConfig(
    vocab_size=10,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    intermediate_size=16,
    max_positions=LENGTH,
    max_length=LENGTH,
)
MODEL = TokenReducingModel(CONFIG)


def examples(num: int, seed: int, clueless: float = 0.0) -> Batch:
    """[CLS], some noise and, anywhere, the token that is the label; `clueless` is the share without it."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(4, CONFIG.vocab_size, (num, LENGTH))
    labels, lengths = rng.integers(0, 2, num), rng.integers(2, LENGTH + 1, num)
    ids[:, 0] = CLS
    clue = np.flatnonzero(rng.uniform(size=num) >= clueless)
    ids[clue, rng.integers(1, lengths)[clue]] = np.where(labels, YES, NO)[clue]
    return {
        "input_ids": jnp.asarray(ids),
        "mask": jnp.asarray(np.arange(LENGTH) < lengths[:, None]),
        "labels": jnp.asarray(labels),
        "valid": jnp.ones(num, bool),
        "index": jnp.arange(num),
    }


def train(
    objective: ObjectiveFn, params: Params, trains: optimizer.Trains, batches: Iterable[Batch], rate: float
) -> Params:
    trained, frozen = optimizer.split_params(params, trains)
    adamw = optimizer.adamw(lambda step: rate, CONFIG)
    state = init_state(jax.tree.map(jnp.asarray, trained), adamw)
    update = jax.jit(functools.partial(train_step, objective, adamw))
    for batch in batches:
        state, _ = update(state, frozen, jax.tree.map(lambda x: x[None], batch), jax.random.key(0))
    return optimizer.merge_params(state.trained, frozen)


def finetune(params: Params, batch: Batch, rng: jax.Array, step: jax.Array) -> Objective:
    return objectives.dense_objective(MODEL, params, batch)


def policy(params: Params, batch: Batch, rng: jax.Array, step: jax.Array) -> Objective:
    rule = objectives.sampling_rule(rng, batch, 8, imitating=False)
    samples = objectives.sample_policy(
        MODEL, params, batch, rule=rule, num_samples=8, alpha=1.0, max_length=LENGTH
    )
    return objectives.policy_objective(batch, samples)


def test_policy_keeps_what_decides() -> None:
    """First the dense model learns, that nothing follows from noise too; then the selector."""
    dense = optimizer.trains_dense(CONFIG)
    batches = [examples(16, seed, clueless=0.5) for seed in range(150)]
    params = tiny_runs.deaf_params(CONFIG)
    params = train(finetune, params, lambda name: dense(name) and name != "layer_0", batches, rate=1e-2)
    batches = [examples(16, seed) for seed in range(1000, 1100)]
    params = train(policy, params, optimizer.trains_selectors(CONFIG), batches, rate=3e-2)

    batch = examples(64, seed=9999)
    output = jax.jit(lambda params: forward(MODEL, params, batch, rule=keep_probable))(params)
    keep_prob = np.asarray(jax.nn.sigmoid(output.selections[0].logits))
    ids = np.where(batch["mask"], batch["input_ids"], 0)
    assert keep_prob[(ids == YES) | (ids == NO)].min() > 0.9
    assert keep_prob[ids > NO].max() < 0.1
    np.testing.assert_array_equal(output.selections[0].num_kept, 2)
    np.testing.assert_array_equal(output.logits.argmax(-1), batch["labels"])
