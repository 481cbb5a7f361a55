"""The price of kept tokens, its exact gradient, and the target speed-up that it holds."""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from trbert_jax.reduction import budget, flops
from trbert_jax.reduction import policy_loss as policy
from trbert_jax.reduction.flops import EncoderShape
from trbert_jax.reduction.selection import Selection
from trbert_jax.reduction.selector_init import rank_error

SHAPE = EncoderShape.of(tiny_models.BERT)
BERT_BASE = EncoderShape(12, 768, 3072, 2, (1, 6))
# Six tokens, the first is [CLS]; the logits of both points, which depend on no other token.
LOGITS = jnp.array([[0.3, -1.0, 0.5, 2.0, -0.2, 1.1], [0.1, 0.8, -0.6, 0.4, 1.5, -2.0]])
ACTIONS = np.array([(True, *x) for x in itertools.product([False, True], repeat=5)])  # [32, 6]


def selections(logits: jax.Array, *actions: np.ndarray) -> list[Selection]:
    """Rows with these actions, bool [rows, 6] for each point; a point judges what the one before kept."""
    valid, found = jnp.ones(actions[0].shape, bool), []
    for z, keep in zip(logits, actions, strict=False):
        found.append(Selection(jnp.broadcast_to(z, valid.shape), valid, valid & keep))
        valid = found[-1].keep
    return found


def chances(logits: jax.Array) -> np.ndarray:
    """Probability of each of `ACTIONS`, float [32]."""
    p = np.asarray(jax.nn.sigmoid(logits))
    return np.prod(np.where(ACTIONS, p, 1 - p)[:, 1:], axis=1)


def ones(found: Sequence[Selection]) -> list[jax.Array]:
    return [jnp.ones(len(x.logits)) for x in found]


def test_expected_counts_are_those_of_all_selections() -> None:
    """Values, and on average over the first point's selections the gradients by all logits."""

    def ours(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = selections(logits, ACTIONS, ACTIONS)
        first, second = budget.expected_counts(found, ones(found))
        weights = chances(LOGITS[0])
        return first @ weights, second @ weights

    def closed(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        p, q = jax.nn.sigmoid(logits)[:, 1:]
        return 1 + p.sum(), 1 + (p * q).sum()

    values, gradients = (
        [f(LOGITS) for f in (ours, closed)],
        [jax.jacobian(f)(LOGITS) for f in (ours, closed)],
    )
    for left, right in (values, gradients):
        for a, b in zip(left, right, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_exact_penalty_is_the_mean_of_its_policy_gradient() -> None:
    """Over all pairs of samples of a row, drawn with their probability; K = 2 with its own baseline."""
    alpha, weights = 0.7, chances(LOGITS[0])
    pairs = [[i, j] for i, j in itertools.product(range(32), repeat=2)]
    both = np.array(pairs).T  # [K, 1024]

    def reinforce(logits: jax.Array) -> jax.Array:
        found = selections(logits[None], ACTIONS[both.reshape(-1)])
        cost = policy.kept_ratio([found[0].num_kept], 10).reshape(2, -1)
        nll = policy.selector_nll(found).reshape(2, -1)
        loss = policy.policy_loss(nll, policy.reward(jnp.zeros_like(cost), cost, alpha))
        return loss @ (weights[both[0]] * weights[both[1]])

    def exact(logits: jax.Array) -> jax.Array:
        found = selections(logits[None], ACTIONS[[3]])  # any sample
        scale = [(1 - 1 / 2) / found[0].scored.sum(-1)]
        return alpha * policy.kept_ratio(budget.expected_counts(found, scale), 10)[0]

    gradient = jax.grad(exact)(LOGITS[0])
    np.testing.assert_allclose(gradient, jax.grad(reinforce)(LOGITS[0]), rtol=1e-4, atol=1e-7)
    assert gradient[0] == 0
    assert (np.asarray(gradient[1:]) > 5e-4).all()


@pytest.mark.parametrize("shape", [SHAPE, BERT_BASE], ids=["tiny", "base"])
def test_price_is_the_reported_flops(shape: EncoderShape) -> None:
    lengths, kept = np.array([18, 7, 1]), np.array([[9, 4], [7, 1], [1, 1]])
    share = budget.flops_share(shape, [jnp.asarray(lengths), *jnp.asarray(kept).T], 512)
    full = flops.dense_flops(shape, 512)
    np.testing.assert_allclose(share, flops.reduced_flops(shape, lengths, kept) / full, rtol=1e-6)
    dense = budget.flops_share(shape, [jnp.asarray(lengths)], 512)
    np.testing.assert_allclose(dense, flops.dense_flops(shape, lengths) / full, rtol=1e-6)


def test_multiplier_follows_the_error() -> None:
    """By the formula; what is asked rises from the first update's to the target in half of the updates."""
    alpha = expected = 0.5
    follow = jax.jit(lambda control, speedup, step: budget.follow(control, speedup, 3.0, step, 10, alpha))
    control = budget.first_control(alpha)
    for step, speedup in enumerate([1.2, 1.9, 1.1, 2.0, 8.0, 3.0, 2.5]):
        asked = 1.2 + min(step / 5, 1) * (3 - 1.2)
        error = np.clip(asked / speedup - 1, -1, 1)
        expected *= np.exp(budget.RATE * error)
        control = follow(control, speedup, step)
        np.testing.assert_allclose(control.multiplier, expected, rtol=1e-5)
        weight = expected + budget.DAMPING * max(expected, alpha) * error
        np.testing.assert_allclose(control.weight, weight, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(control.start, 1.2)
    fast = follow(budget.first_control(alpha), 4.0, 0)
    np.testing.assert_allclose(fast.multiplier, alpha * np.exp(budget.RATE * (3 / 4 - 1)), rtol=1e-5)
    slow = dataclasses.replace(fast, multiplier=jnp.float32(99.99))
    for step in range(9, 20):
        slow = follow(slow, 1.0, step)
    assert slow.multiplier == budget.RANGE[1]


def test_shift() -> None:
    """Fewer tokens after an update that was slower than the target."""
    for speedup, share in ((3.0, 0), (2.0, -1 / 2), (6.0, 1 / 2), (1.0, -1)):
        change = budget.shift(jnp.float32(speedup), 3.0)
        np.testing.assert_allclose(change, share * budget.SHIFT, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("keep", [None, (0.3, 0.8)])
def test_bce_learns_the_tokens_to_keep(keep: tuple[float, ...] | None) -> None:
    """The cross entropy with the top share of the ranks; its minimum keeps as many on average."""
    rng, length = np.random.default_rng(0), 10
    rank = 1 - rng.permuted(np.tile(np.arange(length), (2, 1)), axis=1).astype(np.float32) / length
    found = selections(jnp.asarray(rng.normal(size=(2, length))), *[np.ones((1, length), bool)] * 2)
    shares, loss = keep or (0.5, 0.5), np.zeros(length)
    for selection, target, share in zip(found, rank, shares, strict=True):
        p, top = 1 / (1 + np.exp(-selection.logits[0])), np.argsort(-target)[: round(share * length)]
        wanted = np.isin(np.arange(length), top)
        loss = loss - np.log(np.where(wanted, p, 1 - p))
    np.testing.assert_allclose(rank_error(found, jnp.asarray(rank[None]), keep, "bce")[0], loss, rtol=1e-5)
