"""Compute the policy loss: REINFORCE with the mean reward of an example's own samples as the baseline.

Arrays [K, B] hold K samples of each of B examples. Source: paper, section 3.3; docs/method.md, "Policy loss".
"""

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp

from trbert_jax.reduction.selection import LOG_EPSILON, Selection


def selector_nll(selections: Sequence[Selection]) -> jax.Array:
    """Computes the negative log-probability of the actions taken, float32 [rows].

    The mean over the tokens judged at a point of reduction, [CLS] included although it is always kept,
    summed over the points. Differentiable in the selector logits only.
    """

    def one(selection: Selection) -> jax.Array:
        keep_prob = jax.nn.sigmoid(selection.logits)
        # XLA would fold (1 - p) + eps into (1 + eps) - p, which rounds eps itself by several per cent.
        drop_prob = jax.lax.optimization_barrier(1 - keep_prob)
        log_prob = jnp.log(jnp.where(selection.keep, keep_prob, drop_prob) + LOG_EPSILON)
        scored = selection.scored
        return -jnp.sum(jnp.where(scored, log_prob, 0.0), axis=-1) / jnp.maximum(scored.sum(-1), 1)

    return sum(map(one, selections), start=jnp.zeros(()))


def kept_ratio(counts: Sequence[jax.Array], max_length: int) -> jax.Array:
    """Computes kept tokens over the maximum length, mean over the points: [rows] for each -> float32 [rows].

    The denominator is not the width of an array, because trimming padding must not change the reward.
    """
    return jnp.stack(counts).mean(0) / max_length


def reward(task_loss: jax.Array, ratio: jax.Array, alpha: float | jax.Array) -> jax.Array:
    """Computes log-likelihood minus alpha times the kept ratio: [K, B] (twice) -> [K, B], no gradient."""
    chex.assert_equal_shape([task_loss, ratio])
    return jax.lax.stop_gradient(-task_loss - alpha * ratio)


def advantage(reward: jax.Array) -> jax.Array:
    """Subtracts the mean reward of the example's own samples, [K, B] -> [K, B]; does not scale."""
    chex.assert_rank(reward, 2)
    return reward - reward.mean(axis=0, keepdims=True)


def policy_loss(nll: jax.Array, reward: jax.Array) -> jax.Array:
    """Computes the REINFORCE loss of each example, [K, B] (twice) -> [B]; callers average over examples."""
    chex.assert_equal_shape([nll, reward])
    return jnp.mean(jax.lax.stop_gradient(advantage(reward)) * nll, axis=0)
