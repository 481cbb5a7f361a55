"""Run the model packed: the remaining tokens of a whole batch, one after the other in one flat array.

Elsewhere this is called unpadded. Parameters, selections and results are those of the masked encoder, but
padding and dropped tokens are never computed, so reduction saves as much time as it saves FLOPs.
Source: docs/method.md, "Packed execution".
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from trbert_jax.model import tiles
from trbert_jax.model.dropout import seeds
from trbert_jax.model.encoder import selector_features
from trbert_jax.model.heads import Logits
from trbert_jax.model.layers import NUM_MASKS, Selector, TransformerLayer
from trbert_jax.model.model import (
    Batch,
    ModelOutput,
    Params,
    TokenReducingModel,
    forward,
    head_inputs,
    segments_of,
    shared_passage,
)
from trbert_jax.model.segment import KEPT, Segment, attend_group, kept_numbers
from trbert_jax.model.tiles import Rows, Tiling
from trbert_jax.reduction.gate import Gate, add_bias, gate_states
from trbert_jax.reduction.selection import Rule, Selection, TokenSet, restore, select


@struct.dataclass
class PackedTokens:
    """The tokens of R rows without gaps: the longest row first, each row's tokens in order."""

    states: jax.Array  # [C, H]; meaningless after the last token
    valid: jax.Array  # bool [R, S], the positions of the tokens in the padded batch
    slot: jax.Array  # int32 [R, S], the index of each token in `states`
    order: jax.Array  # int32 [R], the order of the rows; neighbors have similar lengths: little to pad
    scratch: tuple[jax.Array, ...]  # four arrays [C, H] for layers to write to; no layer has to clear memory
    key_bias: jax.Array | None = None  # float32 [C], added to the attention scores of a key; None: nothing

    @property
    def length(self) -> jax.Array:
        """int32 [R], tokens of each row."""
        return jnp.sum(self.valid, axis=-1, dtype=jnp.int32)

    @property
    def start(self) -> jax.Array:
        """int32 [R], slot of each row's first token."""
        return _starts(self.length, self.order)

    @property
    def count(self) -> jax.Array:
        """int32 scalar, all tokens."""
        return jnp.sum(self.length)

    def unpack(self, num_copies: int = 1) -> TokenSet:
        """Puts the tokens at their positions in the padded batch, 0 elsewhere; stacks copies of the rows."""
        states = jnp.where(self.valid[..., None], self.states[self.slot], 0)
        return TokenSet(states, self.valid).repeat(num_copies)

    def with_bias(self, values: jax.Array) -> "PackedTokens":
        """Sets `key_bias` to values of tokens, float32 [R, S]."""
        return dataclasses.replace(self, key_bias=self.to_slots(values))

    def to_slots(self, values: jax.Array) -> jax.Array:
        """Inverts `to_rows`: float32 [R, S, ...] -> [C, ...]."""
        slots = jnp.where(self.valid, self.slot, len(self.states))
        empty = jnp.zeros((len(self.states), *values.shape[2:]), jnp.float32)
        return empty.at[slots].set(values, mode="drop")

    def to_rows(self, values: jax.Array) -> jax.Array:
        """Puts values of tokens, [C], at their positions in the padded batch: [R, S], 0 elsewhere."""
        return jnp.where(self.valid, values[self.slot], 0)


def pack(
    states: jax.Array, slot: jax.Array, valid: jax.Array, tiling: Tiling, scratch: Sequence[jax.Array] = ()
) -> PackedTokens:
    """Packs the `valid` tokens, bool [R, S], of R rows.

    `slot`, int32 [R, S], is the index of each token in `states` [N, H]; tokens may share one. Overwrites the
    `scratch` arrays that have the right capacity.
    """
    capacity = tiling.capacity(valid.size, valid.shape[-1])
    usable = [x for x in scratch if len(x) == capacity]
    while len(usable) < 5:
        usable.append(jnp.zeros((capacity, states.shape[-1]), states.dtype))
    length = jnp.sum(valid, axis=-1, dtype=jnp.int32)
    order = jnp.argsort(-length)
    target = _starts(length, order)[:, None] + jnp.cumsum(valid, axis=-1, dtype=jnp.int32) - 1
    source = jnp.zeros(capacity, jnp.int32)
    source = source.at[jnp.where(valid, target, capacity)].set(slot, mode="drop")
    packed = tiles.gather_tokens(states, source, usable[0], jnp.sum(length), tiling)
    return PackedTokens(packed, valid, jnp.where(valid, target, 0), order, tuple(usable[1:5]))


def _starts(length: jax.Array, order: jax.Array) -> jax.Array:
    """Returns int32 [R], the first slot of each row if the rows follow each other in this order."""
    following = length[order]
    return jnp.zeros_like(length).at[order].set(jnp.cumsum(following) - following)


