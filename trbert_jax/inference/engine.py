"""Runs a model over a whole feature set, in few static shapes."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from trbert_jax.errors import UserError
from trbert_jax.inference.execution import (
    DEFAULT_EXECUTION,
    DEFAULT_THRESHOLD,
    EXECUTIONS,
    CompiledForward,
    Execution,
    Inputs,
    check_execution,
    with_threshold,
)
from trbert_jax.model.config import ModelConfig
from trbert_jax.model.heads import Logits
from trbert_jax.model.model import Params, TokenReducingModel
from trbert_jax.reduction import selection as tokens
from trbert_jax.tasks.batch import Rows, is_by_token
from trbert_jax.tasks.batching import batch_rows, length_batches, pad_batch
from trbert_jax.tasks.examples import Examples
from trbert_jax.tasks.score_classification import accuracy

# Called after each batch with the features, the examples of the batch, int [b], and its logits.
AfterBatch = Callable[[Examples, np.ndarray, Logits], None]
# Name of the logits ("" where there is one array) and shape -> zeros, float32.
Allocate = Callable[[str, tuple[int, ...]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Outputs for n examples of R rows in all, in the order of the feature set.

    Attributes:
      logits: float32 [n, C], or what else the task has (`modeling.heads`): an array, or a dict of arrays,
        with an entry an example; for spans an entry a row, [R, 2, max_length], 0 behind a row's end.
      kept: one list a point of reduction of R int arrays, the positions of a row that were kept.
      lengths: int [R], tokens before reduction, special ones included.
      labels: int [n], -1 where there is none.
      seconds: time in the compiled program, compilation not counted.
    """

    logits: Logits
    kept: tuple[list[np.ndarray], ...]
    lengths: np.ndarray
    labels: np.ndarray
    seconds: float

    @property
    def num_kept(self) -> np.ndarray:
        """int32 [R, stages]."""
        counts = [[len(positions) for positions in stage] for stage in self.kept]
        return np.array(counts, np.int32).reshape(len(self.kept), len(self.lengths)).T

    @property
    def accuracy(self) -> float:
        """Share of examples whose highest logit is the label's."""
        return accuracy(self.logits.argmax(-1), self.labels)


