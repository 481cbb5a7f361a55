"""Run an exported model in another engine: ONNX Runtime or OpenVINO, in place of JAX.

    model = TRBert.from_pretrained("work/imdb/model", backend="onnxruntime")

Texts, tasks and results are those of JAX; only the passes of `InferenceEngine` are computed elsewhere.
"""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from trbert_jax.errors import UserError
from trbert_jax.inference.engine import InferenceEngine
from trbert_jax.inference.outputs import Collector, Outputs
from trbert_jax.model.config import ModelConfig
from trbert_jax.model.engines import RULES_OF_GRAPHS, Arrays, Graph
from trbert_jax.model.packed import DEFAULT_BACKEND
from trbert_jax.reduction.rules import DEFAULT_RULE, DEFAULT_THRESHOLD, RULES, Threshold, point_thresholds
from trbert_jax.tasks import TASKS
from trbert_jax.tasks.examples import Examples, length_batches, pad_batch
from trbert_jax.tasks.losses import Rows


class ExportedEngine(InferenceEngine):
    """Runs a graph over examples; nothing is compiled, and shapes are those of each batch."""

    def __init__(self, config: ModelConfig, graph: Graph, batch_size: int) -> None:
        self._config, self._graph, self.batch_size = config, graph, batch_size

    def compile(self, *arguments: Any) -> Iterator[tuple[str, float]]:
        """Yields nothing: there is nothing to compile."""
        yield from ()

    def run(
        self,
        params: Any,
        examples: Examples,
        *,
        rule: str = DEFAULT_RULE,
        backend: str = DEFAULT_BACKEND,
        threshold: Threshold = DEFAULT_THRESHOLD,
        **others: Any,
    ) -> Outputs:
        """Does what `InferenceEngine.run` does, with rules `threshold` and `dense`; `params` are not read."""
        engine = self._graph.engine
        if rule not in RULES_OF_GRAPHS or others:
            asked = ", ".join((f"rule {rule}", *others))
            raise UserError(f"{asked}: {engine} computes rules {' and '.join(RULES_OF_GRAPHS)} alone")
        if backend not in (DEFAULT_BACKEND, engine):
            raise UserError(f"backend is {backend!r}; the model was loaded for {engine}")
        if RULES[rule].drops and not self._graph.reduces:
            raise UserError(f"rule {rule} needs a graph that drops tokens; this one was exported without")
        points = self._config.num_reductions
        thresholds = point_thresholds(threshold, points) if RULES[rule].drops else (0.0,) * points
        # One half, the default here, stands for the graph's own default; (0.5, 0.5) does not.
        own = RULES[rule].drops and threshold == DEFAULT_THRESHOLD
        fixed = {} if own else {"threshold": np.array(thresholds, np.float32)}
        collected, seconds = Collector(self._config, examples, RULES[rule].drops), 0.0
        task, widths = TASKS[self._config.task], range(1, self._config.max_length + 1)
        for index, width in length_batches(examples, self.batch_size, widths):
            batch = pad_batch(examples, index, len(index), width)
            begun = time.perf_counter()
            found = self._graph.run({**self._inputs(batch, examples.group), **fixed})
            seconds += time.perf_counter() - begun
            kept = [found[f"kept_{stage}"] for stage in range(points)] if RULES[rule].drops else []
            logits = {name: x for name, x in found.items() if not name.startswith("kept_")}
            rows: Any = batch  # NumPy's arrays do for JAX's
            answers = task.example_logits(logits.get("logits", logits), Rows(rows))
            collected.put(index, len(index), answers, np.array(kept, bool))
        return collected.outputs(seconds)

    def _inputs(self, batch: Arrays, group: int) -> dict[str, npt.NDArray[Any]]:
        types = batch.get("token_type_ids", np.zeros_like(batch["input_ids"]))
        inputs = {"attention_mask": batch["mask"], "token_type_ids": types, "group": np.array(group)}
        others = {name: x for name, x in batch.items() if name in self._graph.inputs}
        return {name: x.astype(np.int64) for name, x in {**inputs, **others}.items()}
