import functools
from typing import Any

import golden_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trbert_jax.model.model import Batch, TokenReducingModel, forward
from trbert_jax.reduction import selection as tokens
from trbert_jax.tasks import TASKS
from trbert_jax.tasks.losses import Rows, margin
from trbert_jax.training.objectives import gate_scores

QUICK = ("classification_distil3_joint_distil", "hotpot_bert_joint")
HEADS = [
    pytest.param(path, id=path.name, marks=[] if path.name in QUICK else pytest.mark.slow)
    for path in sorted(golden_cases.DIRECTORY.glob("*_joint*"))
]


def test_margin() -> None:
    """Log odds of the best of those that take part; the rest has the derivative of its probabilities."""
    logits = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(margin(jnp.asarray(logits)), np.log(p / (1 - p)).max(-1), atol=1e-5)
    mask = jnp.arange(4) < 3
    np.testing.assert_allclose(
        margin(jnp.asarray(logits), mask), margin(jnp.asarray(logits)[:, :3]), atol=1e-5
    )
    sure = jnp.array([[40.0, -40.0, -40.0]])
    np.testing.assert_allclose(jax.grad(lambda x: margin(x).sum())(sure), [[1, -0.5, -0.5]], rtol=1e-5)
    assert np.isfinite(jax.grad(lambda x: margin(x[None], mask).sum())(jnp.zeros(4))).all()


@pytest.mark.parametrize("folder", HEADS)
def test_gate_scores_for_every_head_are_finite_differences(folder: Any) -> None:
    """Of the margin, by a bias of the attention scores of a key in all layers after a point."""
    case = golden_cases.load(folder)
    model = TokenReducingModel(case.config)
    batch = {key: value for key, value in case.batch.items() if key != "head_mask"}  # real tokens only

    @jax.jit
    def margins(params: Any, batch: Batch, bias: jax.Array) -> jax.Array:
        gate = lambda stage, selection: bias[stage]  # noqa: E731
        logits = forward(model, params, batch, rule=tokens.keep_all, gate=gate).logits
        return TASKS[case.config.task].margin(logits, Rows(batch))

    score, _, sure = jax.jit(functools.partial(gate_scores, model))(case.params, batch)
    bias = jnp.zeros((case.config.num_reductions, *batch["mask"].shape))
    np.testing.assert_allclose(sure, margins(case.params, batch, bias), rtol=1e-5, atol=1e-5)
    points = np.asarray(score)[:, : case.config.num_reductions].swapaxes(0, 1)
    np.testing.assert_array_equal(score[:, -1], points[-1])
    assert score.dtype == jnp.float32
    assert not points[:, ~np.asarray(batch["mask"])].any()
    by_example = points.reshape(len(points), len(sure), -1)
    for stage, largest in enumerate(by_example):
        for place in np.argsort(-largest, axis=1)[:, :3].T:  # of each example one token
            step = np.zeros(by_example.shape, np.float32)
            step[stage, np.arange(len(sure)), place] = 1e-3
            moved = (margins(case.params, batch, jnp.asarray(x).reshape(bias.shape)) for x in (step, -step))
            ahead, behind = moved
            expected = largest[np.arange(len(sure)), place]
            np.testing.assert_allclose(np.abs(ahead - behind) / 2e-3, expected, rtol=1e-2, atol=5e-3)
