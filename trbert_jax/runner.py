"""Runs a model over a whole feature set, in few static shapes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trbert_jax import tokens
from trbert_jax.data.batching import length_batches, pad_batch, width_ladder
from trbert_jax.data.features import FeatureSet
from trbert_jax.errors import UserError
from trbert_jax.metrics.classification import accuracy
from trbert_jax.modeling.model import Params, TokenReducingClassifier, forward

# What decides about tokens, given the batch that the compiled program sees; None drops nothing.
EXECUTIONS: dict[str, Callable[[dict[str, jax.Array]], tokens.Rule | None]] = {
    "masked": lambda batch: tokens.keep_above(batch["min_logit"][0]),
    "batch_max": lambda batch: tokens.keep_batch_max,
    "dense": lambda batch: None,
}
DEFAULT_THRESHOLD = 0.5  # the published rule


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


def check_threshold(threshold: float, execution: str) -> None:
    """Raises a UserError unless `threshold` is one that `execution` can use."""
    if not isinstance(threshold, float) or not 0 < threshold < 1:
        raise UserError(f"threshold is {threshold!r}; expected a probability above 0 and below 1")
    if execution != "masked" and threshold != DEFAULT_THRESHOLD:
        raise UserError(f"threshold is {threshold!r}, but {execution} execution has none; use masked")


class Runner:
    """Runs a model over feature sets; one compilation a batch shape and rule, none after that."""

    def __init__(self, model: TokenReducingClassifier, batch_size: int) -> None:
        self.model = model
        self.batch_size = batch_size
        self._compiled: dict[tuple[str, int], Callable[..., Any]] = {}

    def num_batches(self, features: FeatureSet) -> int:
        """Batches of a run over `features`."""
        return -(-len(features) // self.batch_size)

    def run(
        self,
        params: Params,
        features: FeatureSet,
        execution: str = "masked",
        progress: Callable[[int, int], None] | None = None,
        threshold: float = DEFAULT_THRESHOLD,
    ) -> Outputs:
        """Runs with one of `EXECUTIONS`.

        Args:
          params: the model's parameters.
          features: n examples.
          execution: a key of `EXECUTIONS`.
          progress: called after each batch with the number of batches done and its examples.
          threshold: keep probability from which a token is kept, for `masked`.

        Raises:
          UserError: a threshold that is no probability, or one for an execution that has none.
        """
        check_threshold(threshold, execution)
        # An input of the compiled program, which all thresholds share.
        limit = np.full(len(features), tokens.min_logit(threshold), np.float32)
        return self._run(
            params, features, execution, EXECUTIONS[execution], {"min_logit": limit}, progress=progress
        )

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

        def rule(batch: dict[str, jax.Array]) -> tokens.Rule | None:
            counts = batch["num_kept"].T
            if kind == "first_k":
                return tokens.keep_first(counts)
            rng = jax.random.key(batch["seed"][0])
            return tokens.keep_random(counts, tokens.row_keys(rng, batch["index"]))

        # The seed is an input of the compiled program, which other seeds then share.
        extras = {"num_kept": num_kept.astype(np.int32), "seed": np.full(len(features), seed, np.int32)}
        return self._run(params, features, kind, rule, extras)

    def _run(
        self,
        params: Params,
        features: FeatureSet,
        name: str,
        rule: Callable[[dict[str, jax.Array]], tokens.Rule | None],
        extras: dict[str, np.ndarray] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Outputs:
        n, stages = len(features), 0 if name == "dense" else self.model.config.num_reductions
        logits = np.zeros((n, self.model.config.num_labels), np.float32)
        kept = tuple([np.zeros(0, np.int32)] * n for _ in range(stages))
        seconds = 0.0
        ladder = width_ladder(self.model.config.max_length)
        for step, (index, width) in enumerate(length_batches(features, self.batch_size, ladder), 1):
            batch = pad_batch(features, index, self.batch_size, width)
            for key, values in (extras or {}).items():
                batch[key] = values[np.maximum(batch["index"], 0)]
            program = self._program(name, width, rule, params, batch)
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

    def _program(
        self, name: str, width: int, rule: Callable[..., Any], params: Params, batch: dict[str, Any]
    ) -> Callable[..., Any]:
        if (name, width) not in self._compiled:

            def program(params: Params, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
                output = forward(self.model, params, batch, rule=rule(batch))
                keep = [s.keep for s in output.selections]
                return output.logits, jnp.stack(keep) if keep else jnp.zeros((0, 1), bool)

            self._compiled[name, width] = jax.jit(program).lower(params, batch).compile()
        return self._compiled[name, width]
