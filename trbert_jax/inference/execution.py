"""The ways to run a model over a batch of texts, and their compiled programs."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trbert_jax.errors import UserError
from trbert_jax.model.heads import Logits
from trbert_jax.model.model import ModelOutput, Params, TokenReducingModel, forward
from trbert_jax.model.packed import packed_forward
from trbert_jax.parallel import KEPT, ROWS, DeviceMesh, single_device
from trbert_jax.reduction import selection as tokens
from trbert_jax.tasks.batch import example_logits
from trbert_jax.tasks.batching import width_ladder

Inputs = Mapping[str, Any]  # arrays [B, ...]
Program = Callable[[Params, Inputs], tuple[Logits, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Execution:
    """A way to run a model over texts.

    Attributes:
      forward: runs the model.
      rule: what decides about tokens, given the batch that the compiled program sees; None drops
        nothing.
      exact: whether each text is decided on by itself, with a threshold.
    """

    forward: Callable[..., ModelOutput]
    rule: Callable[[Inputs], tokens.Rule | None]
    exact: bool = False

    def widths(self, max_length: int) -> tuple[int, ...]:
        """Padded lengths of batches, ascending, the last one `max_length`."""
        # Packed, padding costs next to nothing: one narrow shape spares what little there is.
        return (
            width_ladder(max_length, (0.25,)) if self.forward is packed_forward else width_ladder(max_length)
        )


def _keep_above(batch: Inputs) -> tokens.Rule:
    return tokens.keep_above(batch["min_logit"][0])


EXECUTIONS = {
    "packed": Execution(packed_forward, _keep_above, exact=True),
    "masked": Execution(forward, _keep_above, exact=True),
    "batch_max": Execution(packed_forward, lambda batch: tokens.keep_batch_max),
    "dense": Execution(packed_forward, lambda batch: None),
}
DEFAULT_EXECUTION = "packed"
# Whoever compiles more for one model than a few executions and batch sizes need gets to know why it is slow.
MANY_PROGRAMS = 24
DEFAULT_THRESHOLD = 0.5  # the published rule


def execution_of(rule: str | None, backend: str) -> str | None:
    """The key of `EXECUTIONS` for a rule and a backend; None for what suits the model, packed."""
    if rule == "threshold" or (rule is None and backend == "masked"):
        return backend
    return rule


def check_execution(execution: str, threshold: float = DEFAULT_THRESHOLD) -> None:
    """Raises a UserError unless there is such an execution and `threshold` is one that it can use."""
    if execution not in EXECUTIONS:
        raise UserError(f"execution is {execution!r}; expected one of {', '.join(EXECUTIONS)}")
    if not isinstance(threshold, float) or not 0 < threshold < 1:
        raise UserError(f"threshold is {threshold!r}; expected a probability above 0 and below 1")
    if not EXECUTIONS[execution].exact and threshold != DEFAULT_THRESHOLD:
        raise UserError(f"threshold is {threshold!r}, but {execution} execution has none; use packed")


class CompiledForward:
    """The compiled forward passes of one model: one for each execution and batch shape.

    With a `layout` of several devices each computes its share of a batch's rows, and every process gets all
    results. Batches then have a number of examples that the devices divide (`DeviceMesh.rounded`).
    """

    def __init__(self, model: TokenReducingModel, layout: DeviceMesh | None = None) -> None:
        self.model = model
        self.layout = layout or single_device()
        self.compile_seconds: dict[tuple[str, int, int], float] = {}  # execution, rows, width -> seconds
        self._compiled: dict[tuple[str, int, int], Program] = {}

    def get(self, name: str, params: Params, batch: Inputs, execution: Execution | None = None) -> Program:
        """The program for a batch of this shape, compiled now if it is the first one.

        Args:
          name: key of `EXECUTIONS`, or the name of `execution`.
          params: the model's parameters, or their shapes.
          batch: arrays [B, ...], or their shapes; all that `execution` asks for.
          execution: None takes it from the table.

        Returns:
          `(params, batch) -> (logits, keep bool [stages, B * G, S])`: logits off which the examples' answers
          are read (`modeling.tasks.example_logits`); keep is bool [0, 1] where nothing is dropped.
        """
        how = execution or EXECUTIONS[name]
        key = (name, *batch["input_ids"].shape)
        if key not in self._compiled:
            self._warn_of_many(len(self._compiled) + 1)

            def program(params: Params, batch: Inputs) -> tuple[Logits, jax.Array]:
                output = how.forward(self.model, params, batch, rule=how.rule(batch))
                keep = [s.keep for s in output.selections]
                logits = example_logits(self.model.config.task, output.logits, batch)
                return logits, jnp.stack(keep) if keep else jnp.zeros((0, 1), bool)

            start = time.perf_counter()
            # The published fill looks at the whole batch: every device computes all of it.
            self._compiled[key] = self._compile(program, params, batch, divide=name != "batch_max")
            self.compile_seconds[key] = time.perf_counter() - start
        return self._compiled[key]

    def _compile(self, program: Program, params: Params, batch: Inputs, divide: bool) -> Program:
        if self.layout.is_single:
            return jax.jit(program).lower(params, batch).compile()
        place = self.layout.place_rows if divide else self.layout.replicate
        mapped = self.layout.by_rows(program, out_specs=(ROWS, KEPT)) if divide else program
        whole = self.layout.whole
        compiled = jax.jit(mapped, out_shardings=whole).lower(params, place(batch)).compile()

        def run(params: Params, batch: Inputs) -> tuple[Logits, jax.Array]:
            # Every device has the results of all; those of one are enough.
            return jax.tree.map(lambda x: x.addressable_data(0), compiled(params, place(batch)))

        return run

    def _warn_of_many(self, count: int) -> None:
        if count == MANY_PROGRAMS:
            shapes = ", ".join(f"{rows} x {width}" for _, rows, width in self._compiled)
            warnings.warn(
                f"{count} programs have been compiled for one model, for batches of {shapes} and now one "
                "more; each batch size compiles its own, so always ask for the same few",
                RuntimeWarning,
                stacklevel=4,
            )


def with_threshold(batch: Inputs, threshold: float = DEFAULT_THRESHOLD) -> Inputs:
    """The batch with what the exact executions ask for besides the tokens: `min_logit` float32 [B]."""
    rows = len(batch["input_ids"])
    return {**batch, "min_logit": np.full(rows, tokens.min_logit(threshold), np.float32)}
