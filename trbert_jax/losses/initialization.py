"""Selector initialisation: regression of the keep probabilities on the ranks of residual scores.

Source: docs/method.md, "Selector initialisation".
"""

from __future__ import annotations

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp

from trbert_jax.tokens import Selection


def rank_error(selections: Sequence[Selection], rank: jax.Array) -> jax.Array:
    """|keep probability - rank| of every token, 0 on padding, summed over the points of reduction.

    Args:
      selections: of a run that drops nothing, logits [B, S].
      rank: float32 [B, stages, S] in [0, 1], see `trbert_jax.training.residual.rank_targets`.

    Returns:
      float32 [B, S]; its sum over the number of real tokens is the published E_0 + E_1.
    """
    chex.assert_rank(rank, 3)
    errors = [
        jnp.where(s.scored, jnp.abs(jax.nn.sigmoid(s.logits) - rank[:, stage]), 0.0)
        for stage, s in enumerate(selections)
    ]
    return sum(errors, start=jnp.zeros(()))
