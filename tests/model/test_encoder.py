import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import params_of, random_batch, take

from trbert_jax.model.config import ModelConfig
from trbert_jax.model.encoder import Encoder
from trbert_jax.model.model import ModelOutput, TokenReducingModel, forward
from trbert_jax.model.packed import BACKENDS
from trbert_jax.reduction import selection as tokens
from trbert_jax.reduction.selection import Rule, TokenSet

BERT = tiny_models.BERT
DISTILBERT = dataclasses.replace(tiny_models.DISTILBERT, num_layers=2)
SHALLOW = dataclasses.replace(BERT, num_layers=1)  # one point of reduction, before layer 0; compiles fast
LENGTHS = [9, 1, 5, 12]


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="num_copies")
def run(config: ModelConfig, rule: Rule | None, params: Any, batch: Any, num_copies: int = 1) -> ModelOutput:
    return forward(TokenReducingModel(config), params, batch, rule=rule, num_copies=num_copies)


def with_bias(params: Any, bias: float) -> Any:
    """Parameters whose selectors lean toward keeping (bias > 0) or dropping."""
    encoder = dict(params["encoder"])
    for name in ("selector_0", "selector_1"):
        output = {**encoder[name]["output"], "bias": encoder[name]["output"]["bias"] + bias}
        encoder[name] = {**encoder[name], "output": output}
    return {**params, "encoder": encoder}


def kept(output: ModelOutput) -> np.ndarray:
    return np.stack([s.keep for s in output.selections])


@pytest.mark.parametrize("config", [BERT, DISTILBERT], ids=lambda c: c.model_type)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=4, max_size=4),
    order=st.permutations(range(4)),
    seed=st.integers(0, 1000),
    bias=st.sampled_from([0.0, 0.0, 100.0, -100.0]),  # -100: everything is dropped but [CLS]
)
def test_batch_independence(
    config: ModelConfig, lengths: list[int], order: list[int], seed: int, bias: float
) -> None:
    params = with_bias(params_of(config), bias)
    classify = functools.partial(run, config, tokens.keep_probable, params)
    batch = random_batch(config, lengths, 12, seed)
    reference = classify(batch)
    if bias:
        expected = np.arange(12) < np.array(lengths)[:, None] if bias > 0 else np.arange(12) < 1
        np.testing.assert_array_equal(kept(reference), np.broadcast_to(expected, kept(reference).shape))

    one, wider = order[:1], random_batch(config, lengths, 17, seed)
    for output, rows in [(classify(take(batch, order)), order), (classify(take(wider, one)), one)]:
        np.testing.assert_allclose(output.logits, reference.logits[np.array(rows)], atol=1e-5)
        np.testing.assert_array_equal(kept(output)[..., :12], kept(reference)[:, rows])
        assert not kept(output)[..., 12:].any()


def test_dropping_is_deleting() -> None:
    """Masked execution of a row equals running the later layers on arrays without the dropped tokens."""
    batch = random_batch(BERT, [12], 12)
    draw = np.random.default_rng(1).uniform(size=batch["mask"].shape)
    actions = np.stack([draw < 0.6, draw < 0.3])  # some go at the first point, some at the second
    actions[..., 0] = True
    first, second = np.flatnonzero(actions[0, 0]), np.flatnonzero(actions[1, 0])
    assert 12 > len(first) > len(second) > 1

    @jax.jit
    def states_of_cls(params: Any) -> tuple[jax.Array, jax.Array]:
        def apply(*arguments: Any, method: str) -> Any:
            return Encoder(BERT).apply({"params": params["encoder"]}, *arguments, method=method)

        def layers(states: jax.Array, numbers: list[int]) -> jax.Array:
            return apply(
                TokenSet(states, jnp.ones(states.shape[:2], bool)), numbers, method="run_layers"
            ).states

        embedded = apply(batch["input_ids"], batch["mask"], batch["token_type_ids"], method="embed")
        before = apply(embedded, method="before_selection")
        masked, _ = apply(before, tokens.replay(jnp.asarray(actions)), method="from_selection")
        deleted = layers(before.states[:, first], [1])
        deleted = layers(deleted[:, np.isin(first, second)], [2, 3])
        return masked.states[:, 0], deleted[:, 0]

    masked, deleted = states_of_cls(params_of(BERT))
    np.testing.assert_allclose(masked, deleted, atol=1e-5)


@jax.jit
def gradients(params: Any, batch: Any) -> tuple[Any, ModelOutput]:

    def total(params: Any) -> tuple[jax.Array, ModelOutput]:
        output = forward(TokenReducingModel(SHALLOW), params, batch, rule=tokens.keep_probable)
        return jnp.sum(output.logits**2), output

    return jax.grad(total, has_aux=True)(params)


def test_decisions_have_no_gradient() -> None:
    """The task's loss reaches the encoder, but not the selectors through what they decide."""
    params = with_bias(params_of(SHALLOW), -2.4)  # so that about half is dropped
    grads, output = gradients(params, random_batch(SHALLOW, LENGTHS, 12))
    assert 4 < kept(output).sum() < sum(LENGTHS)
    for name, grad in grads["encoder"].items():
        largest = max(np.abs(x).max() for x in jax.tree.leaves(grad))
        assert (largest == 0) == name.startswith("selector_"), name


def test_rows_of_padding_are_finite() -> None:
    batch = random_batch(SHALLOW, LENGTHS, 12)
    grads, output = gradients(params_of(SHALLOW), {**batch, "mask": batch["mask"].at[1].set(False)})
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
