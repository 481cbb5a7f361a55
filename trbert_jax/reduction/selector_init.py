"""Initialize the selectors: fit the keep probabilities to the ranks of residual scores.

Source: docs/method.md, "Selector initialization".
"""

import math
from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import optax

from trbert_jax.reduction.selection import Selection


def rank_error(
    selections: Sequence[Selection],
    rank: jax.Array,
    keep: Sequence[float] | None = None,
    loss: str = "l1",
) -> jax.Array:
    """Computes the error of every keep probability, 0 on padding, summed over the points of reduction.

    `l1`: |keep probability - target|. The target is the rank, or a power of it to keep another share of the
    tokens than one half. `bce`: the binary cross entropy with the target 1 for the tokens to keep, those that
    rank highest, and 0 for the others; at its minimum the probabilities add up to their number.

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
    if loss == "bce":
        shares = keep or [0.5] * len(selections)
        # Float32 ranks of exactly 1 - share are not above it.
        targets = [target > 1 - share + 1e-6 for target, share in zip(targets, shares, strict=True)]
    elif keep is not None:
        # The share `keep` has ranks above 1 - keep, and (1 - keep) ** power is 1/2.
        powers = [math.log(0.5) / math.log1p(-share) for share in keep]
        targets = [target**power for target, power in zip(targets, powers, strict=True)]
    pairs = zip(selections, targets, strict=True)
    error = {
        "l1": lambda logits, target: jnp.abs(jax.nn.sigmoid(logits) - target),
        "bce": optax.sigmoid_binary_cross_entropy,
    }[loss]
    errors = [jnp.where(s.scored, error(s.logits, target), 0.0) for s, target in pairs]
    return sum(errors, start=jnp.zeros(()))
