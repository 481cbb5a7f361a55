"""The policy network: a two-layer perceptron that scores every token for keeping."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from trbert_jax.model.config import ModelConfig
from trbert_jax.model.layers import dense


class Selector(nn.Module):
    """Linear, exact GELU, Linear to one logit; no dropout. Paper, section 3.2.

    Always float32: a keep decision close to one half should not depend on the compute dtype.
    """

    config: ModelConfig

    def setup(self) -> None:
        self.hidden = dense(self.config.selector_hidden, self.config, jnp.float32)
        self.output = dense(1, self.config, jnp.float32)

    def __call__(self, states: jax.Array) -> jax.Array:
        """[..., H] -> float32 [...], the logit of the keep probability."""
        inner = jax.nn.gelu(self.hidden(states.astype(jnp.float32)), approximate=False)
        return self.output(inner)[..., 0]
