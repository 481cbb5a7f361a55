"""Puts the paragraphs of multi-hop questions into inputs: `[CLS] question [SEP] paragraphs [SEP]`.

Which paragraphs, and in what order, is decided apart (`drawn_orders`, `file_orders`), so that what
was computed for one order can be used with it again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from trbert_jax.tasks.multi_hop_features import SPAN, MultiHopFeatures
from trbert_jax.tasks.ragged import TokenRows, digest_of, join_rows

MAX_ANSWERS = 8
MAX_SENTENCES = 80


@dataclasses.dataclass(frozen=True, eq=False)
class PackedQuestions:
    """n questions, one input each.

    Attributes:
      rows: n inputs.
      paragraphs: int32 [total], the paragraphs of each input in their order, numbered as in
        `MultiHopFeatures`; the last may be cut.
      paragraph_offsets: int64 [n + 1].
      starts, ends: int32 [total], first and last token of each answer, both inclusive, 8 at most for a
        question; the one (0, 0), [CLS], where there is none.
      target_offsets: int64 [n + 1], of `starts` and `ends`.
      switch: int8 [n], see `MultiHopFeatures`.
      sentences: int32 [total, 2], first and last token of every sentence that is in the input as a
        whole, both inclusive, 80 at most for a question.
      sentence_labels: int8 [total], 1 supporting, 0 not, -1 withheld.
      facts: int32 [total, 2], paragraph (as in `paragraphs`) and number in it of each sentence.
      sentence_offsets: int64 [n + 1], of the last three.
      num_without_answer: inputs without the answer although some paragraph of the question holds it.
      digest: identifies features and orders.
    """

    rows: TokenRows
    paragraphs: np.ndarray
    paragraph_offsets: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    target_offsets: np.ndarray
    switch: np.ndarray
    sentences: np.ndarray
    sentence_labels: np.ndarray
    facts: np.ndarray
    sentence_offsets: np.ndarray
    num_without_answer: int
    digest: str

    def __len__(self) -> int:
        return len(self.rows)


def file_orders(features: MultiHopFeatures) -> list[np.ndarray]:
    """For evaluation: paragraphs as the source orders them, until the input is full.

    Returns:
      For each question the numbers of its paragraphs, int64, the last of which may not fit as a whole.
    """
    orders = []
    for i in range(len(features)):
        first, last = features.paragraph_offsets[i : i + 2]
        filled = np.cumsum(np.diff(features.token_offsets[first : last + 1]))
        count = np.searchsorted(filled, features.room(i)) + 1
        orders.append(np.arange(first, min(first + count, last)))
    return orders


def drawn_orders(features: MultiHopFeatures, seed: int, epoch: int) -> list[np.ndarray]:
    """For training: the gold paragraphs and, drawn at random, others until the input is full.

    The last one added, which may be cut, stands last; the order of the rest is drawn too. Every draw
    depends on seed, epoch and the number of the question alone.

    Args:
      features: n questions.
      seed: of the run, not negative.
      epoch: 0-based; each has its own orders.

    Returns:
      As `file_orders`.
    """
    orders = []
    for i in range(len(features)):
        # + 1: a final 0 would give the numbers of (seed, epoch), which order the examples.
        rng = np.random.Generator(np.random.PCG64([seed, epoch, i + 1]))
        first, last = features.paragraph_offsets[i : i + 2]
        lengths, gold = np.diff(features.token_offsets[first : last + 1]), features.gold[first:last]
        orders.append(first + _draw(lengths, gold, features.room(i), rng))
    return orders


def _draw(lengths: np.ndarray, gold: np.ndarray, room: int, rng: np.random.Generator) -> np.ndarray:
    chosen, others = np.flatnonzero(gold), rng.permutation(np.flatnonzero(~gold))
    # How much there is before each of the others; it is added if that does not fill the input.
    before = lengths[chosen].sum() + np.cumsum(lengths[others]) - lengths[others]
    added = others[before < room]
    if not len(added):
        return rng.permutation(chosen)
    return np.append(rng.permutation(np.concatenate([chosen, added[:-1]])), added[-1])


def pack(features: MultiHopFeatures, orders: Sequence[np.ndarray]) -> PackedQuestions:
    """Puts the paragraphs of every question into one input.

    Args:
      features: n questions.
      orders: for each, paragraphs of its own in the order wanted; what does not fit is cut.
    """
    cls, sep = (np.array([i], np.int32) for i in (features.cls_id, features.sep_id))
    targets, sentences, labels, facts = [], [], [], []
    rows, without = [], 0
    for i, order in enumerate(orders):
        query = features.queries[features.query_offsets[i] : features.query_offsets[i + 1]]
        source, owner = _members(features.token_offsets, order)
        room = features.room(i)
        rows.append(((cls, query, sep), (features.tokens[source[:room]], sep)))
        lengths = features.token_offsets[order + 1] - features.token_offsets[order]
        begin = len(query) + 2 + np.cumsum(lengths) - lengths  # in the row, of each paragraph
        end = len(query) + 2 + min(room, len(source))

        source, owner = _members(features.span_offsets, order)
        spans = features.spans[source] + begin[owner, None]
        spans = spans[spans[:, 1] <= end][:MAX_ANSWERS] - [0, 1]
        if not len(spans):
            without += _has_span(features, i)
            spans = np.zeros((1, 2), np.int64)
        targets.append(spans)

        source, owner = _members(features.sentence_offsets, order)
        ranges = features.sentences[source] + begin[owner, None]
        kept = np.flatnonzero((ranges[:, 0] < ranges[:, 1]) & (ranges[:, 1] <= end))[:MAX_SENTENCES]
        sentences.append(ranges[kept] - [0, 1])
        labels.append(features.supporting[source[kept]])
        paragraph = order[owner[kept]]
        facts.append(np.stack([paragraph, source[kept] - features.sentence_offsets[paragraph]], axis=1))
    joined = _joined(targets, 2)
    return PackedQuestions(
        rows=join_rows(rows),
        paragraphs=_joined(list(orders)),
        paragraph_offsets=np.cumsum([0, *map(len, orders)], dtype=np.int64),
        starts=joined[:, 0].copy(),
        ends=joined[:, 1].copy(),
        target_offsets=np.cumsum([0, *map(len, targets)], dtype=np.int64),
        switch=features.switch,
        sentences=_joined(sentences, 2),
        sentence_labels=_joined(labels).astype(np.int8),
        facts=_joined(facts, 2),
        sentence_offsets=np.cumsum([0, *map(len, sentences)], dtype=np.int64),
        num_without_answer=without,
        digest=digest_of("packed", features.digest, list(orders)),
    )


def _members(offsets: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the members of some groups, group after group, and each one's place in `groups`."""
    counts = offsets[groups + 1] - offsets[groups]
    owner = np.repeat(np.arange(len(groups)), counts)
    before = np.cumsum(counts) - counts
    return np.arange(counts.sum()) + (offsets[groups] - before)[owner], owner


def _has_span(features: MultiHopFeatures, i: int) -> bool:
    first, last = features.paragraph_offsets[i : i + 2]
    return bool(features.switch[i] <= SPAN and features.span_offsets[last] > features.span_offsets[first])


def _joined(arrays: list[np.ndarray], width: int | None = None) -> np.ndarray:
    empty = np.zeros((0,) if width is None else (0, width), np.int32)
    return np.concatenate([empty, *arrays]).astype(np.int32)
