"""Heads: from encoder states to the logits of a task. Source: docs/method.md, "Heads"."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from trbert_jax.model.config import ModelConfig
from trbert_jax.model.dropout import Dropout
from trbert_jax.model.layers import dense

Logits = Any  # an array, or a dict of arrays by what they are of
Inputs = Mapping[str, jax.Array]  # entries of a batch that a head reads besides the states


class ClassificationHead(nn.Module):
    """Dropout, Linear; first Linear, ReLU without a pooler. In multiple choice a row is an option."""

    config: ModelConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        if not self.config.backbone.pooler:
            self.pre_classifier = dense(self.config.hidden_size, self.config, self.dtype)
        self.classifier = dense(self.config.num_outputs, self.config, jnp.float32)
        self.dropout = Dropout(self.config.classifier_dropout)

    def __call__(self, sentence: jax.Array, deterministic: bool) -> jax.Array:
        """[B, H] -> float32 logits [B, C]; [B, 1] in multiple choice."""
        if not self.config.backbone.pooler:
            sentence = jax.nn.relu(self.pre_classifier(sentence))
        return self.classifier(self.dropout(sentence, deterministic))


class SpanHead(nn.Module):
    """A Linear on every token: how well an answer starts there, and ends there."""

    config: ModelConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.qa_outputs = dense(2, self.config, jnp.float32)
        self.dropout = Dropout(self.config.backbone.span_dropout)

    def __call__(self, states: jax.Array, mask: jax.Array, batch: Inputs, deterministic: bool) -> jax.Array:
        """States [B, S, H] -> float32 logits [B, 2, S], of the start and of the end."""
        states = self.dropout(states, deterministic)
        return jnp.swapaxes(self.qa_outputs(states), 1, 2)


class CandidateHead(nn.Module):
    """A Linear on the marker before each candidate."""

    config: ModelConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.qa_outputs = dense(1, self.config, jnp.float32)

    def __call__(self, states: jax.Array, mask: jax.Array, batch: Inputs, deterministic: bool) -> jax.Array:
        """States [B, S, H] and `candidates` int32 [B, C] (-1 for none) -> float32 [B, C]."""
        return self.qa_outputs(take_states(states, batch["candidates"]))[..., 0]


class MultiHopHead(nn.Module):
    """An answer's start and end, its kind (span, yes, no), and which sentences support it."""

    config: ModelConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        linear = functools.partial(dense, config=self.config, dtype=jnp.float32)
        self.qa_outputs, self.qa_classifier = linear(2), linear(3)
        self.sent_linear, self.sent_classifier = linear(self.config.hidden_size), linear(2)

    def __call__(self, states: jax.Array, mask: jax.Array, batch: Inputs, deterministic: bool) -> Logits:
        """States [B, S, H], `sentences` int32 [B, N, 2] (first and last token, -1 for none).

        The kind is read off the largest value of each feature among the positions of `mask`.

        Returns:
          float32 `span` [B, 2, S], `kind` [B, 3], `sentence` [B, N, 2].
        """
        # By position: the derivative of `jnp.max` compares values, which a compiler may compute twice and
        # round differently; then none is the largest, and it is 0 / 0.
        place = jnp.argmax(jnp.where(mask[..., None], states, -jnp.inf), axis=1, keepdims=True)
        largest = jnp.take_along_axis(states, place, axis=1)[:, 0]
        ends = batch["sentences"].reshape(len(states), -1)
        ends = take_states(states, ends).reshape(*batch["sentences"].shape[:2], -1)  # [B, N, 2H]
        ends = jax.nn.gelu(self.sent_linear(ends), approximate=False)
        return {
            "span": jnp.swapaxes(self.qa_outputs(states), 1, 2),
            "kind": self.qa_classifier(largest),
            "sentence": self.sent_classifier(ends),
        }


@dataclasses.dataclass(frozen=True)
class Head:
    """The head of a task."""

    name: str  # key of `HEADS`, the task
    module: type[nn.Module]  # made with a configuration and a compute dtype
    layers: tuple[str, ...]  # its linear layers, named as on disk
    class_suffix: str = "Model"  # end of the class name in config.json; some tasks have no class of their own
    # Whether it reads every token, a dropped one in the state it had when dropped; otherwise [CLS] alone.
    reads_all_tokens: bool = True
    # The data set whose questions a checkpoint of another origin can be asked; "" for none.
    data: str = ""
    num_outputs: int | None = None  # of its last layer, per token or per [CLS]; None for one per label
    # Entries of a batch that it reads besides the states -> shape of a row in the smallest example.
    inputs: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)


_SENTENCE, _MULTI_HOP = ("classifier",), ("qa_outputs", "qa_classifier", "sent_linear", "sent_classifier")

HEADS: dict[str, Head] = {
    head.name: head
    for head in (
        Head("classification", ClassificationHead, _SENTENCE, "ForSequenceClassification", False),
        Head("multiple_choice", ClassificationHead, _SENTENCE, "ForMultipleChoice", False, num_outputs=1),
        Head("span", SpanHead, ("qa_outputs",), "ForQuestionAnswering", data="squad"),
        Head("candidates", CandidateHead, ("qa_outputs",), num_outputs=1, inputs={"candidates": (1,)}),
        Head("multi_hop", MultiHopHead, _MULTI_HOP, inputs={"sentences": (1, 2)}),
    )
}


def take_states(states: jax.Array, positions: jax.Array) -> jax.Array:
    """[B, S, H] at int32 [B, N] -> [B, N, H]; 0 where the position is negative."""
    taken = jnp.take_along_axis(states, jnp.maximum(positions, 0)[..., None], axis=1)
    return jnp.where(positions[..., None] >= 0, taken, 0)
