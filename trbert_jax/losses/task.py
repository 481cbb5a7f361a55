"""Losses of the task, one value an example; callers average over the real examples.

Source: docs/method.md, "Task losses".
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import optax


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Negative log-likelihood of the labels: float [B, C], int [B] -> float [B], nats."""
    chex.assert_rank([logits, labels], [2, 1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def distillation(logits: jax.Array, teacher_logits: jax.Array, temperature: float = 1.0) -> jax.Array:
    """Soft cross entropy with a teacher: float [B, C] (twice) -> float [B], nats.

    Not a Kullback-Leibler divergence and without the factor temperature^2: the length penalty's
    coefficient is tuned against exactly this. No gradient reaches the teacher.
    """
    chex.assert_rank([logits, teacher_logits], 2)
    chex.assert_equal_shape([logits, teacher_logits])
    target = jax.nn.softmax(jax.lax.stop_gradient(teacher_logits) / temperature, axis=-1)
    return -jnp.sum(target * jax.nn.log_softmax(logits / temperature, axis=-1), axis=-1)
