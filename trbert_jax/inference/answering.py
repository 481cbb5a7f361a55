"""Asking a trained model: questions in, answers out, for every task but texts with a label.

    from trbert_jax import TRBert, answer_questions

    model = TRBert.from_pretrained("work/model")
    answer_questions(model, [{"question": "Who wrote it?", "context": "It was written by Ada."}])

What a question has to have says `trbert_jax.tasks.requests`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trbert_jax.config import BackboneConfig, DataConfig, RunConfig
from trbert_jax.datasets import BadRecords, find_dataset
from trbert_jax.errors import UserError
from trbert_jax.inference.engine import Outputs
from trbert_jax.inference.predictor import WINDOW, TRBert
from trbert_jax.model.config import ModelConfig
from trbert_jax.model.packed import DEFAULT_BACKEND
from trbert_jax.reduction.rules import DEFAULT_THRESHOLD
from trbert_jax.tasks import load_task_data
from trbert_jax.tasks.base import QuestionData, Score
from trbert_jax.tasks.examples import Examples
from trbert_jax.tasks.requests import SHORTEST, parse_requests

Announce = Callable[[str], Any]

_SPLIT = "test"


def _say_nothing(line: str) -> None:
    pass


class Questions:
    """Questions as a trained model reads them, and what its outputs for them are worth.

    Attributes:
      features: their inputs.
      num_skipped: records that were left out, being not as they should be.
    """

    def __init__(
        self, model: TRBert, records: Sequence[Any], announce: Announce, bad: BadRecords | None = None
    ) -> None:
        if model.tokenizer is None:
            raise UserError(
                "this model has no tokenizer; put the files of the model it was made of beside it"
            )
        self._tokenizer = model.tokenizer
        self._data = question_data(model.config, announce)
        self._data.give(_SPLIT, records, bad)
        self.features: Examples = self._data.inputs(_SPLIT, self._tokenizer, Path())
        self.num_skipped = 0 if bad is None else len(bad.skipped)

    @property
    def notes(self) -> dict[str, Any]:
        """What became of the questions on the way to inputs, see `TaskData.notes`."""
        return self._data.notes.get(_SPLIT, {})

    @property
    def in_pairs(self) -> bool:
        """Whether each option of a question is an example."""
        return self._data.request == "choice" and self.features.group == 1

    def score(self, outputs: Outputs) -> Score:
        """Answers, and their metrics where the right ones are known."""
        return self._data.score(_SPLIT, self.features, self._tokenizer, outputs.logits)


def question_data(config: ModelConfig, announce: Announce) -> QuestionData:
    """The task that a model was trained for.

    Raises:
      UserError: it classifies texts, or does not say what it was trained on.
    """
    inputs = config.inputs
    if not inputs.data:
        raise UserError(
            "this model labels texts, or its config.json has no trbert.inputs, which says how questions "
            "become its inputs; a model that `trbert train` made for a data set of questions has"
        )
    data = DataConfig(name=inputs.data, choices=inputs.choices)  # type: ignore[arg-type]
    model = BackboneConfig(
        init="",
        max_length=config.max_length,
        max_question_length=inputs.max_question_length or None,
        window_step=inputs.window_step or None,
        max_segments=inputs.max_segments,
    )
    found = load_task_data(RunConfig(workdir="", data=data, model=model), announce)
    if not isinstance(found, QuestionData):
        raise UserError(f"config.json: trbert.inputs.data is {inputs.data!r}, no data set of questions")
    found.unanswerable, found.null_threshold = inputs.unanswerable, inputs.null_threshold
    return found


def answer_questions(
    model: TRBert,
    requests: Sequence[Any],
    *,
    batch_size: int = 32,
    rule: str | None = None,
    backend: str = DEFAULT_BACKEND,
    threshold: float = DEFAULT_THRESHOLD,
    source: str = "question",
    announce: Announce = _say_nothing,
) -> list[dict[str, Any]]:
    """Answers questions.

    Args:
      model: trained on a question answering data set.
      requests: JSON objects, see `trbert_jax.tasks.requests`.
      batch_size, rule, backend, threshold: see `TRBert.predict`.
      source: what messages call the place the questions come from.
      announce: called with lines of text about what was cut.

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
        announce=announce,
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
    announce: Announce = _say_nothing,
) -> Iterator[dict[str, Any]]:
    """Answers any number of questions, of which only `WINDOW` batches are in memory at a time.

    Args:
      model: trained on a question answering data set.
      requests: of each question what messages call its place, and the JSON object; read as needed.
      batch_size, rule, backend, threshold: see `TRBert.predict`.
      announce: called with lines of text about what was cut, for each window.

    Returns:
      As `answer_questions`, in the order of the questions.

    Raises:
      UserError: as `answer_questions`, when the window of a bad question is reached.
    """
    source, ids = iter(requests), set[str]()
    while window := list(itertools.islice(source, WINDOW * batch_size)):
        records = parse_requests(question_data(model.config, announce).request, window, ids)
        options = {"rule": rule or model.default_rule, "backend": backend, "threshold": threshold}
        yield from _answer(model, records, batch_size, options, announce)


def _answer(
    model: TRBert,
    records: Sequence[Any],
    batch_size: int,
    options: dict[str, Any],
    announce: Announce,
) -> Iterator[dict[str, Any]]:
    questions = Questions(model, records, announce)
    outputs = model.engine(batch_size).run(model.params, questions.features, **options)
    found = questions.score(outputs).files["predictions.json"]
    answers = found["answer"] if model.config.task == "multi_hop" else found
    tokens, kept = _counts(questions.features, outputs, questions.in_pairs)
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
    kind = question_data(model.config, _say_nothing).request
    # Shapes and inputs of a batch are those of any question: one is enough, the rest of the batch is filled.
    features = Questions(
        model, parse_requests(kind, [("example", SHORTEST[kind])], set()), _say_nothing
    ).features
    yield from model.engine(batch_size).compile(model.params, features, rule or model.default_rule, backend)


def read_questions(model: TRBert, path: Path, skip_bad: bool, announce: Announce) -> Questions:
    """The questions of a file in the published format of the data set that a model was trained on."""
    bad = BadRecords(skip=skip_bad)
    data = question_data(model.config, announce)
    records = find_dataset(data.config.data.name).read_file(path, bad)
    return Questions(model, records, announce, bad)


def _counts(
    features: Examples, outputs: Outputs, in_pairs: bool
) -> tuple[dict[str, int], dict[str, list[int]]]:
    """By question: tokens of its inputs, and how many of them each point of reduction keeps."""
    tokens = dict[str, int]()
    kept = dict[str, np.ndarray]()
    rows = features.rows(np.arange(len(features)))
    for name, some in zip(features.ids, rows, strict=True):
        # In pairs the options of a question are examples, `question:A` and so on.
        question = name.rpartition(":")[0] if in_pairs else name
        there = some[some >= 0]
        tokens[question] = tokens.get(question, 0) + int(features.row_lengths[there].sum())
        kept[question] = kept.get(question, 0) + outputs.num_kept[there].sum(0)
    return tokens, {name: counts.tolist() for name, counts in kept.items()}
