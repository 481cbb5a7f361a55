"""The best pairs of a start and an end in every window."""

from __future__ import annotations

import dataclasses

import numpy as np

from trbert_jax.tasks.windows import Windows

_CHUNK = 256  # windows that are padded to one array at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """Stretches of contexts that may be answers.

    Window after window, in a window by the rank of their start, then by that of their end.

    Attributes:
      row: int64 [p], of the windows.
      start, end: int64 [p], first and last token, both inclusive.
      start_logit, end_logit: float64 [p].
      question_offsets: int64 [n + 1], question i has the pairs
        `question_offsets[i]:question_offsets[i + 1]`.
    """

    row: np.ndarray
    start: np.ndarray
    end: np.ndarray
    start_logit: np.ndarray
    end_logit: np.ndarray
    question_offsets: np.ndarray


def best_pairs(
    windows: Windows,
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    n_best: int,
    max_answer_length: int,
    max_context_only: bool,
) -> Pairs:
    """Combines the best starts of each window with its best ends, and keeps what can be an answer.

    As published, the best are chosen among all tokens of a window, question and special tokens
    included, so that fewer pairs than `n_best`² may be left; among equals the earlier token is better.

    Args:
      windows: r rows of `total` tokens in all.
      start_logits, end_logits: float [total], aligned with `windows.rows.tokens`.
      n_best: starts and ends of a window.
      max_answer_length: tokens of an answer at most.
      max_context_only: whether a start has to have more context in this window than in any other.

    Raises:
      ValueError: logits of another shape, or not finite.
    """
    total = windows.rows.tokens.shape
    for name, logits in (("start_logits", start_logits), ("end_logits", end_logits)):
        if logits.shape != total:
            raise ValueError(f"{name} has the shape {logits.shape}; expected {total}, a number a token")
        if not np.isfinite(logits).all():
            raise ValueError(f"{name} has values that are not finite")
    found = [np.zeros((3, 0), np.int64)]
    for first in range(0, len(windows), _CHUNK):
        rows = np.arange(first, min(first + _CHUNK, len(windows)))
        columns = np.arange(windows.rows.lengths[rows].max())
        real = columns < windows.rows.lengths[rows, None]  # [b, W]
        source = np.where(real, windows.rows.offsets[rows, None] + columns, 0)
        begin = windows.context_start[rows, None]
        in_context = (columns >= begin) & (columns < begin + windows.num_pieces[rows, None])
        may_start = in_context & windows.max_context[source] if max_context_only else in_context
        starts = _best(np.where(real, start_logits[source], -np.inf), n_best)  # [b, n_best]
        ends = _best(np.where(real, end_logits[source], -np.inf), n_best)
        length = ends[:, None, :] - starts[:, :, None] + 1  # [b, starts, ends]
        fits = (length > 0) & (length <= max_answer_length)
        fits &= np.take_along_axis(may_start, starts, 1)[:, :, None]
        fits &= np.take_along_axis(in_context, ends, 1)[:, None, :]
        row, i, j = np.nonzero(fits)
        found.append(np.stack([rows[row], starts[row, i], ends[row, j]]))
    row, start, end = np.concatenate(found, axis=1)
    place = windows.rows.offsets[row]
    return Pairs(
        row=row,
        start=start,
        end=end,
        start_logit=start_logits[place + start].astype(np.float64),
        end_logit=end_logits[place + end].astype(np.float64),
        question_offsets=np.searchsorted(row, windows.question_rows),
    )


def _best(logits: np.ndarray, count: int) -> np.ndarray:
    """Columns of the `count` largest values of each row, largest first, among equals the leftmost.

    Args:
      logits: float [b, W].
      count: at most W are returned.

    Returns:
      int64 [b, min(count, W)].
    """
    count = min(count, logits.shape[1])
    # A partition leaves the order of equals open, so it is only asked for the value.
    least = -np.partition(-logits, count - 1, axis=1)[:, count - 1 : count]
    above, equal = logits > least, logits == least
    room = count - above.sum(axis=1, keepdims=True)
    chosen = above | (equal & (np.cumsum(equal, axis=1) <= room))
    columns = np.nonzero(chosen)[1].reshape(-1, count)
    order = np.argsort(-np.take_along_axis(logits, columns, 1), axis=1, kind="stable")
    return np.take_along_axis(columns, order, 1)
