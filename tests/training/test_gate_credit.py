"""Stages policy and joint with `credit: gate`."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from tiny_models import params_of, random_batch

from trbert_jax.config import load_config
from trbert_jax.errors import UserError
from trbert_jax.model.model import Params, TokenReducingModel, forward
from trbert_jax.reduction import selection as tokens
from trbert_jax.tasks.losses import distillation
from trbert_jax.training import objectives
from trbert_jax.training.stages import STAGES, objective_of

BERT = tiny_models.BERT
MODEL, WIDTH, K, ALPHA = TokenReducingModel(BERT), 12, 2, 0.7
BATCH = random_batch(BERT, [12, 9, 5, 12], WIDTH)
GATES = "{0}.credit=gate {0}.penalty_gradient=exact {0}.alpha=0.7 {0}.dropout=false"
SETTINGS = [x for stage in ("policy", "joint") for x in GATES.format(stage).split()]
PARAMS = params_of(BERT)
QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.yaml"
KEY = jax.random.key(1)


@functools.cache
def gradient(
    stage: str, *settings: str, hard: bool = False, step: int = 9, num_layers: int = 4
) -> tuple[Any, Params]:
    """Loss and gradient of a stage on one batch."""
    samples = (f"policy.num_samples={K}", f"joint.num_samples={K}")
    keys = (*(x for x in samples if "joint.rule=threshold" not in settings or "joint" not in x), *settings)
    shape = dataclasses.replace(BERT, num_layers=num_layers)
    config, model = load_config(QUICKSTART, [*SETTINGS, *keys]), TokenReducingModel(shape)
    objective = objective_of(STAGES[stage], config, model, 10, hard)
    batch = {k: x for k, x in BATCH.items() if stage == "joint" or k != "teacher_logits"}

    def loss(params: Params) -> jax.Array:
        return objective(params, batch, KEY, jnp.int32(step)).sums()["loss"]

    return jax.jit(jax.value_and_grad(loss))(params_of(shape))


def by_hand(thresholded: bool) -> list[np.ndarray]:
    """Coefficients of the selectors' logits, [rows, S] for each point.

    They are (1 - p) times the derivative by a bias on the scores of the key, of a kept token, over the number
    of tokens judged; p (1 - p) in place of (1 - p) if tokens are not drawn. The penalty, the mean over points
    of the sum of p over the maximum length, adds its derivative and that of what the first point lets pass.
    """
    copies = 1 if thresholded else K
    rule = tokens.keep_probable if thresholded else objectives.sampling_rule(KEY, BATCH, K, imitating=False)

    def total(bias: jax.Array, later: jax.Array) -> tuple[jax.Array, Any]:
        def gate(stage: int, selection: tokens.Selection) -> jax.Array:
            return jnp.where(selection.keep, bias[stage], 0.0)

        output = forward(MODEL, PARAMS, BATCH, rule=rule, num_copies=copies, gate=gate)
        loss = distillation(output.logits, jnp.tile(BATCH["teacher_logits"], (copies, 1)))
        return loss.sum() + jnp.sum(later * output.selections[1].logits), output.selections

    slope = jax.jit(jax.grad(total, has_aux=True))
    bias = jnp.zeros((2, copies * len(BATCH["mask"]), WIDTH))
    gained, selections = slope(bias, bias[1])
    free, unit = np.arange(WIDTH) > 0, ALPHA / 2 / BERT.max_length
    probs = [np.asarray(jax.nn.sigmoid(s.logits)) for s in selections]

    def coefficients(stage: int, worth: np.ndarray) -> np.ndarray:
        p, judged = probs[stage], np.asarray(selections[stage].scored) & free
        chance = (p if thresholded else 1) * (1 - p) * (judged & selections[stage].keep)
        direct = unit * p * (1 - p) * judged
        return (chance * worth + direct) / np.asarray(selections[stage].scored).sum(-1, keepdims=True)

    second = coefficients(1, np.asarray(gained[1]))
    # Tokens that the first point keeps are judged by the second, and changes how that judges other tokens.
    gained, _ = slope(bias, jnp.asarray(second))
    passed = unit * np.where(selections[1].scored & free, probs[1], 0)
    return [coefficients(0, gained[0] + passed) / copies, second / copies]


@pytest.mark.parametrize("thresholded", [False, True], ids=["sample", "threshold"])
def test_selectors_learn_from_gates(thresholded: bool) -> None:
    """The derivative by the last bias of a selector is the sum of the coefficients of its logits."""
    rule = "threshold" if thresholded else "sample"
    _, found = gradient("joint", "joint.backend=masked", f"joint.rule={rule}")
    for number, expected in enumerate(by_hand(thresholded)):
        bias = found["encoder"][f"selector_{number}"]["output"]["bias"]
        np.testing.assert_allclose(bias, [expected.sum()], rtol=1e-3)


def test_packed_as_masked() -> None:
    """All gradients of stage joint; those of selectors in stage policy, where a sample imitates."""
    for stage, step in (("joint", 9), ("policy", 0)):
        (value, expected), (packed_value, found) = (
            gradient(stage, f"{stage}.backend={backend}", step=step) for backend in ("masked", "packed")
        )
        np.testing.assert_allclose(packed_value, value, rtol=1e-5)
        if stage == "policy":
            expected, found = (
                {k: x for k, x in tree["encoder"].items() if k.startswith("selector")}
                for tree in (expected, found)
            )
        tiny_models.assert_same_gradients(found, expected)


def test_gates_change_no_loss() -> None:
    """The task loss of joint is that of credit reward; the hard part trains no selector."""
    metrics = []
    for settings in (SETTINGS, [*SETTINGS, "joint.credit=secant"], ["joint.dropout=false"]):
        config = load_config(QUICKSTART, ["joint.backend=masked", f"joint.num_samples={K}", *settings])
        objective = objective_of(STAGES["joint"], config, MODEL, 10)
        metrics.append(jax.jit(lambda p, f=objective: f(p, BATCH, KEY, jnp.int32(0)).metrics)(PARAMS))
    for name in ("task_loss", "kept_ratio", "kept_tokens_0", "kept_tokens_1"):
        np.testing.assert_array_equal(metrics[0][name], metrics[2][name])
        np.testing.assert_array_equal(metrics[1][name], metrics[2][name])
    _, hard = gradient("joint", "joint.backend=masked", hard=True)
    assert not any(x.any() for x in jax.tree.leaves(hard["encoder"]["selector_0"]))


GATE = "joint.credit=gate joint.penalty_gradient=exact"


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ("policy.credit=gate", "policy.penalty_gradient"),
        ("policy.num_samples=1", "policy.num_samples"),
        ("joint.num_samples=1", "joint.num_samples"),
        (f"{GATE} joint.rule=threshold joint.num_samples=2", "joint.num_samples"),
    ],
)
def test_settings_that_conflict(settings: str, key: str) -> None:
    with pytest.raises(UserError, match=key):
        load_config(QUICKSTART, settings.split())
