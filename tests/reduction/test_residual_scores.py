import functools
from pathlib import Path
from typing import Any

import golden_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from tiny_models import random_batch, take

from trbert_jax.model.config import ModelConfig
from trbert_jax.model.encoder import Encoder
from trbert_jax.model.model import Batch, TokenReducingModel, head_inputs
from trbert_jax.reduction.residual_scores import rank_targets, score_layers
from trbert_jax.reduction.selection import TokenSet
from trbert_jax.tasks import TASKS
from trbert_jax.tasks.losses import Rows
from trbert_jax.training.objectives import score_tokens

BERT = tiny_models.BERT
LENGTHS = [6, 1, 4]
# Models and batches of every task: those of the golden cases, whose targets are at hand.
ANSWERING = sorted(golden_cases.DIRECTORY.glob("*_joint*"))

MODEL = TokenReducingModel(BERT)
PARAMS = tiny_models.tiny_params(BERT)


@jax.jit
def scores_of(params: Any, batch: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    return score_tokens(MODEL, params, batch)


@functools.partial(jax.jit, static_argnums=(0, 3))
def losses_after_moving(
    model: TokenReducingModel, params: Any, batch: Batch, start: int, which: jax.Array, distance: float
) -> jax.Array:
    """Losses [B] with states after layer 2L/3 moved on, away from what they were after layer `start`.

    Args:
      which: the tokens, bool [B * G, S].
    """
    _, back = score_layers(model.config)
    encoder = functools.partial(Encoder(model.config).apply, {"params": params["encoder"]})
    layers = functools.partial(encoder, method="run_layers")
    inputs = (batch["input_ids"], batch["mask"], batch.get("token_type_ids"))
    tokens = [encoder(*inputs, method="embed")]
    for layer in range(back + 1):
        tokens.append(layers(tokens[-1], [layer]))
    states = jnp.stack([t.states for t in tokens])  # from the embeddings on
    states = states[-1] + distance * which[..., None] * (states[-1] - states[start + 1])
    last = layers(TokenSet(states, batch["mask"]), range(back + 1, model.config.num_layers))
    logits = model.apply({"params": params}, last, head_inputs(batch), method="answer")
    return TASKS[model.config.task].loss(logits, Rows(batch))


def slopes(
    model: TokenReducingModel, params: Any, batch: Batch, start: int, which: np.ndarray, distance: float
) -> np.ndarray:
    ahead, behind = (
        losses_after_moving(model, params, batch, start, jnp.asarray(which), d) for d in (distance, -distance)
    )
    return np.abs(ahead - behind) / (2 * distance)


@pytest.mark.parametrize(
    ("num_layers", "before", "back"),
    [(12, (0, 5), 8), (6, (0, 2), 4), (4, (0, 1), 2), (3, (0, 0), 2), (2, (0, 0), 1), (1, (-1, -1), 0)],
)
def test_score_layers(num_layers: int, before: tuple[int, ...], back: int) -> None:
    """The published layers at 12 and 6; always a score for each of the two selectors."""
    assert score_layers(ModelConfig(num_layers=num_layers)) == (before, back)


@pytest.mark.parametrize("folder", ANSWERING, ids=lambda folder: folder.name)
def test_scores_for_every_head_are_finite_differences(folder: Path) -> None:
    """Of the tokens of each example that the loss feels most, in whichever of its rows they are."""
    case = golden_cases.load(folder)
    model = TokenReducingModel(case.config)
    batch = {key: value for key, value in case.batch.items() if key != "head_mask"}  # real tokens only
    score, _, loss = jax.jit(functools.partial(score_tokens, model))(case.params, batch)
    assert score.dtype == jnp.float32
    by_example = np.asarray(score).reshape(len(loss), -1, *score.shape[1:])  # [B, G, stages, S]
    for stage, start in enumerate(score_layers(case.config)[0]):
        largest = by_example[:, :, stage].reshape(len(loss), -1)
        assert (largest.max(axis=1) > 5e-3).all(), "far above what rounding makes of a slope"
        for place in np.argsort(-largest, axis=1)[:, :3].T:  # of each example one token
            which = np.zeros(largest.shape, bool)
            which[np.arange(len(loss)), place] = True
            slope = slopes(model, case.params, batch, start, which.reshape(len(score), -1), 2e-3)
            expected = largest[np.arange(len(loss)), place]
            np.testing.assert_allclose(expected, slope, rtol=1e-2, atol=1e-3)


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