class InferenceEngine:
    """Runs a model over feature sets; one compilation a batch shape and rule, none after that."""

    def __init__(
        self,
        model: TokenReducingModel,
        batch_size: int,
        programs: CompiledForward | None = None,
        after_batch: AfterBatch | None = None,
    ) -> None:
        self.model = model
        self._after_batch = after_batch
        self.programs = programs or CompiledForward(model)
        self.batch_size = self.programs.layout.rounded(batch_size)

    def num_batches(self, features: Examples) -> int:
        """Batches of a run over `features`."""
        return -(-len(features) // self.batch_size)

    def run(
        self,
        params: Params,
        features: Examples,
        execution: str = DEFAULT_EXECUTION,
        progress: Callable[[int, int], None] | None = None,
        threshold: float = DEFAULT_THRESHOLD,
        allocate: Allocate | None = None,
        start: int = 0,
    ) -> Outputs:
        """Runs with one of `EXECUTIONS`.

        Args:
          params: the model's parameters.
          features: n examples.
          execution: a key of `EXECUTIONS`.
          progress: called after each batch with the number of batches done and its examples.
          threshold: keep probability from which a token is kept, for an exact execution.
          allocate: makes the arrays for the logits, for example on disk; None has them in memory.
          start: batches to leave out, whose logits the arrays of `allocate` have from an earlier call; fewer
            than there are. Only for an execution that drops nothing.

        Raises:
          UserError: no such execution, a threshold that is no probability, or one for an execution that has
            none.
        """
        check_execution(execution, threshold)
        # An input of the compiled program, which all thresholds share.
        limit = np.full(features.num_rows, tokens.min_logit(threshold), np.float32)
        rule, extras = EXECUTIONS[execution], {"min_logit": limit}
        return self._run(params, features, execution, rule, extras, progress, allocate, start)

    def compile(self, params: Params, execution: str, width: int) -> float:
        """Compiles the program for batches of this padded length, unless it is there; seconds taken."""
        shape = (self.batch_size, width)
        batch = {
            "input_ids": np.zeros(shape, np.int32),
            "mask": np.zeros(shape, bool),
            "labels": np.zeros(self.batch_size, np.int32),
            "valid": np.zeros(self.batch_size, bool),
            "index": np.zeros(self.batch_size, np.int32),
        }
        self.programs.get(execution, params, with_threshold(batch))
        return self.programs.compile_seconds[execution, *shape]

    def baseline(
        self, params: Params, features: Examples, kind: str, num_kept: np.ndarray, seed: int
    ) -> Outputs:
        """Runs a selection that learned nothing, at given kept counts.

        Args:
          params: the model's parameters.
          features: n examples.
          kind: `random` or `first_k`.
          num_kept: int [R, stages], how many tokens each row keeps.
          seed: of the random choice.
        """

        def rule(batch: Inputs) -> tokens.Rule | None:
            counts = batch["num_kept"].T
            if kind == "first_k":
                return tokens.keep_first(counts)
            rng = jax.random.key(batch["seed"][0])
            return tokens.keep_random(counts, Rows(batch).keys(rng))

        if "shared_length" in features.row_targets:  # the others are kept whatever a rule says
            others = features.row_lengths - features.row_targets["shared_length"]
            num_kept = num_kept - others[:, None]
        # The seed is an input of the compiled program, which other seeds then share.
        extras = {"num_kept": num_kept.astype(np.int32), "seed": np.full(features.num_rows, seed, np.int32)}
        return self._run(
            params, features, kind, Execution(EXECUTIONS[DEFAULT_EXECUTION].forward, rule), extras
        )

    def _run(
        self,
        params: Params,
        features: Examples,
        name: str,
        execution: Execution,
        extras: dict[str, np.ndarray],  # arrays [R, ...]
        progress: Callable[[int, int], None] | None = None,
        allocate: Allocate | None = None,
        start: int = 0,
    ) -> Outputs:
        config = self.model.config
        kept = tuple(
            [np.zeros(0, np.int32)] * features.num_rows
            for _ in range(0 if name == "dense" else config.num_reductions)
        )
        store, seconds = None, 0.0
        params = self.programs.layout.replicate(params)
        ladder = execution.widths(config.max_length)
        batches = itertools.islice(length_batches(features, self.batch_size, ladder), start, None)
        for step, (index, width) in enumerate(batches, start + 1):
            batch = pad_batch(features, index, self.batch_size, width)
            rows = batch_rows(features, index, self.batch_size)
            for key, values in extras.items():
                batch[key] = values[np.maximum(rows, 0)]
            program = self.programs.get(name, params, batch, execution)
            begun = time.perf_counter()
            output, keep = jax.block_until_ready(program(params, batch))
            seconds += time.perf_counter() - begun
            if self._after_batch:
                self._after_batch(features, index, output)
            store = store or LogitStore(config, features, output, allocate)
            store.put(index, rows, output)
            there = np.flatnonzero(rows >= 0)
            for positions, masks in zip(kept, np.asarray(keep), strict=True):
                for row, mask in zip(rows[there], masks[there], strict=True):
                    positions[row] = np.flatnonzero(mask).astype(np.int32)
            if progress:
                progress(step, len(index))
        logits = store.logits if store else None
        return Outputs(logits, kept, features.row_lengths, features.labels, seconds)


class LogitStore:
    """The logits of a whole feature set, put together from those of its batches."""

    def __init__(
        self, config: ModelConfig, features: Examples, like: Logits, allocate: Allocate | None = None
    ) -> None:
        self._features = features
        self._by_row = config.task == "span"
        count = features.num_rows if self._by_row else len(features)

        def empty(path: Any, x: jax.Array) -> np.ndarray:
            name = path[0].key if path else ""
            *inner, last = x.shape[1:]
            shape = (count, *inner, config.max_length if is_by_token(config.task, name or None) else last)
            return allocate(name, shape) if allocate else np.zeros(shape, np.float32)

        self.logits = jax.tree_util.tree_map_with_path(empty, like)

    def put(self, index: np.ndarray, rows: np.ndarray, output: Logits) -> None:
        """Puts a batch's logits in their place.

        Args:
          index: int [b], its examples.
          rows: int [B * G], its rows, -1 for fillers.
          output: of the batch.

        Raises:
          UserError: one of them is NaN or infinite; names the example.
        """
        there = np.flatnonzero(rows >= 0) if self._by_row else np.arange(len(index))
        to = rows[there] if self._by_row else index

        def put(into: np.ndarray, x: jax.Array) -> None:
            values = np.asarray(x)[there]
            self._check_finite(to, values)
            into[to, ..., : values.shape[-1]] = values

        jax.tree.map(put, self.logits, output)

    def _check_finite(self, entries: np.ndarray, values: np.ndarray) -> None:
        finite = np.isfinite(values.reshape(len(values), -1)).all(-1)
        if finite.all():
            return
        entry, first_row = entries[np.flatnonzero(~finite)[0]], self._features.first_row
        if self._by_row and first_row is not None:
            entry = np.searchsorted(first_row, entry, side="right") - 1
        raise UserError(
            f"example {self._features.ids[entry]}: the model's logits are not finite (NaN or infinity); its "
            "weights are damaged, or too large for the dtype it computes in"
        )