def packed_forward(
    model: TokenReducingModel,
    params: Params,
    batch: Batch,
    *,
    rule: Rule | None,
    num_copies: int = 1,
    gate: Gate | None = None,
    dropout_rng: jax.Array | None = None,
    tiling: Tiling | None = None,
) -> ModelOutput:
    """Runs the model on a batch like `model.forward`, equally exactly; dropout masks differ.

    Without a `tiling`, chooses the sizes of the loops for the device and the number of rows.
    """
    config = model.config
    encoder = PackedEncoder.of(model, len(batch["input_ids"]) * num_copies, tiling)
    points = [0, *config.reduction_layers, config.num_layers]
    if rule is None and num_copies == 1:
        points = [0, config.num_layers]  # nothing happens at the others
    packed = encoder.embed(params, batch, dropout_rng)
    passage = shared_passage(batch, num_copies)
    inputs = head_inputs(batch, num_copies)
    selections: list[Selection] = []
    dropped: TokenSet | None = None
    gated: list[tuple[jax.Array, jax.Array]] = []
    bias: jax.Array | None = None  # float32 [R, S]
    for number, (start, stop) in enumerate(itertools.pairwise(points)):
        copies = num_copies if number == 1 else 1
        if number and rule is not None:
            logits = encoder.selector_logits(params, packed, number - 1, batch)
            valid = jnp.tile(packed.valid, (copies, 1))
            selections.append(select(jnp.tile(logits, (copies, 1)), valid, number - 1, rule, passage))
            if config.reads_all_tokens:
                before = packed.unpack(copies)
                dropped = before if dropped is None else restore(dropped, before)
            packed = encoder.keep(packed, selections[-1].keep, copies)
            if gate is not None:
                bias = add_bias(bias, opened := gate(number - 1, selections[-1]))
                packed = packed.with_bias(bias)
                if config.reads_all_tokens:
                    gated.append((opened, before.states))
        elif copies > 1:
            packed = encoder.keep(packed, jnp.tile(packed.valid, (copies, 1)), copies)
        if number < len(points) - 2:
            packed = encoder.run_layers(params, packed, range(start, stop), dropout_rng)
    last = range(start, stop)
    logits, first = encoder.finish(params, packed, last, inputs, dropout_rng, dropped, gated)
    return ModelOutput(logits, tuple(selections), first)


