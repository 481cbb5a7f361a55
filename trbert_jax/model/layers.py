"""Embeddings, the post-LN transformer layer and the token selector. Source: docs/method.md, "Encoder"."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from trbert_jax.model.config import ModelConfig
from trbert_jax.model.dropout import Dropout, dropout, seeds

Dtype = Any
PROJECTIONS = ("query", "key", "value")  # the parameters of `attention_inputs`
NUM_MASKS = 3  # of dropout in a layer: attention's weights and output, and the layer's output

# Activations between the two products of a layer, by their names in config.json. A selector has its own.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    **dict.fromkeys(("gelu", "gelu_python"), functools.partial(jax.nn.gelu, approximate=False)),
    **dict.fromkeys(
        ("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh"),
        functools.partial(jax.nn.gelu, approximate=True),
    ),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


def dense(features: int, config: ModelConfig, dtype: Dtype) -> nn.Dense:
    """A linear layer with BERT's initialization; float32 is exact on GPUs and TPUs too."""
    return nn.Dense(
        features,
        dtype=dtype,
        precision=precision(dtype),
        kernel_init=nn.initializers.normal(config.initializer_range),
    )


def precision(dtype: Dtype) -> jax.lax.Precision:
    """Returns the precision of matrix products for a compute dtype."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def layer_norm(config: ModelConfig, dtype: Dtype) -> nn.LayerNorm:
    """LayerNorm with float32 statistics, in two passes: one pass loses digits that parity needs."""
    return nn.LayerNorm(epsilon=config.layer_norm_eps, dtype=dtype, use_fast_variance=False)


class Embeddings(nn.Module):
    """Word, position and (for some backbones) token type embeddings, LayerNorm, dropout."""

    config: ModelConfig
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        def table(rows: int) -> nn.Embed:
            init = nn.initializers.normal(self.config.initializer_range)
            return nn.Embed(rows, self.config.hidden_size, dtype=self.dtype, embedding_init=init)

        self.word = table(self.config.vocab_size)
        self.position = table(self.config.max_positions)
        if self.config.type_vocab_size:
            self.token_type = table(self.config.type_vocab_size)
        self.norm = layer_norm(self.config, self.dtype)
        self.dropout = Dropout(self.config.hidden_dropout)

    def __call__(
        self, input_ids: jax.Array, token_type_ids: jax.Array | None, deterministic: bool
    ) -> jax.Array:
        """int32 [B, S] (twice) -> [B, S, H]; token types default to 0."""
        states = self.word(input_ids) + self.position(jnp.arange(input_ids.shape[-1]))
        if self.config.type_vocab_size:
            types = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            states = states + self.token_type(types)
        return self.dropout(self.norm(states), deterministic)


class TransformerLayer(nn.Module):
    """Self-attention and feed-forward, each followed by dropout, residual and LayerNorm.

    All methods but `attend` work on single tokens and take states of any leading shape: padded [B, S, H] or
    flat [C, H]. `noise`, `seeds` uint32 [NUM_MASKS, 2] or None, are the layer's seeds of dropout; `first` is
    the number of the first of the rows or tokens among all that share the seeds.
    """

    config: ModelConfig
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        config, dtype = self.config, self.dtype
        self.query = dense(config.hidden_size, config, dtype)
        self.key = dense(config.hidden_size, config, dtype)
        self.value = dense(config.hidden_size, config, dtype)
        self.attention_output = dense(config.hidden_size, config, dtype)
        self.attention_norm = layer_norm(config, dtype)
        self.intermediate = dense(config.intermediate_size, config, dtype)
        self.output = dense(config.hidden_size, config, dtype)
        self.output_norm = layer_norm(config, dtype)

    def __call__(
        self, states: jax.Array, valid: jax.Array, deterministic: bool, key_bias: jax.Array | None = None
    ) -> jax.Array:
        """[B, S, H], bool [B, S] -> [B, S, H]; only valid tokens are attended to, see `attend`."""
        # Token-wise parts run on flat tokens: products of two matrices, of which XLA makes a better
        # backward pass on a CPU (a quarter of a layer's time) than of products over [B, S].
        shape, flat = states.shape, states.reshape(-1, states.shape[-1])  # [B * S, H]
        query, key, value = (x.reshape(shape) for x in self.attention_inputs(flat))
        noise = None if deterministic else seeds(self.make_rng("dropout"), NUM_MASKS)
        context = self.attend(query, key, value, valid, noise, key_bias=key_bias)
        return self.finish(flat, context.reshape(flat.shape), noise).reshape(shape)

    def attention_inputs(self, states: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[..., H] -> query, key, value, each [..., H]."""
        return self.queries(states), *self.keys_and_values(states)

    def queries(self, states: jax.Array) -> jax.Array:
        """[..., H] -> [..., H], already divided by sqrt(d)."""
        scale = (self.config.hidden_size // self.config.num_heads) ** -0.5
        return self.query(states) * jnp.asarray(scale, self.dtype)

    def keys_and_values(self, states: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[..., H] -> [..., H] twice."""
        return self.key(states), self.value(states)

    def attend(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        valid: jax.Array,
        noise: jax.Array | None,
        first: jax.Array | int = 0,
        key_bias: jax.Array | None = None,
    ) -> jax.Array:
        """Multi-head attention over padded rows: query [B, Q, H], key and value [B, S, H] -> [B, Q, H].

        Only `valid` tokens, bool [B, S], are attended to. `key_bias`, float32 [B, S], is added to every score
        of a key.
        """
        shape = query.shape
        # Heads in front and plain batched products: half the time of the einsum over [B, S, N, d]
        # on a CPU, where XLA does not find this form by itself.
        query, key, value = (self._split_heads(x) for x in (query, key, value))  # [B, N, Q or S, d]
        product = precision(self.dtype)
        scores = jnp.matmul(query, key.swapaxes(-1, -2), precision=product)  # [B, N, Q, S]
        scores = scores.astype(jnp.float32)
        if key_bias is not None:
            scores = scores + key_bias[:, None, None, :]
        # A large finite number, not -inf: a row without any valid token must not become NaN.
        scores = jnp.where(valid[:, None, None, :], scores, -1e30)
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        total = weights.sum(-1, keepdims=True)
        if noise is not None:
            longest = self.config.max_positions  # rows are padded to several widths
            whole = self.config.num_heads, longest, longest
            weights = dropout(weights, self.config.attention_dropout, noise[0], first, whole)
        weights = weights.astype(self.dtype)
        # Dividing the [S, d] product costs less than dividing the [S, S] weights.
        context = jnp.matmul(weights, value, precision=product) / total.astype(self.dtype)
        return context.swapaxes(1, 2).reshape(shape)

    def finish(
        self,
        states: jax.Array,
        context: jax.Array,
        noise: jax.Array | None,
        first: jax.Array | int = 0,
    ) -> jax.Array:
        """Computes the rest of the layer, token by token: [..., H] (twice) -> [..., H]."""
        return self.finish_keeping(states, context, noise, first)[0]

    def finish_keeping(
        self,
        states: jax.Array,
        context: jax.Array,
        noise: jax.Array | None,
        first: jax.Array | int = 0,
        sums: tuple[jax.Array, ...] | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Computes what `finish` does, and returns the inputs of norms and activation too.

        Given these `sums`, [..., H], [..., I], [..., H], from an earlier call, its derivative needs no matrix
        product of the layer again.
        """
        attended = self.attention_output(context)
        if self.config.backbone.attention_output_dropout:
            attended = self._dropout(attended, noise, 1, first)
        attended = _known(states + attended, sums, 0)
        states = self.attention_norm(attended)
        inner = _known(self.intermediate(states), sums, 1)
        output = self.output(ACTIVATIONS[self.config.activation](inner))
        total = _known(states + self._dropout(output, noise, 2, first), sums, 2)
        return self.output_norm(total), (attended, inner, total)

    def _dropout(
        self, x: jax.Array, noise: jax.Array | None, number: int, first: jax.Array | int
    ) -> jax.Array:
        seed = None if noise is None else noise[number]
        return dropout(x, self.config.hidden_dropout, seed, first)

    def _split_heads(self, x: jax.Array) -> jax.Array:
        batch, length, hidden = x.shape
        heads = self.config.num_heads
        return x.reshape(batch, length, heads, hidden // heads).swapaxes(1, 2)


def _known(computed: jax.Array, values: tuple[jax.Array, ...] | None, number: int) -> jax.Array:
    """Returns the known value in place of the computed one, with the derivative of the computed one."""
    return computed if values is None else _replace(computed, values[number])


@jax.custom_jvp
def _replace(computed: jax.Array, known: jax.Array) -> jax.Array:
    return known


_replace.defjvp(lambda values, tangents: (values[1], tangents[0]))


class Selector(nn.Module):
    """The policy network: Linear, exact GELU, Linear to one logit per token; no dropout. Paper, section 3.2.

    Always float32: a keep decision close to one half should not depend on the compute dtype.
    """

    config: ModelConfig

    def setup(self) -> None:
        self.hidden = dense(self.config.selector_hidden, self.config, jnp.float32)
        self.output = dense(1, self.config, jnp.float32)

    def __call__(self, states: jax.Array, *features: jax.Array) -> jax.Array:
        """[..., H] -> float32 [...], the logit of the keep probability.

        Of a model with `selector_match` also reads the features of `reduction.match`, float32 [..., 2].
        """
        read = jnp.concatenate([states.astype(jnp.float32), *features], -1)
        inner = jax.nn.gelu(self.hidden(read), approximate=False)
        return self.output(inner)[..., 0]
