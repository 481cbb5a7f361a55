"""Define what a task is: records -> inputs -> loss -> answers -> score -> request."""

import abc
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import jax
import numpy as np

from trbert_jax.datasets import reading
from trbert_jax.datasets.reading import BadRecord, BadRecords, UnusableRecords, unusable
from trbert_jax.model.config import InputConfig
from trbert_jax.model.heads import Logits
from trbert_jax.tasks.examples import Examples
from trbert_jax.tasks.losses import Rows, cross_entropy, distillation, margin

T = TypeVar("T", bound="type[Task]")


@dataclasses.dataclass(frozen=True)
class Score:
    """Answers and their metrics."""

    # Under the official scorer's names and in its units; empty if no right answer is known.
    metrics: dict[str, float]
    files: dict[str, Any]  # file name -> JSON value, in the form that the official scorer reads
    null_threshold: float | None = None  # the one with the best metrics; None if the task has none
    # Contents of a report besides the metrics, as JSON: `classes` and `confusion_matrix`, see `class_scores`.
    details: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def report(self) -> dict[str, Any]:
        """Metrics and details."""
        return {**self.metrics, **self.details}


class Task(abc.ABC):
    """One kind of task. Everything between records and metrics except the model itself."""

    name: ClassVar[str]  # key of `TASKS`, and of `HEADS` unless `head` says otherwise
    metric: ClassVar[str]  # the metric that selects the best checkpoint; higher is better
    full_score: ClassVar[float] = 1.0  # the largest value of this metric; some official scorers count to 100
    settings: ClassVar[frozenset[str]] = frozenset()  # keys that only some tasks read and this one does
    markers: ClassVar[tuple[str, ...]] = ()  # vocabulary entries besides word pieces that inputs may have
    shortest_request: ClassVar[dict[str, Any]]  # a request as short as possible
    resamples: ClassVar[bool] = False  # whether each epoch has its own inputs, see `resample`
    by_row: ClassVar[bool] = False  # whether logits have an entry a row, not an entry an example
    logits: ClassVar[tuple[str, ...]] = ()  # names of the arrays of logits; empty if they are one array
    max_answer_length: int | None = None  # word pieces of an answer at most; None if none is cut from a text
    may_answer_nothing: bool = False  # whether questions may have no answer, and a null threshold decides

    def __init__(self, inputs: InputConfig, max_length: int, labels: Sequence[str] = ()) -> None:
        self.inputs = inputs  # how records become inputs; saved with the model
        self.max_length = max_length  # tokens of a row at most, special tokens included
        self.labels = tuple(labels)  # names of the classes; empty if answers are not classes

    @property
    def head(self) -> str:
        """Key of `HEADS`: the head that the model needs."""
        return self.name

    @classmethod
    def settings_of(cls, data: str) -> frozenset[str]:
        """Returns the `settings` that the task reads for a data set."""
        return cls.settings

    @classmethod
    def complete(cls, inputs: InputConfig, train: Callable[[], Sequence[Any]]) -> InputConfig:
        """Adds to the inputs what the training records decide; `train` reads them."""
        return inputs

    # Records -> inputs

    @abc.abstractmethod
    def texts(self, records: Sequence[Any]) -> list[str]:
        """Returns all texts that a tokenizer may be trained on."""

    def warnings(
        self, split: str, records: Sequence[Any], others: Mapping[str, Sequence[Any]]
    ) -> Iterator[str]:
        """Yields what a user should know of the records of a split; `others` are the splits read before."""
        return iter(())

    @abc.abstractmethod
    def encode(
        self,
        records: Sequence[Any],
        tokenizer: Any,
        *,
        training: bool = False,
        seed: int = 0,
        cache_dir: Path | None = None,
    ) -> Examples:
        """Turns the records of a split into inputs.

        Args:
          tokenizer: a `transformers.PreTrainedTokenizerFast`; not changed.
          training: whether records need an answer, and those whose answer cannot be found are left out.
          seed: decides the inputs of epoch 0 if the task resamples.
          cache_dir: folder of tokenized examples, for tasks that cache them; None for no cache.

        Raises:
          UnusableRecords: records that cannot become inputs; names all of them.
          UserError: a tokenizer that lacks special tokens or markers.
        """

    def resample(self, examples: Examples, seed: int, epoch: int) -> Examples:
        """Draws the inputs of an epoch from those of `encode(training=True)`; epoch 0 gives the same."""
        raise NotImplementedError

    # Logits -> loss

    @classmethod
    def loss(cls, logits: Logits, rows: Rows) -> jax.Array:
        """Computes the loss with the labels, float32 [K * B]; by default the cross entropy of the classes.

        The model computes with the loss of the task that is named like its head.
        """
        return cross_entropy(cls.example_logits(logits, rows), rows.get("labels"))

    @classmethod
    def distillation_loss(cls, logits: Logits, rows: Rows, temperature: float) -> jax.Array:
        """Computes the loss with a teacher's logits, `teacher_logits`, float32 [K * B]."""
        return distillation(cls.example_logits(logits, rows), rows.get("teacher_logits"), temperature)

    @classmethod
    def margin(cls, logits: Logits, rows: Rows) -> jax.Array:
        """Computes how sure the model is, without a label: sums of `losses.margin`, float32 [K * B]."""
        return margin(cls.example_logits(logits, rows))

    @staticmethod
    def example_logits(logits: Logits, rows: Rows) -> Logits:
        """Combines the logits of rows that answer together: [K * B * G, ...] -> [K * B, ...]."""
        return logits

    @staticmethod
    def is_by_token(name: str | None = None) -> bool:
        """Whether the last axis of the logits (or of those of this name) is the positions of a row."""
        return False

    # Logits -> answers -> score

    @abc.abstractmethod
    def score(self, examples: Examples, logits: Any, null_threshold: float | None = None) -> Score:
        """Answers the examples, and scores those whose right answer is known.

        Args:
          examples: from `encode`, not from `Examples.take`.
          logits: see `trbert_jax.inference.engine.Outputs`.
          null_threshold: null odds above which a question has no answer; None for that of `inputs`.
        """

    def answers(self, examples: Examples, logits: Any, n_best: int = 0) -> dict[str, dict[str, Any]]:
        """Answers requests, with the arguments of `score`: id -> `answer` and what else is known of it.

        `score` is the probability of the answer. An answer cut from a text has its characters there, `start`
        and `end`. `n_best` lists that many of the best answers, best first, alike.
        """
        return {id: {"answer": answer} for id, answer in self._predictions(examples, logits).items()}

    def _predictions(self, examples: Examples, logits: Any) -> dict[str, Any]:
        return dict(self.score(examples, logits).files["predictions.json"])

    # Requests

    @abc.abstractmethod
    def parse_request(self, request: Mapping[str, Any], id: str, where: str) -> Any:
        """Turns a JSON object asked of a trained model into a record without an answer.

        docs/question_answering.md lists its fields. `where` is its place, for messages. Raises `ValueError`
        for a missing field, a wrong type or an empty text.
        """


