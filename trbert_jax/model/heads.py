"""Heads: from encoder states to the logits of a task. Source: docs/method.md, "Heads"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from trbert_jax.model.config import ModelConfig
from trbert_jax.model.layers import dense

Logits = Any  # an array, or a dict of arrays by what they are of


class ClassificationHead(nn.Module):
    """BERT: dropout, Linear. DistilBERT: Linear, ReLU, dropout, Linear.

    In multiple choice each row is an option, and its single logit says how well it answers.
    """

    config: ModelConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        if self.config.model_type == "distilbert":
            self.pre_classifier = dense(self.config.hidden_size, self.config, self.dtype)
        outputs = 1 if self.config.task == "multiple_choice" else self.config.num_labels
        self.classifier = dense(outputs, self.config, jnp.float32)
        self.dropout = nn.Dropout(self.config.classifier_dropout)

    def __call__(self, sentence: jax.Array, deterministic: bool) -> jax.Array:
        """[B, H] -> float32 logits [B, C]; [B, 1] in multiple choice."""
        if self.config.model_type == "distilbert":
            sentence = jax.nn.relu(self.pre_classifier(sentence))
        return self.classifier(self.dropout(sentence, deterministic=deterministic))


class SpanHead(nn.Module):
    """A Linear on every token: how well an answer starts there, and ends there."""

    config: ModelConfig

    def setup(self) -> None:
        self.qa_outputs = dense(2, self.config, jnp.float32)
        self.dropout = nn.Dropout(qa_dropout(self.config))

    def __call__(
        self, states: jax.Array, mask: jax.Array, batch: Mapping[str, jax.Array], deterministic: bool
    ) -> jax.Array:
        """States [B, S, H] -> float32 logits [B, 2, S], of the start and of the end."""
        states = self.dropout(states, deterministic=deterministic)
        return jnp.swapaxes(self.qa_outputs(states), 1, 2)


class CandidateHead(nn.Module):
    """A Linear on the marker before each candidate."""

    config: ModelConfig

    def setup(self) -> None:
        self.qa_outputs = dense(1, self.config, jnp.float32)

    def __call__(
        self, states: jax.Array, mask: jax.Array, batch: Mapping[str, jax.Array], deterministic: bool
    ) -> jax.Array:
        """States [B, S, H] and `candidates` int32 [B, C] (-1 where there is none) -> float32 [B, C]."""
        return self.qa_outputs(take_states(states, batch["candidates"]))[..., 0]


class MultiHopHead(nn.Module):
    """An answer's start and end, its kind (span, yes, no), and which sentences support it."""

    config: ModelConfig

    def setup(self) -> None:
        def linear(outputs: int) -> nn.Module:
            return dense(outputs, self.config, jnp.float32)

        self.qa_outputs, self.qa_classifier = linear(2), linear(3)
        self.sent_linear, self.sent_classifier = linear(self.config.hidden_size), linear(2)

    def __call__(
        self, states: jax.Array, mask: jax.Array, batch: Mapping[str, jax.Array], deterministic: bool
    ) -> dict[str, jax.Array]:
        """States [B, S, H], `sentences` int32 [B, N, 2] (first and last token, -1 where there is none).

        The kind is read off the largest value of each feature among the positions of `mask`.

        Returns:
          float32 `span` [B, 2, S], `kind` [B, 3], `sentence` [B, N, 2].
        """
        largest = jnp.max(jnp.where(mask[..., None], states, -jnp.inf), axis=1)
        ends = batch["sentences"].reshape(len(states), -1)
        ends = take_states(states, ends).reshape(*batch["sentences"].shape[:2], -1)  # [B, N, 2H]
        ends = jax.nn.gelu(self.sent_linear(ends), approximate=False)
        return {
            "span": jnp.swapaxes(self.qa_outputs(states), 1, 2),
            "kind": self.qa_classifier(largest),
            "sentence": self.sent_classifier(ends),
        }


HEADS: dict[str, Any] = {
    "classification": ClassificationHead,
    "multiple_choice": ClassificationHead,
    "span": SpanHead,
    "candidates": CandidateHead,
    "multi_hop": MultiHopHead,
}


def qa_dropout(config: ModelConfig) -> float:
    """Dropout before a span head's Linear: DistilBERT has one, BERT none."""
    return 0.1 if config.model_type == "distilbert" else 0.0


def take_states(states: jax.Array, positions: jax.Array) -> jax.Array:
    """[B, S, H] at int32 [B, N] -> [B, N, H]; 0 where the position is negative."""
    taken = jnp.take_along_axis(states, jnp.maximum(positions, 0)[..., None], axis=1)
    return jnp.where(positions[..., None] >= 0, taken, 0)
