"""Encode with token reduction by masking.

Every array keeps its padded length; no token attends to a dropped one. Simple, differentiable, and the
reference for the packed backend. Source: paper, section 3; docs/method.md, "Reduction".
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from trbert_jax.model.config import ModelConfig
from trbert_jax.model.layers import Embeddings, Selector, TransformerLayer, dense
from trbert_jax.reduction.gate import Gate, add_bias, gate_states
from trbert_jax.reduction.match import match_features
from trbert_jax.reduction.selection import Rule, Selection, SharedPassage, TokenSet, drop_tokens, restore


class Encoder(nn.Module):
    """Embeddings, transformer layers and the selectors between them."""

    config: ModelConfig
    dtype: Any = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        config, dtype = self.config, self.dtype
        self.embeddings = Embeddings(config, dtype)
        make = nn.remat(TransformerLayer, static_argnums=(3,)) if self.remat else TransformerLayer
        self.layer = [make(config, dtype) for _ in range(config.num_layers)]
        self.selector = [Selector(config) for _ in range(config.num_selectors)]
        if config.backbone.pooler:
            self.pooler = dense(config.hidden_size, config, dtype)

    def embed(
        self,
        input_ids: jax.Array,
        mask: jax.Array,
        token_type_ids: jax.Array | None = None,
        deterministic: bool = True,
    ) -> TokenSet:
        """int32 [B, S], bool [B, S] -> tokens with states [B, S, H]."""
        return TokenSet(self.embeddings(input_ids, token_type_ids, deterministic), mask)

    def run_layers(self, tokens: TokenSet, layers: Sequence[int], deterministic: bool = True) -> TokenSet:
        """Runs the given layers, without reduction."""
        states = tokens.states
        for i in layers:
            states = self.layer[i](states, tokens.valid, deterministic, tokens.key_bias)
        return dataclasses.replace(tokens, states=states)

    def before_selection(self, tokens: TokenSet, deterministic: bool = True) -> TokenSet:
        """Runs the layers before the first point of reduction, which the samples of an example share."""
        return self.run_layers(tokens, range(self.config.reduction_layers[0]), deterministic)

    def from_selection(
        self,
        tokens: TokenSet,
        rule: Rule | None,
        deterministic: bool = True,
        passage: SharedPassage | None = None,
        gate: Gate | None = None,
        segments: jax.Array | None = None,
    ) -> tuple[TokenSet, tuple[Selection, ...]]:
        """Runs the other layers on the output of `before_selection`; drops tokens at each point of reduction.

        Without a `rule` runs the dense encoder; `passage` is as in `select`. A `gate` changes the gradient
        alone, see `reduction.gate`. `segments`, token types int32 [B, S], are for a model with
        `selector_match`.

        Returns:
          The tokens after the last layer, and one `Selection` for each point of reduction. If the head reads
          all tokens, dropped ones are restored, see `restore`.
        """
        points = self.config.reduction_layers
        if rule is None:
            return self.run_layers(tokens, range(points[0], self.config.num_layers), deterministic), ()
        selections: list[Selection] = []
        dropped = tokens  # if the head reads all tokens: each in its latest state
        gated: list[tuple[jax.Array, jax.Array]] = []
        for stage, (start, stop) in enumerate(
            zip(points, (*points[1:], self.config.num_layers), strict=True)
        ):
            match = selector_features(self.config, tokens, segments)
            logits = self.selector[stage](tokens.states, *match)
            dropped = restore(dropped, tokens)
            before = tokens.states
            tokens, selection = drop_tokens(tokens, logits, stage, rule, passage)
            selections.append(selection)
            if gate is not None:
                gated.append((gate(stage, selection), before))
                tokens = dataclasses.replace(tokens, key_bias=add_bias(tokens.key_bias, gated[-1][0]))
            tokens = self.run_layers(tokens, range(start, stop), deterministic)
        if self.config.reads_all_tokens:
            tokens = gate_states(restore(dropped, tokens), gated)
        return tokens, tuple(selections)

    def sentence_state(self, tokens: TokenSet) -> jax.Array:
        """Returns [B, H], the state of [CLS] that a head reads, behind the pooler if the backbone has one."""
        first = tokens.states[:, 0]
        return jnp.tanh(self.pooler(first)) if self.config.backbone.pooler else first


def selector_features(
    config: ModelConfig, tokens: TokenSet, segments: jax.Array | None
) -> tuple[jax.Array, ...]:
    """Returns what selectors read besides states: nothing, or the `match_features`, float32 [B, S, 2]."""
    if not config.selector_match:
        return ()
    if segments is None:
        raise ValueError("selector_match needs token_type_ids")
    return (match_features(tokens.states, tokens.valid, segments),)
