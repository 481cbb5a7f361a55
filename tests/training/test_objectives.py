import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tiny_models
from tiny_models import random_batch, take

from trbert_jax.model.model import Batch, TokenReducingModel, forward
from trbert_jax.reduction import selection as tokens
from trbert_jax.tasks import losses as task
from trbert_jax.training import objectives
from trbert_jax.training.objectives import Objective, mean_over_examples

CONFIG = dataclasses.replace(tiny_models.BERT, num_layers=1)  # one point of reduction, before layer 0
MODEL = TokenReducingModel(CONFIG)
PARAMS = tiny_models.tiny_params(CONFIG)
LENGTHS, WIDTH = [6, 1, 4, 5], 6
ALPHA, MAX_LENGTH, K = 0.7, 10, 3


@jax.jit
def run(batch: Batch) -> tuple[dict[str, Objective], dict[str, objectives.PolicySamples]]:
    """Every objective, and the samples behind those of the policy: compiled once for all tests."""
    plain = {k: v for k, v in batch.items() if k != "teacher_logits"}
    options: dict[str, Any] = {"num_samples": K, "alpha": ALPHA, "max_length": MAX_LENGTH, "temperature": 2.0}
    rule = tokens.replay(batch["actions"].swapaxes(0, 1).reshape(1, -1, WIDTH))
    samples = {
        name: objectives.sample_policy(MODEL, PARAMS, inputs, rule=rule, **options)
        for name, inputs in (("policy", plain), ("distil", batch))
    }
    return {
        "dense": objectives.dense_objective(MODEL, PARAMS, batch),
        "init": objectives.initialization_objective(MODEL, PARAMS, batch),
        "scaled_init": objectives.initialization_objective(MODEL, PARAMS, batch, per_length_scale=True),
        "policy": objectives.policy_objective(plain, samples["policy"]),
        "joint": objectives.joint_objective(plain, samples["policy"]),
        "distil": objectives.joint_objective(batch, samples["distil"]),
    }, samples


@functools.partial(jax.jit, static_argnames="imitating")
def drawn(batch: Batch, seed: int, imitating: bool) -> jax.Array:
    """Actions of a training step, bool [K, B, S]."""
    rule = objectives.sampling_rule(jax.random.key(seed), batch, K, imitating)
    copies = {k: jnp.concatenate([batch[k]] * K) for k in ("mask", "guide")}
    # Logits that are a function of the guide alone: rows draw differently for their own number only.
    logits = 4 * copies["guide"][:, 1] - 2
    return rule(0, logits, copies["mask"]).reshape(K, *batch["mask"].shape)


def make_batch() -> Batch:
    """Four rows with what every stage reads; `actions`, bool [B, K, S], are to be replayed."""
    actions = np.random.default_rng(0).uniform(size=(len(LENGTHS), K, WIDTH)) < 0.6
    return {**random_batch(CONFIG, LENGTHS, WIDTH), "actions": jnp.asarray(actions)}


def test_means_are_over_real_examples() -> None:
    """Weighted, added up over micro-batches, whatever the values of padding rows."""
    first = Objective(
        jnp.array([1.0, 2.0, np.nan]), jnp.array([1.0, 1, 0]), {"x": jnp.array([3.0, 5, np.inf])}
    )
    second = Objective(jnp.array([6.0, 9.0, 9.0]), jnp.array([1.0, 0, 0]), {"x": jnp.array([1.0, 9, 9])})
    sums = jax.tree.map(jnp.add, first.sums(), second.sums())
    assert sums == {"loss": 9, "x": 9, "weight": 3}
    assert mean_over_examples(sums) == {"loss": 3, "x": 3}


def test_padding_changes_nothing() -> None:
    """For every objective and everything it logs."""
    batch = make_batch()
    filled, _ = run({**batch, "valid": jnp.array([True, False, True, False])})
    deleted, _ = run(take(batch, [0, 2]))
    for name, objective in filled.items():
        ours, theirs = (mean_over_examples(x.sums()) for x in (objective, deleted[name]))
        assert ours.keys() == theirs.keys()
        for metric, value in theirs.items():
            np.testing.assert_allclose(ours[metric], value, rtol=1e-5, atol=1e-6, err_msg=f"{name}: {metric}")


