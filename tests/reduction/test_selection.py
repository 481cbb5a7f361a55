import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trbert_jax.reduction import selection as tokens
from trbert_jax.reduction.selection import Rule, Selection, TokenSet, drop_tokens

ABOVE_ZERO = 1e-6  # logits a rounding error away from the threshold
INF = float("inf")


def bools(*rows: str) -> jax.Array:
    """`bools("110", "100")`: a bool array, one string a row."""
    return jnp.array([[character == "1" for character in row] for row in rows])


def apply(rule: Rule, logits: list[list[float]], valid: jax.Array, stage: int = 0) -> Selection:
    states = jnp.zeros((*valid.shape, 1))
    return drop_tokens(TokenSet(states, valid), jnp.array(logits, jnp.float32), stage, rule)[1]


def assert_kept(keep: jax.Array, *rows: str) -> None:
    np.testing.assert_array_equal(keep, bools(*rows))


def test_first_token_stays_and_nothing_returns() -> None:
    """Whatever a rule says: here it drops everything, or keeps even what is not there."""
    valid = bools("1110", "1011", "1000", "0000")  # the last row is padding

    def careless(stage: int, logits: jax.Array, valid: jax.Array) -> jax.Array:
        return logits > 0

    assert_kept(apply(careless, [[-1.0] * 4] * 4, valid).keep, "1000", "1000", "1000", "0000")
    assert_kept(apply(careless, [[1.0] * 4] * 4, valid).keep, "1110", "1011", "1000", "0000")


def test_keep_probable_includes_one_half() -> None:
    selection = apply(tokens.keep_probable, [[-5.0, 0.0, -ABOVE_ZERO, ABOVE_ZERO, 3.0]], bools("11110"))
    assert_kept(selection.keep, "11010")


@pytest.mark.parametrize(
    ("score", "count", "expected"),
    [
        ([1.0, 3.0, 2.0, 0.0], 2, "0110"),
        ([1.0, 1.0, 1.0, 1.0], 2, "1100"),  # ties: those that stand first
        ([0.0, 2.0, 1.0, 1.0], 2, "0110"),
        ([0.0, -0.0, 0.0, -0.0], 1, "1000"),  # the sign of zero breaks no tie
        ([INF, 5.0, 4.0, INF], 3, "1101"),
        ([1.0, 3.0, 2.0, 0.0], 0, "0000"),
        ([1.0, 3.0, 2.0, 0.0], 9, "1111"),
    ],
)
def test_top_tokens(score: list[float], count: int, expected: str) -> None:
    assert_kept(tokens.top_tokens(jnp.array([score]), bools("1111"), jnp.array([count])), expected)


def test_top_tokens_of_short_rows() -> None:
    """Rows with fewer tokens than asked for keep them all, and invalid tokens never win."""
    score = jnp.array([[9.0, 1.0, 8.0, 2.0]] * 3)
    valid = bools("0101", "1111", "0000")
    assert_kept(tokens.top_tokens(score, valid, jnp.array([3, 3, 3])), "0101", "1011", "0000")


@pytest.mark.parametrize("threshold", [0.01, 0.3, 0.5, 0.7])
def test_keep_above_a_threshold(threshold: float) -> None:
    logits = [[-5.0, -4.0, -1.0, -0.1, 0.0, 0.1, 1.0, 9.0]]
    assert tokens.min_logit(0.5) == 0.0
    selection = apply(
        tokens.keep_above(jnp.array([[tokens.min_logit(threshold)]])), logits, bools("11111110")
    )
    expected = (1 / (1 + np.exp(-np.array(logits))) >= threshold) & np.array(bools("11111110"))
    expected[:, 0] = True
    np.testing.assert_array_equal(selection.keep, expected)


def test_each_point_and_row_has_its_own_threshold() -> None:
    least, logits = jnp.array([[0.0, 1.0], [2.0, -1.0]]), [[9.0, -1.5, -0.5, 0.5, 1.5, 2.5]] * 2
    for stage, rows in enumerate([("100111", "100001"), ("100011", "101111")]):
        assert_kept(apply(tokens.keep_above(least), logits, bools(*["111111"] * 2), stage).keep, *rows)


@pytest.mark.parametrize("cls", [-5.0, 5.0])
def test_keep_batch_max_counts_cls_once(cls: float) -> None:
    """[CLS] is among the kept whatever its logit, and its place is not given to another."""
    keep = apply(tokens.keep_batch_max, [[cls, 1.0, -1.0, -2.0]] * 2, bools("1111", "1111")).keep
    assert_kept(keep, "1100", "1100")


