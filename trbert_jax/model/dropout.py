"""Dropout whose masks are a hash of seed and position.

Any part of a mask can be computed again, so none is stored for the backward pass and none depends on the
sizes of the loops. JAX's generators take a third of a training step on a CPU.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp


def seeds(rng: jax.Array, *shape: int) -> jax.Array:
    """Draws seeds of masks: uint32 [*shape, 2]."""
    return jax.random.bits(rng, (*shape, 2), jnp.uint32)


def dropout(
    x: jax.Array,
    rate: float,
    seed: jax.Array | None,
    first: jax.Array | int = 0,
    whole: tuple[int, ...] | None = None,
) -> jax.Array:
    """Sets entries to 0 with probability `rate` and divides the others by `1 - rate`.

    `seed` is uint32 [2]; without one, returns x. If x is a part of a larger array, of which it has the
    beginning of each axis but the first, `first` is the number of its first row there and `whole` the shape
    of a row. Positions count modulo 2^32.
    """
    if seed is None or rate == 0:
        return x
    if rate == 1:
        return jnp.zeros_like(x)
    position, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis, size in reversed(list(enumerate((1, *(whole or x.shape[1:]))))):
        index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        if axis == 0:
            index += jnp.asarray(first).astype(jnp.uint32)
        position += index * jnp.uint32(stride % 2**32)
        stride *= size
    keep = hash_bits(seed, position) < jnp.uint32(min(round((1 - rate) * 2**32), 2**32 - 1))
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def hash_bits(seed: jax.Array, position: jax.Array) -> jax.Array:
    """Returns 32 random bits for each position, uint32.

    The integer hash `lowbias32` (Wellons, "Prospecting for hash functions", 2018) with the seed between its
    rounds, and one more round: masks are independent even of seeds that differ in one bit.
    """
    x = position ^ seed[0]
    x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
    x = x + seed[1]
    x = (x ^ (x >> 15)) * jnp.uint32(0xD35A2D97)
    x = ((x ^ (x >> 15)) + seed[0]) * jnp.uint32(0x9E3779B1)
    return x ^ (x >> 16)


class Dropout(nn.Module):
    """Dropout of a whole array; draws its seed from the `dropout` RNG."""

    rate: float

    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        """Any shape -> the same."""
        if deterministic or self.rate == 0:
            return x
        return dropout(x, self.rate, seeds(self.make_rng("dropout")))
