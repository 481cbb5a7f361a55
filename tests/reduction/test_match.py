"""Features of the other segment that selectors read: the documented formulas, in each backend."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from tiny_models import BERT, DISTILBERT, params_of, random_batch

from trbert_jax.errors import UserError
from trbert_jax.model.config import ModelConfig
from trbert_jax.model.engines import Graph
from trbert_jax.model.model import TokenReducingModel, forward
from trbert_jax.model.onnx_graph import onnx_model
from trbert_jax.model.packed import packed_forward
from trbert_jax.model.pretrained import load_pretrained
from trbert_jax.reduction import flops
from trbert_jax.reduction import selection as tokens
from trbert_jax.reduction.match import WINDOW, match_features

SIZES = ((3, 40), (9, 9), (2, 1), (5, 0), (0, 0))  # tokens of both segments after [CLS]
WIDTH = 50


def rows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns states, remaining tokens and token types, [B, S] each."""
    rng = np.random.default_rng(3)
    valid, types = np.zeros((2, len(SIZES), WIDTH), int)
    for row, (first, second) in enumerate(SIZES):
        valid[row, : 1 + first + second] = 1
        types[row, 1 + first : 1 + first + second] = 1
    valid[0, [2, 7, 8, 30]] = 0  # dropped before
    return rng.normal(1, 1, (len(SIZES), WIDTH, 6)).astype(np.float32), valid > 0, types


def expected(states: np.ndarray, valid: np.ndarray, types: np.ndarray) -> np.ndarray:
    """One row, written as the formulas are."""
    inside = [t for t in range(WIDTH) if valid[t] and t > 0]
    found = np.zeros((WIDTH, 2))
    if not inside:
        return found
    u = {t: states[t] - states[inside].mean(0) for t in inside}
    u = {t: x / np.linalg.norm(x) for t, x in u.items()}
    for t in inside:
        found[t, 0] = max((u[t] @ u[r] for r in inside if types[r] != types[t]), default=-1)
    for t in inside:
        near = [r for r in inside if types[r] == types[t] and abs(r - t) <= WINDOW]
        found[t, 1] = np.mean(found[near, 0])
    found[inside] -= found[inside].mean(0)
    found[inside] /= np.maximum(found[inside].std(0), 1e-3)
    return found


def test_features() -> None:
    states, valid, types = rows()
    found = match_features(jnp.asarray(states), jnp.asarray(valid), jnp.asarray(types))
    for row in range(len(SIZES)):
        # rsqrt(x + 1e-6) against 1 / sqrt(x)
        np.testing.assert_allclose(found[row], expected(states[row], valid[row], types[row]), atol=1e-3)
    gradient = jax.grad(lambda x: match_features(x, jnp.asarray(valid), jnp.asarray(types)).sum())
    np.testing.assert_array_equal(gradient(jnp.asarray(states)), 0)


@pytest.mark.parametrize("task", ["classification", "span"])
def test_same_in_each_backend(task: str) -> None:
    config = dataclasses.replace(BERT, selector_match=True, task=task)
    types = np.arange(18) >= np.array([[6], [3], [1], [5], [10]])
    batch = {**random_batch(config, [18, 9, 1, 5, 14], width=18), "token_type_ids": jnp.int32(types)}
    limits = np.array([-0.1, 0.1], np.float32)
    params, model = params_of(config), TokenReducingModel(config)

    @jax.jit
    def both(params: Any, batch: Any) -> Any:
        rule = tokens.keep_above(jnp.tile(jnp.asarray(limits), (10, 1)))
        return [run(model, params, batch, rule=rule, num_copies=2) for run in (forward, packed_forward)]

    masked, packed = both(params, batch)
    assert 5 < masked.selections[1].keep.sum() < masked.selections[0].scored.sum()
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["mask"], "token_type_ids": types}
    exported = onnx_model(config, jax.tree.map(np.asarray, params), (0.5, 0.5))
    inputs = {name: np.asarray(x, np.int64) for name, x in given.items()}
    graph = Graph(exported.SerializeToString(), "onnxruntime")
    onnx = graph.run({**inputs, "threshold": 1 / (1 + np.exp(-limits))})
    for stage, reference in enumerate(masked.selections):
        logits = np.where(reference.scored, reference.logits, 0)
        assert not (np.abs(logits - limits[stage]) < 1e-4)[np.asarray(reference.scored)].any()  # no ties
        np.testing.assert_allclose(packed.selections[stage].logits, logits, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(packed.selections[stage].keep, reference.keep)
        np.testing.assert_array_equal(onnx[f"kept_{stage}"], reference.keep[:5])
    np.testing.assert_allclose(packed.logits, masked.logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(onnx["logits"], masked.logits[:5], rtol=1e-4, atol=1e-4)


def test_flops() -> None:
    # As in test_flops, with 5 x 2 more inputs a token and n^2 H / 4 a point; H = 4.
    plain = flops.EncoderShape(4, 4, 3, num_outputs=3, reduction_layers=(1, 2), selector_hidden=5)
    match = dataclasses.replace(plain, selector_match=True)
    more = flops.exact_flops(match, [10], [[4, 2]]) - flops.exact_flops(plain, [10], [[4, 2]])
    assert more.tolist() == [2 * (14 * 10 + 100 + 16)]
    more = flops.reduced_flops(match, [10], [[4, 2]]) - flops.reduced_flops(plain, [10], [[4, 2]])
    assert more.tolist() == [2 * (6 * 10 + 16 + 4)]


def test_chosen_when_loading(tmp_path: Path) -> None:
    folder = tiny_models.tiny_model(tmp_path / "plain")
    assert "selector_match" not in (folder / "config.json").read_text()
    matching = load_pretrained(folder, selector_match=True)
    assert matching.newly_initialized == ("selectors",)
    assert matching.params["encoder"]["selector_0"]["hidden"]["kernel"].shape == (18, 32)
    saved = tiny_models.tiny_model(tmp_path / "match", dataclasses.replace(BERT, selector_match=True))
    assert tiny_models.quietly(saved).config.selector_match
    assert tiny_models.quietly(saved, selector_match=True).newly_initialized == ()
    back: ModelConfig = load_pretrained(saved, selector_match=False).config
    assert back == BERT


def test_needs_token_types(tmp_path: Path) -> None:
    folder = tiny_models.tiny_model(tmp_path / "model", DISTILBERT)
    with pytest.raises(UserError, match="distilbert has no token types"):
        load_pretrained(folder, selector_match=True)
    config = folder / "config.json"
    config.write_text(
        config.read_text().replace('"selector_hidden"', '"selector_match": true, "selector_hidden"')
    )
    with pytest.raises(UserError, match="token types"):
        load_pretrained(folder)
