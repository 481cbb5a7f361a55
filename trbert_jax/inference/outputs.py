"""Collect the outputs of a model's batches into those of a whole data set."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from trbert_jax.errors import UserError
from trbert_jax.model.config import ModelConfig
from trbert_jax.model.heads import Logits
from trbert_jax.tasks import TASKS
from trbert_jax.tasks.examples import Examples, batch_rows
from trbert_jax.tasks.scorers import accuracy

# Name of the logits ("" where there is one array) and shape -> zeros, float32.
Allocate = Callable[[str, tuple[int, ...]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Outputs for n examples of R rows in all, in the order of the examples."""

    # float32 [n, C], or the logits of another head (`model.heads`): an array or a dict of arrays, one entry
    # per example; of the span head one entry per row, [R, 2, max_length], 0 behind a row's end.
    logits: Logits
    kept: tuple[list[np.ndarray], ...]  # for each point of reduction R int arrays, the positions kept
    lengths: np.ndarray  # int [R], tokens before reduction, special tokens included
    labels: np.ndarray  # int [n], -1 for an unknown label
    seconds: float  # time in the compiled programs, without compilation

    @property
    def num_kept(self) -> np.ndarray:
        """int32 [R, stages]."""
        counts = [list(map(len, stage)) for stage in self.kept]
        return np.array(counts, np.int32).reshape(len(self.kept), len(self.lengths)).T

    @property
    def probabilities(self) -> np.ndarray:
        """float32 [n, C], the softmax of a classifier's logits."""
        scores = np.exp(self.logits - self.logits.max(-1, keepdims=True))
        return scores / scores.sum(-1, keepdims=True)

    @property
    def accuracy(self) -> float:
        """Share of the labeled examples whose highest logit is the label's."""
        known = self.labels >= 0
        return accuracy(self.logits.argmax(-1)[known], self.labels[known])

    def kept_masks(self, width: int) -> np.ndarray:
        """The kept positions as masks, bool [R, stages, width]."""
        masks = np.zeros((len(self.lengths), len(self.kept), width), bool)
        for stage, rows in enumerate(self.kept):
            for row, positions in enumerate(rows):
                masks[row, stage, positions] = True
        return masks


class Collector:
    """Collects the results of batches into the `Outputs` of all examples."""

    def __init__(
        self, config: ModelConfig, examples: Examples, drops: bool, allocate: Allocate | None = None
    ) -> None:
        self._config, self._examples, self._allocate = config, examples, allocate
        stages = config.num_reductions if drops else 0
        self._kept = tuple([np.zeros(0, np.int32)] * examples.num_rows for _ in range(stages))
        self._store: LogitStore | None = None

    def put(self, index: np.ndarray, size: int, output: Logits, keep: np.ndarray) -> None:
        """Stores logits and kept tokens, bool [stages, B * G, S], of the examples `index`, int [b].

        `size` is B, padding included. Raises `UserError` for logits that are not finite.
        """
        self._store = self._store or LogitStore(self._config, self._examples, output, self._allocate)
        rows = batch_rows(self._examples, index, size)
        self._store.put(index, rows, output)
        valid = np.flatnonzero(rows >= 0)
        for positions, masks in zip(self._kept, keep, strict=True):
            for row, mask in zip(rows[valid], masks[valid], strict=True):
                positions[row] = np.flatnonzero(mask).astype(np.int32)

    def outputs(self, seconds: float) -> Outputs:
        """Returns the results of all examples, which took `seconds`."""
        logits = self._store.logits if self._store else None
        return Outputs(logits, self._kept, self._examples.row_lengths, self._examples.labels, seconds)


class LogitStore:
    """Collects the logits of batches into those of all examples."""

    def __init__(
        self, config: ModelConfig, examples: Examples, like: Logits, allocate: Allocate | None = None
    ) -> None:
        self._examples, task = examples, TASKS[config.task]
        self._by_row = task.by_row
        count = examples.num_rows if self._by_row else len(examples)

        def empty(path: Any, x: jax.Array) -> np.ndarray:
            name = path[0].key if path else ""
            *inner, last = x.shape[1:]
            shape = (count, *inner, config.max_length if task.is_by_token(name or None) else last)
            return allocate(name, shape) if allocate else np.zeros(shape, np.float32)

        self.logits = jax.tree_util.tree_map_with_path(empty, like)

    def put(self, index: np.ndarray, rows: np.ndarray, output: Logits) -> None:
        """Stores the logits of a batch: examples `index`, int [b], and `rows`, int [B * G], -1 for padding.

        Raises UserError if one of them is NaN or infinite; names the example.
        """
        valid = np.flatnonzero(rows >= 0) if self._by_row else np.arange(len(index))
        to = rows[valid] if self._by_row else index

        def put(into: np.ndarray, x: jax.Array) -> None:
            values = np.asarray(x)[valid]
            finite = np.isfinite(values.reshape(len(values), -1)).all(-1)
            if not finite.all():
                raise UserError(
                    f"example {self._name(to[finite.argmin()])}: the model's logits are not finite (NaN or "
                    "infinity); its weights are damaged, or too large for the dtype it computes in"
                )
            into[to, ..., : values.shape[-1]] = values

        jax.tree.map(put, self.logits, output)

    def _name(self, entry: int) -> str:
        """Name of the example that an entry of the logits belongs to."""
        if self._by_row and self._examples.first_row is not None:
            entry = int(np.searchsorted(self._examples.first_row, entry, side="right")) - 1
        return self._examples.ids[entry]
