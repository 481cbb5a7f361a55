"""Long contexts as windows: which word pieces each holds, and where they stand in the text.

A window is `[CLS] question [SEP] part of the context [SEP]`. docs/question_answering.md, "Windows over
a context".
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from trbert_jax.datasets.reading import BadRecord, UnusableRecords, unusable
from trbert_jax.datasets.records import SpanQuestion
from trbert_jax.tasks.encoding import EncodedTexts, TextEncoder, cut_text
from trbert_jax.tasks.ragged import TokenRows, join_rows


@dataclasses.dataclass(frozen=True)
class WindowSettings:
    """How contexts are divided.

    Attributes:
      max_length: tokens of a window at most, special ones included.
      max_question_length: word pieces of a question at most; the rest is cut.
      step: word pieces from the beginning of one window to that of the next, at most as many as a
        window has room for, so that there are no gaps; None for windows that do not overlap.
      max_windows: windows of a question at most, the first ones; None for all.
      markers: words of the texts that are read as entries of the vocabulary, see `TextEncoder`.
    """

    max_length: int
    max_question_length: int
    step: int | None
    max_windows: int | None = None
    markers: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_question_length", "step", "max_windows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")

    @property
    def max_context(self) -> int | None:
        """Word pieces of a context that windows can hold at most; None for any number."""
        return None if self.max_windows is None else self.max_windows * self.max_length


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """r windows over the contexts of n questions, those of a question side by side.

    Attributes:
      rows: the r inputs.
      ids: n ids of questions.
      texts: n contexts, as published.
      question_rows: int64 [n + 1], question i has the rows `question_rows[i]:question_rows[i + 1]`.
      context_start: int32 [r], where in its row the context begins.
      first_piece: int32 [r], which word piece of the context stands there.
      max_context: bool [total of rows], pieces of the context that have in this window more around
        them than in any other; a piece that stands in several windows is so in one of them.
      contexts: the distinct contexts as word pieces.
      context_index: int64 [n], each question's place in them.
    """

    rows: TokenRows
    ids: list[str]
    texts: list[str]
    question_rows: np.ndarray
    context_start: np.ndarray
    first_piece: np.ndarray
    max_context: np.ndarray
    contexts: EncodedTexts
    context_index: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def question(self) -> np.ndarray:
        """int32 [r], the question of each row, as a position in `ids`."""
        return np.repeat(np.arange(len(self.ids), dtype=np.int32), np.diff(self.question_rows))

    @functools.cached_property
    def num_pieces(self) -> np.ndarray:
        """int32 [r], word pieces of the context in each row."""
        return (self.rows.lengths - self.context_start - 1).astype(np.int32)

    def text(self, row: int, start: int, end: int) -> str:
        """The original text of a stretch of a row.

        Args:
          row: of `rows`.
          start, end: first and last token, both inclusive, both of the context.
        """
        question = self.question[row]
        shift = self.first_piece[row] - self.context_start[row]
        chars = self.contexts.chars_of(self.context_index[question])
        return cut_text(self.texts[question], chars[start + shift, 0], chars[end + shift, 1])


class WindowMaker:
    """Encodes questions and contexts, and collects the windows that are wanted.

    Args:
      questions: n of them.
      encoder: made with the markers of `settings`.
      settings: see there.

    Attributes:
      contexts: the distinct contexts.
      context_index: int64 [n].
      num_questions_cut: int.

    Raises:
      UnusableRecords: a question or a context without word pieces, a question that leaves no room for
        any context; all such questions.
    """

    def __init__(
        self, questions: Sequence[SpanQuestion], encoder: TextEncoder, settings: WindowSettings
    ) -> None:
        self._questions, self._encoder, self._settings = questions, encoder, settings
        self._queries = encoder.encode(
            [q.question for q in questions], max_tokens=settings.max_question_length
        )
        self.contexts, self.context_index = encoder.encode_distinct(
            [q.context for q in questions], chars=True, max_tokens=settings.max_context
        )
        self.num_questions_cut = int((self._queries.num_tokens > settings.max_question_length).sum())
        found = {q.id: error for i, q in enumerate(questions) if (error := self._check(i))}
        if found:
            raise UnusableRecords(found)
        self._windows = [self._divide(i) for i in range(len(questions))]
        self._kept: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]] = []

    def _check(self, i: int) -> BadRecord | None:
        """What keeps question i from having windows."""
        question = self._questions[i]
        if self._queries.num_tokens[i] == 0:
            return unusable(question, "question", "has no tokens; expected a text that the tokenizer keeps")
        if self.contexts.num_tokens[self.context_index[i]] == 0:
            return unusable(question, "context", "has no tokens; expected a text that the tokenizer keeps")
        if self._room(i) < 1:
            return unusable(
                question,
                "question",
                f"has {len(self._queries.tokens_of(i))} tokens, which leaves none of "
                f"{self._settings.max_length} for its context; give a larger max_length or a smaller "
                "max_question_length",
            )
        return None

    def _room(self, i: int) -> int:
        return self._settings.max_length - len(self._queries.tokens_of(i)) - 3  # [CLS], [SEP], [SEP]

    def _divide(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        room = self._room(i)
        step = room if self._settings.step is None else min(room, self._settings.step)
        length = int(self.contexts.num_tokens[self.context_index[i]])
        count = 1 + max(0, -(-(length - room) // step))
        starts = np.arange(min(count, self._settings.max_windows or count), dtype=np.int32) * step
        return starts, np.minimum(room, length - starts).astype(np.int32)

    def windows_of(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """First pieces and numbers of pieces of question i's windows, int32 [windows] each."""
        return self._windows[i]

    def context_start(self, i: int) -> int:
        """Where in the windows of question i the context begins."""
        return len(self._queries.tokens_of(i)) + 2

    def is_cut(self, i: int) -> bool:
        """Whether the last window of question i ends before its context does."""
        starts, sizes = self.windows_of(i)
        return bool(starts[-1] + sizes[-1] < self.contexts.num_tokens[self.context_index[i]])

    def keep(self, i: int, wanted: np.ndarray) -> None:
        """Takes those windows of question i for which `wanted` (bool [windows]) is True."""
        starts, sizes = self.windows_of(i)
        self._kept.append((i, starts[wanted], sizes[wanted], most_context(starts, sizes)[wanted]))

    def finish(self) -> Windows:
        """The windows taken, in the order in which they were."""
        cls, sep = (np.array([k], np.int32) for k in (self._encoder.cls_id, self._encoder.sep_id))
        rows, flags, starts, index = [], [np.zeros(0, bool)], list[int](), list[int]()
        for i, firsts, sizes, owned in self._kept:
            query = self._queries.tokens_of(i)
            context = self.contexts.tokens_of(self.context_index[i])
            for first, size, own in zip(firsts.tolist(), sizes.tolist(), owned, strict=True):
                rows.append(((cls, query, sep), (context[first : first + size], sep)))
                flags.extend((np.zeros(len(query) + 2, bool), own[first : first + size], np.zeros(1, bool)))
                starts.append(self.context_start(i))
            index.append(i)
        counts = [len(firsts) for _, firsts, _, _ in self._kept]
        return Windows(
            rows=join_rows(rows),
            ids=[self._questions[i].id for i in index],
            texts=[self._questions[i].context for i in index],
            question_rows=np.cumsum([0, *counts], dtype=np.int64),
            context_start=np.array(starts, np.int32),
            first_piece=np.concatenate([np.zeros(0, np.int32), *(firsts for _, firsts, _, _ in self._kept)]),
            max_context=np.concatenate(flags),
            contexts=self.contexts,
            context_index=self.context_index[np.array(index, np.int64)],
        )


def most_context(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """In which window each piece of a context has most around it.

    As published: the larger is min(pieces before it, pieces after it) + 0.01 · size of the window,
    and the first window wins among equals.

    Args:
      starts, sizes: int [windows].

    Returns:
      bool [windows, pieces up to the end of the last window].
    """
    pieces = np.arange(starts[-1] + sizes[-1])
    before = pieces - starts[:, None]
    after = sizes[:, None] - 1 - before
    score = np.minimum(before, after) + 0.01 * sizes[:, None]
    score[(before < 0) | (after < 0)] = -np.inf
    return np.argmax(score, axis=0) == np.arange(len(starts))[:, None]
