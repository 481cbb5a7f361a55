"""Questions over long documents with many mentions of the answer: TriviaQA.

The windows of a question, here called segments, belong together: they share one softmax, and
everything in them that reads like the answer is right. docs/question_answering.md, "Segments of a document".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from trbert_jax.datasets.dataset import Announce
from trbert_jax.datasets.records import SpanQuestion
from trbert_jax.tasks.encoding import TextEncoder, locate
from trbert_jax.tasks.ragged import Counts, digest_of
from trbert_jax.tasks.windows import WindowMaker, Windows, WindowSettings

TRIVIAQA = WindowSettings(max_length=1024, max_question_length=55, step=None, max_windows=1)
MAX_ANSWERS = 64


@dataclasses.dataclass(frozen=True, eq=False)
class SegmentFeatures:
    """n questions with one segment or more, r in all, and the answers in each.

    Attributes:
      windows: the segments; those of question i are rows `question_rows[i]:question_rows[i + 1]`.
      starts, ends: int32 [total], first and last tokens of answers in their row, both inclusive, in
        the order of the source; -1 stands for a start (an end) that already occurred in the row.
      target_offsets: int64 [r + 1], row j has the answers `target_offsets[j]:target_offsets[j + 1]`,
        at most 64, maybe none. Where no row of a question holds an answer, each has the one (0, 0).
      counts: what became of the questions.
      digest: identifies records, tokenizer and settings.
    """

    windows: Windows
    starts: np.ndarray
    ends: np.ndarray
    target_offsets: np.ndarray
    counts: Counts
    digest: str

    def __len__(self) -> int:
        return len(self.windows.ids)


def build_segment_features(
    questions: Sequence[SpanQuestion],
    tokenizer: Any,
    settings: WindowSettings = TRIVIAQA,
    *,
    training: bool = False,
    announce: Announce = print,
) -> SegmentFeatures:
    """Divides documents into segments and finds every answer in them.

    Args:
      questions: of one split.
      tokenizer: a `transformers.PreTrainedTokenizerFast`; not changed.
      settings: `TRIVIAQA`, or others, say with more segments.
      training: whether to leave out questions of whose answers the tokenizer keeps no character. One
        whose answers all stand behind its last segment stays, and points at [CLS].
      announce: called with a line of text that says what became of the questions.

    Raises:
      UserError: see `WindowMaker` and `TextEncoder`.
    """
    encoder = TextEncoder(tokenizer, dict(settings.markers))
    maker = WindowMaker(questions, encoder, settings)
    targets, counts = list[np.ndarray](), [0]
    truncated = without = dropped = 0
    for i, question in enumerate(questions):
        answers, lost = _answers(maker, i, question)
        if training and question.spans and lost:
            dropped += 1
            continue
        firsts, sizes = maker.windows_of(i)
        maker.keep(i, np.ones(len(firsts), bool))
        truncated += maker.is_cut(i)
        found = [
            _without_repeats(answers[(first <= answers[:, 0]) & (answers[:, 1] < first + size)])
            for first, size in zip(firsts.tolist(), sizes.tolist(), strict=True)
        ]
        if not any(map(len, found)):
            without += len(found) if question.spans else 0
            found = [np.zeros((1, 2), np.int64)] * len(found)
        else:
            shift = maker.context_start(i) - firsts
            found = [np.where(f < 0, -1, f + k) for f, k in zip(found, shift.tolist(), strict=True)]
        targets.extend(found)
        counts.extend(map(len, found))
    windows = maker.finish()
    joined = np.concatenate([np.zeros((0, 2), np.int64), *targets]).astype(np.int32)
    summary = Counts(
        num_examples=len(questions),
        num_rows=len(windows),
        num_truncated=truncated,
        num_questions_cut=maker.num_questions_cut,
        num_without_answer=without,
        num_dropped=dropped,
    )
    announce(summary.describe())
    return SegmentFeatures(
        windows=windows,
        starts=joined[:, 0].copy(),
        ends=joined[:, 1].copy(),
        target_offsets=np.cumsum(counts, dtype=np.int64),
        counts=summary,
        digest=digest_of("segment", encoder.description, settings, training, list(questions)),
    )


def _answers(maker: WindowMaker, i: int, question: SpanQuestion) -> tuple[np.ndarray, bool]:
    """The answers among the stored pieces, first and last piece of each, int64 [answers, 2].

    Also whether the tokenizer keeps nothing of any answer.
    """
    context = int(maker.context_index[i])
    chars = maker.contexts.chars_of(context)
    cut = len(chars) < maker.contexts.num_tokens[context]
    found, behind = list[tuple[int, int]](), False
    for span in question.spans:
        place = locate(chars, span.start, span.end)
        # Of an answer across the end of what is stored the last pieces are not known.
        if cut and span.end > chars[-1, 1]:
            behind = True
        elif place is not None:
            found.append(place)
    return np.array(found, np.int64).reshape(-1, 2), not found and not behind


def _without_repeats(answers: np.ndarray) -> np.ndarray:
    """The first 64 answers; a start, or an end, that occurs again becomes -1."""
    some = answers[:MAX_ANSWERS].copy()
    for column in some.T:
        _, kept = np.unique(column, return_index=True)
        repeated = np.ones(len(column), bool)
        repeated[kept] = False
        column[repeated] = -1
    return some
