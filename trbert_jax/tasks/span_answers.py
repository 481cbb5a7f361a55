"""From start and end logits to answers: SQuAD with unanswerable questions, MRQA, TriviaQA.

docs/question_answering.md, "From logits to answers".
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from trbert_jax.tasks.pairs import Pairs, best_pairs
from trbert_jax.tasks.segment_features import SegmentFeatures
from trbert_jax.tasks.windows import Windows

N_BEST = 20
N_BEST_SEGMENTS = 10
MAX_ANSWER_LENGTH = 30  # word pieces
_NOTHING_FOUND = "empty"  # as published


@dataclasses.dataclass(frozen=True)
class SpanAnswers:
    """What a model answers, each attribute a file that the official scorers or people read.

    Attributes:
      answers: id -> text, "" where the question is taken to have no answer.
      n_best: id -> entries of different texts, best first: `text`, `probability` (a softmax over the
        entries), `start_logit`, `end_logit`.
      null_odds: id -> how much more the model says "no answer" than its best answer; empty where
        every question has one.
    """

    answers: dict[str, str]
    n_best: dict[str, list[dict[str, Any]]]
    null_odds: dict[str, float]


def decode_spans(
    windows: Windows,
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    null_threshold: float | None = None,
    n_best: int = N_BEST,
    max_answer_length: int = MAX_ANSWER_LENGTH,
) -> SpanAnswers:
    """Chooses an answer for every question.

    Args:
      windows: of n questions.
      start_logits, end_logits: float [total tokens], aligned with `windows.rows.tokens`.
      null_threshold: a question has no answer where its null odds are above; None where every
        question has one (MRQA, SQuAD 1.1).
      n_best: starts and ends of a window that are combined, and entries of a question.
      max_answer_length: word pieces of an answer at most.

    Raises:
      ValueError: logits of another shape, or not finite.
    """
    pairs = best_pairs(windows, start_logits, end_logits, n_best, max_answer_length, max_context_only=True)
    n_best_entries, null_odds = {}, {}
    for i, question in enumerate(windows.ids):
        null = None
        if null_threshold is not None:
            null = _null_logits(windows, start_logits, end_logits, i)
        entries = _entries(windows, pairs, i, n_best, null)
        n_best_entries[question] = _with_probabilities(entries)
        if null is not None:
            _, start, end = next(entry for entry in entries if entry[0])
            null_odds[question] = sum(null) - start - end
    answers = {
        question: next(e["text"] for e in some if e["text"]) for question, some in n_best_entries.items()
    }
    result = SpanAnswers(answers, n_best_entries, null_odds)
    return result if null_threshold is None else with_null_threshold(result, null_threshold)


def with_null_threshold(found: SpanAnswers, null_threshold: float) -> SpanAnswers:
    """The same n-best lists judged by another threshold, say one tuned on development data."""
    answers = {}
    for question, entries in found.n_best.items():
        best = next(entry["text"] for entry in entries if entry["text"])
        answers[question] = "" if found.null_odds[question] > null_threshold else best
    return dataclasses.replace(found, answers=answers)


@dataclasses.dataclass(frozen=True)
class SegmentAnswers:
    """What a model answers to questions over documents.

    Attributes:
      answers: id -> text, "" where no combination of start and end can be an answer; the official
        scorer counts it as wrong, as it does the published "NoAnswerFound".
      scores: id -> start logit + end logit of the answer; -inf where there is none.
    """

    answers: dict[str, str]
    scores: dict[str, float]


def decode_segments(
    features: SegmentFeatures,
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    n_best: int = N_BEST_SEGMENTS,
    max_answer_length: int = MAX_ANSWER_LENGTH,
) -> SegmentAnswers:
    """The best answer of all segments of each question; TriviaQA.

    Args:
      features: n questions.
      start_logits, end_logits: float [total tokens], aligned with `features.windows.rows.tokens`.
      n_best: starts and ends of a segment that are combined.
      max_answer_length: word pieces of an answer at most.

    Raises:
      ValueError: logits of another shape, or not finite.
    """
    windows = features.windows
    pairs = best_pairs(windows, start_logits, end_logits, n_best, max_answer_length, max_context_only=False)
    sums, answers, scores = pairs.start_logit + pairs.end_logit, {}, {}
    for i, question in enumerate(windows.ids):
        first, last = pairs.question_offsets[i : i + 2]
        answers[question], scores[question] = "", -math.inf
        if first < last:
            best = first + int(np.argmax(sums[first:last]))
            answers[question] = windows.text(pairs.row[best], pairs.start[best], pairs.end[best])
            scores[question] = float(sums[best])
    return SegmentAnswers(answers, scores)


def best_of_records(found: SegmentAnswers, scored_ids: Mapping[str, str]) -> dict[str, str]:
    """One answer for all records that are scored together: the one of the highest score.

    Args:
      found: of n records.
      scored_ids: id of each record -> the id by which it is scored, see `SpanQuestion.scored_as`.

    Returns:
      The latter id -> text; the first record wins among equals.
    """
    best: dict[str, str] = {}
    for record in found.answers:
        together = scored_ids[record]
        if together not in best or found.scores[record] > found.scores[best[together]]:
            best[together] = record
    return {together: found.answers[record] for together, record in best.items()}


def _null_logits(
    windows: Windows, start_logits: np.ndarray, end_logits: np.ndarray, i: int
) -> tuple[float, float]:
    """Start and end logit of [CLS] in the window of question i where their sum is least."""
    heads = windows.rows.offsets[windows.question_rows[i] : windows.question_rows[i + 1]]
    starts, ends = start_logits[heads].astype(np.float64), end_logits[heads].astype(np.float64)
    least = int(np.argmin(starts + ends))
    return float(starts[least]), float(ends[least])


def _entries(
    windows: Windows, pairs: Pairs, i: int, n_best: int, null: tuple[float, float] | None
) -> list[tuple[str, float, float]]:
    """Texts with their logits, best first, each text once; at least one that is not empty."""
    first, last = pairs.question_offsets[i : i + 2]
    starts, ends = pairs.start_logit[first:last], pairs.end_logit[first:last]
    if null is not None:
        starts, ends = np.append(starts, null[0]), np.append(ends, null[1])
    entries, seen = list[tuple[str, float, float]](), set[str]()
    for k in np.argsort(-(starts + ends), kind="stable"):
        if len(entries) >= n_best:
            break
        at = first + k
        text = "" if at == last else windows.text(pairs.row[at], pairs.start[at], pairs.end[at])
        if text not in seen:
            seen.add(text)
            entries.append((text, float(starts[k]), float(ends[k])))
    if null is not None and "" not in seen:
        entries.append(("", *null))
    if not any(text for text, _, _ in entries):
        entries.insert(0, (_NOTHING_FOUND, 0.0, 0.0))
    return entries


def _with_probabilities(entries: list[tuple[str, float, float]]) -> list[dict[str, Any]]:
    scores = np.array([start + end for _, start, end in entries])
    weights = np.exp(scores - scores.max())
    return [
        {"text": text, "probability": float(p), "start_logit": start, "end_logit": end}
        for (text, start, end), p in zip(entries, weights / weights.sum(), strict=True)
    ]
