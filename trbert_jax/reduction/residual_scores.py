"""Score tokens by how much the loss depends on the work done on them after a point of reduction.

The scores guide the warm-up of the policy. Source: paper, section 3.3; docs/method.md, "Residual scores".
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np


class Encoder(Protocol):
    """Runs parts of an encoder, without dropout: `model.packed.PackedEncoder`."""

    def embed(self, params: Any, batch: Mapping[str, jax.Array]) -> Any: ...
    def run_layers(self, params: Any, tokens: Any, layers: Sequence[int]) -> Any: ...


def score_layers(config: Any) -> tuple[tuple[int, ...], int]:
    """Returns the compared layers: the one before each selector's point of reduction, and layer 2L/3.

    0-based; -1 for the embeddings. One entry per selector, also if a shallow model has a single point.
    """
    before = [point - 1 for point in config.reduction_layers]
    before += before[-1:] * (config.num_selectors - len(before))
    return tuple(before), 2 * config.num_layers // 3


def residual_scores(
    config: Any,
    encoder: Encoder,
    params: Any,
    batch: Mapping[str, jax.Array],
    loss: Callable[[Any, range], tuple[jax.Array, Any]],
) -> tuple[jax.Array, Any, jax.Array]:
    """Scores every token of a batch with the dense model.

    `score[b, s, t] = |sum_h g[b, t, h] * (h_r[b, t, h] - h_s[b, t, h])|`, where h_r is the output
    of layer 2L/3, g the gradient of example b's own loss by it, and h_s the state the token has at
    point of reduction s.

    Args:
      config: the model's shape, `model.config.ModelConfig`; `params` are fine-tuned.
      batch: B examples of G rows each, padded to S tokens.
      loss: runs the last layers, whose numbers it gets, and the head:
        `(tokens, layers) -> (loss float32 [B], logits)`.

    Returns:
      score float32 [B * G, stages, S] (0 on padding), the logits, loss float32 [B].
    """
    before, back = score_layers(config)
    tokens = encoder.embed(params, batch)
    states = {-1: tokens.states}  # [C, H] each
    for layer in range(back + 1):
        tokens = encoder.run_layers(params, tokens, [layer])
        states[layer] = tokens.states

    def loss_from(back_states: jax.Array) -> tuple[jax.Array, tuple[Any, jax.Array]]:
        last = dataclasses.replace(tokens, states=back_states)
        losses, logits = loss(last, range(back + 1, config.num_layers))
        # Rows do not interact, so the gradient of the sum holds each example's own gradient.
        return losses.sum(), (logits, losses)

    gradient, (logits, losses) = jax.grad(loss_from, has_aux=True)(states[back])
    score = [jnp.abs(jnp.sum(gradient * (states[back] - states[layer]), -1)) for layer in before]  # [C] each
    rows = jnp.stack([tokens.to_rows(s.astype(jnp.float32)) for s in score], axis=1)
    return rows, logits, losses


def rank_targets(scores: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Computes the targets of the selector initialization from residual scores.

    The token of rank k (0 = highest score) among the l real tokens of an example gets 1 - k / l; padding gets
    0. Among equal scores the earlier token ranks higher. `scores` and result are float32 [B, stages, S],
    `lengths` int [B].
    """
    position = np.arange(scores.shape[-1])
    real = position < np.asarray(lengths)[:, None, None]
    order = np.argsort(np.where(real, -scores, np.inf), axis=-1, kind="stable")
    rank = np.argsort(order, axis=-1, kind="stable")
    return np.where(real, 1 - rank / np.asarray(lengths)[:, None, None], 0.0).astype(np.float32)
