"""Run a model over a data set, in compiled passes of few static shapes."""

import itertools
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trbert_jax.errors import UserError
from trbert_jax.inference.outputs import Allocate, Collector, Outputs
from trbert_jax.io import streams
from trbert_jax.model.heads import Logits
from trbert_jax.model.model import Params, TokenReducingModel
from trbert_jax.model.packed import BACKENDS, DEFAULT_BACKEND
from trbert_jax.parallel import KEPT, ROWS, DeviceMesh, single_device
from trbert_jax.reduction.rules import (
    DEFAULT_RULE,
    DEFAULT_THRESHOLD,
    RULES,
    RuleSpec,
    Threshold,
    check_rule,
    point_thresholds,
)
from trbert_jax.reduction.selection import Selection, min_logit, random_key
from trbert_jax.tasks import TASKS
from trbert_jax.tasks.examples import Examples, batch_rows, length_batches, pad_batch, width_buckets
from trbert_jax.tasks.losses import Rows

Inputs = Mapping[str, Any]  # arrays [B, ...]
Program = Callable[[Params, Inputs], tuple[Logits, jax.Array]]
Key = tuple[str, str, tuple[tuple[str, tuple[int, ...], str], ...]]
AfterBatch = Callable[[Examples, np.ndarray, Logits], None]

# Sizes of batches of fewer examples than the batch size, so that memory follows the examples. Few and far
# between: each is compiled.
FEWER = tuple(2**k for k in range(5, 31, 2))
MANY_PROGRAMS = 24  # more than a few rules and batch sizes need; compiling this many gets a warning


def bucket_widths(backend: str, max_length: int) -> tuple[int, ...]:
    """Padded lengths of batches, ascending; the last one is `max_length`."""
    # The packed backend does not compute padding: one narrow shape is enough.
    return width_buckets(max_length, (0.25,)) if backend == "packed" else width_buckets(max_length)


def fitting_size(num_examples: int, batch_size: int) -> int:
    """Returns the size of batches of this many examples: `batch_size`, or the smallest of `FEWER` for all."""
    return min([size for size in FEWER if size >= num_examples] + [batch_size])


def check_backend(backend: str) -> None:
    """Raises a UserError for an unknown backend."""
    if backend not in BACKENDS:
        raise UserError(f"backend is {backend!r}; expected one of {', '.join(BACKENDS)}")


class CompiledForward:
    """The compiled forward passes of one model: one for each rule, backend and batch shape.

    With several `devices` each computes its share of a batch's rows, and every process gets all
    results. The number of examples of a batch must then be a multiple of the devices (`DeviceMesh.rounded`).
    """

    def __init__(self, model: TokenReducingModel, devices: DeviceMesh | None = None) -> None:
        self.model, self.devices = model, devices or single_device()
        self.compile_seconds: dict[Key, float] = {}  # seconds that compiling each program took
        self._compiled: dict[Key, Program] = {}

    @staticmethod
    def key(batch: Inputs, rule: str | RuleSpec = DEFAULT_RULE, backend: str = DEFAULT_BACKEND) -> Key:
        """Returns all that a program is compiled for: rule, backend, and name, shape and dtype of each input.

        Splits differ in their inputs: one has no labels, or other numbers of answers or options.
        """
        name = rule if isinstance(rule, str) else rule.name
        return name, backend, tuple(sorted((k, (*x.shape,), str(x.dtype)) for k, x in batch.items()))

    def get(
        self,
        params: Params,
        batch: Inputs,
        rule: str | RuleSpec = DEFAULT_RULE,
        backend: str = DEFAULT_BACKEND,
    ) -> Program:
        """Compiles the program for batches like this one (`key`), unless it is compiled already.

        Takes arrays, those of the batch [B * G, ...] with the rule's inputs, or their shapes. Returns
        `(params, batch) -> (logits, keep bool [stages, B * G, S])`: the logits that answers are read from
        (`Task.example_logits`); keep is bool [0, 1] for a rule that drops nothing.

        `min_logit` or `num_kept` [B * G, K, stages] makes K copies of each row, each with its own entry; the
        copies share the layers before the first point of reduction. Logits are then [B, K, ...] and keep is
        [stages, B * G, K, S].
        """
        spec = RULES[rule] if isinstance(rule, str) else rule
        key = self.key(batch, spec, backend)
        if key not in self._compiled:
            if len(self._compiled) + 1 == MANY_PROGRAMS:
                inputs = [{name: shape for name, shape, _ in key[2]} for key in self._compiled]
                shapes = ", ".join("{} x {}".format(*shape["input_ids"]) for shape in inputs)
                warnings.warn(
                    f"{MANY_PROGRAMS} programs have been compiled for one model, for batches of {shapes} and "
                    "now one more; each batch size compiles its own, so always ask for the same few",
                    RuntimeWarning,
                    stacklevel=3,
                )
            forward = BACKENDS[backend]

            def program(params: Params, batch: Inputs) -> tuple[Logits, jax.Array]:
                inputs, count = _copies(batch)
                if "row_keys" in spec.inputs:
                    keys = Rows(batch).keys(random_key(batch["seed"][0]))
                    inputs["row_keys"] = jnp.concatenate([keys] * (count or 1))
                output = forward(self.model, params, batch, rule=spec.build(inputs), num_copies=count or 1)
                keep = [_judged(s) if spec.judges else s.keep for s in output.selections]
                kept = jnp.stack(keep) if keep else jnp.zeros((0, 1), bool)
                rows, task = Rows(batch, count or 1), TASKS[self.model.config.task]
                logits = task.example_logits(output.logits, rows)
                if count:  # rows first, which devices share
                    logits = jax.tree.map(lambda x: _rows_first(x, count), logits)
                    kept = jax.vmap(lambda x: _rows_first(x, count))(kept)
                return logits, kept

            start = time.perf_counter()
            # Rows that depend on each other are all computed by every device.
            self._compiled[key] = self._compile(program, params, batch, divide=spec.exact)
            self.compile_seconds[key] = time.perf_counter() - start
        return self._compiled[key]

    def _compile(self, program: Program, params: Params, batch: Inputs, divide: bool) -> Program:
        if self.devices.is_single:
            return jax.jit(program).lower(params, batch).compile()
        place = self.devices.place_rows if divide else self.devices.replicate
        mapped = self.devices.by_rows(program, out_specs=(ROWS, KEPT)) if divide else program
        whole = self.devices.whole
        compiled = jax.jit(mapped, out_shardings=whole).lower(params, place(batch)).compile()

        def run(params: Params, batch: Inputs) -> tuple[Logits, jax.Array]:
            # Every device has all results; one copy is enough.
            return jax.tree.map(lambda x: x.addressable_data(0), compiled(params, place(batch)))

        return run