TASKS: dict[str, type[Task]] = {}  # by name; the head names that a saved config.json uses


def register_task(task: T) -> T:
    """Adds a task to `TASKS`; a class decorator."""
    TASKS[task.name] = task
    return task


def softmax(logits: np.ndarray) -> np.ndarray:
    """Returns the probabilities of logits, float [n]."""
    weights = np.exp(logits - logits.max(), dtype=np.float64)
    return np.asarray(weights / weights.sum())


def ranked(names: Sequence[str], scores: np.ndarray, chosen: int, n_best: int) -> dict[str, Any]:
    """Returns one of several answers, for `Task.answers`, and the `n_best` of them, this one first."""
    order = sorted(range(len(names)), key=lambda k: (k != chosen, -scores[k]))
    entries = [{"answer": names[k], "score": float(scores[k])} for k in order]
    return entries[0] | ({"n_best": entries[:n_best]} if n_best else {})


class RecordErrors:
    """Collects the records that cannot become inputs; in training those without an answer too."""

    def __init__(self, training: bool = False) -> None:
        self._training = training
        self._found: dict[str, BadRecord] = {}

    def add(self, record: Any, field: str, reason: str) -> None:
        """Notes an error; only the first one of a record counts."""
        self._found.setdefault(record.id, unusable(record, field, reason))

    def check(self, record: Any, texts: Mapping[str, int], room: int, max_length: int) -> bool:
        """Notes what keeps a record from having an input, and returns whether it can have one.

        `texts` has the number of tokens of each field that must have some. The first field is the query,
        which leaves `room` of `max_length` tokens for the text it asks about.
        """
        if self._training and getattr(record, "answer", "") is None:
            self.add(record, "answer", "missing; training needs one")
        for field, count in texts.items():
            if not count:
                self.add(record, field, "has no tokens; expected a text that the tokenizer keeps")
        if room < 1:
            reason = f"is too long: it leaves none of {max_length} tokens for the text it asks about; give "
            reason += "a larger max_length or a smaller max_question_length"
            self.add(record, next(iter(texts)), reason)
        return record.id not in self._found

    def raise_if_any(self) -> None:
        """Raises `UnusableRecords` with all errors noted."""
        if self._found:
            raise UnusableRecords(self._found)


def parse_requests(
    task: Task, requests: Iterable[tuple[str, Any]], ids: set[str], bad: BadRecords | None = None
) -> Iterator[tuple[Any, Any]]:
    """Turns requests, each with its place for messages, into records; yields both.

    `ids` has those of all earlier requests and receives those of these. A request without an id gets its
    number. One that is no object, repeats an id or is malformed goes to `bad`, which by default raises.
    """
    for where, request in requests:
        with (bad.record if bad else reading.record)(where):
            if not isinstance(request, Mapping):
                raise ValueError(f"a JSON {type(request).__name__}; expected an object")
            given = request.get("id")  # null counts as missing
            if given is not None and (isinstance(given, bool) or not isinstance(given, str | int)):
                raise ValueError(f"id: is {reading.describe(given)}; expected a text or a whole number")
            id = str(len(ids) + 1 if given is None else given)
            if id in ids:
                raise ValueError(f"the id {id!r} occurs twice; give each question its own, or none")
            ids.add(id)
            record = task.parse_request(dict(request), id, where)
            yield request, record
