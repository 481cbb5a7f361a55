"""Dropout's masks: rates, independence, and parts of a mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trbert_jax.model.dropout import dropout, hash_bits, seeds


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_rate_and_scale(rate: float) -> None:
    n = 200_000
    kept = np.asarray(dropout(jnp.ones((n // 100, 100)), rate, seeds(jax.random.key(3))))
    assert set(np.unique(kept)) <= {np.float32(0), np.float32(1) / np.float32(1 - rate or 1)}
    # Five standard deviations of a binomial.
    assert abs((kept > 0).mean() - (1 - rate)) <= 5 * np.sqrt(rate * (1 - rate) / n)


def test_a_part_of_a_mask_is_that_part() -> None:
    seed, x = seeds(jax.random.key(0)), jnp.ones((40, 6, 8))
    whole = dropout(x, 0.5, seed)
    np.testing.assert_array_equal(dropout(x[12:20], 0.5, seed, jnp.int32(12)), whole[12:20])
    part = dropout(x[12:20, :5, :3], 0.5, seed, jnp.int32(12), (6, 8))
    np.testing.assert_array_equal(part, whole[12:20, :5, :3])
    np.testing.assert_array_equal(dropout(x, 0.5, None), x)


def test_bits_are_as_of_a_random_source() -> None:
    """Correlations of bits between positions, seeds and places are those of independent bits."""
    n = 1 << 14
    position = jnp.arange(n, dtype=jnp.uint32)
    words = [hash_bits(jnp.array(s, jnp.uint32), position) for s in ((0, 0), (1, 0), (0, 1), (2**31, 7))]
    bits = np.stack([np.unpackbits(np.asarray(x).view(np.uint8)).reshape(n, 32) for x in words])
    signs = bits.astype(np.float64) * 2 - 1  # [seeds, n, 32]
    bound = 6 / np.sqrt(n)  # 6 standard deviations of a mean of n signs, over some thousands of means
    assert np.abs(signs.mean(1)).max() < bound
    flat = signs.swapaxes(1, 2).reshape(-1, n)  # [seeds * 32, n]
    assert np.abs(flat @ flat.T / n - np.eye(len(flat))).max() < bound
    for lag in (1, 2, 6, 64, 384):
        pairs = (signs[:, lag:, :, None] * signs[:, :-lag, None, :]).mean(1)
        assert np.abs(pairs).max() < 1.1 * bound
