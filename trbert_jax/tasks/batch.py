"""The loss of each task on the outputs of a batch, one value an example.

A batch has B examples of G consecutive rows each: one for most tasks, the options of a multiple choice, the
segments of a long document. `input_ids`, `mask` and what the head reads have an entry a row; `labels` and
`valid` have one an example. Outputs of K copies of the batch are stacked, copy j of example i at `j * B + i`.
Source: docs/method.md, "Task losses".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from trbert_jax.model.heads import Logits
from trbert_jax.model.model import Batch
from trbert_jax.reduction.selection import Selection, row_keys
from trbert_jax.tasks import losses as task


class Rows:
    """A batch and how many copies of it the outputs are of: what losses read, by copy, example and row."""

    def __init__(self, batch: Batch, num_copies: int = 1) -> None:
        self.batch = batch
        self.num_copies = num_copies
        self.num_examples = batch["valid"].shape[0]
        self.group = batch["input_ids"].shape[0] // self.num_examples

    def get(self, key: str) -> Any:
        """An entry of the batch (or each array of it), copied."""

        def copies(x: jax.Array) -> jax.Array:
            return jnp.tile(x, (self.num_copies,) + (1,) * (x.ndim - 1))

        return jax.tree.map(copies, self.batch[key])

    def grouped(self, x: jax.Array) -> jax.Array:
        """[K * B * G, ...] -> [K * B, G, ...]."""
        return x.reshape(-1, self.group, *x.shape[1:])

    @property
    def there(self) -> jax.Array:
        """bool [K * B * G], False for rows that only fill an example up."""
        if "segment" in self.batch:
            return self.get("segment")
        return jnp.ones(self.num_copies * self.num_examples * self.group, bool)

    @property
    def mask(self) -> jax.Array:
        """bool [K * B * G, S], the positions that losses see; none of a segment that only fills."""
        mask = self.get("head_mask" if "head_mask" in self.batch else "mask")
        return mask & self.get("segment")[:, None] if "segment" in self.batch else mask

    def keys(self, rng: jax.Array) -> jax.Array:
        """PRNG keys for draws, [B * G]: each row's own, but one where rows decide together.

        A row's key depends on `index` int32 [B], the example's number in its data set, and on nothing else.
        """
        keys = row_keys(rng, self.batch["index"])
        if self.group == 1:
            return keys
        if "shared" in self.batch:
            return jnp.repeat(keys, self.group)
        return jax.vmap(lambda key: row_keys(key, jnp.arange(self.group)))(keys).reshape(-1)

    def kept(self, selections: Sequence[Selection]) -> tuple[Selection, ...]:
        """The selections as far as what they keep counts: a position that rows share counts once for all."""
        if "shared" not in self.batch:
            return tuple(selections)

        def together(keep: jax.Array) -> jax.Array:
            return jnp.repeat(self.grouped(keep).any(1), self.group, axis=0)

        return tuple(dataclasses.replace(s, keep=together(s.keep)) for s in selections)

    def mean(self, x: jax.Array) -> jax.Array:
        """Means over the rows of each example that are not fillers: [K * B * G] -> [K * B]."""
        x = self.grouped(x)
        if "segment" in self.batch:
            return task.masked_mean(x, self.grouped(self.get("segment")))
        return x.mean(1)


def task_loss(kind: str, logits: Logits, batch: Batch, num_copies: int = 1) -> jax.Array:
    """The loss with the labels, float32 [K * B].

    Args:
      kind: one of `modeling.config.TASKS`.
      logits: the model's, of K copies of the batch.
      batch: see the module's docstring, and the functions below for what each task adds.
      num_copies: K.
    """
    return _HARD[kind](logits, Rows(batch, num_copies))


def distillation_loss(
    kind: str, logits: Logits, batch: Batch, num_copies: int = 1, temperature: float = 1.0
) -> jax.Array:
    """The loss with the logits of a teacher, `teacher_logits`, float32 [K * B]; arguments as above."""
    return _SOFT[kind](logits, Rows(batch, num_copies), temperature)


def example_logits(kind: str, logits: Logits, batch: Batch, num_copies: int = 1) -> Logits:
    """The logits off which answers are read: [B * G, ...] -> [B, ...] where rows answer together."""
    if kind == "multiple_choice":
        return Rows(batch, num_copies).grouped(logits)[..., 0]
    if kind == "candidates":
        return _candidate_logits(logits, Rows(batch, num_copies))
    return logits


def is_by_token(kind: str, name: str | None = None) -> bool:
    """Whether the last axis of a task's logits (or of those of this name) are the positions of a row."""
    return kind == "span" or (kind == "multi_hop" and name == "span")


