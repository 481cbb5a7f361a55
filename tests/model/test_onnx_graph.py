"""The exported graph has the logits and kept tokens of the JAX model, for each head and backbone."""

import dataclasses
from typing import Any

import golden_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trbert_jax.model.engines import Graph
from trbert_jax.model.model import forward
from trbert_jax.model.onnx_graph import onnx_model
from trbert_jax.reduction import selection as tokens

HALF = (0.5, 0.5)
KINDS = ("classification_", *golden_cases.TASKS)
CASES = sorted(path.name for path in golden_cases.DIRECTORY.iterdir() if path.name.startswith(KINDS))


def onnx_graph(*arguments: Any) -> Graph:
    return Graph(onnx_model(*arguments).SerializeToString(), "onnxruntime")


def inputs_of(case: golden_cases.Case) -> dict[str, np.ndarray]:
    batch = {name: np.asarray(x) for name, x in case.batch.items() if name != "teacher_logits"}
    ids = batch["input_ids"]
    types = batch.get("token_type_ids", np.zeros_like(ids))
    found = {"input_ids": ids, "attention_mask": batch["mask"], "token_type_ids": types}
    found |= {name: batch[name] for name in ("candidates", "sentences", "shared") if name in batch}
    found["group"] = np.array(case.group)
    return {name: x.astype(np.int64) for name, x in found.items()}


@pytest.mark.parametrize("name", CASES)
def test_as_in_jax(name: str) -> None:
    case = golden_cases.load(golden_cases.DIRECTORY / name)
    if case.shares_passage:
        inputs = dataclasses.replace(case.config.inputs, choices="shared")
        case.config = dataclasses.replace(case.config, inputs=inputs)
    batch = {key: x for key, x in case.batch.items() if key != "head_mask"}
    params = jax.tree.map(np.asarray, case.params)
    points, given = case.config.num_reductions, inputs_of(case)
    graph = onnx_graph(case.config, params, HALF[:points])
    checked = 0
    for threshold in ([0.5, 0.5], [0.3, 0.6], [0.45, 0.55], [0.55, 0.45]):
        limits = [tokens.min_logit(x) for x in threshold[:points]]
        rule = tokens.keep_above(jnp.tile(jnp.array(limits), (len(given["input_ids"]), 1)))
        expected = forward(case.model, case.params, batch, rule=rule)
        if any(is_tie(x, limit) for x, limit in zip(expected.selections, limits, strict=True)):
            continue  # rounding decides
        checked += 1
        found = graph.run({**given, "threshold": np.array(threshold[:points], np.float32)})
        check_logits(found, expected.logits)
        for stage, selection in enumerate(expected.selections):
            np.testing.assert_array_equal(found[f"kept_{stage}"], selection.keep)
    assert checked >= 2
    dense = onnx_graph(case.config, params).run(given)
    logits = forward(case.model, case.params, batch, rule=None).logits
    check_logits(dense, logits)
    if not case.config.reads_all_tokens:
        padded = onnx_graph(case.config, params, None, "float32", False, True)
        check_logits(padded.run(given), logits)


def is_tie(selection: tokens.Selection, limit: float) -> bool:
    """Whether a logit is as close to the threshold as the sum of terms as large as the largest is exact."""
    logits = np.asarray(selection.logits)[np.asarray(selection.scored)]
    return bool((np.abs(logits - limit) < 1e-5 * max(1, np.abs(logits).max())).any())


def check_logits(found: dict[str, np.ndarray], expected: Any) -> None:
    for name, logits in expected.items() if isinstance(expected, dict) else [("logits", expected)]:
        np.testing.assert_allclose(found[name], logits, rtol=1e-5, atol=1e-5)
