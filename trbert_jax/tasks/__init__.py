"""Tasks: records -> inputs -> loss -> answers -> score -> request, one file a task.

`TASKS` has them by name, `register_task` adds one, and `Splits` has the examples of a run.
"""

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from trbert_jax.config import RunConfig
from trbert_jax.datasets import BadRecords, find_dataset
from trbert_jax.datasets.reading import BadRecord, UnusableRecords
from trbert_jax.datasets.records import content_digest
from trbert_jax.datasets.registry import OWN_KEYS, Options
from trbert_jax.errors import UserError
from trbert_jax.model.config import InputConfig, ModelConfig
from trbert_jax.tasks import (  # noqa: F401 - each registers its task
    candidates,
    classification,
    multi_hop,
    multiple_choice,
    spans,
)
from trbert_jax.tasks.base import TASKS, Score, Task, register_task
from trbert_jax.tasks.examples import Examples

__all__ = [
    "TASKS",
    "Score",
    "Splits",
    "Task",
    "Trained",
    "encode_usable",
    "log_counts",
    "notes_of",
    "register_task",
    "saved_task",
]

logger = logging.getLogger(__name__)

_LISTED = 100  # skipped records in the notes


Trained = tuple[InputConfig, Sequence[str]]  # inputs and class names


class Splits:
    """The examples of a run, one split at a time.

    `trained` returns inputs and labels of a model trained on this data, None if there is none yet: then the
    training set decides them. Raises `UserError` for an unknown data set, or a setting that its task does not
    read.
    """

    def __init__(
        self,
        config: RunConfig,
        trained: Callable[[], Trained | None] = lambda: None,
    ) -> None:
        self._config, self._source = config, find_dataset(config.data.name)
        self._trained, self._digests = trained, dict[str, str]()
        self._kind = TASKS[self._source.task]
        self.notes: dict[str, dict[str, Any]] = {}  # split -> what was cut, left out or skipped
        self._records: dict[str, Sequence[Any]] = {}
        self._bad: dict[str, BadRecords] = {}
        self._warned = set[str]()
        of_tasks = frozenset[str]().union(*(task.settings for task in TASKS.values()))
        for key in sorted(of_tasks - self._kind.settings_of(config.data.name)):
            name, _, field = key.partition(".")
            section = getattr(config, name)
            value = getattr(section, field)
            if value != getattr(type(section), field):  # its default
                raise UserError(f"{key} is {value!r}, which {config.data.name} does not read; leave it out")

    @functools.cached_property
    def task(self) -> Task:
        """The task of the data set, with the settings of the run."""
        data, model = self._config.data, self._config.model
        inputs = InputConfig(
            data=data.name,
            choices=data.choices,
            max_question_length=model.max_question_length or 0,
            window_step=model.window_step or 0,
            max_segments=model.max_segments,
            text_field=data.text_field,
            text_pair_field=data.text_pair_field or "",
            label_field=data.label_field,
        )
        known, labels = self._trained(), None
        if known is not None and known[0].data == data.name:
            inputs = known[0]
        else:
            inputs = self._kind.complete(inputs, lambda: self.records("train"))
        if known is not None and issubclass(self._kind, classification.ClassificationTask):
            labels = tuple(known[1])
        return self._kind(inputs, model.max_length, self.labels() if labels is None else labels)

    def labels(self) -> tuple[str, ...]:
        """Returns the class names that the data set has; () for questions."""
        bad = BadRecords(skip=self._config.data.skip_bad_records)
        return self._source.read_labels(self._config.data.path, bad, **self._options("train"))

    def digest(self, key: str) -> Any:
        """Returns a hash of the records of a split or `part`, of their ids (`train.ids`), or the `labels`."""
        if key == "labels":
            return list(self.labels())
        self.records(key.partition(".")[0])
        return self._digests[key]

    def part(self, limit: int | None) -> str:
        """Returns the name of a split: `limit` training examples at random, or `train` for all of them.

        A smaller part lies in a larger one. It is the training set of a run whose `data.max_train_examples`
        is `limit`.
        """
        most = self._config.data.max_train_examples
        return "train" if limit is None or (most is not None and limit >= most) else f"train[:{limit}]"

    def require_test_set(self) -> None:
        """Raises `UserError` if there is no test set; before a training that ends with it."""
        if not self._source.has_split(self._config.data.path, "test", self._options("train")):
            self.records("test")

    def records(self, split: str) -> Sequence[Any]:
        """Returns the records of a split or `part`, limited in number as configured."""
        if split not in self._records:
            data, (name, _, limit) = self._config.data, split.rstrip("]").partition("[:")
            bad, options = BadRecords(skip=data.skip_bad_records), self._options(name)
            self._bad[split] = bad
            options |= {"limit": int(limit)} if limit else {}
            records = self._source.read_split(data.path, name, bad, **options)
            ids = hashlib.blake2b(
                "\n".join(record.id for record in records).encode("utf-8", "surrogatepass"), digest_size=16
            )
            self._digests |= {split: content_digest(records), f"{split}.ids": ids.hexdigest()}
            self._records[split] = records
        return self._records[split]

    def _options(self, split: str) -> Options:
        data = self._config.data
        limit = data.max_train_examples if split == "train" else data.max_eval_examples
        own = {key: getattr(data, key) for key in OWN_KEYS}
        if split != "train" and "labels" in self._source.reads and (known := self._trained()) is not None:
            own["labels"] = known[1]  # else they are those of the training set
        return cast(Options, {"limit": limit, "seed": self._config.seed, **own})

    def texts(self, split: str) -> list[str]:
        """Returns all texts of a split that a tokenizer may be trained on."""
        return self.task.texts(self.records(split))

    def ids(self, split: str) -> frozenset[str]:
        """Returns the ids of the records of a split."""
        return frozenset(record.id for record in self.records(split))

    def examples(self, split: str, tokenizer: Any, cache_dir: Path | None = None) -> Examples:
        """Tokenizes a split or `part`, `train` for training, as `encode_usable` does."""
        records, name = self.records(split), split.partition("[")[0]
        options = {"training": name == "train", "seed": self._config.seed, "cache_dir": cache_dir}
        if name not in self._warned:
            others = {x: records for x, records in self._records.items() if x.partition("[")[0] != name}
            for warning in self.task.warnings(name, records, others):
                logger.warning("%s: %s", split, warning)
            self._warned.add(name)
        examples = encode_usable(self.task, records, tokenizer, self._bad[split], split, **options)
        if len(examples.records) < len(records):
            self._records[split] = examples.records
        self.notes.update({split: notes} if (notes := notes_of(examples, self._bad[split])) else {})
        return examples

    def resample(self, examples: Examples, epoch: int) -> Examples:
        """Draws the training inputs of an epoch; those of epoch 0 are what `examples` returned."""
        return self.task.resample(examples, self._config.seed, epoch)


