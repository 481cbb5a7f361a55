"""Residual scores: how much the loss would feel the work done on a token after a point of reduction.

The guide of the policy's warm-up. Source: paper, section 3.3; docs/method.md, "Residual scores".
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from trbert_jax.model.config import ModelConfig
from trbert_jax.model.heads import Logits
from trbert_jax.model.model import Batch, Params, TokenReducingModel, head_inputs
from trbert_jax.model.packed import PackedEncoder
from trbert_jax.tasks import TASKS
from trbert_jax.tasks.losses import Rows


def score_layers(config: ModelConfig) -> tuple[tuple[int, ...], int]:
    """The layers compared: the one before each selector's point of reduction, and layer 2L/3.

    0-based; -1 stands for the embeddings. Always one entry a selector, also where a shallow model
    has a single point of reduction.
    """
    before = [point - 1 for point in config.reduction_layers]
    before += before[-1:] * (config.num_selectors - len(before))
    return tuple(before), 2 * config.num_layers // 3


def residual_scores(
    model: TokenReducingModel, params: Params, batch: Batch
) -> tuple[jax.Array, Logits, jax.Array]:
    """Scores every token of a batch with the dense model.

    `score[b, s, t] = |sum_h g[b, t, h] * (h_r[b, t, h] - h_s[b, t, h])|`, where h_r is the output
    of layer 2L/3, g the gradient of example b's own loss by it, and h_s the state the token has at
    point of reduction s.

    Args:
      model: runs packed, nothing dropped, without dropout.
      params: its parameters, fine-tuned.
      batch: see `trbert_jax.training.objectives`.

    Returns:
      score float32 [B * G, stages, S] (0 on padding), the logits, loss float32 [B].
    """
    before, back = score_layers(model.config)
    encoder = PackedEncoder.of(model, len(batch["input_ids"]))
    tokens = encoder.embed(params, batch)
    states = {-1: tokens.states}  # [C, H] each
    for layer in range(back + 1):
        tokens = encoder.run_layers(params, tokens, [layer])
        states[layer] = tokens.states

    def loss_from(back_states: jax.Array) -> tuple[jax.Array, tuple[Logits, jax.Array]]:
        last = dataclasses.replace(tokens, states=back_states)
        logits = encoder.finish(params, last, range(back + 1, model.config.num_layers), head_inputs(batch))
        loss = TASKS[model.config.task].loss(logits, Rows(batch))
        # Rows do not interact, so the gradient of the sum holds each example's own gradient.
        return loss.sum(), (logits, loss)

    gradient, (logits, loss) = jax.grad(loss_from, has_aux=True)(states[back])
    score = [jnp.abs(jnp.sum(gradient * (states[back] - states[layer]), -1)) for layer in before]  # [C] each
    rows = jnp.stack([tokens.to_rows(s.astype(jnp.float32)) for s in score], axis=1)
    return rows, logits, loss


def rank_targets(scores: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Targets of the selector initialization from residual scores.

    The token of rank k (0 = highest score) among the l real tokens of an example gets 1 - k / l;
    padding gets 0. Among equal scores the earlier token ranks higher.

    Args:
      scores: float32 [B, stages, S].
      lengths: int [B].

    Returns:
      float32 [B, stages, S].
    """
    position = np.arange(scores.shape[-1])
    real = position < np.asarray(lengths)[:, None, None]
    order = np.argsort(np.where(real, -scores, np.inf), axis=-1, kind="stable")
    rank = np.argsort(order, axis=-1, kind="stable")
    return np.where(real, 1 - rank / np.asarray(lengths)[:, None, None], 0.0).astype(np.float32)
