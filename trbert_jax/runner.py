"""Runs a model over a whole feature set, in few static shapes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import jax
import numpy as np

from trbert_jax import tokens
from trbert_jax.data.batching import length_batches, pad_batch
from trbert_jax.data.features import FeatureSet
from trbert_jax.execution import (
    DEFAULT_EXECUTION,
    DEFAULT_THRESHOLD,
    EXECUTIONS,
    Execution,
    Inputs,
    Programs,
    check_execution,
    with_threshold,
)
from trbert_jax.metrics.classification import accuracy
from trbert_jax.modeling.model import Params, TokenReducingClassifier


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Outputs for n examples, rows as in the feature set.

    Attributes:
      logits: float32 [n, C].
      kept: one list a point of reduction of n int arrays, the input positions that were kept.
      lengths: int [n], tokens before reduction, special ones included.
      labels: int [n].
      seconds: time in the compiled program, compilation not counted.
    """

    logits: np.ndarray
    kept: tuple[list[np.ndarray], ...]
    lengths: np.ndarray
    labels: np.ndarray
    seconds: float

    @property
    def num_kept(self) -> np.ndarray:
        """int32 [n, stages]."""
        counts = [[len(positions) for positions in stage] for stage in self.kept]
        return np.array(counts, np.int32).reshape(len(self.kept), len(self.labels)).T

    @property
    def accuracy(self) -> float:
        """Share of examples whose highest logit is the label's."""
        return accuracy(self.logits.argmax(-1), self.labels)


class Runner:
    """Runs a model over feature sets; one compilation a batch shape and rule, none after that."""

    def __init__(
        self, model: TokenReducingClassifier, batch_size: int, programs: Programs | None = None
    ) -> None:
        self.model = model
        self.batch_size = batch_size
        self.programs = programs or Programs(model)

    def num_batches(self, features: FeatureSet) -> int:
        """Batches of a run over `features`."""
        return -(-len(features) // self.batch_size)

    def run(
        self,
        params: Params,
        features: FeatureSet,
        execution: str = DEFAULT_EXECUTION,
        progress: Callable[[int, int], None] | None = None,
        threshold: float = DEFAULT_THRESHOLD,
    ) -> Outputs:
        """Runs with one of `EXECUTIONS`.

        Args:
          params: the model's parameters.
          features: n examples.
          execution: a key of `EXECUTIONS`.
          progress: called after each batch with the number of batches done and its examples.
          threshold: keep probability from which a token is kept, for an exact execution.

        Raises:
          UserError: no such execution, a threshold that is no probability, or one for an execution that has
            none.
        """
        check_execution(execution, threshold)
        # An input of the compiled program, which all thresholds share.
        limit = np.full(len(features), tokens.min_logit(threshold), np.float32)
        return self._run(params, features, execution, EXECUTIONS[execution], {"min_logit": limit}, progress)

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
        self, params: Params, features: FeatureSet, kind: str, num_kept: np.ndarray, seed: int
    ) -> Outputs:
        """Runs a selection that learned nothing, at given kept counts.

        Args:
          params: the model's parameters.
          features: n examples.
          kind: `random` or `first_k`.
          num_kept: int [n, stages], how many tokens each example keeps.
          seed: of the random choice.
        """

        def rule(batch: Inputs) -> tokens.Rule | None:
            counts = batch["num_kept"].T
            if kind == "first_k":
                return tokens.keep_first(counts)
            rng = jax.random.key(batch["seed"][0])
            return tokens.keep_random(counts, tokens.row_keys(rng, batch["index"]))

        # The seed is an input of the compiled program, which other seeds then share.
        extras = {"num_kept": num_kept.astype(np.int32), "seed": np.full(len(features), seed, np.int32)}
        return self._run(
            params, features, kind, Execution(EXECUTIONS[DEFAULT_EXECUTION].forward, rule), extras
        )

    def _run(
        self,
        params: Params,
        features: FeatureSet,
        name: str,
        execution: Execution,
        extras: dict[str, np.ndarray],
        progress: Callable[[int, int], None] | None = None,
    ) -> Outputs:
        n, stages = len(features), 0 if name == "dense" else self.model.config.num_reductions
        logits = np.zeros((n, self.model.config.num_labels), np.float32)
        kept = tuple([np.zeros(0, np.int32)] * n for _ in range(stages))
        seconds = 0.0
        ladder = execution.widths(self.model.config.max_length)
        for step, (index, width) in enumerate(length_batches(features, self.batch_size, ladder), 1):
            batch = pad_batch(features, index, self.batch_size, width)
            for key, values in extras.items():
                batch[key] = values[np.maximum(batch["index"], 0)]
            program = self.programs.get(name, params, batch, execution)
            start = time.perf_counter()
            output, keep = jax.block_until_ready(program(params, batch))
            seconds += time.perf_counter() - start
            logits[index] = np.asarray(output)[: len(index)]
            for stage, masks in enumerate(np.asarray(keep)[:, : len(index)]):
                for row, mask in zip(index, masks, strict=True):
                    kept[stage][row] = np.flatnonzero(mask).astype(np.int32)
            if progress:
                progress(step, len(index))
        return Outputs(logits, kept, features.lengths, features.labels, seconds)
