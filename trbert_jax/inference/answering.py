"""Asking a trained model: questions in, answers out, for every task but texts with a label.

    from trbert_jax import TRBert, answer_questions

    model = TRBert.from_pretrained("work/model")
    answer_questions(model, [{"question": "Who wrote it?", "context": "It was written by Ada."}])

docs/question_answering.md lists the fields of a question.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trbert_jax.datasets import BadRecords, find_dataset
from trbert_jax.errors import UserError
from trbert_jax.inference.engine import Outputs
from trbert_jax.inference.predictor import WINDOW, TRBert
from trbert_jax.model.config import ModelConfig
from trbert_jax.model.packed import DEFAULT_BACKEND
from trbert_jax.reduction.rules import DEFAULT_THRESHOLD
from trbert_jax.tasks import Score, Task
from trbert_jax.tasks.base import parse_requests
from trbert_jax.tasks.examples import Examples
from trbert_jax.tasks.splits import encode_usable, notes_of, saved_task


class Questions:
    """Questions as inputs of a trained model.

    Attributes:
      task: of the model.
      examples: the inputs.
      notes: what was cut, left out or skipped.
      num_skipped: records that were skipped.
    """

    def __init__(
        self,
        model: TRBert,
        records: Sequence[Any],
        bad: BadRecords | None = None,
        source: str = "questions",
    ) -> None:
        if model.tokenizer is None:
            raise UserError(
                "this model has no tokenizer; put the files of the model it was made of beside it"
            )
        bad = bad or BadRecords()
        self.task = question_task(model.config)
        self.examples: Examples = encode_usable(self.task, records, model.tokenizer, bad, source)
        self.notes = notes_of(self.examples, bad)
        self.num_skipped = len(bad.skipped)

    def score(self, outputs: Outputs) -> Score:
        """Answers the questions, and scores those whose right answer is known."""
        return self.task.score(self.examples, outputs.logits)


def question_task(config: ModelConfig) -> Task:
    """Returns the task that a model was trained for.

    Raises:
      UserError: the model classifies texts, or does not say what it was trained on.
    """
    if not config.inputs.data:
        raise UserError(
            "this model labels texts, or its config.json has no trbert.inputs, which says how questions "
            "become its inputs; a model that `trbert train` made for a data set of questions has"
        )
    return saved_task(config)


def answer_questions(
    model: TRBert,
    requests: Sequence[Any],
    *,
    batch_size: int = 32,
    rule: str | None = None,
    backend: str = DEFAULT_BACKEND,
    threshold: float = DEFAULT_THRESHOLD,
    source: str = "question",
) -> list[dict[str, Any]]:
    """Answers questions.

    Args:
      model: trained on a question answering data set.
      requests: JSON objects, see docs/question_answering.md.
      batch_size, rule, backend, threshold: see `TRBert.predict`.
      source: what messages call the place the questions come from.

    Returns:
      For each question `id`, `answer` (text, letter of the option, or candidate), for several hops
      `supporting` ([title, number of the sentence] each), `num_tokens` of all its inputs, and `num_kept`,
      how many of them went on at each point of reduction (none where dense).

    Raises:
      UserError: a model of another kind, a question that is not as it should be.
    """
    placed = ((f"{source}:{number}", request) for number, request in enumerate(requests, 1))
    found = answer_stream(
        model,
        placed,
        batch_size=batch_size,
        rule=rule,
        backend=backend,
        threshold=threshold,
    )
    return list(found)


def answer_stream(
    model: TRBert,
    requests: Iterable[tuple[str, Any]],
    *,
    batch_size: int = 32,
    rule: str | None = None,
    backend: str = DEFAULT_BACKEND,
    threshold: float = DEFAULT_THRESHOLD,
) -> Iterator[dict[str, Any]]:
    """Answers any number of questions, of which only `WINDOW` batches are in memory at a time.

    Args:
      model: trained on a question answering data set.
      requests: of each question what messages call its place, and the JSON object; read as needed.
      batch_size, rule, backend, threshold: see `TRBert.predict`.

    Returns:
      As `answer_questions`, in the order of the questions.

    Raises:
      UserError: as `answer_questions`, when the window of a bad question is reached.
    """
    source, ids = iter(requests), set[str]()
    while window := list(itertools.islice(source, WINDOW * batch_size)):
        records = parse_requests(question_task(model.config), window, ids)
        options = {"rule": rule or model.default_rule, "backend": backend, "threshold": threshold}
        yield from _answer(model, records, batch_size, options)


def _answer(
    model: TRBert,
    records: Sequence[Any],
    batch_size: int,
    options: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    questions = Questions(model, records)
    outputs = model.engine(batch_size).run(model.params, questions.examples, **options)
    found = questions.score(outputs).files["predictions.json"]
    answers = found["answer"] if model.config.task == "multi_hop" else found
    tokens, kept = _counts(questions, outputs)
    for record in records:
        result = {"id": record.id, "answer": answers[record.id]}
        if answers is not found:
            result["supporting"] = found["sp"][record.id]
        yield result | {"num_tokens": tokens[record.id], "num_kept": kept[record.id]}


def compile_questions(
    model: TRBert, batch_size: int = 32, rule: str | None = None, backend: str = DEFAULT_BACKEND
) -> Iterator[tuple[str, float]]:
    """Compiles ahead of time what answering needs with this batch size.

    Args:
      model: trained on a question answering data set.
      batch_size, rule, backend: as in `answer_questions`.

    Yields:
      The name of each program and the seconds that compiling it took.

    Raises:
      UserError: a bad option, a model of another kind.
    """
    # Shapes and inputs of a batch are those of any question: one is enough, the rest of the batch is padding.
    task = question_task(model.config)
    request = parse_requests(task, [("example", task.shortest_request)], set())
    examples = Questions(model, request).examples
    yield from model.engine(batch_size).compile(model.params, examples, rule or model.default_rule, backend)


def read_questions(model: TRBert, path: Path, skip_bad: bool) -> Questions:
    """Reads a file in the published format of the data set that a model was trained on."""
    question_task(model.config)
    bad = BadRecords(skip=skip_bad)
    records = find_dataset(model.config.inputs.data).read_file(path, bad)
    return Questions(model, records, bad, str(path))


def _counts(questions: Questions, outputs: Outputs) -> tuple[dict[str, int], dict[str, list[int]]]:
    """By question: tokens of its inputs, and how many of them each point of reduction keeps."""
    examples = questions.examples
    in_pairs = questions.task.name == "multiple_choice" and examples.group == 1
    tokens = dict[str, int]()
    kept = dict[str, np.ndarray]()
    rows = examples.rows(np.arange(len(examples)))
    for name, some in zip(examples.ids, rows, strict=True):
        # In pairs the options of a question are examples, `question:A` and so on.
        question = name.rpartition(":")[0] if in_pairs else name
        there = some[some >= 0]
        tokens[question] = tokens.get(question, 0) + int(examples.row_lengths[there].sum())
        kept[question] = kept.get(question, 0) + outputs.num_kept[there].sum(0)
    return tokens, {name: counts.tolist() for name, counts in kept.items()}
