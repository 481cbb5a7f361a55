"""Loop over as many tokens as there are, a number that only the device knows.

Arrays have a static capacity, of which the first `count` slots hold tokens. Work on single tokens
runs tile by tile, as many tiles as `count` needs; attention runs in groups of rows, each as wide as
its longest row needs. Nothing is compiled twice and nothing waits for the host. Slots after the last
token are finite and never read.

JAX has no derivative of a loop with a dynamic trip count. These loops define one: the backward pass is
the same loop over the derivative of its body, which recomputes the body instead of storing it. The loops over
whole layers, in `segment`, store what is worth it.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

Arrays = tuple[jax.Array, ...]
TokenFn = Callable[..., Arrays]  # (params, noise, first token, *tiles [t, ...]) -> tiles [t, ...]
AttentionFn = Callable[
    ..., jax.Array
]  # (noise, group, query [g, 1, H], key, value [g, w, H], ...) -> [g, 1, H]
SMALL_REQUEST = 4  # rows


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Sizes of the loops' steps."""

    tokens: int = 512  # tokens of a large tile
    rest: int = 64  # tokens of a small tile, for the remainder; divides `tokens`
    group_tokens: int = 512  # tokens of a group of rows in attention, padded to the group's width
    width_step: int = 32  # widths of attention are multiples of this
    # Whether the rows of a group are copied one by one: fast on a CPU; elsewhere one gather is faster.
    row_by_row: bool = True

    @classmethod
    def for_backend(cls, name: str, num_rows: int) -> "Tiling":
        """Returns sizes for `cpu`, `gpu` or `tpu` and batches of this many rows (copies included)."""
        if name != "cpu":
            # An accelerator wants few large steps: it gains nothing below thousands of tokens.
            return cls(8192, 1024, group_tokens=8192, width_step=64, row_by_row=False)
        # A few texts have few tokens: large tiles would round them up to several times the work.
        return cls(128, 32, group_tokens=256) if num_rows <= SMALL_REQUEST else cls()

    def capacity(self, num_tokens: int, width: int) -> int:
        """Returns the slots of an array for `num_tokens` tokens in rows of at most `width`."""
        # Tiles end at or before the next multiple of `tokens`; rows are read past their end.
        return -(-num_tokens // self.tokens) * self.tokens + self.buckets(width)[-1]

    def group(self, width: int) -> int:
        """Returns the number of rows in a group of this width."""
        return max(1, self.group_tokens // width)

    def buckets(self, width: int) -> tuple[int, ...]:
        """Returns the widths of attention for rows of at most `width` tokens, ascending; at most eight.

        Each adds a loop to every layer, and loops dominate the compile time. So the steps double above half
        of `width`: such rows are rounded up by half at most, and in attention only.
        """
        step = self.width_step * max(1, -(-width // (10 * self.width_step)))
        last = -(-width // step) * step
        widths = [step]
        while widths[-1] < last:
            widths.append(min(widths[-1] + (step if 2 * widths[-1] < width else 2 * step), last))
        return tuple(widths)


def map_tokens(
    fn: TokenFn,
    params: Any,
    inputs: Arrays,
    into: Arrays,
    count: jax.Array,
    tiling: Tiling,
    noise: jax.Array | None = None,
) -> Arrays:
    """Applies a function of single tokens to the first `count` slots, an int32 scalar.

    Args:
      fn: `(params, noise, first, *tiles) -> tiles`; works on each token by itself.
      params, inputs: its parameters, and arrays [C, ...]; differentiated.
      into: arrays [C, ...] to overwrite; they may be the inputs.
      noise: seeds of dropout, passed on; `first` is the slot of the tile's first token.
    """

    def forward(params: Any, inputs: Arrays, into: Arrays, count: jax.Array, noise: Any) -> Arrays:
        def step(start: jax.Array, size: int, outputs: Arrays) -> Arrays:
            tiles = fn(params, noise, start, *(_slice(x, start, size) for x in inputs))
            return tuple(_update(x, tile, start) for x, tile in zip(outputs, tiles, strict=True))

        return over_tiles(step, into, count, tiling)

    def backward(saved: Any, cotangents: Arrays) -> Any:
        params, inputs, count, noise = saved

        def step(start: jax.Array, size: int, sums: Any) -> Any:
            d_params, d_inputs = sums
            _, pull = jax.vjp(
                lambda params, *tiles: fn(params, noise, start, *tiles),
                params,
                *(_slice(x, start, size) for x in inputs),
            )
            found = pull(tuple(only(start, count, _slice(x, start, size)) for x in cotangents))
            d_params = jax.tree.map(jnp.add, d_params, found[0])
            return d_params, tuple(
                _update(x, tile, start) for x, tile in zip(d_inputs, found[1:], strict=True)
            )

        zeros = jax.tree.map(jnp.zeros_like, (params, inputs))
        return *over_tiles(step, zeros, count, tiling), None, None, None

    run = jax.custom_vjp(forward)
    run.defvjp(
        lambda params, inputs, into, count, noise: (
            forward(params, inputs, into, count, noise),
            (params, inputs, count, noise),
        ),
        backward,
    )
    return run(params, inputs, jax.lax.stop_gradient(into), count, noise)


def gather_tokens(
    states: jax.Array, source: jax.Array, into: jax.Array, count: jax.Array, tiling: Tiling
) -> jax.Array:
    """Sets the first `count` slots to `states[source]`: [C, H], int32 [D], [D, H] -> [D, H]."""

    def forward(states: jax.Array, source: jax.Array, into: jax.Array, count: jax.Array) -> jax.Array:
        def step(start: jax.Array, size: int, output: jax.Array) -> jax.Array:
            return _update(output, states[_slice(source, start, size)], start)

        return over_tiles(step, into, count, tiling)

    def backward(saved: Any, cotangent: jax.Array) -> Any:
        states, source, count = saved

        def step(start: jax.Array, size: int, total: jax.Array) -> jax.Array:
            tile = only(start, count, _slice(cotangent, start, size))
            return total.at[_slice(source, start, size)].add(tile)

        return over_tiles(step, jnp.zeros_like(states), count, tiling), None, None, None

    run = jax.custom_vjp(forward)
    run.defvjp(
        lambda states, source, into, count: (forward(states, source, into, count), (states, source, count)),
        backward,
    )
    return run(states, source, jax.lax.stop_gradient(into), count)


@struct.dataclass
class Group:
    """Neighboring rows of similar length, padded to one width w."""

    first: jax.Array  # int32 scalar, number of the first row in the order
    start: jax.Array  # int32 [g], first slots
    mask: jax.Array  # bool [g, w]
    row_by_row: bool = struct.field(pytree_node=False)

    def cut(self, number: jax.Array | int, *xs: jax.Array) -> Arrays:
        """Copies the rows of entry `number` of some arrays: [n, C, F] -> [g, w, F]."""
        width = self.mask.shape[1]

        def row(slot: jax.Array) -> Arrays:
            return tuple(read(x, number, slot, width) for x in xs)

        if not self.row_by_row:
            return tuple(x[_entry(x, number), self.start[:, None] + jnp.arange(width)] for x in xs)
        if len(self.start) == 1:
            return tuple(x[None] for x in row(self.start[0]))
        return jax.lax.map(row, self.start)

    def put(self, number: jax.Array | int, xs: Arrays, rows: Arrays) -> Arrays:
        """Writes rows, [g, w, F], to entry `number` of arrays [n, C, F]."""
        if self.row_by_row:

            def row(i: jax.Array | int, xs: Arrays) -> Arrays:
                return tuple(write(x, new[i], number, self.start[i]) for x, new in zip(xs, rows, strict=True))

            # Rows are written in order: each overwrites the excess of the one before.
            return jax.lax.fori_loop(0, len(self.start), row, xs) if len(self.start) > 1 else row(0, xs)
        slots = jnp.where(self.mask, self.start[:, None] + jnp.arange(self.mask.shape[1]), xs[0].shape[1])
        return tuple(
            x.at[_entry(x, number), slots].set(new.astype(x.dtype), mode="drop")
            for x, new in zip(xs, rows, strict=True)
        )


@struct.dataclass
class Rows:
    """Rows of tokens that follow each other in flat arrays, the longest row first.

    The last group of a width may reach past the last row: R is larger than the number of rows. The padding
    rows there have no tokens and begin where the last row ends, so that they overwrite nothing.
    """

    start: jax.Array  # int32 [R], first slots
    length: jax.Array  # int32 [R], numbers of tokens
    width: int = struct.field(pytree_node=False)  # the largest possible length

    @classmethod
    def of(cls, start: jax.Array, length: jax.Array, width: int, tiling: Tiling) -> "Rows":
        """Adds the padding rows."""
        fill = tiling.group(tiling.buckets(width)[0])
        start = jnp.concatenate([start, jnp.full(fill, start[-1] + length[-1], start.dtype)])
        return cls(start, jnp.pad(length, (0, fill)), width)

    @property
    def count(self) -> jax.Array:
        """int32 scalar, all tokens."""
        return jnp.sum(self.length)

    def over_groups(self, step: Callable[[Group, Any], Any], carry: Any, tiling: Tiling) -> Any:
        """Runs `step(group, carry)` over all rows with tokens, the longest first.

        One loop per width, with as many turns as rows need it. A `switch` over the widths in a single loop
        is slower on a CPU.
        """
        done = jnp.zeros((), jnp.int32)
        for narrower, width in reversed(list(itertools.pairwise((0, *tiling.buckets(self.width))))):
            size = tiling.group(width)
            rows = jnp.sum(self.length > narrower, dtype=jnp.int32) - done
            turns = jnp.maximum(-(-rows // size), 0)

            def turn(i: jax.Array, carry: Any, done: Any = done, size: int = size, width: int = width) -> Any:
                first = done + i * size
                start, length = (_slice(x, first, size) for x in (self.start, self.length))
                mask = jnp.arange(width) < length[:, None]
                return step(Group(first, start, mask, tiling.row_by_row), carry)

            carry = jax.lax.fori_loop(0, turns, turn, carry)
            done += turns * size
        return carry


def attend_from_first(
    fn: AttentionFn, query: jax.Array, keys: Arrays, rows: Rows, tiling: Tiling, noise: jax.Array | None
) -> jax.Array:
    """Attends within rows, from a single query each.

    Args:
      fn: `(noise, group, query [g, 1, H], key, value [g, w, H], ...) -> [g, 1, H]`.
      query: [R, H], one entry per row in their order; differentiated.
      keys: key and value, [C, H] each, and more arrays of keys, [C, F]; differentiated.
      noise: seeds of dropout, passed on.

    Returns [R, H].
    """
    num_rows = len(query)
    query = jnp.pad(query, ((0, len(rows.start) - num_rows), (0, 0)))

    def inputs(query: jax.Array, keys: Arrays, group: Group) -> Arrays:
        of_rows = _slice(query, group.first, len(group.start))[:, None]
        return of_rows, *group.cut(0, *(x[None] for x in keys))

    def forward(query: jax.Array, keys: Arrays, rows: Rows, noise: Any) -> jax.Array:
        def step(group: Group, output: jax.Array) -> jax.Array:
            context = fn(noise, group, *inputs(query, keys, group))
            return _update(output, context[:, 0], group.first)

        return rows.over_groups(step, jnp.zeros_like(query), tiling)

    def backward(saved: Any, cotangent: jax.Array) -> Any:
        query, keys, rows, noise = saved

        def step(group: Group, totals: Any) -> Any:
            d_query, d_keys = totals
            _, pull = jax.vjp(functools.partial(fn, noise, group), *inputs(query, keys, group))
            above = _slice(cotangent, group.first, len(group.start))
            # After a row's end the derivative is 0, and the next row's overwrites it.
            found = pull(jnp.where(group.mask[:, :1], above, 0)[:, None])
            d_query = _update(d_query, found[0][:, 0], group.first)
            return d_query, group.put(0, d_keys, found[1:])

        zeros = jnp.zeros_like(query), tuple(jnp.zeros_like(x)[None] for x in keys)
        d_query, d_keys = rows.over_groups(step, zeros, tiling)
        return d_query, tuple(x[0] for x in d_keys), None, None

    run = jax.custom_vjp(forward)
    run.defvjp(
        lambda query, keys, rows, noise: (forward(query, keys, rows, noise), (query, keys, rows, noise)),
        backward,
    )
    return run(query, keys, rows, noise)[:num_rows]


def over_tiles(
    step: Callable[[jax.Array, int, Any], Any], carry: Any, count: jax.Array, tiling: Tiling
) -> Any:
    """Runs `step(start, size, carry)` over all tokens: large tiles while they are full, then small ones."""
    large, small = tiling.tokens, tiling.rest
    full = count // large
    carry = jax.lax.fori_loop(0, full, lambda i, carry: step(i * large, large, carry), carry)
    left = -(-(count - full * large) // small)
    return jax.lax.fori_loop(0, left, lambda i, carry: step(full * large + i * small, small, carry), carry)


def read(x: jax.Array, number: jax.Array | int, start: jax.Array, size: int) -> jax.Array:
    """Reads `size` slots of entry `number`: [n, C, F] -> [size, F]."""
    return jax.lax.dynamic_slice(
        x, (_entry(x, number), start, 0), (1, size, x.shape[2]), allow_negative_indices=False
    )[0]


def write(x: jax.Array, tile: jax.Array, number: jax.Array | int, start: jax.Array) -> jax.Array:
    """Writes a tile, [size, F], to entry `number` of x, [n, C, F]."""
    return jax.lax.dynamic_update_slice(
        x, tile[None].astype(x.dtype), (_entry(x, number), start, 0), allow_negative_indices=False
    )


def only(start: jax.Array, count: jax.Array, tile: jax.Array) -> jax.Array:
    """Sets to 0 what belongs to no token in the tile that starts at slot `start`."""
    live = start + jnp.arange(len(tile)) < count
    return jnp.where(live.reshape(-1, *(1,) * (tile.ndim - 1)), tile, 0)


def _entry(x: jax.Array, number: jax.Array | int) -> jax.Array | int:
    """Returns the index of an entry; all numbers share a single one."""
    return 0 if len(x) == 1 else number


def _slice(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size, allow_negative_indices=False)


def _update(x: jax.Array, tile: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(
        x, tile.astype(x.dtype), start, axis=0, allow_negative_indices=False
    )
