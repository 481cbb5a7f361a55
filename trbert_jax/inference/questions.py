"""Answer questions with a trained model."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from trbert_jax.datasets import BadRecords
from trbert_jax.datasets.reading import UnusableRecords
from trbert_jax.errors import UserError, iterable, whole_number
from trbert_jax.inference.lines import PAUSE
from trbert_jax.inference.outputs import Outputs
from trbert_jax.tasks import Task, log_counts
from trbert_jax.tasks.base import parse_requests
from trbert_jax.tasks.examples import Examples

if TYPE_CHECKING:
    from trbert_jax.inference.predictor import TRBert

MAX_N_BEST = 20  # answers that a question's n-best list has
WINDOW = 32  # batches within which inputs are sorted by length


def answer_questions(
    model: TRBert, requests: Iterable[Any], *, source: str = "question", **options: Any
) -> list[dict[str, Any]]:
    """Answers questions.

    Args:
      model: trained on a data set of questions.
      requests: JSON objects; docs/question_answering.md lists their fields.
      source: name of the questions in messages, before their number.
      options: `batch_size`, `rule`, `backend`, `threshold` and `operating_point`, see `TRBert.predict`;
        `n_best`, the number of best answers to list; `null_threshold`, the null odds above which a question
        has no answer; `max_answer_length` in word pieces.

    Returns:
      For each question `id`, `answer` (text, letter of the option, or candidate), `score` (its probability),
      `start` and `end` (its characters of the context; for multi-hop questions of the `paragraph` with this
      number), `null_odds` if a question may have no answer, `n_best` if asked for, for multi-hop questions
      `supporting` (a list of [title, number of the sentence]), `num_tokens` of all its inputs, and
      `num_kept`, how many of them each point of reduction keeps (empty for rule `dense`).

    Raises UserError for a model that labels texts, a malformed question, or an invalid option.
    """
    requests = iterable("questions", requests, "answer_questions(model, [question])")
    placed = ((f"{source}:{number}", request) for number, request in enumerate(requests, 1))
    return list(model.answer_stream(placed, **options))


def answering(
    model: TRBert, null_threshold: float | None = None, max_answer_length: int | None = None
) -> Task:
    """Returns the model's task with other settings of its answers; None for the model's own.

    Raises UserError for a bad value, or a setting that the task does not read.
    """
    model.check_use(model.answers_questions)
    task = copy.copy(model.task)
    if null_threshold is not None:
        if isinstance(null_threshold, bool | str) or not math.isfinite(null_threshold):
            raise UserError(f"null_threshold is {null_threshold!r}; expected a finite number")
        if not task.may_answer_nothing:
            raise UserError(f"{model.source}: null_threshold: its questions always have an answer")
        threshold = float(null_threshold)
        task.inputs = dataclasses.replace(task.inputs, unanswerable=True, null_threshold=threshold)
    if max_answer_length is not None:
        max_answer_length = whole_number("max_answer_length", max_answer_length, 1)
        if task.max_answer_length is None:
            raise UserError(f"{model.source}: max_answer_length: it cuts no answers from a text")
        task.max_answer_length = max_answer_length
    return task


def answer_pairs(
    model: TRBert,
    requests: Iterable[Any],
    batch_size: int = 32,
    *,
    n_best: int = 0,
    null_threshold: float | None = None,
    max_answer_length: int | None = None,
    bad: BadRecords | None = None,
    **options: Any,
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yields questions with their answers, see `TRBert.answer_stream`; bad questions go to `bad`."""
    options, bad = model.checked_options(batch_size, **options), bad or BadRecords()
    n_best = whole_number("n_best", n_best, 0, MAX_N_BEST)
    source, ids = iter(requests), set[str]()
    for window in windows(source, WINDOW * int(batch_size)):
        if not window:
            continue
        model.check_use(questions=True)
        task = answering(model, null_threshold, max_answer_length)
        asked, failed = list[tuple[Any, Any]](), None
        try:
            for pair in parse_requests(task, window, ids, bad):
                asked.append(pair)
        except UserError as error:
            failed = error
        examples, asked, unusable = _encode(model, task, asked, bad)
        if examples is not None:
            log_counts(examples, "questions")
            outputs = model.engine(batch_size).run(model.params, examples, **options)
            answers = task.answers(examples, outputs.logits, n_best)
            counts = _count_tokens(model, examples, outputs)
            for request, record in asked:
                given = request.get("id")
                id = record.id if given is None else given
                yield request, {"id": id, **answers[record.id], **counts[record.id]}
        if unusable or failed:
            raise unusable or failed  # type: ignore[misc]


def _encode(
    model: TRBert, task: Task, asked: list[tuple[Any, Any]], bad: BadRecords
) -> tuple[Examples | None, list[tuple[Any, Any]], UserError | None]:
    """Encodes questions that can become inputs, all or those before the first that cannot and is raised.

    Returns None without any, the questions encoded, and the error to raise after their answers.
    """
    tokenizer, failed = model.require_tokenizer(), None
    try:
        return task.encode([record for _, record in asked], tokenizer) if asked else None, asked, None
    except UnusableRecords as error:
        usable = list[tuple[Any, Any]]()
        for request, record in asked:
            if (reason := error.found.get(record.id)) is None:
                usable.append((request, record))
                continue
            try:
                bad.add(reason)
            except UserError as raised:
                failed = raised
                break
    return task.encode([record for _, record in usable], tokenizer) if usable else None, usable, failed


def _count_tokens(model: TRBert, examples: Examples, outputs: Outputs) -> dict[str, dict[str, Any]]:
    """Returns for each question the tokens of its inputs, and how many each point of reduction keeps."""
    # In pairs the options of a question are examples, named `question:A` and so on.
    in_pairs = model.task.name == "multiple_choice" and examples.group == 1
    num_kept, totals = outputs.num_kept, dict[str, np.ndarray]()
    for name, rows in zip(examples.ids, examples.rows(np.arange(len(examples))), strict=True):
        question = name.rpartition(":")[0] if in_pairs else name
        rows = rows[rows >= 0]
        counts = np.array([examples.row_lengths[rows].sum(), *num_kept[rows].sum(0)])
        totals[question] = totals.get(question, 0) + counts
    return {id: {"num_tokens": int(x[0]), "num_kept": x[1:].tolist()} for id, x in totals.items()}


def windows(source: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Divides inputs into lists of `size`; at a `PAUSE` yields those before it, and an empty list."""
    window: list[Any] = []
    for item in source:
        if item is not PAUSE:
            window.append(item)
        if window and (item is PAUSE or len(window) == size):
            yield window
            window = []
        if item is PAUSE:
            yield []
    if window:
        yield window