def test_dense() -> None:
    batch = make_batch()
    objective = run(batch)[0]["dense"]
    logits = jax.jit(lambda params: forward(MODEL, params, batch, rule=None).logits)(PARAMS)
    np.testing.assert_allclose(objective.total, task.cross_entropy(logits, batch["labels"]), atol=1e-5)
    np.testing.assert_array_equal(objective.metrics["accuracy"], logits.argmax(-1) == batch["labels"])
    np.testing.assert_array_equal(objective.weight, 1)


def test_initialization() -> None:
    """A mean over tokens, not over examples; the published factor is the mean of 1 / length."""
    batch = make_batch()
    outputs, samples = run(batch)
    logits = samples["policy"].selections[0].logits[: len(LENGTHS)]  # the first point: nothing dropped yet
    mask = np.asarray(batch["mask"])
    error = np.abs(1 / (1 + np.exp(-np.asarray(logits))) - batch["rank"][:, 0])[mask].mean()
    for name, expected in [("init", error), ("scaled_init", error * np.mean(1 / mask.sum(1)))]:
        np.testing.assert_allclose(mean_over_examples(outputs[name].sums())["loss"], expected, rtol=1e-5)


def test_policy_and_joint() -> None:
    outputs, samples = run(make_batch())
    for name, source, joint in [("policy", "policy", 0), ("joint", "policy", 1), ("distil", "distil", 1)]:
        given, objective = samples[source], outputs[name]
        advantage = given.reward - given.reward.mean(0)
        reinforce = np.mean(advantage * given.selector_nll, axis=0)
        expected = joint * given.task_loss.mean(0) + reinforce
        np.testing.assert_allclose(objective.total, expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(objective.metrics["policy_loss"], reinforce, rtol=1e-4, atol=1e-6)
        for metric in ("task_loss", "reward", "kept_ratio"):
            np.testing.assert_allclose(objective.metrics[metric], getattr(given, metric).mean(0), rtol=1e-5)
        kept = given.selections[0].keep.sum(-1).reshape(K, -1).mean(0)
        np.testing.assert_allclose(objective.metrics["kept_tokens_0"], kept, rtol=1e-6)


def test_draws_follow_from_seed_copy_and_example() -> None:
    batch = random_batch(CONFIG, [6] * 8, 6)
    actions = drawn(batch, 0, imitating=False)
    assert (drawn(batch, 1, imitating=False) != actions).any()
    assert (actions[0] != actions[1]).any()
    assert (actions[1] != actions[2]).any()
    order = np.array([5, 2, 7, 0, 1, 6, 3, 4])
    np.testing.assert_array_equal(drawn(take(batch, order), 0, imitating=False), actions[:, order])
    np.testing.assert_array_equal(drawn(take(batch, order[:3]), 0, imitating=False), actions[:, order[:3]])
    # The same tokens under another number draw anew.
    renumbered = {**batch, "index": batch["index"] + 8}
    assert (drawn(renumbered, 0, imitating=False) != actions).any()


def test_first_copy_imitates() -> None:
    """The others draw what they would have drawn."""
    batch = random_batch(CONFIG, [6] * 8, 6)
    free, guided = (drawn(batch, 0, imitating=imitating) for imitating in (False, True))
    np.testing.assert_array_equal(guided[1:], free[1:])
    guide = np.asarray(batch["guide"])
    count = np.floor((1 / (1 + np.exp(2 - 4 * guide[:, 1]))).sum(-1) + 0.5)
    rank = (-guide[:, 0]).argsort(-1).argsort(-1)
    np.testing.assert_array_equal(guided[0], rank < count[:, None])
    assert (guided[0] != free[0]).any()