# Classification: `labels` int32 [B] ------------------------------------------------------------------


def _classification(logits: jax.Array, rows: Rows) -> jax.Array:
    return task.cross_entropy(logits, rows.get("labels"))


def _classification_soft(logits: jax.Array, rows: Rows, temperature: float) -> jax.Array:
    return task.distillation(logits, rows.get("teacher_logits"), temperature)


# Multiple choice: a row an option, `labels` int32 [B] -----------------------------------------------


def _choice(logits: jax.Array, rows: Rows) -> jax.Array:
    return _classification(rows.grouped(logits)[..., 0], rows)


def _choice_soft(logits: jax.Array, rows: Rows, temperature: float) -> jax.Array:
    return _classification_soft(rows.grouped(logits)[..., 0], rows, temperature)


# Spans: a row a segment, `starts` and `ends` int32 [B * G, A] (-1 where there are fewer) ------------


def _span(logits: jax.Array, rows: Rows) -> jax.Array:
    mask = rows.grouped(rows.mask)
    ends = (
        task.any_of(rows.grouped(logits[:, i]), rows.grouped(rows.get(key)), mask)
        for i, key in enumerate(("starts", "ends"))
    )
    return sum(ends, start=jnp.zeros(())) / 2


def _span_soft(logits: jax.Array, rows: Rows, temperature: float) -> jax.Array:
    loss = task.distillation(logits, rows.get("teacher_logits"), temperature, rows.mask[:, None])
    return rows.mean(loss.sum(1))  # not halved, as published


# Candidates: a row a segment, `candidates` int32 [B * G, C], `labels` int32 [B] -----------------------


def _candidate_logits(logits: jax.Array, rows: Rows) -> jax.Array:
    logits = rows.grouped(jnp.where(rows.get("candidates") >= 0, logits, task.NO_CANDIDATE))
    if "segment" not in rows.batch:
        return logits.mean(1)
    return task.masked_mean(jnp.moveaxis(logits, 1, -1), rows.grouped(rows.get("segment"))[:, None])


def _candidates(logits: jax.Array, rows: Rows) -> jax.Array:
    return _classification(_candidate_logits(logits, rows), rows)


def _candidates_soft(logits: jax.Array, rows: Rows, temperature: float) -> jax.Array:
    return _classification_soft(_candidate_logits(logits, rows), rows, temperature)


# Several paragraphs: `starts`, `ends` int32 [B, A], `kind` int32 [B], `sentence_labels` int32 [B, N] ----


def _multi_hop(logits: dict[str, jax.Array], rows: Rows) -> jax.Array:
    ends = (
        task.mean_of(logits["span"][:, i], rows.get(key), rows.mask)
        for i, key in enumerate(("starts", "ends"))
    )
    span = sum(ends, start=jnp.zeros(())) / 2
    kind = task.cross_entropy(logits["kind"], rows.get("kind"))
    return span + kind + task.sentence_loss(logits["sentence"], rows.get("sentence_labels"))


def _multi_hop_soft(logits: dict[str, jax.Array], rows: Rows, temperature: float) -> jax.Array:
    teacher, labeled = rows.get("teacher_logits"), rows.get("sentence_labels") >= 0
    span = task.distillation(logits["span"], teacher["span"], temperature, rows.mask[:, None]).sum(1)
    kind = task.distillation(logits["kind"], teacher["kind"], temperature)
    sentence = task.distillation(logits["sentence"], teacher["sentence"], temperature)
    # The published sum is over all slots for sentences, also those where there is none.
    counted = sentence if "head_mask" in rows.batch else jnp.where(labeled, sentence, 0.0)
    return span + kind + counted.sum(-1) / jnp.maximum(labeled.sum(-1), 1)


_HARD: dict[str, Callable[..., jax.Array]] = {
    "classification": _classification,
    "multiple_choice": _choice,
    "span": _span,
    "candidates": _candidates,
    "multi_hop": _multi_hop,
}
_SOFT: dict[str, Callable[..., jax.Array]] = {
    "classification": _classification_soft,
    "multiple_choice": _choice_soft,
    "span": _span_soft,
    "candidates": _candidates_soft,
    "multi_hop": _multi_hop_soft,
}
