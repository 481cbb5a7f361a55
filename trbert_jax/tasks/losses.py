"""Loss functions of the tasks, one value an example, and the batches they read.

Callers average over the valid examples. A position where `mask` is False takes no part.
Source: docs/method.md, "Task losses".
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from trbert_jax.model.model import Batch
from trbert_jax.reduction.selection import Selection, row_keys

# The logit of a position that takes no part: finite, so that 0 times its logarithm is 0.
_MASKED = -1e9
# The published logit of a candidate that an example lacks.
NO_CANDIDATE = -10000.0


class Rows:
    """A batch and the number of its copies that the logits are of, read by copy, example and row.

    A batch has B examples of G consecutive rows each: the options of a multiple choice, the segments of a
    long document, otherwise one. `input_ids`, `mask` and what the head reads have an entry a row; `labels`
    and `valid` have one an example. Logits of K copies of the batch are stacked, copy j of example i at
    `j * B + i`.
    """

    def __init__(self, batch: Batch, num_copies: int = 1) -> None:
        self.batch = batch
        self.num_copies = num_copies
        self.num_examples = batch["valid"].shape[0]
        self.group = batch["input_ids"].shape[0] // self.num_examples

    def get(self, key: str) -> Any:
        """Returns an entry of the batch (or each array of it), once for each copy."""

        def copies(x: jax.Array) -> jax.Array:
            return jnp.tile(x, (self.num_copies,) + (1,) * (x.ndim - 1))

        return jax.tree.map(copies, self.batch[key])

    def grouped(self, x: jax.Array) -> jax.Array:
        """Divides by example: [K * B * G, ...] -> [K * B, G, ...]."""
        return x.reshape(-1, self.group, *x.shape[1:])

    @property
    def valid(self) -> jax.Array:
        """bool [K * B * G], False for padding rows of an example."""
        if "segment" in self.batch:
            return self.get("segment")
        return jnp.ones(self.num_copies * self.num_examples * self.group, bool)

    @property
    def mask(self) -> jax.Array:
        """bool [K * B * G, S], the positions that losses see; none in padding rows."""
        mask = self.get("head_mask" if "head_mask" in self.batch else "mask")
        return mask & self.get("segment")[:, None] if "segment" in self.batch else mask

    def keys(self, rng: jax.Array) -> jax.Array:
        """Returns a PRNG key for each row, [B * G]; rows that select tokens together get the same key.

        A row's key depends only on `rng` and on `index` int32 [B], the example's number in its data set.
        """
        keys = row_keys(rng, self.batch["index"])
        if self.group == 1:
            return keys
        if "shared" in self.batch:
            return jnp.repeat(keys, self.group)
        return jax.vmap(lambda key: row_keys(key, jnp.arange(self.group)))(keys).reshape(-1)

    def kept(self, selections: Sequence[Selection]) -> tuple[Selection, ...]:
        """Returns the selections with a position that rows share kept in all of them if one keeps it."""
        if "shared" not in self.batch:
            return tuple(selections)

        def together(keep: jax.Array) -> jax.Array:
            return jnp.repeat(self.grouped(keep).any(1), self.group, axis=0)

        return tuple(dataclasses.replace(s, keep=together(s.keep)) for s in selections)

    def mean(self, x: jax.Array) -> jax.Array:
        """Averages over the valid rows of each example: [K * B * G] -> [K * B]."""
        x = self.grouped(x)
        if "segment" in self.batch:
            return masked_mean(x, self.grouped(self.get("segment")))
        return x.mean(1)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Negative log-likelihood of the labels: float [B, C], int [B] -> float [B], nats."""
    chex.assert_rank([logits, labels], [2, 1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def distillation(
    logits: jax.Array, teacher_logits: jax.Array, temperature: float = 1.0, mask: jax.Array | None = None
) -> jax.Array:
    """Soft cross entropy with a teacher: float [..., C] (twice), bool [..., C] -> float [...], nats.

    Not a Kullback-Leibler divergence and without the factor temperature^2: the length penalty's
    coefficient is tuned against exactly this. No gradient reaches the teacher. Masked logits are centered,
    see `_only`; logits without a mask may hold `NO_CANDIDATE`.
    """
    chex.assert_equal_shape([logits, teacher_logits])
    logits = logits / temperature
    teacher_logits = jax.lax.stop_gradient(teacher_logits) / temperature
    if mask is not None:
        mask = jnp.broadcast_to(mask, logits.shape)
        logits, teacher_logits = _only(logits, mask), _only(teacher_logits, mask)
    target = jax.nn.softmax(teacher_logits, axis=-1)
    return -jnp.sum(target * jax.nn.log_softmax(logits, axis=-1), axis=-1)


def margin(logits: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Log odds of the most probable answer: float [..., C], bool [..., C] -> float [...].

    Its derivative, unlike that of the loss, does not vanish where the model is sure.
    """
    if mask is not None:
        logits = _only(logits, jnp.broadcast_to(mask, logits.shape))
    best = jax.nn.one_hot(logits.argmax(-1), logits.shape[-1], dtype=bool)
    # By position, see `heads.MultiHopHead`.
    largest = jnp.sum(jnp.where(best, logits, 0), axis=-1)
    return largest - jax.nn.logsumexp(jnp.where(best, _MASKED, logits), axis=-1)


def state_distance(states: jax.Array, teacher: jax.Array) -> jax.Array:
    """Mean square of the difference of two states, each brought to mean 0 and variance 1: [B, H] -> [B]."""
    chex.assert_equal_shape([states, teacher])
    ours, theirs = (jax.nn.standardize(x.astype(jnp.float32)) for x in (states, teacher))
    return jnp.mean((ours - jax.lax.stop_gradient(theirs)) ** 2, axis=-1)


def any_of(logits: jax.Array, gold: jax.Array, mask: jax.Array) -> jax.Array:
    """Negative log-likelihood that any of the gold positions is the answer's, in nats.

    With one gold position it is the cross entropy. The segments of an example share one softmax.
    [B, G, S], gold int [B, G, A] (each position once; -1 for padding), bool [B, G, S] -> [B], 0 for an
    example without a gold position.
    """
    chex.assert_rank([logits, gold, mask], 3)
    flat = (len(logits), -1)
    logits = _only(logits.reshape(flat), mask.reshape(flat)).reshape(logits.shape)
    chosen = jnp.take_along_axis(logits, jnp.maximum(gold, 0), axis=-1)
    chosen = jnp.where(gold >= 0, chosen, _MASKED)
    loss = jax.nn.logsumexp(logits, axis=(1, 2)) - jax.nn.logsumexp(chosen, axis=(1, 2))
    return jnp.where(jnp.any(gold >= 0, axis=(1, 2)), loss, 0.0)


def mean_of(logits: jax.Array, gold: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over the gold positions of each one's cross entropy: [B, S], [B, A], [B, S] -> [B], nats."""
    chex.assert_rank([logits, gold, mask], 2)
    log_prob = jax.nn.log_softmax(_only(logits, mask), axis=-1)
    chosen = jnp.take_along_axis(log_prob, jnp.maximum(gold, 0), axis=-1)
    return masked_mean(-chosen, gold >= 0)


def sentence_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross entropy over labeled sentences: [B, N, 2], int [B, N] (-1: no sentence) -> [B], nats."""
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    return masked_mean(loss, labels >= 0)


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Averages over the last axis where `mask` is True; 0 if it is False everywhere."""
    return jnp.sum(jnp.where(mask, values, 0.0), axis=-1) / jnp.maximum(jnp.sum(mask, axis=-1), 1)


def _only(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """Masks and centers the logits of a softmax over the last axis.

    A shift does not change a softmax. The gradients of centered logits add up to zero, as they should;
    otherwise they add up to rounding errors, from which a bias shared by all positions would learn.
    """
    return jnp.where(mask, logits - masked_mean(logits, mask)[..., None], _MASKED)