def _copies(batch: Inputs) -> tuple[dict[str, Any], int]:
    """Returns the inputs of a rule, those that differ by copy [K * R, ...], and K; 0 without copies."""
    inputs, count = dict(batch), 0
    for name in {"min_logit", "num_kept"} & batch.keys():
        if batch[name].ndim == 3:
            inputs[name] = jnp.swapaxes(batch[name], 0, 1).reshape(-1, batch[name].shape[-1])
            count = batch[name].shape[1]
    return inputs, count


def _rows_first(x: jax.Array, count: int) -> jax.Array:
    """Copies one after the other [K * B, ...] -> [B, K, ...]."""
    return jnp.swapaxes(x.reshape(count, -1, *x.shape[1:]), 0, 1)


def _judged(selection: Selection) -> jax.Array:
    """Returns the logit from which a threshold drops each token: inf if none does, -inf for no token."""
    always = selection.keep & (~selection.scored | (jnp.arange(selection.keep.shape[-1]) == 0))
    return jnp.where(always, jnp.inf, jnp.where(selection.scored, selection.logits, -jnp.inf))


class InferenceEngine:
    """Runs a model over examples; compiles once for each rule, backend and batch shape.

    `batch_size` examples a pass (see `fitting_size`), rounded up to a multiple of the devices; `programs` may
    be shared with other engines; `after_batch` is called with all examples, the batch's positions, int [b],
    and its logits.
    """

    def __init__(
        self,
        model: TokenReducingModel,
        batch_size: int,
        programs: CompiledForward | None = None,
        after_batch: AfterBatch | None = None,
    ) -> None:
        self.model, self.after_batch = model, after_batch
        self.programs = programs or CompiledForward(model)
        self.batch_size = self.programs.devices.rounded(batch_size)

    def num_batches(self, examples: Examples) -> int:
        """Number of batches of a run over `examples`."""
        return -(-len(examples) // self.batch_size)

    def run(
        self,
        params: Params,
        examples: Examples,
        *,
        rule: str = DEFAULT_RULE,
        backend: str = DEFAULT_BACKEND,
        threshold: Threshold = DEFAULT_THRESHOLD,
        num_kept: np.ndarray | None = None,
        scores: np.ndarray | None = None,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
        allocate: Allocate | None = None,
        start: int = 0,
    ) -> Outputs:
        """Runs the model with a rule of `RULES`.

        Args:
          params, examples: the model's parameters, and n examples of R rows.
          rule: a rule of evaluation, or with `num_kept` a baseline or `scores`.
          backend: key of `BACKENDS`.
          threshold: keep probability from which rule `threshold` keeps a token, or one for each point.
          num_kept: int [R, stages], tokens that a baseline keeps of each row.
          scores: float32 [R, stages, max_length], of rule `scores`.
          seed: of rule `random`.
          progress: called after each batch with the number of batches done and the batch's examples.
          allocate: makes the arrays for the logits, for example on disk; None makes them in memory.
          start: first batch to run; earlier batches are already in the arrays from `allocate`. Only for a
            rule that drops nothing.

        Raises `UserError` for an unknown rule or backend, a bad threshold, or logits that are not finite.
        """
        check_backend(backend)
        if num_kept is None:
            check_rule(rule, threshold, self.model.config.num_reductions)
            inputs = self.rule_inputs(examples, threshold)
        else:
            if "shared_length" in examples.row_targets:  # a rule decides on shared tokens only
                num_kept = num_kept - (examples.row_lengths - examples.row_targets["shared_length"])[:, None]
            # The seed is an input of the compiled program, which all seeds share.
            seeds = np.full(examples.num_rows, seed, np.int32)
            inputs = {"num_kept": num_kept.astype(np.int32), "seed": seeds}
            if scores is not None:
                inputs["guide"] = scores
        indices = itertools.islice(self.indices(examples, backend, shown=progress is None), start, None)
        batches = ((index, self.batch(examples, index, width, inputs)) for index, width in indices)
        return self.run_batches(params, examples, batches, RULES[rule], backend, progress, allocate, start)

    def indices(
        self, examples: Examples, backend: str, shown: bool = True
    ) -> Iterator[tuple[np.ndarray, int]]:
        """Yields positions, int [b], and width of each batch.

        Shows progress on a terminal after two seconds, unless `after_batch` does.
        """
        widths = bucket_widths(backend, self.model.config.max_length)
        shown = shown and self.after_batch is None
        with streams.bar(len(examples), "computing", "example", shown) as bar:
            for index, width in length_batches(examples, self.batch_size, widths):
                yield index, width
                bar.update(len(index))

    def run_batches(
        self,
        params: Params,
        examples: Examples,
        batches: Iterable[tuple[np.ndarray, Inputs]],
        rule: RuleSpec,
        backend: str,
        progress: Callable[[int, int], None] | None = None,
        allocate: Allocate | None = None,
        start: int = 0,
    ) -> Outputs:
        """Runs batches that are made already: positions of the examples, int [b], and arrays from `batch`."""
        collected, seconds = Collector(self.model.config, examples, rule.drops, allocate), 0.0
        params = self.programs.devices.replicate(params)
        for step, (index, batch) in enumerate(batches, start + 1):
            program = self.programs.get(params, batch, rule, backend)
            begun = time.perf_counter()
            output, keep = jax.block_until_ready(program(params, batch))
            seconds += time.perf_counter() - begun
            if self.after_batch:
                self.after_batch(examples, index, output)
            collected.put(index, len(batch["input_ids"]) // examples.group, output, np.asarray(keep))
            if progress:
                progress(step, len(index))
        return collected.outputs(seconds)

    def rule_inputs(
        self, examples: Examples, threshold: Threshold = DEFAULT_THRESHOLD
    ) -> dict[str, np.ndarray]:
        """Inputs of the rules of evaluation, one entry per row."""
        # Thresholds are an input of the compiled program, which all thresholds share.
        least = [min_logit(x) for x in point_thresholds(threshold, self.model.config.num_reductions)]
        return {"min_logit": np.tile(np.array(least, np.float32), (examples.num_rows, 1))}

    def batch(
        self, examples: Examples, index: np.ndarray, width: int, inputs: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Pads the examples at positions `index`, int [b], and adds the rule's inputs, arrays [R, ...]."""
        size = self.programs.devices.rounded(fitting_size(len(examples), self.batch_size))
        return self._batch(examples, index, width, inputs, size)

    def _batch(
        self,
        examples: Examples,
        index: np.ndarray,
        width: int,
        inputs: Mapping[str, np.ndarray],
        size: int,
    ) -> dict[str, np.ndarray]:
        batch = pad_batch(examples, index, size, width)
        rows = np.maximum(batch_rows(examples, index, size), 0)
        inputs = {name: values[rows] for name, values in inputs.items()}
        return batch | inputs | ({"guide": inputs["guide"][..., :width]} if "guide" in inputs else {})

    def compile(
        self, params: Params, example: Examples, rule: str = DEFAULT_RULE, backend: str = DEFAULT_BACKEND
    ) -> Iterator[tuple[str, float]]:
        """Compiles the programs for all padded lengths of examples that are made like `example`.

        Yields the name of each program and the seconds that compiling took. Raises UserError for an unknown
        rule or backend.
        """
        check_rule(rule)
        check_backend(backend)
        for width in bucket_widths(backend, self.model.config.max_length):
            inputs = self.rule_inputs(example)
            batch = self._batch(example, np.zeros(1, np.int64), width, inputs, self.batch_size)
            self.programs.get(params, batch, rule, backend)
            seconds = self.programs.compile_seconds[self.programs.key(batch, rule, backend)]
            yield f"{rule}, {backend}, {len(batch['input_ids'])} x {width} tokens", seconds
