"""The whole model of a task: encoder with token reduction and head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from trbert_jax.modeling.config import ModelConfig
from trbert_jax.modeling.encoder import Encoder
from trbert_jax.modeling.heads import ClassificationHead
from trbert_jax.tokens import Rule, Selection, TokenSet, keep_all

Params = Any  # nested dict of arrays
Batch = Mapping[str, jax.Array]  # `input_ids`, `mask`, ... of B rows


@struct.dataclass
class ModelOutput:
    """Logits float32 [B, C] and one `Selection` for each point of reduction (none if run dense)."""

    logits: jax.Array
    selections: tuple[Selection, ...]


class TokenReducingClassifier(nn.Module):
    """A text classifier that drops tokens on the way.

    Attributes:
      config: the model's shape.
      dtype: compute dtype; parameters, selector logits, softmax and LayerNorm statistics and the
        classifier's logits stay float32.
    """

    config: ModelConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.encoder = Encoder(self.config, self.dtype)
        self.head = ClassificationHead(self.config, self.dtype)

    def __call__(
        self,
        input_ids: jax.Array,
        mask: jax.Array,
        token_type_ids: jax.Array | None = None,
        *,
        rule: Rule | None,
        num_copies: int = 1,
        deterministic: bool = True,
    ) -> ModelOutput:
        """Classifies a batch.

        Args:
          input_ids: int32 [B, S].
          mask: bool [B, S], True for real tokens.
          token_type_ids: int32 [B, S] or None for all 0.
          rule: how tokens are selected (`trbert_jax.tokens`); None runs the dense encoder.
          num_copies: samples an example, K. What comes before the first point of reduction is
            computed once and shared; outputs have K * B rows, row `j * B + i` copy j of example i.
          deterministic: no dropout; otherwise the `dropout` RNG is needed.
        """
        tokens = self.encoder.embed(input_ids, mask, token_type_ids, deterministic)
        tokens = self.encoder.before_selection(tokens, deterministic)
        if num_copies > 1:
            tokens = tokens.repeat(num_copies)
        tokens, selections = self.encoder.from_selection(tokens, rule, deterministic)
        return ModelOutput(self.classify(tokens, deterministic), selections)

    def classify(self, tokens: TokenSet, deterministic: bool = True) -> jax.Array:
        """Encoder output -> float32 logits [B, C]."""
        return self.head(self.encoder.sentence_state(tokens), deterministic)

    # Pieces of the forward pass, for the residual scores and packed execution.

    def embed(
        self,
        input_ids: jax.Array,
        mask: jax.Array,
        token_type_ids: jax.Array | None = None,
        deterministic: bool = True,
    ) -> TokenSet:
        """Token embeddings; see `Encoder.embed`."""
        return self.encoder.embed(input_ids, mask, token_type_ids, deterministic)

    def run_layers(self, tokens: TokenSet, layers: Sequence[int]) -> TokenSet:
        """Layers without dropout or reduction; see `Encoder.run_layers`."""
        return self.encoder.run_layers(tokens, layers)


def forward(
    model: TokenReducingClassifier,
    params: Params,
    batch: Batch,
    *,
    rule: Rule | None,
    num_copies: int = 1,
    dropout_rng: jax.Array | None = None,
) -> ModelOutput:
    """Runs the model on a batch; dropout is on exactly if there is an RNG for it."""
    return model.apply(
        {"params": params},
        batch["input_ids"],
        batch["mask"],
        batch.get("token_type_ids"),
        rule=rule,
        num_copies=num_copies,
        deterministic=dropout_rng is None,
        rngs=None if dropout_rng is None else {"dropout": dropout_rng},
    )


def init_params(config: ModelConfig, rng: jax.Array) -> Params:
    """Fresh float32 parameters, every selector included: normal(0, initializer_range), biases 0."""
    model = TokenReducingClassifier(config)
    ids = jnp.zeros((1, 2), jnp.int32)

    def everything(module: TokenReducingClassifier) -> jax.Array:
        output = module(ids, jnp.ones((1, 2), bool), rule=keep_all)
        # A shallow model never asks its second selector, but checkpoints hold it.
        unused = [selector(jnp.zeros((1, config.hidden_size))) for selector in module.encoder.selector]
        return output.logits.sum() + sum(x.sum() for x in unused)

    return jax.jit(nn.init(everything, model))(rng)["params"]  # one compilation, not one an array
