import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from tiny_models import params_of, random_batch

from trbert_jax.model.config import ModelConfig
from trbert_jax.model.model import ModelOutput, TokenReducingModel, forward
from trbert_jax.model.packed import BACKENDS
from trbert_jax.reduction import selection as tokens
from trbert_jax.reduction.selection import Rule

BERT = tiny_models.BERT
SHALLOW = dataclasses.replace(BERT, num_layers=1)  # one point of reduction, before layer 0; compiles fast
LENGTHS = [9, 1, 5, 12]


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="num_copies")
def run(config: ModelConfig, rule: Rule | None, params: Any, batch: Any, num_copies: int = 1) -> ModelOutput:
    return forward(TokenReducingModel(config), params, batch, rule=rule, num_copies=num_copies)


def kept(output: ModelOutput) -> np.ndarray:
    return np.stack([s.keep for s in output.selections])


def test_rows_of_padding_are_finite() -> None:
    batch = random_batch(SHALLOW, LENGTHS, 12)
    batch = {**batch, "mask": batch["mask"].at[1].set(False)}

    def total(params: Any) -> tuple[jax.Array, ModelOutput]:
        output = forward(TokenReducingModel(SHALLOW), params, batch, rule=tokens.keep_probable)
        return jnp.sum(output.logits**2), output

    grads, output = jax.jit(jax.grad(total, has_aux=True))(params_of(SHALLOW))
    assert not kept(output)[:, 1].any()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((grads, output)))


def test_copies_equal_tiling() -> None:
    batch = random_batch(BERT, [7, 9], 9)
    tiled = {k: jnp.concatenate([v] * 3) for k, v in batch.items()}
    rule = tokens.replay(jnp.asarray(np.random.default_rng(0).uniform(size=(2, 6, 9)) < 0.6))
    shared = run(BERT, rule, params_of(BERT), batch, num_copies=3)
    explicit = run(BERT, rule, params_of(BERT), tiled)
    np.testing.assert_allclose(shared.logits, explicit.logits, atol=1e-5)
    np.testing.assert_array_equal(kept(shared), kept(explicit))
    for ours, theirs in zip(shared.selections, explicit.selections, strict=True):
        np.testing.assert_allclose(ours.logits, theirs.logits, atol=1e-5)
    assert np.ptp(shared.logits.reshape(3, 2, -1), axis=0).min() > 1e-4  # the copies differ
    dense = [
        f(TokenReducingModel(BERT), params_of(BERT), batch, rule=None, num_copies=3)
        for f in BACKENDS.values()
    ]
    np.testing.assert_allclose(dense[0].logits, dense[1].logits, atol=1e-5)


@pytest.mark.parametrize("execute", BACKENDS.values(), ids=BACKENDS)
def test_dropout_needs_its_key(execute: Any) -> None:
    batch = random_batch(SHALLOW, LENGTHS, 12)
    model, params = TokenReducingModel(SHALLOW), params_of(SHALLOW)
    noisy = jax.jit(lambda key: execute(model, params, batch, rule=None, dropout_rng=key).logits)
    first, again, other = (noisy(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    assert np.abs(first - run(SHALLOW, None, params, batch).logits).max() > 1e-3


def test_bfloat16() -> None:
    batch = random_batch(SHALLOW, LENGTHS, 12)
    half = TokenReducingModel(SHALLOW, jnp.bfloat16)
    output = jax.jit(lambda params: forward(half, params, batch, rule=tokens.keep_all))(params_of(SHALLOW))
    assert output.logits.dtype == jnp.float32
    assert all(s.logits.dtype == jnp.float32 for s in output.selections)
    reference = run(SHALLOW, tokens.keep_all, params_of(SHALLOW), batch)
    assert 0 < np.abs(output.logits - reference.logits).max() < 0.1
