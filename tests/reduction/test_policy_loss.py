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


def selection(keep_prob: Sequence[float], scored: str) -> Selection:
    """One row in which nothing is dropped; `scored` is a string of 0 and 1."""
    return with_logits(jnp.array([[logit(p) for p in keep_prob]], jnp.float32), scored, scored)


def with_logits(logits: jax.Array, scored: str, keep: str) -> Selection:
    valid, kept = (jnp.array([[c == "1" for c in row]]) for row in (scored, keep))
    return Selection(logits=logits, scored=valid, keep=kept)


def test_rank_error() -> None:
    """|p - a power of the rank|, summed over the points; the last token is padding, whatever its rank."""
    selections = [selection(p, "1110") for p in ([0.5, 0.25, 0.75, 0.5], [0.9, 0.8, 0.1, 0.5])]
    rank = jnp.array([[[1.0, 0.5, 0.25, 9.0], [1.0, 0.5, 0.25, 9.0]]])
    powers = initialization.rank_error(selections, rank, [0.75, 0.5])  # rank ** (1/2), rank
    np.testing.assert_allclose(powers, [[0.6, 0.5**0.5 - 0.25 + 0.3, 0.25 + 0.15, 0]], rtol=1e-5)
    with pytest.raises(ValueError, match="zip"):
        initialization.rank_error(selections, rank, [0.75])


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_rank_error_to_keep_a_share(share: float) -> None:
    """A selector without error gives that share a probability above 1/2: the highest ranks."""
    rank = jnp.linspace(0.005, 0.995, 100)[None, None]
    power = np.log(0.5) / np.log(1 - share)
    perfect = selection(np.asarray(rank[0, 0]) ** power, "1" * 100)
    np.testing.assert_allclose(initialization.rank_error([perfect], rank, [share]), 0, atol=1e-6)
    np.testing.assert_array_equal(perfect.logits[0] > 0, np.arange(100) >= round(100 * (1 - share)))


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
        error = initialization.rank_error(judged, rank[..., : len(scored)])
        return policy.selector_nll(judged)[0] + error.sum()

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
        logits = jnp.zeros((1, 4 + len(padding)))
        selections = [
            with_logits(logits, scored + padding, keep + padding)
            for scored, keep in (("1111", "1110"), ("1110", "1000"))
        ]
        np.testing.assert_allclose(policy.kept_ratio([s.num_kept for s in selections], 10), [0.2], rtol=1e-6)
        np.testing.assert_allclose(policy.kept_ratio([selections[0].num_kept], 10), [0.3], rtol=1e-6)


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
