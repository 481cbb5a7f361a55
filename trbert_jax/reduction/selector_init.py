"""Initialize the selectors: regress the keep probabilities on the ranks of residual scores.

Source: docs/method.md, "Selector initialization".
"""

import math
from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp

from trbert_jax.reduction.selection import Selection


def rank_error(
    selections: Sequence[Selection], rank: jax.Array, keep: Sequence[float] | None = None
) -> jax.Array:
    """Computes |keep probability - target| of every token, 0 on padding, summed over the points of reduction.

    The target is the rank, or a power of it to keep another share of the tokens than one half.

    Args:
      selections: of a run that drops nothing.
      rank: float32 [B, stages, S] in [0, 1], see `trbert_jax.reduction.residual_scores.rank_targets`.
      keep: share in (0, 1) of the tokens with a target above 1/2, one per selection; None for one half,
        as published.

    Returns:
      float32 [B, S]. Without `keep`, its sum over the number of real tokens is the published E_0 + E_1.
    """
    chex.assert_rank(rank, 3)
    targets = [rank[:, stage] for stage in range(len(selections))]
    if keep is not None:
        # The share `keep` has ranks above 1 - keep, and (1 - keep) ** power is 1/2.
        powers = [math.log(0.5) / math.log1p(-share) for share in keep]
        targets = [target**power for target, power in zip(targets, powers, strict=True)]
    pairs = zip(selections, targets, strict=True)
    errors = [jnp.where(s.scored, jnp.abs(jax.nn.sigmoid(s.logits) - target), 0.0) for s, target in pairs]
    return sum(errors, start=jnp.zeros(()))
