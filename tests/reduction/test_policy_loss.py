import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trbert_jax.reduction import policy_loss as policy
from trbert_jax.reduction import selector_init as initialization
from trbert_jax.reduction.selection import LOG_EPSILON, Selection


def logit(p: float) -> float:
    return float(np.log(p / (1 - p)))


def selection(keep_prob: Sequence[float], scored: str, keep: str) -> Selection:
    """One row; `scored` and `keep` are strings of 0 and 1."""
    logits = jnp.array([[logit(p) for p in keep_prob]], jnp.float32)
    return with_logits(logits, scored, keep)


def with_logits(logits: jax.Array, scored: str, keep: str) -> Selection:
    there, kept = (jnp.array([[c == "1" for c in row]]) for row in (scored, keep))
    return Selection(logits=logits, scored=there, keep=kept)


def test_rank_error() -> None:
    """|p - rank|, summed over the points; the last token is padding, whatever its rank."""
    selections = [
        selection([0.5, 0.25, 0.75, 0.5], "1110", "1110"),
        selection([0.9, 0.8, 0.1, 0.5], "1110", "1110"),
    ]
    rank = jnp.array([[[1.0, 0.5, 0.25, 9.0], [1.0, 0.5, 0.25, 9.0]]])
    expected = [[0.5 + 0.1, 0.25 + 0.3, 0.5 + 0.15, 0]]
    np.testing.assert_allclose(initialization.rank_error(selections, rank), expected, rtol=1e-5)
    first = initialization.rank_error(selections[:1], rank)
    np.testing.assert_allclose(first, [[0.5, 0.25, 0.5, 0]], rtol=1e-5)
    powers = initialization.rank_error(selections, rank, [0.75, 0.5])  # rank ** (1/2), rank
    np.testing.assert_allclose(powers, [[0.6, 0.5**0.5 - 0.25 + 0.3, 0.25 + 0.15, 0]], rtol=1e-5)
    with pytest.raises(ValueError, match="zip"):
        initialization.rank_error(selections, rank, [0.75])


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_rank_error_to_keep_a_share(share: float) -> None:
    """A selector without error gives that share a probability above 1/2: the highest ranks."""
    rank = jnp.linspace(0.005, 0.995, 100)[None, None]
    power = np.log(0.5) / np.log(1 - share)
    perfect = selection(np.asarray(rank[0, 0]) ** power, "1" * 100, "1" * 100)
    np.testing.assert_allclose(initialization.rank_error([perfect], rank, [share]), 0, atol=1e-6)
    np.testing.assert_array_equal(perfect.logits[0] > 0, np.arange(100) >= round(100 * (1 - share)))


def test_selector_nll_of_two_points() -> None:
    """At each point the mean over the tokens judged there, [CLS] included; summed over the points."""
    selections = [
        selection([0.5, 0.25, 0.75, 0.9], "1110", "1010"),
        selection([0.2, 0.99, 0.6, 0.99], "1010", "1000"),
    ]
    first = -(np.log(0.5) + np.log(1 - 0.25) + np.log(0.75)) / 3
    second = -(np.log(0.2) + np.log(1 - 0.6)) / 2
    np.testing.assert_allclose(policy.selector_nll(selections), [first + second], rtol=1e-5)
    np.testing.assert_allclose(policy.selector_nll(selections[:1]), [first], rtol=1e-5)


@pytest.mark.parametrize("value", [-30.0, -14.0, 14.0, 15.5, 30.0, 200.0])
@pytest.mark.parametrize("keep", ["0", "1"])
def test_saturated_probabilities(value: float, keep: str) -> None:
    """Finite, and the same compiled or not, where XLA could reorder 1 - p + epsilon."""

    def nll(x: jax.Array) -> jax.Array:
        return policy.selector_nll([with_logits(x, "1", keep)])[0]

    x = jnp.array([[value]])
    prob = np.float64(jax.nn.sigmoid(x)[0, 0])
    expected = -np.log((prob if keep == "1" else 1 - prob) + LOG_EPSILON)
    for evaluate in (nll, jax.jit(nll)):
        np.testing.assert_allclose(evaluate(x), expected, rtol=1e-5, atol=1e-6)
    eager, compiled = jax.grad(nll)(x), jax.jit(jax.grad(nll))(x)
    assert np.isfinite(eager).all()
    np.testing.assert_allclose(compiled, eager, rtol=1e-5, atol=1e-9)


