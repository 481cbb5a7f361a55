"""Heads: from encoder states to the logits of a task. Source: docs/method.md, "Heads"."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from trbert_jax.modeling.config import ModelConfig
from trbert_jax.modeling.layers import dense


class ClassificationHead(nn.Module):
    """BERT: dropout, Linear. DistilBERT: Linear, ReLU, dropout, Linear."""

    config: ModelConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        if self.config.model_type == "distilbert":
            self.pre_classifier = dense(self.config.hidden_size, self.config, self.dtype)
        self.classifier = dense(self.config.num_labels, self.config, jnp.float32)
        self.dropout = nn.Dropout(self.config.classifier_dropout)

    def __call__(self, sentence: jax.Array, deterministic: bool) -> jax.Array:
        """[B, H] -> float32 logits [B, C]."""
        if self.config.model_type == "distilbert":
            sentence = jax.nn.relu(self.pre_classifier(sentence))
        return self.classifier(self.dropout(sentence, deterministic=deterministic))
