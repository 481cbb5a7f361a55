"""Run several thresholds, or kept counts, in one pass that computes the first layers once.

The training's samples of an example are such copies too (`num_copies` of `model.model.forward`).
"""

import dataclasses
import operator
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from trbert_jax.inference.engine import InferenceEngine
from trbert_jax.inference.outputs import Collector, Outputs
from trbert_jax.model.model import Params
from trbert_jax.reduction.rules import DEFAULT_RULE, RULES, RuleSpec
from trbert_jax.tasks.examples import Examples, batch_rows

Array = npt.NDArray[Any]

COPIES = 8  # of a row in one pass
_JUDGE = dataclasses.replace(RULES[DEFAULT_RULE], name="judge", judges=True)


def run_copies(
    engine: InferenceEngine,
    params: Params,
    examples: Examples,
    name: str,
    values: Array,
    rule: RuleSpec,
    backend: str,
    seed: int = 0,
) -> Iterator[Outputs]:
    """Runs a rule with `values`, [n, stages] or [n, R, stages], of its input `name`; yields n outputs."""
    for first in range(0, len(values), COPIES):
        part = values[first : first + COPIES]
        collected = [Collector(engine.model.config, examples, True) for _ in part]
        for index, size, (logits, kept) in _passes(engine, params, examples, name, part, rule, backend, seed):
            for copy, into in enumerate(collected):
                one = jax.tree.map(operator.itemgetter((slice(None), copy)), logits)
                into.put(index, size, one, kept[:, :, copy])
        yield from (into.outputs(0.0) for into in collected)


def _passes(
    engine: InferenceEngine,
    params: Params,
    examples: Examples,
    name: str,
    values: Array,
    rule: RuleSpec,
    backend: str,
    seed: int = 0,
) -> Iterator[tuple[Array, int, Any]]:
    """Yields positions of examples, examples of the batch, and the program's results with copies."""
    if values.ndim == 2:
        values = np.repeat(values[:, None], examples.num_rows, 1)
    # All calls share a program; unused copies keep [CLS] alone.
    least = np.inf if name == "min_logit" else 1
    spare = np.full((COPIES - len(values), *values.shape[1:]), least, values.dtype)
    inputs = {name: np.swapaxes(np.concatenate([values, spare]), 0, 1)}
    inputs["seed"] = np.full(examples.num_rows, seed, np.int32)
    params = engine.programs.devices.replicate(params)
    for index, width in engine.indices(examples, backend):
        batch = engine.batch(examples, index, width, inputs)
        program = engine.programs.get(params, batch, rule, backend)
        logits, kept = jax.block_until_ready(program(params, batch))
        if engine.after_batch:
            engine.after_batch(examples, index, logits)
        yield index, len(batch["input_ids"]) // examples.group, (logits, np.asarray(kept))


def judging_logits(
    engine: InferenceEngine, params: Params, examples: Examples, logits: Array, stage: int, backend: str
) -> Array:
    """Returns the logits by which a point of reduction judges tokens, float32 [n, R, max_length].

    `logits`, float32 [n, stages], are the thresholds of the points before it. -inf: the token was dropped
    before; inf: always kept.
    """
    found = np.full((len(logits), examples.num_rows, engine.model.config.max_length), -np.inf, np.float32)
    for index, size, (_, judged) in _passes(engine, params, examples, "min_logit", logits, _JUDGE, backend):
        rows = batch_rows(examples, index, size)
        valid, width = np.flatnonzero(rows >= 0), judged.shape[-1]
        found[:, rows[valid], :width] = np.swapaxes(judged[stage, valid, : len(logits)], 0, 1)
    return found
