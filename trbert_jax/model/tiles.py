"""Loop over as many tokens as there are, a number that only the device knows.

Arrays have a static capacity, of which the first `count` slots hold tokens. Work on single tokens
runs tile by tile, as many tiles as `count` needs; attention runs in groups of rows, each as wide as
its longest row needs. Nothing is compiled twice and nothing waits for the host. Slots after the last
token are finite and never read.

JAX has no derivative of a loop with a dynamic trip count. These loops define one: the backward pass is
the same loop over the derivative of its body, which recomputes the body instead of storing it.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Arrays = tuple[jax.Array, ...]
TokenFn = Callable[..., Arrays]  # (params, rng, *tiles [t, ...]) -> tiles [t, ...]
AttentionFn = Callable[..., jax.Array]  # (q, k, v [g, w, H], [bias,] mask [g, w], rng=) -> [g, w, H]
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
    rng: jax.Array | None = None,
) -> Arrays:
    """Applies a function of single tokens to the first `count` slots, an int32 scalar.

    Args:
      fn: `(params, rng, *tiles) -> tiles`; works on each token by itself, and gets a key per tile.
      params, inputs: its parameters, and arrays [C, ...]; differentiated.
      into: arrays [C, ...] to overwrite; they may be the inputs.
    """

    def forward(params: Any, inputs: Arrays, into: Arrays, count: jax.Array, rng: Any) -> Arrays:
        def step(start: jax.Array, size: int, outputs: Arrays) -> Arrays:
            tiles = fn(params, _fold(rng, start), *(_slice(x, start, size) for x in inputs))
            return tuple(_update(x, tile, start) for x, tile in zip(outputs, tiles, strict=True))

        return _over_tiles(step, into, count, tiling)

    def backward(saved: Any, cotangents: Arrays) -> Any:
        params, inputs, count, rng = saved

        def step(start: jax.Array, size: int, sums: Any) -> Any:
            d_params, d_inputs = sums
            _, pull = jax.vjp(
                lambda params, *tiles: fn(params, _fold(rng, start), *tiles),
                params,
                *(_slice(x, start, size) for x in inputs),
            )
            live = start + jnp.arange(size) < count
            found = pull(tuple(_only(live, _slice(x, start, size)) for x in cotangents))
            d_params = jax.tree.map(jnp.add, d_params, found[0])
            return d_params, tuple(
                _update(x, tile, start) for x, tile in zip(d_inputs, found[1:], strict=True)
            )

        zeros = jax.tree.map(jnp.zeros_like, (params, inputs))
        return *_over_tiles(step, zeros, count, tiling), None, None, None

    run = jax.custom_vjp(forward)
    run.defvjp(
        lambda params, inputs, into, count, rng: (
            forward(params, inputs, into, count, rng),
            (params, inputs, count, rng),
        ),
        backward,
    )
    return run(params, inputs, jax.lax.stop_gradient(into), count, rng)


def gather_tokens(
    states: jax.Array, source: jax.Array, into: jax.Array, count: jax.Array, tiling: Tiling
) -> jax.Array:
    """Sets the first `count` slots to `states[source]`: [C, H], int32 [D], [D, H] -> [D, H]."""

    def forward(states: jax.Array, source: jax.Array, into: jax.Array, count: jax.Array) -> jax.Array:
        def step(start: jax.Array, size: int, output: jax.Array) -> jax.Array:
            return _update(output, states[_slice(source, start, size)], start)

        return _over_tiles(step, into, count, tiling)

    def backward(saved: Any, cotangent: jax.Array) -> Any:
        states, source, count = saved

        def step(start: jax.Array, size: int, total: jax.Array) -> jax.Array:
            live = start + jnp.arange(size) < count
            tile = _only(live, _slice(cotangent, start, size))
            return total.at[_slice(source, start, size)].add(tile)

        return _over_tiles(step, jnp.zeros_like(states), count, tiling), None, None, None

    run = jax.custom_vjp(forward)
    run.defvjp(
        lambda states, source, into, count: (forward(states, source, into, count), (states, source, count)),
        backward,
    )
    return run(states, source, jax.lax.stop_gradient(into), count)


def attend_rows(
    fn: AttentionFn,
    qkv: Arrays,
    into: jax.Array,
    start: jax.Array,
    length: jax.Array,
    width: int,
    tiling: Tiling,
    rng: jax.Array | None = None,
    *,
    one_query: bool = False,
) -> jax.Array:
    """Attends within rows, whose tokens follow each other in flat arrays.

    Args:
      fn: `(query [g, q, H], key, value [g, w, H], ..., mask [g, w], rng=) -> [g, q, H]`.
      qkv: query, key and value, [C, H] each, and more arrays of keys, [C, ...]; differentiated.
      into: [C, H], overwritten.
      start, length: int32 [R], first slot and number of tokens of each row, the longest row first.
      width: the largest possible length.
      rng: key of dropout; each group gets its own.
      one_query: each row has a single query: the query and `into` are [R, H].
    """
    num_rows = len(start)
    # The last group of a width may reach past the last row. The padding rows there have no tokens and begin
    # where the last row ends, so that they overwrite nothing.
    fill = tiling.group(tiling.buckets(width)[0])
    start = jnp.concatenate([start, jnp.full(fill, start[-1] + length[-1], start.dtype)])
    length = jnp.pad(length, (0, fill))
    if one_query:
        qkv = (jnp.pad(qkv[0], ((0, fill), (0, 0))), *qkv[1:])
        into = jnp.pad(into, ((0, fill), (0, 0)))

    def cut(x: jax.Array, starts: jax.Array, width: int) -> jax.Array:
        if tiling.row_by_row:
            return jnp.stack([_slice(x, row, width) for row in starts])  # [g, w, H]
        return x[starts[:, None] + jnp.arange(width)]

    def put(x: jax.Array, rows: jax.Array, starts: jax.Array, mask: jax.Array) -> jax.Array:
        if tiling.row_by_row:
            # Rows are written in order: each overwrites the excess of the one before.
            for row, tokens in zip(starts, rows, strict=True):
                x = _update(x, tokens, row)
            return x
        slots = jnp.where(mask, starts[:, None] + jnp.arange(mask.shape[1]), len(x))
        return x.at[slots].set(rows.astype(x.dtype), mode="drop")

    def cut_all(qkv: Arrays, first: jax.Array, starts: jax.Array, width: int) -> Arrays:
        query = _slice(qkv[0], first, len(starts))[:, None] if one_query else cut(qkv[0], starts, width)
        return query, *(cut(x, starts, width) for x in qkv[1:])

    def put_query(
        x: jax.Array, rows: jax.Array, first: jax.Array, starts: jax.Array, mask: jax.Array
    ) -> jax.Array:
        return _update(x, rows[:, 0], first) if one_query else put(x, rows, starts, mask)

    def forward(qkv: Arrays, into: jax.Array, start: jax.Array, length: jax.Array, rng: Any) -> jax.Array:
        def step(first: jax.Array, group: int, width: int, output: jax.Array) -> jax.Array:
            starts = _slice(start, first, group)
            mask = jnp.arange(width) < _slice(length, first, group)[:, None]
            context = fn(*cut_all(qkv, first, starts, width), mask, rng=_fold(rng, first))
            return put_query(output, context, first, starts, mask)

        return _over_groups(step, into, length, width, tiling)

    def backward(saved: Any, cotangent: jax.Array) -> Any:
        qkv, start, length, rng = saved

        def step(first: jax.Array, group: int, width: int, totals: Arrays) -> Arrays:
            starts = _slice(start, first, group)
            mask = jnp.arange(width) < _slice(length, first, group)[:, None]
            attend = functools.partial(fn, rng=_fold(rng, first))
            _, pull = jax.vjp(lambda *qkv: attend(*qkv, mask), *cut_all(qkv, first, starts, width))
            # After a row's end the derivative is 0, and the next row's overwrites it.
            if one_query:
                above = jnp.where(mask[:, :1], _slice(cotangent, first, group), 0)[:, None]
            else:
                above = jnp.where(mask[..., None], cut(cotangent, starts, width), 0)
            d_query, *found = pull(above)
            d_query = put_query(totals[0], d_query, first, starts, mask)
            return d_query, *(put(x, d, starts, mask) for x, d in zip(totals[1:], found, strict=True))

        zeros = tuple(map(jnp.zeros_like, qkv))
        return _over_groups(step, zeros, length, width, tiling), None, None, None, None

    run = jax.custom_vjp(forward)
    run.defvjp(
        lambda qkv, into, start, length, rng: (
            forward(qkv, into, start, length, rng),
            (qkv, start, length, rng),
        ),
        backward,
    )
    output = run(qkv, jax.lax.stop_gradient(into), start, length, rng)
    return output[:num_rows] if one_query else output


def _over_groups(
    step: Callable[[jax.Array, int, int, Any], Any], carry: Any, length: jax.Array, width: int, tiling: Tiling
) -> Any:
    """Runs `step(first row, number of rows, width, carry)` over all rows with tokens, the longest first.

    One loop per width, with as many turns as rows need it. A `switch` over the widths in a single loop
    is slower on a CPU.
    """
    done = jnp.zeros((), jnp.int32)
    for narrower, w in reversed(list(itertools.pairwise((0, *tiling.buckets(width))))):
        group = tiling.group(w)
        turns = jnp.maximum(-(-(jnp.sum(length > narrower, dtype=jnp.int32) - done) // group), 0)

        def turn(i: jax.Array, carry: Any, done: jax.Array = done, group: int = group, w: int = w) -> Any:
            return step(done + i * group, group, w, carry)

        carry = jax.lax.fori_loop(0, turns, turn, carry)
        done += turns * group
    return carry


def _over_tiles(
    step: Callable[[jax.Array, int, Any], Any], carry: Any, count: jax.Array, tiling: Tiling
) -> Any:
    """Runs `step(start, size, carry)` over all tokens: large tiles while they are full, then small ones."""
    large, small = tiling.tokens, tiling.rest
    full = count // large
    carry = jax.lax.fori_loop(0, full, lambda i, carry: step(i * large, large, carry), carry)
    left = -(-(count - full * large) // small)
    return jax.lax.fori_loop(0, left, lambda i, carry: step(full * large + i * small, small, carry), carry)


def _fold(rng: jax.Array | None, number: jax.Array) -> jax.Array | None:
    return None if rng is None else jax.random.fold_in(rng, number)


def _slice(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size)


def _update(x: jax.Array, tile: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, tile.astype(x.dtype), start, axis=0)


def _only(live: jax.Array, tile: jax.Array) -> jax.Array:
    return jnp.where(live.reshape(-1, *(1,) * (tile.ndim - 1)), tile, 0)
