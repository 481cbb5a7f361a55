"""Queries over several documents with candidate answers: WikiHop.

docs/question_answering.md, "Candidates of a query".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from trbert_jax.datasets.dataset import Announce
from trbert_jax.datasets.reading import BadRecord, UnusableRecords, unusable
from trbert_jax.datasets.records import CandidateQuestion
from trbert_jax.tasks.encoding import TextEncoder
from trbert_jax.tasks.ragged import Counts, RowParts, TokenRows, digest_of, join_rows

MAX_LENGTH = 1024
MAX_DOCUMENT_LENGTH = 1024  # word pieces of all documents together, their markers included
MAX_CANDIDATES = 79  # no question of the data set has more
_CANDIDATE, _DOCUMENT = "[unused1]", "[unused2]"


@dataclasses.dataclass(frozen=True, eq=False)
class CandidateFeatures:
    """n queries with one segment or more, r in all: `[CLS] query ([unused1] candidate)* documents [SEP]`.

    Every segment of a query begins with the same head, query and candidates.

    Attributes:
      rows: the r segments.
      segment_offsets: int64 [n + 1], query i has the rows `segment_offsets[i]:segment_offsets[i + 1]`.
      max_segments: S, the most that a query may have.
      candidate_positions: int32 [n, 79], where in the rows of the query each candidate's [unused1]
        stands, -1 where there are fewer.
      labels: int32 [n], the right candidate, -1 where the source withholds it.
      ids: n ids.
      candidates: each query's candidates, as published.
      counts: what became of the queries.
      digest: identifies records, tokenizer and settings.
    """

    rows: TokenRows
    segment_offsets: np.ndarray
    max_segments: int
    candidate_positions: np.ndarray
    labels: np.ndarray
    ids: list[str]
    candidates: list[tuple[str, ...]]
    counts: Counts
    digest: str

    def __len__(self) -> int:
        return len(self.labels)


def build_candidate_features(
    questions: Sequence[CandidateQuestion],
    tokenizer: Any,
    max_length: int = MAX_LENGTH,
    max_segments: int = 1,
    max_document_length: int = MAX_DOCUMENT_LENGTH,
    *,
    training: bool = False,
    announce: Announce = print,
) -> CandidateFeatures:
    """Makes the segments of every query.

    Args:
      questions: of one split.
      tokenizer: a `transformers.PreTrainedTokenizerFast` whose vocabulary has [unused1] and
        [unused2]; not changed.
      max_length: tokens of a segment at most.
      max_segments: segments of a query at most; they do not overlap.
      max_document_length: word pieces of all documents of a query at most.
      training: whether a query without an answer is an error.
      announce: called with a line of text that says what became of the queries.

    Raises:
      UserError: a vocabulary without the markers.
      UnusableRecords: more than 79 candidates, a query without word pieces, one that with its
        candidates leaves no room for documents, or in training one without an answer; all such queries.
    """
    encoder = TextEncoder(tokenizer)
    cls, sep = (np.array([i], np.int32) for i in (encoder.cls_id, encoder.sep_id))
    candidate, document = (np.array([encoder.id_of(k)], np.int32) for k in (_CANDIDATE, _DOCUMENT))
    queries = encoder.encode([q.query for q in questions])
    names = encoder.encode([name for q in questions for name in q.candidates])
    supports = encoder.encode(
        [text for q in questions for text in q.supports], max_tokens=max_document_length
    )
    rows: list[RowParts] = []
    counts, truncated, name, support = [0], 0, 0, 0
    positions = np.full((len(questions), MAX_CANDIDATES), -1, np.int32)
    bad = dict[str, BadRecord]()
    for i, question in enumerate(questions):
        pieces = [names.tokens_of(name + k) for k in range(len(question.candidates))]
        texts = [supports.tokens_of(support + k) for k in range(len(question.supports))]
        full = int(supports.num_tokens[support : support + len(texts)].sum()) + len(texts)
        name, support = name + len(pieces), support + len(texts)
        head = [cls, queries.tokens_of(i)]
        size = sum(map(len, (*head, *pieces))) + len(pieces)
        error = _check(question, len(queries.tokens_of(i)), size, max_length, training)
        if error is not None:
            bad[question.id] = error
            continue
        for k, piece in enumerate(pieces):
            positions[i, k] = sum(map(len, head))
            head += [candidate, piece]
        room = max_length - 1 - size
        joined = np.concatenate([cls[:0], *(part for text in texts for part in (document, text))])
        kept = joined[: min(max_document_length, max_segments * room)]
        starts = range(0, max(1, len(kept)), room)
        rows.extend((head, (kept[start : start + room], sep)) for start in starts)
        counts.append(len(starts))
        truncated += len(kept) < full
    if bad:
        raise UnusableRecords(bad)
    summary = Counts(num_examples=len(questions), num_rows=len(rows), num_truncated=truncated)
    announce(summary.describe())
    return CandidateFeatures(
        rows=join_rows(rows),
        segment_offsets=np.cumsum(counts, dtype=np.int64),
        max_segments=max_segments,
        candidate_positions=positions,
        labels=np.array([-1 if q.answer is None else q.answer for q in questions], np.int32),
        ids=[q.id for q in questions],
        candidates=[q.candidates for q in questions],
        counts=summary,
        digest=digest_of(
            "candidate",
            encoder.description,
            max_length,
            max_segments,
            max_document_length,
            training,
            list(questions),
        ),
    )


def _check(
    question: CandidateQuestion, query_length: int, size: int, max_length: int, training: bool
) -> BadRecord | None:
    """What keeps a query, `size` tokens with [CLS] and its candidates, from having segments."""
    if len(question.candidates) > MAX_CANDIDATES:
        reason = f"has {len(question.candidates)} items; expected at most {MAX_CANDIDATES}"
        return unusable(question, "candidates", reason)
    if training and question.answer is None:
        return unusable(question, "answer", "missing; training needs one")
    if not query_length:
        return unusable(question, "query", "has no tokens; expected a text that the tokenizer keeps")
    if max_length - 1 - size < 1:
        return unusable(
            question,
            "query",
            f"has with its candidates {size} tokens, which leaves none of {max_length} for the documents; "
            "give a larger max_length",
        )
    return None
