"""The ways to run a model that a benchmark compares, and how they are timed."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trbert_jax.inference.benchmark.workload import Workload
from trbert_jax.inference.engine import CompiledForward, Inputs, LogitStore, bucket_widths
from trbert_jax.model.heads import Logits
from trbert_jax.model.model import Params
from trbert_jax.reduction import selection as tokens
from trbert_jax.reduction.flops import EncoderShape, dense_flops, reduced_flops
from trbert_jax.reduction.rules import RULES, RuleSpec
from trbert_jax.tasks.batching import batch_rows

Announce = Callable[[str], Any]

_SETTLE_SECONDS = 0.02  # threads of one library may spin for a while after their work


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to run the batches of a workload.

    Attributes:
      rule, backend: what runs.
      selects: `each` (every text by itself), `batch_max` or None: what decides about tokens, for actions that
        are given.
      full_length: whether batches are padded to the longest length that the model takes.
      padded: whether padding and dropped tokens are computed.
    """

    rule: str
    backend: str
    selects: str | None
    full_length: bool = False
    padded: bool = False


WAYS = {
    "packed": Way("threshold", "packed", "each"),
    "masked": Way("threshold", "masked", "each", padded=True),
    "masked_full": Way("threshold", "masked", "each", full_length=True, padded=True),
    "batch_max": Way("batch_max", "packed", "batch_max"),
    "dense": Way("dense", "packed", None),
    "dense_full": Way("dense", "masked", None, full_length=True, padded=True),
}


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedRun:
    """A way to run a workload in batches of one size: compiled, warm, and what came out.

    Attributes:
      name: of the way.
      run_batch: runs the batch of this number and waits for its logits.
      num_batches: of the workload.
      num_texts: n, in whole batches.
      flops: of a text on average, by the published count; padding counts where it is computed.
      compile_seconds: of all shapes; None where nothing is compiled.
      peak_memory_bytes: parameters, inputs, outputs and temporaries of the largest program; None where it
        is not known. From the compiler: a device's own counter cannot be set back between programs.
      logits: float32 [n, C], or what else the task has, see `trbert_jax.inference.engine.Outputs`.
      keep: bool [n, stages, max_length], an entry a row where texts have several; None where nothing is
        dropped.
    """

    name: str
    run_batch: Callable[[int], Any]
    num_batches: int
    num_texts: int
    flops: float
    compile_seconds: float | None
    peak_memory_bytes: int | None
    logits: Logits
    keep: np.ndarray | None


def prepare(
    name: str, programs: CompiledForward, params: Params, workload: Workload, batch_size: int
) -> PreparedRun:
    """Compiles one of `WAYS` for all batches of a workload and runs each once.

    Args:
      name: key of `WAYS`.
      programs: of the model; what they hold already is not compiled again.
      params: the model's parameters, on the device.
      workload: what to run.
      batch_size: texts of a batch.
    """
    way = WAYS[name]
    rule = RULES[way.rule] if workload.actions is None else _with_actions(way)
    longest = workload.max_length
    batches = workload.batches(
        batch_size, (longest,) if way.full_length else bucket_widths(way.backend, longest)
    )
    compiled = [programs.get(params, batch, rule, way.backend) for batch in batches]

    def run_batch(number: int) -> Any:
        return jax.block_until_ready(compiled[number](params, batches[number]))

    config, features = programs.model.config, workload.features
    num_texts, stages = workload.num_texts(batch_size), config.num_reductions
    num_rows = int(features.rows(np.arange(num_texts)).max()) + 1
    keep = np.zeros((num_rows, stages, workload.max_length), bool)
    store = None
    for number, index in enumerate(workload.indices(batch_size)):
        output, kept = run_batch(number)
        rows = batch_rows(features, index, batch_size)
        store = store or LogitStore(config, features.take(np.arange(num_texts)), output)
        store.put(index, rows, output)
        if way.selects:
            there = np.flatnonzero(rows >= 0)
            keep[rows[there], :, : kept.shape[-1]] = np.asarray(kept).swapaxes(0, 1)[there]
    keys = {(rule.name, way.backend, *batch["input_ids"].shape) for batch in batches}
    if way.padded:
        shapes = [batch["input_ids"].shape for batch in batches]
        computed = np.concatenate([np.full(count, width) for count, width in shapes])
    else:
        computed = features.row_lengths[:num_rows]
    shape = EncoderShape.of(config)
    if not way.selects:
        flops = dense_flops(shape, computed)
    elif way.padded:  # the selectors judge every token, and every token goes on
        flops = reduced_flops(shape, computed, np.repeat(computed[:, None], stages, axis=1))
    else:
        flops = reduced_flops(shape, computed, keep.sum(-1))
    return PreparedRun(
        name=name,
        run_batch=run_batch,
        num_batches=len(batches),
        num_texts=num_texts,
        flops=float(flops.sum() / num_texts),
        compile_seconds=sum(programs.compile_seconds[key] for key in keys),
        peak_memory_bytes=max(memory_bytes(program) for program in compiled),
        logits=None if store is None else store.logits,
        keep=keep if way.selects else None,
    )


def memory_bytes(program: Any) -> int:
    """Peak memory of a compiled program as its compiler planned it: arguments, outputs, temporaries."""
    plan = program.memory_analysis()
    total = plan.temp_size_in_bytes + plan.argument_size_in_bytes + plan.output_size_in_bytes
    return int(total - plan.alias_size_in_bytes)


def time_runs(
    runs: Sequence[PreparedRun], repeats: int, announce: Announce = lambda line: None
) -> dict[str, np.ndarray]:
    """Times prepared runs in turns: all batches of one, then of the next, and again.

    Args:
      runs: with different names.
      repeats: how often.
      announce: called with a line of text before each repeat.

    Returns:
      Name -> seconds of each batch, float64 [repeats, num_batches].
    """
    seconds = {run.name: np.zeros((repeats, run.num_batches)) for run in runs}
    for repeat in range(repeats):
        announce(f"repeat {repeat + 1} of {repeats}")
        for run in runs:
            time.sleep(_SETTLE_SECONDS)
            for number in range(run.num_batches):
                start = time.perf_counter()
                run.run_batch(number)
                seconds[run.name][repeat, number] = time.perf_counter() - start
    return seconds


def _with_actions(way: Way) -> RuleSpec:
    """The rule with the selections of `batch["actions"]` in place of the model's."""

    def given(batch: Inputs) -> tokens.Rule:
        actions = jnp.swapaxes(batch["actions"], 0, 1)  # [stages, B, S]
        # Looks at the logits too: selectors that nobody asks the compiler would leave out.
        return lambda stage, logits, valid: actions[stage] & (logits > -jnp.inf) & valid

    def given_batch_max(batch: Inputs) -> tokens.Rule:
        each = given(batch)

        def rule(stage: int, logits: jax.Array, valid: jax.Array) -> jax.Array:
            wanted = jnp.where(each(stage, logits, valid), 1.0, -1.0)
            return tokens.keep_batch_max(stage, wanted, valid)

        return rule

    rules = {"each": given, "batch_max": given_batch_max}
    if not way.selects:
        return RULES[way.rule]
    return dataclasses.replace(RULES[way.rule], name=f"given {way.rule}", build=rules[way.selects])