@dataclasses.dataclass(frozen=True)
class PackedEncoder:
    """The pieces of a packed forward pass, with the whole model's parameters; dropout needs `dropout_rng`."""

    model: TokenReducingModel
    tiling: Tiling

    @classmethod
    def of(cls, model: TokenReducingModel, num_rows: int, tiling: Tiling | None = None) -> "PackedEncoder":
        """Chooses sizes of loops for the default device and this number of rows, unless given."""
        return cls(model, tiling or Tiling.for_backend(jax.default_backend(), num_rows))

    def embed(self, params: Params, batch: Batch, dropout_rng: jax.Array | None = None) -> PackedTokens:
        """`input_ids` int32 [B, S], `mask` bool [B, S] -> the embedded tokens, without padding."""
        types = batch.get("token_type_ids")
        # Only this part sees padding: a table lookup, whose derivative is best in one piece.
        layers = self.model.config.num_layers
        inputs = (batch["input_ids"], batch["mask"], types)
        tokens = self._apply(params, _embed, dropout_rng, layers, *inputs)
        rows, width, hidden = tokens.states.shape
        slot = jnp.arange(rows * width, dtype=jnp.int32).reshape(rows, width)
        return pack(tokens.states.reshape(-1, hidden), slot, tokens.valid, self.tiling)

    def selector_logits(self, params: Params, packed: PackedTokens, stage: int, batch: Batch) -> jax.Array:
        """Returns float32 [R, S], 0 at positions without a token; R is a multiple of the batch's rows."""
        selector = Selector(self.model.config)

        def judge(params: Any, noise: None, first: jax.Array, *read: jax.Array) -> tuple[jax.Array]:
            return (selector.apply({"params": params}, *read),)

        inputs = [packed.states]
        if self.model.config.selector_match:
            segments = segments_of(batch, len(packed.valid) // len(batch["mask"]))
            features = selector_features(self.model.config, packed.unpack(), segments)
            inputs += [packed.to_slots(x) for x in features]
        weights = params["encoder"][f"selector_{stage}"]
        into = jnp.zeros(len(packed.states), jnp.float32)
        (logits,) = tiles.map_tokens(judge, weights, tuple(inputs), (into,), packed.count, self.tiling)
        return packed.to_rows(logits)

    def keep(self, packed: PackedTokens, keep: jax.Array, num_copies: int = 1) -> PackedTokens:
        """Keeps some tokens of `num_copies` copies of the rows: bool [num_copies * R, S]."""
        slot = jnp.tile(packed.slot, (num_copies, 1))
        # The old states become the next scratch.
        return pack(packed.states, slot, keep, self.tiling, (*packed.scratch, packed.states))

    def run_layers(
        self, params: Params, packed: PackedTokens, layers: Sequence[int], dropout_rng: Any = None
    ) -> PackedTokens:
        """Runs the given layers."""
        if not layers:
            return packed
        layer, (weights, noise) = self._layers(params, layers, dropout_rng)
        run = Segment(layer, len(layers), self.tiling, self._kept(packed))
        rows = _rows(packed, self.tiling)
        states, scratch = run(weights, noise, packed.states, _bias(packed), packed.scratch, rows)
        return dataclasses.replace(packed, states=states, scratch=scratch)

    def _kept(self, packed: PackedTokens) -> str:
        """Returns what the backward pass keeps, of `KEPT`: the most that fits a layer's share of memory."""
        config, numbers = self.model.config, kept_numbers(self.model.config)
        share = self.model.activation_memory / config.num_layers / packed.states.dtype.itemsize
        fitting = [kept for kept in KEPT[1:] if len(packed.states) * numbers[kept] <= share]
        return KEPT[0] if self.model.remat or not fitting else fitting[-1]

    def run_last_layer(
        self, params: Params, packed: PackedTokens, dropout_rng: jax.Array | None = None
    ) -> jax.Array:
        """Returns the last layer's output for the first token of each row, all that the head reads: [R, H].

        The other tokens serve as keys and values only, a sixth of the layer's work.
        """
        layer, ((params,), noise) = self._layers(params, [self.model.config.num_layers - 1], dropout_rng)
        noise = None if noise is None else noise[0]

        def project(params: Any, noise: Any, first: jax.Array, states: jax.Array) -> tuple[jax.Array, ...]:
            return layer.apply({"params": params}, states, method="keys_and_values")

        first = packed.states[packed.start[packed.order]]  # [R, H], the longest row first
        query = layer.apply({"params": params}, first, method="queries")
        into = packed.scratch[:2]
        keys = tiles.map_tokens(project, params, (packed.states,), into, packed.count, self.tiling)
        attend = functools.partial(attend_group, layer)
        rows = _rows(packed, self.tiling)
        context = tiles.attend_from_first(attend, query, (*keys, *_bias(packed)), rows, self.tiling, noise)
        first = layer.apply({"params": params}, first, context, noise, method="finish")
        return jnp.zeros_like(first).at[packed.order].set(first)

    def finish(
        self,
        params: Params,
        packed: PackedTokens,
        layers: Sequence[int],
        inputs: Batch,
        dropout_rng: jax.Array | None = None,
        dropped: TokenSet | None = None,
        gated: Sequence[tuple[jax.Array, jax.Array]] = (),
    ) -> tuple[Logits, jax.Array]:
        """Runs the last layers, which may be none, and the head, whose inputs `head_inputs` returns.

        Returns the logits and the first token's state of each row, [R, H].

        `dropped` are the tokens to restore for a head that reads all tokens; None if none were dropped.
        `gated` are the points of `reduction.gate.gate_states`.
        """
        config = self.model.config
        if config.reads_all_tokens:
            tokens = self.run_layers(params, packed, layers, dropout_rng).unpack()
            tokens = tokens if dropped is None else gate_states(restore(dropped, tokens), gated)
        else:
            if layers:
                packed = self.run_layers(params, packed, layers[:-1], dropout_rng)
                first = self.run_last_layer(params, packed, dropout_rng)
            else:
                first = packed.states[packed.start]
            tokens = TokenSet(first[:, None], jnp.ones((len(first), 1), bool))
        logits = self._apply(params, "answer", dropout_rng, config.num_layers + 1, tokens, inputs)
        return logits, tokens.states[:, 0]

    def _layers(
        self, params: Params, numbers: Sequence[int], dropout_rng: jax.Array | None
    ) -> tuple[TransformerLayer, tuple[list[Any], jax.Array | None]]:
        """Returns a layer, the parameters of some, and their seeds of dropout."""
        layer = TransformerLayer(self.model.config, self.model.dtype)
        weights = [params["encoder"][f"layer_{number}"] for number in numbers]
        if dropout_rng is None:
            return layer, (weights, None)
        rngs = [jax.random.fold_in(dropout_rng, number) for number in numbers]
        return layer, (weights, jnp.stack([seeds(rng, NUM_MASKS) for rng in rngs]))

    def _apply(
        self, params: Params, method: Any, dropout_rng: jax.Array | None, number: int, *arguments: Any
    ) -> Any:
        rng = None if dropout_rng is None else jax.random.fold_in(dropout_rng, number)
        rngs = None if rng is None else {"dropout": rng}
        return self.model.apply({"params": params}, *arguments, rng is None, rngs=rngs, method=method)


def _rows(packed: PackedTokens, tiling: Tiling) -> Rows:
    start, length = packed.start[packed.order], packed.length[packed.order]
    return Rows.of(start, length, packed.valid.shape[-1], tiling)


def _embed(model: TokenReducingModel, *inputs: Any) -> TokenSet:
    return model.encoder.embed(*inputs)


def _bias(packed: PackedTokens) -> tuple[jax.Array, ...]:
    return () if packed.key_bias is None else (packed.key_bias[:, None],)


DEFAULT_BACKEND = "packed"
# The two ways to compute the same: without padding, and as a reference every position of the padded batch.
BACKENDS: dict[str, Callable[..., ModelOutput]] = {DEFAULT_BACKEND: packed_forward, "masked": forward}