def saved_task(config: ModelConfig) -> Task:
    """Returns the task that a saved model was trained for. Raises `UserError` if its head does not fit."""
    name = find_dataset(config.inputs.data).task if config.inputs.data else config.task
    task = TASKS[name](config.inputs, config.max_length, config.labels)
    if task.head != config.task:
        asked = f"data {config.inputs.data!r}, choices {config.inputs.choices!r}"
        needed = f"needs a head for {task.head}; this one is for {config.task}"
        raise UserError(f"config.json: the model is asked as trbert.inputs says, {asked}, which {needed}")
    return task


def encode_usable(
    task: Task, records: Sequence[Any], tokenizer: Any, bad: BadRecords, source: str, **options: Any
) -> Examples:
    """Encodes records of a `source`, for messages; those that cannot become inputs are added to `bad`.

    Raises `UserError` for a bad record if none are skipped, and if none is usable.
    """
    unusable: dict[str, BadRecord] = {}
    try:
        examples = task.encode(records, tokenizer, **options)
    except UnusableRecords as error:
        unusable = error.found
    if unusable:
        before = len(bad.skipped)
        for reason in unusable.values():
            bad.add(reason)
        usable = [record for record in records if record.id not in unusable]
        summary = bad.summary(len(usable), before)
        if not usable:
            raise UserError(f"{source}: has no usable record; {summary}")
        logger.warning("%s: %s", source, summary)
        examples = task.encode(usable, tokenizer, **options)
    if not len(examples):
        lost = examples.counts.describe() if examples.counts else "it is empty"
        raise UserError(f"{source}: nothing is left of the data; {lost}")
    log_counts(examples, source)
    if examples.counts is None and examples.num_truncated:
        cut = f"{examples.num_truncated} of {len(examples)} texts are longer than {task.max_length} tokens"
        logger.warning("%s: %s and were cut", source, cut)
    return examples


def log_counts(examples: Examples, source: str) -> None:
    """Logs what encoding a `source` cut or left out, as a warning if anything was lost."""
    if examples.counts is not None:
        level = logging.WARNING if examples.counts.is_lossy else logging.INFO
        logger.log(level, "%s: %s", source, examples.counts.describe())


def notes_of(examples: Examples, bad: BadRecords) -> dict[str, Any]:
    """Returns what was cut, left out or skipped, as a JSON object."""
    notes: dict[str, Any] = {}
    if bad.skipped:
        listed = [str(error) for error in bad.skipped[:_LISTED]]
        notes |= {"skipped_records": len(bad.skipped), "skipped": listed}
    return notes | (dataclasses.asdict(examples.counts) if examples.counts else {})
