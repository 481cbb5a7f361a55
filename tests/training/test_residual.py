from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from tiny_batches import random_batch, take

from trbert_jax.losses.task import cross_entropy
from trbert_jax.modeling.config import ModelConfig
from trbert_jax.modeling.model import TokenReducingModel, forward
from trbert_jax.tokens import TokenSet
from trbert_jax.training.residual import rank_targets, residual_scores, score_layers

BERT = tiny_models.BERT
LENGTHS = [6, 1, 4]


MODEL = TokenReducingModel(BERT)
PARAMS = tiny_models.tiny_params(BERT)


@jax.jit
def scores_of(params: Any, batch: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    return residual_scores(MODEL, params, batch)


@jax.jit
def loss_after_moving(params: Any, batch: Any, start: int, token: int, distance: float) -> jax.Array:
    """Losses [B] with one token's state after layer 2L/3 moved on, away from what it was after `start`."""
    _, back = score_layers(BERT)
    layers = functools.partial(MODEL.apply, {"params": params}, method="run_layers")
    inputs = (batch["input_ids"], batch["mask"], batch["token_type_ids"])
    tokens = [MODEL.apply({"params": params}, *inputs, method="embed")]
    for layer in range(back + 1):
        tokens.append(layers(tokens[-1], [layer]))
    states = jnp.stack([t.states for t in tokens])  # from the embeddings on
    moved = jnp.arange(states.shape[2])[:, None] == token
    states = states[-1] + distance * moved * (states[-1] - states[start + 1])
    last = layers(TokenSet(states, batch["mask"]), range(back + 1, BERT.num_layers))
    logits = MODEL.apply({"params": params}, last, {}, method="answer")
    return cross_entropy(logits, batch["labels"])


@pytest.mark.parametrize(
    ("num_layers", "before", "back"),
    [(12, (0, 5), 8), (6, (0, 2), 4), (4, (0, 1), 2), (3, (0, 0), 2), (2, (0, 0), 1), (1, (-1, -1), 0)],
)
def test_score_layers(num_layers: int, before: tuple[int, ...], back: int) -> None:
    """The published layers at 12 and 6; always a score for each of the two selectors."""
    assert score_layers(ModelConfig(num_layers=num_layers)) == (before, back)


def test_scores_are_finite_differences() -> None:
    """How fast an example's loss changes as a token's state moves on along the work done on it."""
    batch, distance = random_batch(BERT, LENGTHS, 6), 0.01
    score, _, _ = scores_of(PARAMS, batch)
    assert score.shape == (3, 2, 6)
    assert score.dtype == jnp.float32
    assert (score[:, :, 0] > 1e-3).all()
    for stage, start in enumerate(score_layers(BERT)[0]):
        for token in range(6):
            ahead, behind = (loss_after_moving(PARAMS, batch, start, token, d) for d in (distance, -distance))
            slope = np.where(batch["mask"][:, token], np.abs(ahead - behind) / (2 * distance), 0)
            np.testing.assert_allclose(score[:, stage, token], slope, rtol=1e-2, atol=1e-4)


def test_rows_do_not_see_each_other() -> None:
    """A row's scores are of its own loss: the same alone, and with more padding, which scores 0."""
    batch = random_batch(BERT, LENGTHS, 6)
    score, logits, loss = scores_of(PARAMS, batch)
    wide = take(random_batch(BERT, LENGTHS, 9), [2])
    alone, alone_logits, alone_loss = scores_of(PARAMS, wide)
    np.testing.assert_allclose(alone[0, :, :6], score[2], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(alone_logits[0], logits[2], atol=1e-5)
    np.testing.assert_allclose(alone_loss[0], loss[2], atol=1e-5)
    for row, length in enumerate(LENGTHS):
        assert (score[row, :, :length] > 0).any()
        np.testing.assert_array_equal(score[row, :, length:], 0)
    np.testing.assert_array_equal(alone[..., 6:], 0)


def test_logits_and_loss_are_the_dense_models() -> None:
    batch = random_batch(BERT, LENGTHS, 6)
    _, logits, loss = scores_of(PARAMS, batch)
    dense = jax.jit(lambda params: forward(MODEL, params, batch, rule=None).logits)(PARAMS)
    np.testing.assert_allclose(logits, dense, atol=1e-5)
    np.testing.assert_allclose(loss, cross_entropy(dense, batch["labels"]), atol=1e-5)


def test_rank_targets() -> None:
    """1 for the highest score, 1/l for the lowest of l; ties in order; padding 0 whatever it holds."""
    scores = np.array(
        [
            [[0.1, 0.4, 0.2, 0.3], [4.0, 3.0, 2.0, 1.0]],
            [[0.5, 0.5, 9.0, np.nan], [0.0, 1.0, 9.0, 9.0]],
            [[0.0, 7.0, 7.0, 7.0], [0.0, 7.0, 7.0, 7.0]],
            [[1.0, 1.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0]],
        ],
        np.float32,
    )
    targets = rank_targets(scores, np.array([4, 2, 1, 3]))
    expected: list[list[list[float]]] = [
        [[0.25, 1, 0.5, 0.75], [1, 0.75, 0.5, 0.25]],
        [[1, 0.5, 0, 0], [0.5, 1, 0, 0]],
        [[1, 0, 0, 0], [1, 0, 0, 0]],
        [[1, 2 / 3, 1 / 3, 0], [2 / 3, 1, 1 / 3, 0]],
    ]
    np.testing.assert_allclose(targets, expected, rtol=1e-6)
    assert targets.dtype == np.float32