@pytest.mark.parametrize(
    ("keep_prob", "count"),
    [([0.5, 0.5, 0.25, 0.125], 1), ([0.5, 0.5, 0.25, 0.25], 2), ([0.01] * 4, 0), ([0.99] * 4, 4)],
)
def test_imitation_keeps_the_expected_number(keep_prob: list[float], count: int) -> None:
    """floor(sum of the probabilities + 1/2) tokens of highest score; [CLS], whose is least, stays too."""
    logits = [float(np.log(p / (1 - p))) for p in keep_prob] + [20.0]
    guide = jnp.array([[[0.0, 1.0, 3.0, 2.0, 9.0]]])
    rule = tokens.imitate(guide, jnp.array([True]), tokens.keep_all)
    expected = {0: "10000", 1: "10100", 2: "10110", 4: "11110"}[count]
    assert_kept(apply(rule, [logits], bools("11110")).keep, expected)


def test_imitation_follows_its_stage_and_its_rows() -> None:
    guide = jnp.array([[[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]] * 2)
    rule = tokens.imitate(guide, jnp.array([True, False]), tokens.keep_all)
    logits = [[-1.0, -1.0, -1.0]] * 2  # sum of p = 0.81: one token
    assert_kept(apply(rule, logits, bools("111", "111"), stage=0).keep, "110", "111")
    assert_kept(apply(rule, logits, bools("111", "111"), stage=1).keep, "101", "111")


LENGTHS = np.array([12, 7, 1, 9])
MANY = 4000  # rows; frequencies are then within 0.03, more than three standard deviations


def prefix(lengths: np.ndarray, width: int) -> jax.Array:
    return jnp.asarray(np.arange(width) < lengths[:, None])


@jax.jit
def keys(rows: np.ndarray) -> jax.Array:
    return tokens.row_keys(jax.random.key(3), jnp.asarray(rows))


@functools.partial(jax.jit, static_argnums=0)
def sampled(stage: int, rows: np.ndarray, logits: jax.Array, valid: jax.Array) -> jax.Array:
    return tokens.sample(keys(rows))(stage, logits, valid)


@jax.jit
def randomly_kept(counts: np.ndarray, rows: np.ndarray, logits: jax.Array, valid: jax.Array) -> jax.Array:
    return tokens.keep_random(jnp.asarray(counts)[None], keys(rows))(0, logits, valid)


def test_keep_random_is_uniform() -> None:
    rows = np.arange(MANY)
    keep = randomly_kept(np.full(MANY, 3), rows, np.zeros((MANY, 5)), np.ones((MANY, 5), bool))
    np.testing.assert_allclose(keep.mean(0), [1, 0.5, 0.5, 0.5, 0.5], atol=0.03)


def test_sampling_frequencies() -> None:
    """Tokens are kept as often as their probability says, each on its own, at each point anew."""
    keep_prob = np.array([0.5, 0.05, 0.3, 0.5, 0.95])
    logits = np.tile(np.log(keep_prob / (1 - keep_prob)), (MANY, 1)).astype(np.float32)
    draws = [sampled(stage, np.arange(MANY), logits, np.ones((MANY, 5), bool)) for stage in (0, 1)]
    for keep in draws:
        np.testing.assert_allclose(keep.mean(0), keep_prob, atol=0.03)
    together = np.concatenate([np.asarray(x, float) for x in draws], axis=1).T
    assert abs(np.corrcoef(together) - np.eye(10)).max() < 0.06


def test_sampling_is_certain_at_saturated_logits() -> None:
    logits = np.tile(np.array([200, -200, 200, -200, 200], np.float32), (MANY, 1))
    keep = sampled(0, np.arange(MANY), logits, np.ones((MANY, 5), bool))
    np.testing.assert_array_equal(keep, logits > 0)


RULES: dict[str, Callable[..., jax.Array]] = {
    "sample": functools.partial(sampled, 0),
    "keep_random": lambda rows, *inputs: randomly_kept(1 + LENGTHS[rows] // 2, rows, *inputs),
    "keep_probable": lambda rows, *inputs: tokens.keep_probable(0, *inputs),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(("rows", "width"), [([1], 12), ([3, 1, 1, 0, 2, 3], 29)], ids=str)
def test_rows_do_not_depend_on_their_batch(name: str, rows: list[int], width: int) -> None:
    """Not on its size, nor on the place in it, nor on the padding."""
    logits = np.random.default_rng(0).normal(size=(4, 12)).astype(np.float32)

    def keep(rows: np.ndarray, width: int) -> np.ndarray:
        padded = np.pad(logits[rows], [(0, 0), (0, width - 12)])
        return np.asarray(RULES[name](rows, padded, prefix(LENGTHS[rows], width)))

    whole, part = keep(np.arange(4), 12), keep(np.array(rows), width)
    np.testing.assert_array_equal(part[:, :12], whole[rows])
    assert not part[:, 12:].any()
