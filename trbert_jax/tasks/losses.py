"""Losses of the tasks, one value an example; callers average over the real examples.

A position where `mask` is False takes no part. Source: docs/method.md, "Task losses".
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import optax

# What a logit is that takes no part: finite, so that 0 times its logarithm is 0.
_NOT_THERE = -1e9
# The published logit of a candidate that an example does not have.
NO_CANDIDATE = -10000.0


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Negative log-likelihood of the labels: float [B, C], int [B] -> float [B], nats."""
    chex.assert_rank([logits, labels], [2, 1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def distillation(
    logits: jax.Array, teacher_logits: jax.Array, temperature: float = 1.0, mask: jax.Array | None = None
) -> jax.Array:
    """Soft cross entropy with a teacher: float [..., C] (twice) -> float [...], nats.

    Not a Kullback-Leibler divergence and without the factor temperature^2: the length penalty's
    coefficient is tuned against exactly this. No gradient reaches the teacher.

    Args:
      logits, teacher_logits: float [..., C].
      temperature: divides both.
      mask: bool [..., C]; None for all. Logits of a mask are centered, see `_only`; without one they may
        hold `NO_CANDIDATE`.
    """
    chex.assert_equal_shape([logits, teacher_logits])
    logits = logits / temperature
    teacher_logits = jax.lax.stop_gradient(teacher_logits) / temperature
    if mask is not None:
        mask = jnp.broadcast_to(mask, logits.shape)
        logits, teacher_logits = _only(logits, mask), _only(teacher_logits, mask)
    target = jax.nn.softmax(teacher_logits, axis=-1)
    return -jnp.sum(target * jax.nn.log_softmax(logits, axis=-1), axis=-1)


def any_of(logits: jax.Array, gold: jax.Array, mask: jax.Array) -> jax.Array:
    """Negative log-likelihood that one of the gold positions is the answer's, whichever; nats.

    With one gold position the cross entropy. The segments of an example share one softmax.

    Args:
      logits: float [B, G, S], G segments an example.
      gold: int [B, G, A], gold positions in each segment, -1 where there are fewer; each counts once.
      mask: bool [B, G, S].

    Returns:
      float [B]; 0 for an example without a gold position, which teaches nothing.
    """
    chex.assert_rank([logits, gold, mask], 3)
    flat = (len(logits), -1)
    logits = _only(logits.reshape(flat), mask.reshape(flat)).reshape(logits.shape)
    chosen = jnp.take_along_axis(logits, jnp.maximum(gold, 0), axis=-1)
    chosen = jnp.where(gold >= 0, chosen, _NOT_THERE)
    loss = jax.nn.logsumexp(logits, axis=(1, 2)) - jax.nn.logsumexp(chosen, axis=(1, 2))
    return jnp.where(jnp.any(gold >= 0, axis=(1, 2)), loss, 0.0)


def mean_of(logits: jax.Array, gold: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over the gold positions of each one's cross entropy: [B, S], [B, A], [B, S] -> [B], nats."""
    chex.assert_rank([logits, gold, mask], 2)
    log_prob = jax.nn.log_softmax(_only(logits, mask), axis=-1)
    chosen = jnp.take_along_axis(log_prob, jnp.maximum(gold, 0), axis=-1)
    return masked_mean(-chosen, gold >= 0)


def sentence_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross entropy over labeled sentences: [B, N, 2], int [B, N] (-1: no sentence) -> [B], nats."""
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    return masked_mean(loss, labels >= 0)


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over the last axis where `mask` is True; 0 where it nowhere is."""
    return jnp.sum(jnp.where(mask, values, 0.0), axis=-1) / jnp.maximum(jnp.sum(mask, axis=-1), 1)


def _only(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """Logits of a softmax over the last axis that only sees `mask`, centered.

    A softmax does not feel a shift. Of centered logits the gradients add up to nothing, as they should; of
    others they add up to rounding errors, and these are all that a bias shared by all positions learns from.
    """
    return jnp.where(mask, logits - masked_mean(logits, mask)[..., None], _NOT_THERE)
