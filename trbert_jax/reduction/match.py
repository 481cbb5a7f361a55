"""Let a selector compare a token with the other segment of its row: a context with its question.

Early layers mix the two segments little, so a token's state says what the token is, not whether it was asked
for. Source: docs/method.md, "Match with the question".
"""

import jax
import jax.numpy as jnp

NUM_FEATURES = 2
WINDOW = 16  # tokens on each side whose matches are averaged
EPSILON = 1e-6


def match_features(states: jax.Array, valid: jax.Array, segments: jax.Array) -> jax.Array:
    """Computes how well each token matches the most similar token of the other segment of its row.

    Similarity is the cosine of the states, less the mean state of the row. Returns float32
    [B, S, NUM_FEATURES], without gradient: that cosine, and its mean over the tokens of the same segment at
    most `WINDOW` positions away; both less their mean over the row, over their standard deviation. 0 for
    tokens that are not valid and in rows with a single segment.

    Args:
      states: [B, S, H].
      valid: bool [B, S], remaining tokens; the first, [CLS], is in no segment.
      segments: int [B, S], token types.
    """
    states = jax.lax.stop_gradient(states).astype(jnp.float32)
    inside = valid & (jnp.arange(valid.shape[1]) > 0)
    real = inside[..., None]
    count = jnp.maximum(real.sum(1, keepdims=True), 1)
    centered = jnp.where(real, states - jnp.where(real, states, 0).sum(1, keepdims=True) / count, 0)
    unit = centered * jax.lax.rsqrt(jnp.square(centered).sum(-1, keepdims=True) + EPSILON)
    same = segments[:, :, None] == segments[:, None]
    cosine = jnp.where(~same & inside[:, None], jnp.einsum("bsh,bth->bst", unit, unit), -1)
    best = cosine.max(-1)
    position = jnp.arange(valid.shape[1])
    near = jnp.abs(position[:, None] - position) <= WINDOW
    window = (same & near & inside[:, None]).astype(jnp.float32)
    around = jnp.einsum("bst,bt->bs", window, best) / jnp.maximum(window.sum(-1), 1)
    features = jnp.where(real, jnp.stack([best, around], -1), 0)
    mean = features.sum(1, keepdims=True) / count
    deviation = jnp.where(real, features - mean, 0)
    return deviation * jax.lax.rsqrt(jnp.square(deviation).sum(1, keepdims=True) / count + EPSILON)
