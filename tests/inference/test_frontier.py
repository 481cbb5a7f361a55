"""Thresholds for given speeds: copies in one pass, solved FLOPs, and the points that a model keeps."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from common import random_examples
from jax.scipy.special import rel_entr
from test_engine import CONFIG, EXAMPLES, MAX_LENGTH, PARAMS, RUNNER, assert_same

from trbert_jax.errors import UserError
from trbert_jax.inference import frontier
from trbert_jax.inference.copies import judging_logits, run_copies
from trbert_jax.inference.engine import InferenceEngine
from trbert_jax.inference.frontier import Point
from trbert_jax.model.model import TokenReducingModel
from trbert_jax.model.operating_points import OperatingPoint, find_thresholds, from_dict, to_dict
from trbert_jax.reduction import flops
from trbert_jax.reduction.rules import RULES
from trbert_jax.reduction.selection import min_logit
from trbert_jax.tasks import saved_task

THRESHOLDS = [(0.3, 0.6), (0.5, 0.5), (0.7, 0.2)]
LOGITS = np.array([[min_logit(x) for x in pair] for pair in THRESHOLDS], np.float32)


@pytest.mark.parametrize("backend", ["packed", "masked"])
def test_copies_are_runs_of_their_own(backend: str) -> None:
    copies = run_copies(RUNNER, PARAMS, EXAMPLES, "min_logit", LOGITS, RULES["threshold"], backend)
    apart = [RUNNER.run(PARAMS, EXAMPLES, threshold=pair, backend=backend) for pair in THRESHOLDS]
    for one, other in zip(copies, apart, strict=True):
        assert_same(one, other)
    if backend == "packed":
        counts = np.stack([outputs.num_kept for outputs in apart])
        drawn = run_copies(RUNNER, PARAMS, EXAMPLES, "num_kept", counts, RULES["random"], backend, seed=3)
        for one, kept in zip(drawn, counts, strict=True):
            assert_same(one, RUNNER.run(PARAMS, EXAMPLES, rule="random", num_kept=kept, seed=3))


def test_judging_logits_give_the_counts_of_any_threshold() -> None:
    first = judging_logits(RUNNER, PARAMS, EXAMPLES, LOGITS[:1], 0, "packed")[0]
    seconds = judging_logits(RUNNER, PARAMS, EXAMPLES, LOGITS, 1, "packed")
    assert first.shape == (len(EXAMPLES), MAX_LENGTH)
    for pair, logits, second in zip(THRESHOLDS, LOGITS, seconds, strict=True):
        kept = RUNNER.run(PARAMS, EXAMPLES, threshold=pair).num_kept
        for stage, judged in enumerate((first, second)):
            np.testing.assert_array_equal((judged >= logits[stage]).sum(-1), kept[:, stage])


@pytest.mark.parametrize("num_layers", [4, 3], ids=["two points", "one point"])
def test_a_speed_that_is_asked_for_is_met_on_other_texts(num_layers: int) -> None:
    config = dataclasses.replace(CONFIG, num_layers=num_layers)
    assert config.num_reductions == num_layers // 2
    params = jax.tree.map(jnp.asarray, tiny_models.tiny_params(config, seed=38, scale=0.3))
    engine, rng, task = (
        InferenceEngine(TokenReducingModel(config), 64),
        np.random.default_rng(1),
        saved_task(config),
    )
    dev, test = (random_examples(config, rng.integers(3, MAX_LENGTH + 1, 256), rng) for _ in range(2))
    dense = engine.run(params, dev, rule="dense", backend="masked")
    points = frontier.find_frontier(engine, params, dev, task, dense, (1.5, 2.0, 9.0), "masked")
    best = frontier.best(points)
    assert [point.target for point in best] == [1.5, 2.0]  # 9x is out of reach
    assert len(points) > len(best) if config.num_reductions > 1 else len(points) == len(best)
    for point in best:
        assert point.speedup == pytest.approx(point.target, rel=0.01)
        assert point.divergence == min(p.divergence for p in points if p.target == point.target)  # type: ignore[type-var]
        outputs = engine.run(params, test, threshold=point.thresholds, backend="masked")
        shape = flops.EncoderShape.of(config)
        reduced = flops.reduced_flops(shape, outputs.lengths, outputs.num_kept).mean()
        speedup = flops.dense_flops(shape, outputs.lengths).mean() / reduced
        assert speedup == pytest.approx(point.target, rel=0.05)
    results = frontier.evaluate_points(engine, params, test, task, best, dense, ["first_k"], "masked")
    assert results[-1]["flops_speedup"] == pytest.approx(speedup)
    assert results[-1]["accuracy"] == outputs.accuracy
    baseline = engine.run(params, test, rule="first_k", num_kept=outputs.num_kept, backend="masked")
    assert results[-1]["first_k"]["accuracy"] == baseline.accuracy


def kl(left: np.ndarray, right: np.ndarray) -> float:
    return float(rel_entr(jax.nn.softmax(left), jax.nn.softmax(right)).sum(-1).mean())


def test_divergence_and_flips() -> None:
    """Of classes as optax computes them; of spans over the real positions of each row."""
    dense, reduced = RUNNER.run(PARAMS, EXAMPLES, rule="dense"), RUNNER.run(PARAMS, EXAMPLES)
    divergence, flips = frontier.compare(dense, reduced)
    assert divergence == pytest.approx(kl(dense.logits, reduced.logits), rel=1e-4)
    assert flips == (dense.logits.argmax(-1) != reduced.logits.argmax(-1)).mean() > 0
    assert frontier.compare(dense, dense) == (0, 0)
    rng, rows = np.random.default_rng(0), 2
    one, two = rng.normal(size=(2, rows, 2, 5)).astype(np.float32)
    left, right = (dataclasses.replace(dense, logits=x, lengths=np.array([5, 3])) for x in (one, two))
    parts = [(one[0], two[0]), (one[1, :, :3], two[1, :, :3])]
    terms = [kl(d, r) for d, r in parts]
    differ = [(d.argmax(-1) != r.argmax(-1)).any() for d, r in parts]
    divergence, flips = frontier.compare(left, right)
    assert (divergence, flips) == pytest.approx((np.mean(terms), np.mean(differ)), rel=1e-4)


def test_falling_is_the_least_squares_fit() -> None:
    """The closed form of isotonic regression: min over starts of max over ends of the mean."""
    values = np.random.default_rng(0).normal(size=9)
    expected = [
        min(max(values[j : k + 1].mean() for k in range(i, 9)) for j in range(i + 1)) for i in range(9)
    ]
    assert frontier.falling(values.tolist()) == pytest.approx(expected)


def point(target: float, value: float) -> Point:
    values: dict[str, Any] = {"divergence": target, "flips": 0.0, "kept": (5.0, 2.0)}
    values["thresholds"] = (0.5, target / 10)
    return Point(target=target, value=value, speedup=target + 0.01, **values)


def test_operating_points(caplog: pytest.LogCaptureFixture) -> None:
    task = saved_task(CONFIG)
    points = [point(1.5, 0.90), point(2, 0.892), point(3, 0.88), point(4, 0.897), point(5, 0.80)]
    found = frontier.operating_points(points, task, "accuracy", 0.9, 100, (2, 8), (0.5, 1, 1.2))
    # One lucky point at 4x carries neither 4x nor 3x within half a point: their mean is 0.8885.
    assert {p.name: p.speedup for p in found} == {
        "2x": 2.01,
        "within_0.5": 1.51,
        "within_1": 2.01,
        "within_1.2": 4.01,
    }
    assert "operating point 8x: left out" in caplog.text
    assert from_dict(json.loads(json.dumps(to_dict(found))), "x") == found
    assert found[0] == OperatingPoint(
        name="2x",
        thresholds=(0.5, 0.2),
        speedup=2.01,
        kept=(5.0, 2.0),
        metric="accuracy",
        value=0.892,
        dense=0.9,
        examples=100,
    )
    assert find_thresholds(found, "2x") == (0.5, 0.2)
    assert find_thresholds(found, None, threshold=0.3) == 0.3
    for name, options, words in (
        ("3x", {}, "'3x' is unknown; the model has 2x, within_0.5"),
        ("2x", {"rule": "dense"}, "leave out rule dense"),
        ("2x", {"threshold": 0.3}, "leave out threshold 0.3"),
    ):
        with pytest.raises(UserError, match=words):
            find_thresholds(found, name, **options)
