"""Run the layers between two points of reduction on packed tokens, and their derivative.

Without a derivative each layer overwrites the arrays of the one before. For a derivative, one compiled
body serves all layers: their parameters are stacked, and what the backward pass needs is stored for each
layer, in arrays [layers, C, ...] of which only the slots of real tokens are ever written. Matrix products are
computed again only where their results were not stored (`KEPT`).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.custom_derivatives import SymbolicZero

from trbert_jax.model.config import ModelConfig
from trbert_jax.model.layers import PROJECTIONS, TransformerLayer
from trbert_jax.model.tiles import Arrays, Group, Rows, Tiling, only, over_tiles, read, write

# Values of each token and layer stored for the backward pass: the layer's input; also query, key, value and
# context; also the inputs of the layer's norms and of its activation.
KEPT = ("states", "attention", "all")


@struct.dataclass
class Store:
    """Arrays [n, C, ...]: one entry for each layer, or n = 1 for all of them."""

    states: jax.Array  # inputs of the layers, and the output of the last one: n = layers + 1, or 1
    attention: Arrays  # query, key, value, context
    sums: Arrays  # `TransformerLayer.finish_keeping`; () if they are not kept


def kept_numbers(config: ModelConfig) -> dict[str, int]:
    """Returns how many numbers are stored of each token and layer, by what is kept."""
    hidden = config.hidden_size
    return dict(zip(KEPT, (hidden, 5 * hidden, 7 * hidden + config.intermediate_size), strict=True))


@dataclasses.dataclass(frozen=True)
class Segment:
    """The functions of consecutive layers, which differ in their parameters and seeds only."""

    layer: TransformerLayer
    num_layers: int
    tiling: Tiling
    kept: str  # one of `KEPT`

    def __call__(
        self,
        params: Sequence[Any],
        noise: jax.Array | None,
        states: jax.Array,
        bias: Arrays,
        scratch: Arrays,
        rows: Rows,
    ) -> tuple[jax.Array, Arrays]:
        """Runs the layers.

        Args:
          params: one tree per layer; differentiated.
          noise: seeds of dropout, uint32 [layers, NUM_MASKS, 2], or None.
          states: [C, H]; differentiated.
          bias: `key_bias` of `TransformerLayer.attend`, (float32 [C, 1],) or (); differentiated.
          scratch: four arrays [C, H] to overwrite.

        Returns states [C, H], and scratch for the next layers.
        """
        run = jax.custom_vjp(self._forward)
        run.defvjp(self._forward_keeping, self._backward, symbolic_zeros=True)
        return run(tuple(params), noise, states, bias, jax.lax.stop_gradient(scratch), rows)

    def _forward(
        self, params: Sequence[Any], noise: Any, states: jax.Array, bias: Arrays, scratch: Arrays, rows: Rows
    ) -> tuple[jax.Array, Arrays]:
        store = Store(states[None], tuple(x[None] for x in scratch), ())
        for number, weights in enumerate(params):
            store = self._run(weights, _at(noise, number), number, store, bias, rows)
        return store.states[0], tuple(x[0] for x in store.attention)

    def _forward_keeping(self, *arguments: Any) -> Any:
        # Frozen parameters get no gradient: a layer's costs as much as its forward pass.
        trained = any(x.perturbed for x in jax.tree.leaves(arguments[0]))
        params, noise, states, bias, scratch, rows = jax.tree.map(lambda x: x.value, arguments)
        params = jax.tree.map(lambda *x: jnp.stack(x), *params)
        store = jax.lax.fori_loop(
            0,
            self.num_layers,
            lambda i, store: self._run(_at(params, i), _at(noise, i), i, store, bias, rows),
            self._empty(states),
        )
        outputs = store.states[self.num_layers], tuple(map(jnp.zeros_like, scratch))
        return outputs, (params if trained else None, params, noise, store, bias, rows)

    def _empty(self, states: jax.Array) -> Store:
        capacity, hidden = states.shape
        layers, inner = self.num_layers, self.layer.config.intermediate_size
        inputs = jnp.zeros((layers + 1, capacity, hidden), states.dtype).at[0].set(states)
        count = 1 if self.kept == "states" else layers
        attention = tuple(jnp.zeros((count, capacity, hidden), states.dtype) for _ in range(4))
        widths = (hidden, inner, hidden) if self.kept == "all" else ()
        sums = tuple(jnp.zeros((layers, capacity, width), states.dtype) for width in widths)
        return Store(inputs, attention, sums)

    def _run(self, params: Any, noise: Any, number: Any, store: Store, bias: Arrays, rows: Rows) -> Store:
        """Runs layer `number` of the segment: reads its inputs in the store, writes its outputs there."""

        def finish(start: jax.Array, size: int, store: Store) -> Store:
            inputs = read(store.states, number, start, size), read(store.attention[3], number, start, size)
            output, sums = self._finish(params, noise, start, *inputs)
            kept = zip(store.sums, sums, strict=False)
            return dataclasses.replace(
                store,
                states=write(store.states, output, number + 1, start),
                sums=tuple(write(x, tile, number, start) for x, tile in kept),
            )

        store = self._attend(params, noise, number, store, bias, rows)
        return over_tiles(finish, store, rows.count, self.tiling)

    def _attend(self, params: Any, noise: Any, number: Any, store: Store, bias: Arrays, rows: Rows) -> Store:
        def project(start: jax.Array, size: int, store: Store) -> Store:
            tiles = self._project(params, read(store.states, number, start, size))
            qkv = (write(x, t, number, start) for x, t in zip(store.attention, tiles, strict=False))
            return dataclasses.replace(store, attention=(*qkv, store.attention[3]))

        def attend(group: Group, store: Store) -> Store:
            *qkv, context = store.attention
            arrays = *group.cut(number, *qkv), *group.cut(0, *(x[None] for x in bias))
            result = attend_group(self.layer, noise, group, *arrays)
            return dataclasses.replace(store, attention=(*qkv, *group.put(number, (context,), (result,))))

        store = over_tiles(project, store, rows.count, self.tiling)
        return rows.over_groups(attend, store, self.tiling)

    def _backward(self, saved: Any, cotangents: Any) -> Any:
        trained, params, noise, store, bias, rows = saved
        d_states = cotangents[0]
        if isinstance(d_states, SymbolicZero):
            d_states = jnp.zeros(d_states.shape, d_states.dtype)
        scratch = tuple(jnp.zeros_like(d_states)[None] for _ in range(4))
        d_params = None if trained is None else jax.tree.map(jnp.zeros_like, params)

        def layer_back(i: jax.Array, carry: Any) -> Any:
            d_states, d_bias, scratch, d_params, store = carry
            number = self.num_layers - 1 - i
            weights, seeds = _at(params, number), _at(noise, number)
            if self.kept == "states":
                store = self._attend(weights, seeds, number, store, bias, rows)
            d_weights = None if d_params is None else jax.tree.map(jnp.zeros_like, weights)
            carry = d_states, scratch, d_weights
            carry = self._run_back(weights, seeds, number, store, bias, rows, carry)
            d_states, scratch, d_weights = carry
            d_bias = tuple(total + x[0] for total, x in zip(d_bias, scratch[4:], strict=True))
            if d_params is not None:
                d_params = jax.tree.map(lambda x, d: x.at[number].set(d), d_params, d_weights)
            return d_states, d_bias, scratch, d_params, store

        d_bias = tuple(map(jnp.zeros_like, bias))
        carry = d_states[None], d_bias, (*scratch, *(x[None] for x in d_bias)), d_params, store
        d_states, d_bias, _, d_params, _ = jax.lax.fori_loop(0, self.num_layers, layer_back, carry)
        by_layer = d_params and tuple(_at(d_params, number) for number in range(self.num_layers))
        return by_layer, None, d_states[0], d_bias, None, None

    def _run_back(
        self, params: Any, noise: Any, number: Any, store: Store, bias: Arrays, rows: Rows, carry: Any
    ) -> Any:
        """Turns the derivative by a layer's output, [1, C, H], into those by its input and parameters."""

        def finish(start: jax.Array, size: int, carry: Any) -> Any:
            d_states, (d_q, d_k, d_v, d_context, *others), d_params = carry
            sums = tuple(read(x, number, start, size) for x in store.sums)
            _, pull = jax.vjp(
                lambda *x: self._finish(x[0], noise, start, *x[1:], sums or None)[0],
                params,
                read(store.states, number, start, size),
                read(store.attention[3], number, start, size),
            )
            d_weights, *tiles = pull(only(start, rows.count, read(d_states, 0, start, size)))
            d_states, d_context = (
                write(x, tile, 0, start) for x, tile in zip((d_states, d_context), tiles, strict=True)
            )
            return d_states, (d_q, d_k, d_v, d_context, *others), _add(d_params, d_weights, out=PROJECTIONS)

        def attend(group: Group, scratch: Arrays) -> Arrays:
            d_query, d_key, d_value, d_context, *d_bias = scratch
            inputs = *group.cut(number, *store.attention[:3]), *group.cut(0, *(x[None] for x in bias))
            _, pull = jax.vjp(functools.partial(attend_group, self.layer, noise, group), *inputs)
            (above,) = group.cut(0, d_context)
            # After a row's end the derivative is 0, and the next row's overwrites it.
            found = pull(jnp.where(group.mask[..., None], above, 0))
            d_query, d_key, d_value, *d_bias = group.put(0, (d_query, d_key, d_value, *d_bias), found)
            return d_query, d_key, d_value, d_context, *d_bias

        def project(start: jax.Array, size: int, carry: Any) -> Any:
            d_states, scratch, d_params = carry
            _, pull = jax.vjp(self._project, params, read(store.states, number, start, size))
            above = (only(start, rows.count, read(x, 0, start, size)) for x in scratch[:3])
            d_weights, tile = pull(tuple(above))
            d_states = write(d_states, read(d_states, 0, start, size) + tile, 0, start)
            return d_states, scratch, _add(d_params, d_weights, only=PROJECTIONS)

        d_states, scratch, d_params = over_tiles(finish, carry, rows.count, self.tiling)
        scratch = rows.over_groups(attend, scratch, self.tiling)
        return over_tiles(project, (d_states, scratch, d_params), rows.count, self.tiling)

    # The layer's functions of tiles of tokens.

    def _project(self, params: Any, states: jax.Array) -> Arrays:
        return self.layer.apply({"params": params}, states, method="attention_inputs")

    def _finish(self, params: Any, noise: Any, first: jax.Array, *arrays: Any) -> tuple[jax.Array, Arrays]:
        states, context, sums = (*arrays, None)[:3]
        method = "finish_keeping"
        return self.layer.apply({"params": params}, states, context, noise, first, sums, method=method)


def attend_group(
    layer: TransformerLayer,
    noise: Any,
    group: Group,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *bias: jax.Array,
) -> jax.Array:
    """Attends within a group: query [g, q, H], key, value [g, w, H], maybe bias [g, w, 1] -> [g, q, H]."""
    biases = [x[..., 0] for x in bias]
    return layer.apply({}, query, key, value, group.mask, noise, group.first, *biases, method="attend")


def _at(tree: Any, number: Any) -> Any:
    return jax.tree.map(lambda x: x[number], tree)


def _add(total: Any, found: Any, only: Sequence[str] = (), out: Sequence[str] = ()) -> Any:
    """Adds the gradients of some parts of a layer."""
    if total is None:
        return None
    names = [name for name in total if (name in only or not only) and name not in out]
    return {**total, **{name: jax.tree.map(jnp.add, total[name], found[name]) for name in names}}
