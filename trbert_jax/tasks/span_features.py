"""Questions whose answer is one stretch of a context: SQuAD, and MRQA with its many sources."""

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

SQUAD = WindowSettings(max_length=384, max_question_length=64, step=128)
# MRQA marks paragraphs, titles and documents by words of their own.
MRQA = WindowSettings(
    max_length=512,
    max_question_length=40,
    step=128,
    markers=(("[PAR]", "[unused1]"), ("[TLE]", "[unused2]"), ("[DOC]", "[unused3]")),
)


@dataclasses.dataclass(frozen=True, eq=False)
class SpanFeatures:
    """r windows and where the answer stands in each.

    Attributes:
      windows: see there.
      starts, ends: int32 [r], first and last token of the answer in the row, both inclusive; both 0,
        [CLS], where there is none or it does not stand in this window as a whole.
      counts: what became of the questions.
      digest: identifies records, tokenizer and settings.
    """

    windows: Windows
    starts: np.ndarray
    ends: np.ndarray
    counts: Counts
    digest: str

    def __len__(self) -> int:
        return len(self.windows)


def build_span_features(
    questions: Sequence[SpanQuestion],
    tokenizer: Any,
    settings: WindowSettings = SQUAD,
    *,
    training: bool = False,
    discard_without_answer: bool = False,
    announce: Announce = print,
) -> SpanFeatures:
    """Divides contexts into windows and finds the first answer of each question in them.

    Args:
      questions: of one split.
      tokenizer: a `transformers.PreTrainedTokenizerFast`; not changed.
      settings: `SQUAD`, `MRQA`, or others.
      training: whether to leave out questions that have an answer of which the tokenizer keeps no
        character, or none at all although they are not impossible. In evaluation all stay.
      discard_without_answer: in training, whether to leave out the windows of an answerable question
        that do not hold its answer, as is published for MRQA. Without it they point at [CLS].
      announce: called with a line of text that says what became of the questions.

    Raises:
      UserError: see `WindowMaker` and `TextEncoder`.

    Source: docs/question_answering.md, "Windows over a context".
    """
    encoder = TextEncoder(tokenizer, dict(settings.markers))
    maker = WindowMaker(questions, encoder, settings)
    starts, ends = list[np.ndarray](), list[np.ndarray]()
    truncated = without = discarded = dropped = 0
    for i, question in enumerate(questions):
        answer = _first_answer(maker, i, question)
        firsts, sizes = maker.windows_of(i)
        inside = np.zeros(len(firsts), bool)
        if answer is not None:
            inside = (firsts <= answer[0]) & (answer[1] < firsts + sizes)
        wanted = np.ones(len(firsts), bool)
        if training and not question.impossible:
            wanted = inside if discard_without_answer else wanted & (answer is not None)
            if not wanted.any():
                dropped += 1
                continue
        maker.keep(i, wanted)
        shift = maker.context_start(i) - firsts[wanted]
        first, last = answer or (0, 0)
        starts.append(np.where(inside[wanted], first + shift, 0))
        ends.append(np.where(inside[wanted], last + shift, 0))
        truncated += maker.is_cut(i)
        discarded += int((~wanted).sum())
        without += int((~inside[wanted]).sum()) if question.spans else 0
    windows = maker.finish()
    counts = Counts(
        num_examples=len(questions),
        num_rows=len(windows),
        num_truncated=truncated,
        num_questions_cut=maker.num_questions_cut,
        num_without_answer=without,
        num_discarded=discarded,
        num_dropped=dropped,
    )
    announce(counts.describe())
    empty = np.zeros(0, np.int32)
    return SpanFeatures(
        windows=windows,
        starts=np.concatenate([empty, *starts]).astype(np.int32),
        ends=np.concatenate([empty, *ends]).astype(np.int32),
        counts=counts,
        digest=digest_of(
            "span", encoder.description, settings, training, discard_without_answer, list(questions)
        ),
    )


def _first_answer(maker: WindowMaker, i: int, question: SpanQuestion) -> tuple[int, int] | None:
    if not question.spans:
        return None
    span = question.spans[0]
    return locate(maker.contexts.chars_of(int(maker.context_index[i])), span.start, span.end)
