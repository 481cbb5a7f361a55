"""Divide long contexts into windows, and find the best answers in them.

A window is `[CLS] question [SEP] part of the context [SEP]`. See docs/question_answering.md, "Windows over a
context".
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from trbert_jax.datasets.records import Span, SpanQuestion
from trbert_jax.tasks.base import RecordErrors
from trbert_jax.tasks.examples import Counts, Examples, Ragged, digest_of
from trbert_jax.tasks.text_encoder import TextEncoder, cut_span, locate

_CHUNK = 256  # windows that are searched at a time


@dataclasses.dataclass(frozen=True)
class WindowSettings:
    """How contexts are divided."""

    max_length: int  # tokens of a window at most, special tokens included
    max_question_length: int  # word pieces of a question at most; the rest is cut
    # Word pieces from the start of one window to that of the next, at most a full window, which leaves no
    # gaps; None for windows that do not overlap.
    step: int | None
    max_windows: int | None = None  # windows of a question at most, the first ones; None for all
    markers: tuple[tuple[str, str], ...] = ()  # see `TextEncoder`


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """The places of r windows in the contexts of n questions; the windows of a question are consecutive."""

    ids: list[str]  # n, of questions
    texts: list[str]  # n contexts, as published
    # int64 [n + 1]; question i has the rows `question_rows[i]` to `question_rows[i + 1] - 1`
    question_rows: np.ndarray
    context_start: np.ndarray  # int32 [r], position in its row at which the context begins
    first_piece: np.ndarray  # int32 [r], the word piece of the context at that position
    num_pieces: np.ndarray  # int32 [r], word pieces of the context in the row
    # bool [total tokens], whether a piece of the context has more context in this window than in any other;
    # of a piece in several windows it is True in exactly one
    max_context: np.ndarray
    chars: Ragged  # the characters of the pieces of each distinct context
    context_index: np.ndarray  # int64 [n], the context of each question

    def __len__(self) -> int:
        return len(self.context_start)

    @functools.cached_property
    def question(self) -> np.ndarray:
        """int32 [r], the question of each row."""
        return np.repeat(np.arange(len(self.ids), dtype=np.int32), np.diff(self.question_rows))

    def text(self, row: int, start: int, end: int) -> str:
        """Returns the original text from one token of a row to another, both inclusive."""
        return self.texts[self.question[row]][slice(*self.span(row, start, end))]

    def span(self, row: int, start: int, end: int) -> tuple[int, int]:
        """Returns the characters `[start, end)` of the context that are this text."""
        question = self.question[row]
        shift = self.first_piece[row] - self.context_start[row]
        chars = self.chars[self.context_index[question]]
        return cut_span(self.texts[question], chars[start + shift, 0], chars[end + shift, 1])


class WindowBuilder:
    """Encodes questions and contexts, and collects the windows to keep.

    Raises `UnusableRecords` for texts without word pieces, and questions that leave no room for context.
    """

    def __init__(self, questions: Sequence[SpanQuestion], tokenizer: Any, settings: WindowSettings) -> None:
        encoder = TextEncoder(tokenizer, dict(settings.markers))
        self._questions, self._encoder, self._settings = questions, encoder, settings
        longest = settings.max_question_length
        queries = encoder.encode([q.question for q in questions], max_tokens=longest)
        limit = None if settings.max_windows is None else settings.max_windows * settings.max_length
        self._contexts, self._context_index = encoder.encode_distinct(
            [q.context for q in questions], chars=True, max_tokens=limit
        )
        self._queries = queries.tokens
        self._num_questions_cut = int((queries.num_tokens > longest).sum())
        self._num_truncated = 0  # questions kept whose context does not end with their last window
        self._context_lengths = self._contexts.num_tokens[self._context_index]
        # [CLS], [SEP], [SEP]
        self._room = settings.max_length - 3 - self._queries.lengths
        errors = RecordErrors()
        for i, question in enumerate(questions):
            texts = {"question": queries.num_tokens[i], "context": self._context_lengths[i]}
            errors.check(question, texts, self._room[i], settings.max_length)
        errors.raise_if_any()
        self._kept: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]] = []

    def windows_of(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns first pieces and numbers of pieces of question i's windows, int32 [windows] each."""
        room, length = int(self._room[i]), int(self._context_lengths[i])
        step = room if self._settings.step is None else min(room, self._settings.step)
        count = 1 + max(0, -(-(length - room) // step))
        starts = np.arange(min(count, self._settings.max_windows or count), dtype=np.int32) * step
        return starts, np.minimum(room, length - starts).astype(np.int32)

    def context_start(self, i: int) -> int:
        """Returns the position at which the context begins in the windows of question i."""
        return len(self._queries[i]) + 2

    def locate(self, i: int, span: Span) -> tuple[int, int] | None:
        """Returns the first and last piece of a span of question i's context, None if none is kept."""
        return locate(self._contexts.chars[self._context_index[i]], span.start, span.end)

    def is_cut(self, i: int, span: Span) -> bool:
        """Whether a span of question i's context reaches beyond the pieces that are stored."""
        chars = self._contexts.chars[self._context_index[i]]
        return bool(len(chars) < self._context_lengths[i] and span.end > chars[-1, 1])

    def keep(self, i: int, wanted: np.ndarray) -> None:
        """Keeps the windows of question i for which `wanted`, bool [windows], is True."""
        starts, sizes = self.windows_of(i)
        self._kept.append((i, starts[wanted], sizes[wanted], np.flatnonzero(wanted)))
        self._num_truncated += bool(starts[-1] + sizes[-1] < self._context_lengths[i])

    def finish(self, ends: np.ndarray, *options: bool, grouped: bool = False, **lost: int) -> Examples:
        """Returns the windows in the order they were kept, with their `Windows` as `layout`.

        `ends` are int32 [R, A, 2], the row targets `starts` and `ends`; `options` those of the encoding,
        for the digest. If `grouped`, the windows of a question form one example; otherwise each is one.
        """
        cls, sep = self._encoder.cls, self._encoder.sep
        rows, flags, starts = list[Any](), [np.zeros(0, bool)], list[int]()
        for i, firsts, sizes, numbers in self._kept:
            owner = most_context(*self.windows_of(i))
            query = self._queries[i]
            context = self._contexts.tokens[self._context_index[i]]
            for first, size, number in zip(firsts.tolist(), sizes.tolist(), numbers, strict=True):
                own = owner[first : first + size] == number
                rows.append(((cls, query, sep), (context[first : first + size], sep)))
                flags.extend((np.zeros(len(query) + 2, bool), own, np.zeros(1, bool)))
                starts.append(self.context_start(i))
        index = [i for i, *_ in self._kept]
        pieces = Ragged.of([firsts for _, firsts, _, _ in self._kept])
        windows = Windows(
            ids=[self._questions[i].id for i in index],
            texts=[self._questions[i].context for i in index],
            question_rows=pieces.offsets,
            context_start=np.array(starts, np.int32),
            first_piece=pieces.values,
            num_pieces=Ragged.of([sizes for _, _, sizes, _ in self._kept]).values,
            max_context=np.concatenate(flags),
            chars=self._contexts.chars,
            context_index=self._context_index[np.array(index, np.int64)],
        )
        name = "segment" if grouped else "span"
        settings = (self._encoder.description, self._settings, *options)
        return Examples.of_pairs(
            rows,
            windows.ids if grouped else [windows.ids[i] for i in windows.question],
            counts=Counts(
                len(self._questions), len(rows), self._num_truncated, self._num_questions_cut, **lost
            ),
            first_row=windows.question_rows if grouped else None,
            group=(self._settings.max_windows or 1) if grouped else 1,
            row_targets={"starts": ends[:, :, 0].copy(), "ends": ends[:, :, 1].copy()},
            digest=digest_of(name, *settings, list(self._questions)),
            records=self._questions,
            layout=windows,
        )


def most_context(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Finds the window in which each piece of a context has most context around it.

    As published: the window with the largest min(pieces before, pieces after) + 0.01 * size, the first
    among equals. int [windows] (twice) -> int32 [pieces up to the end of the last window], its number.
    """
    best = np.full((starts + sizes).max(), -np.inf)
    owner = np.zeros(len(best), np.int32)
    # One window at a time: memory grows with the context, not with its square.
    for number, (start, size) in enumerate(zip(starts.tolist(), sizes.tolist(), strict=True)):
        before = np.arange(size)
        score = np.minimum(before, size - 1 - before) + 0.01 * size
        better = score > best[start : start + size]
        best[start : start + size][better] = score[better]
        owner[start : start + size][better] = number
    return owner


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """p pairs of a start and an end that may be answers, by window, rank of the start, rank of the end."""

    row: np.ndarray  # int64 [p], of the windows
    start: np.ndarray  # int64 [p], first token
    end: np.ndarray  # int64 [p], last token, inclusive
    start_logit: np.ndarray  # float64 [p]
    end_logit: np.ndarray  # float64 [p]
    # int64 [n + 1]; question i has the pairs `question_offsets[i]` to `question_offsets[i + 1] - 1`
    question_offsets: np.ndarray


def best_pairs(
    examples: Examples, logits: np.ndarray, n_best: int, max_answer_length: int, max_context_only: bool
) -> Pairs:
    """Combines the best starts of each window with its best ends, and keeps what can be an answer.

    As published, the best are chosen among all tokens of a window, question and special tokens
    included, so that fewer pairs than `n_best`² may be left; among equals the earlier token is better.

    `examples` have r rows and their `Windows` as `layout`; `logits` are float [r, 2, S], of starts and ends;
    `max_context_only` asks that a start has more context in this window than in any other.
    """
    windows: Windows = examples.layout
    found = [np.zeros((3, 0), np.int64)]
    for first in range(0, len(windows), _CHUNK):
        rows = np.arange(first, min(first + _CHUNK, len(windows)))
        columns = np.arange(examples.row_lengths[rows].max())
        real = columns < examples.row_lengths[rows, None]  # [b, W]
        begin = windows.context_start[rows, None]
        in_context = (columns >= begin) & (columns < begin + windows.num_pieces[rows, None])
        may_start = in_context
        if max_context_only:
            source = np.where(real, examples.offsets[rows, None] + columns, 0)
            may_start = in_context & windows.max_context[source]
        starts, ends = (  # [b, n_best] each
            _best(np.where(real, logits[rows, k, : len(columns)], -np.inf), n_best) for k in (0, 1)
        )
        length = ends[:, None, :] - starts[:, :, None] + 1  # [b, starts, ends]
        fits = (length > 0) & (length <= max_answer_length)
        fits &= np.take_along_axis(may_start, starts, 1)[:, :, None]
        fits &= np.take_along_axis(in_context, ends, 1)[:, None, :]
        row, i, j = np.nonzero(fits)
        found.append(np.stack([rows[row], starts[row, i], ends[row, j]]))
    row, start, end = np.concatenate(found, axis=1)
    return Pairs(
        row=row,
        start=start,
        end=end,
        start_logit=logits[row, 0, start].astype(np.float64),
        end_logit=logits[row, 1, end].astype(np.float64),
        question_offsets=np.searchsorted(row, windows.question_rows),
    )


def _best(logits: np.ndarray, count: int) -> np.ndarray:
    """Returns the columns of the largest values of each row, largest first, the leftmost among equals.

    float [b, W] -> int64 [b, min(count, W)].
    """
    count = min(count, logits.shape[1])
    # A partition leaves the order of equals open, so it only gives the threshold.
    least = -np.partition(-logits, count - 1, axis=1)[:, count - 1 : count]
    above, equal = logits > least, logits == least
    room = count - above.sum(axis=1, keepdims=True)
    chosen = above | (equal & (np.cumsum(equal, axis=1) <= room))
    columns = np.nonzero(chosen)[1].reshape(-1, count)
    order = np.argsort(-np.take_along_axis(logits, columns, 1), axis=1, kind="stable")
    return np.take_along_axis(columns, order, 1)
