"""What every task has to offer to the stages, to evaluation and to prediction."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trbert_jax.config import RunConfig
from trbert_jax.datasets import BadRecord, BadRecords, find_dataset
from trbert_jax.datasets.dataset import Announce
from trbert_jax.datasets.reading import UnusableRecords
from trbert_jax.errors import UserError
from trbert_jax.tasks.examples import Examples
from trbert_jax.tasks.ragged import Counts, TokenRows

_LISTED = 100  # of skipped records


@dataclasses.dataclass(frozen=True)
class Score:
    """What answers are worth.

    Attributes:
      metrics: name -> number, under the official scorer's names and in its units.
      files: name -> JSON value of the files to write, in the form that scorer reads.
    """

    metrics: dict[str, float]
    files: dict[str, Any]


class TaskData(abc.ABC):
    """The data of a run, one split at a time.

    Attributes:
      task: what the model's head is for, one of `modeling.config.TASKS`.
      labels: names of the classes; empty where answers are none.
      metric: which of the metrics decides what is best, the more the better.
      own_settings: those that not every data set reads and this one does, `model.window_step` and the like.
      markers: entries of the vocabulary, besides word pieces, that inputs may have.
      notes: split -> what became of it on the way to inputs: how many were skipped, cut, left out.
    """

    task: str
    metric: str
    labels: tuple[str, ...]
    own_settings: frozenset[str] = frozenset()
    markers: tuple[str, ...] = ()

    def __init__(self, config: RunConfig, announce: Announce) -> None:
        self.config = config
        self.announce = announce
        self.notes: dict[str, dict[str, Any]] = {}

    @abc.abstractmethod
    def texts(self, split: str) -> list[str]:
        """Everything in a split that a tokenizer may be trained on."""

    @abc.abstractmethod
    def features(self, split: str, tokenizer: Any, cache_dir: Path) -> Examples:
        """The tokenized examples of a split; those of `train` are for training."""

    def redraw(self, tokenizer: Any, epoch: int) -> Examples | None:
        """The training examples as inputs drawn for this epoch; None where all epochs have the same.

        Those of epoch 0 are what `features` gives.
        """
        return None

    def inputs(self, split: str, tokenizer: Any, cache_dir: Path) -> Examples:
        """What `features` gives, of those examples alone that can be used where others are to be skipped."""
        return self.features(split, tokenizer, cache_dir)

    @abc.abstractmethod
    def score(self, split: str, features: Examples, tokenizer: Any, logits: Any) -> Score:
        """Judges the outputs for the examples of a split.

        Args:
          split: which.
          features: what `features` gave for it.
          tokenizer: with which it gave that.
          logits: see `trbert_jax.inference.engine.Outputs`.
        """


class QuestionData(TaskData):
    """A data set of questions, in one of the formats of `data.qa_readers`.

    Attributes:
      request: what a question looks like to whoever asks, see `task_data.requests`.
      unanswerable: whether questions may have no answer.
      null_threshold: null odds above which such a question is taken to have none.
    """

    markers = ("[unused1]", "[unused2]", "[unused3]")
    request: str
    null_threshold = 0.0  # the published one
    unanswerable = False

    def __init__(self, config: RunConfig, announce: Announce) -> None:
        super().__init__(config, announce)
        self._given: dict[str, Sequence[Any]] = {}
        self._bad: dict[str, BadRecords] = {}

    def give(self, split: str, records: Sequence[Any], bad: BadRecords | None = None) -> None:
        """Lets these questions be the split, in place of those of the data set.

        Args:
          split: which.
          records: the questions.
          bad: what to do about those that cannot become inputs; None where nobody may skip any.
        """
        self._given[split] = records
        if bad is not None:
            self._bad[split] = bad
            self._note_skipped(split, bad)

    def inputs(self, split: str, tokenizer: Any, cache_dir: Path) -> Examples:
        """What `features` gives; questions that cannot become inputs go the way of other bad records.

        Those that are skipped are none of `records` from here on, so that answers and gold agree.

        Raises:
          UserError: there is such a question and none is to be skipped, or there is no other.
        """
        try:
            return self.features(split, tokenizer, cache_dir)
        except UnusableRecords as error:
            bad = self._bad.get(split)
            if bad is None:
                raise
            self._leave_out(split, error.found, bad)
        return self.features(split, tokenizer, cache_dir)

    def _leave_out(self, split: str, found: Mapping[str, BadRecord], bad: BadRecords) -> None:
        before = len(bad.skipped)
        for error in found.values():
            bad.add(error)
        kept = [record for record in self.records(split) if record.id not in found]
        summary = bad.summary(len(kept), before)
        if not kept:
            raise UserError(f"{split}: has no usable record; {summary}")
        self.announce(f"{split}: {summary}")
        self._given[split] = kept
        self._note_skipped(split, bad)

    def best_null_threshold(self, metrics: Mapping[str, float]) -> float | None:
        """The null threshold that the metrics found best; None for a task that has none."""
        return None

    def ids(self, split: str) -> frozenset[str]:
        """Ids of the questions of a split."""
        return frozenset(record.id for record in self.records(split))

    def records(self, split: str) -> Sequence[Any]:
        """The questions of a split, at most as many as the configuration says."""
        if split not in self._given:
            self._given[split] = self._read(split)
        return self._given[split]

    def _read(self, split: str) -> Sequence[Any]:
        data = self.config.data
        bad = self._bad[split] = BadRecords(skip=data.skip_bad_records)
        limit = data.max_train_examples if split == "train" else data.max_eval_examples
        records = find_dataset(data.name).read_split(
            data.path, split, bad, limit=limit, seed=self.config.seed
        )
        self._note_skipped(split, bad)
        return records

    def _note_skipped(self, split: str, bad: BadRecords) -> None:
        if bad.skipped:
            skipped = [str(error) for error in bad.skipped[:_LISTED]]
            self.note(split, skipped_records=len(bad.skipped), skipped=skipped)

    def note(self, split: str, **facts: Any) -> None:
        """Adds to `notes`."""
        self.notes.setdefault(split, {}).update(facts)

    def note_counts(self, split: str, counts: Counts) -> None:
        """Notes what became of a split when it was turned into inputs."""
        self.note(split, **dataclasses.asdict(counts))


def feature_set(
    rows: TokenRows,
    ids: Sequence[str],
    digest: str,
    num_truncated: int,
    *,
    labels: np.ndarray | None = None,
    first_row: np.ndarray | None = None,
    group: int = 1,
    row_targets: Mapping[str, np.ndarray] | None = None,
    targets: Mapping[str, np.ndarray] | None = None,
) -> Examples:
    """A `Examples` of rows of two parts."""
    return Examples(
        tokens=rows.tokens,
        offsets=rows.offsets,
        token_types=rows.token_types,
        labels=np.full(len(ids), -1, np.int32) if labels is None else labels,
        ids=list(ids),
        num_truncated=num_truncated,
        digest=digest,
        first_row=first_row,
        group=group,
        row_targets=row_targets or {},
        targets=targets or {},
    )


def at_tokens(features: Examples, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Start and end logits of all tokens, one after the other: float [R, 2, S] -> two float [total]."""
    real = np.arange(logits.shape[-1]) < features.row_lengths[:, None]
    return logits[:, 0][real], logits[:, 1][real]


def padded(values: Sequence[np.ndarray], width: int | None = None) -> np.ndarray:
    """Ragged int arrays as one, padded with -1: int32 [n, width], by default the longest."""
    width = max([1, *map(len, values)]) if width is None else width
    array = np.full((len(values), width), -1, np.int32)
    for row, some in zip(array, values, strict=True):
        row[: len(some)] = some[:width]
    return array