def test_masking_is_deleting() -> None:
    """Tokens that were not there change neither value nor gradient, whatever their logits."""
    short = jnp.array([[0.3, -0.2]])
    long = jnp.array([[0.3, -0.2, 1e30, -1e30]])
    rank = jnp.array([[[1.0, 0.5, 0.0, 0.0]]])

    def loss(logits: jax.Array, scored: str) -> jax.Array:
        keep = "10" + "0" * (len(scored) - 2)
        judged = [with_logits(logits, scored, keep)]
        return (
            policy.selector_nll(judged) + initialization.rank_error(judged, rank[..., : len(scored)]).sum(-1)
        )[0]

    for x, scored in ((short, "11"), (long, "1100")):
        value, grad = jax.value_and_grad(loss)(x, scored)
        np.testing.assert_allclose(value, loss(short, "11"), rtol=1e-6)
        np.testing.assert_allclose(grad[:, :2], jax.grad(loss)(short, "11"), rtol=1e-6)
        np.testing.assert_array_equal(grad[:, 2:], 0)


def test_row_without_tokens() -> None:
    value, grad = jax.value_and_grad(lambda x: policy.selector_nll([with_logits(x, "00", "00")])[0])(
        jnp.array([[5.0, -5.0]])
    )
    assert value == 0
    np.testing.assert_array_equal(grad, 0)


def test_kept_ratio_is_of_the_maximum_length() -> None:
    """Not of the width: 3 and 1 kept tokens of 10 that an input may have."""
    for padding in ("", "00000"):
        p = [0.5] * (4 + len(padding))
        selections = [
            selection(p, "1111" + padding, "1110" + padding),
            selection(p, "1110" + padding, "1000" + padding),
        ]
        np.testing.assert_allclose(policy.kept_ratio(selections, 10), [0.2], rtol=1e-6)
        np.testing.assert_allclose(policy.kept_ratio(selections[:1], 10), [0.3], rtol=1e-6)


def test_policy_loss() -> None:
    task_loss = jnp.array([[1.0, 0.0], [2.0, 0.0], [6.0, 0.0]])
    ratio = jnp.array([[0.5, 0.1], [0.0, 0.2], [0.5, 0.3]])
    nll = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    reward = policy.reward(task_loss, ratio, alpha=2.0)
    np.testing.assert_allclose(reward, [[-2, -0.2], [-2, -0.4], [-7, -0.6]], rtol=1e-6)
    advantage = np.array([[5 / 3, 0.2], [5 / 3, 0], [-10 / 3, -0.2]])
    np.testing.assert_allclose(policy.advantage(reward), advantage, rtol=1e-5, atol=1e-6)
    expected = [(5 / 3 + 5 - 50 / 3) / 3, (0.4 - 1.2) / 3]
    np.testing.assert_allclose(policy.policy_loss(nll, reward), expected, rtol=1e-5)


def test_reward_has_no_gradient() -> None:
    """The policy loss moves the log-probabilities alone, each by its advantage over K."""

    def loss(nll: jax.Array, task_loss: jax.Array, ratio: jax.Array) -> jax.Array:
        return policy.policy_loss(nll, policy.reward(task_loss, ratio, 0.5)).sum()

    nll, task_loss, ratio = jax.random.uniform(jax.random.key(0), (3, 4, 2))
    grads = jax.grad(loss, argnums=(0, 1, 2))(nll, task_loss, ratio)
    expected = policy.advantage(-task_loss - 0.5 * ratio) / 4
    np.testing.assert_allclose(grads[0], expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(grads[1], 0)
    np.testing.assert_array_equal(grads[2], 0)


@pytest.mark.parametrize("num_samples", [2, 3])
def test_expected_gradient_is_the_rewards(num_samples: int) -> None:
    """Over all outcomes of sampling, the loss's gradient is that of the negative expected reward.

    Times (K - 1) / K, since a sample is part of its own baseline, and over the 2 tokens judged.
    """
    keep_prob, kept_reward, dropped_reward = 0.3, 2.0, -1.0
    x = jnp.array([[logit(0.8), logit(keep_prob)]])  # [CLS] and a token

    def loss(x: jax.Array, actions: tuple[int, ...]) -> jax.Array:
        nll = jnp.stack([policy.selector_nll([with_logits(x, "11", f"1{a}")]) for a in actions])
        reward = jnp.array([[kept_reward if a else dropped_reward] for a in actions])
        return policy.policy_loss(nll, reward)[0]

    gradient = np.zeros((1, 2))
    for actions in itertools.product((0, 1), repeat=num_samples):
        probability = np.prod([keep_prob if a else 1 - keep_prob for a in actions])
        gradient += probability * np.asarray(jax.grad(loss)(x, actions))
    slope = (kept_reward - dropped_reward) * keep_prob * (1 - keep_prob)
    expected = -slope * (num_samples - 1) / num_samples / 2
    np.testing.assert_allclose(gradient, [[0, expected]], rtol=1e-4, atol=1e-6)
