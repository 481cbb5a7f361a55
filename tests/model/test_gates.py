"""Gates change no value; their derivative is what a kept token is worth."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models
from tiny_models import params_of, random_batch

from trbert_jax.model.config import ModelConfig
from trbert_jax.model.model import TokenReducingModel, forward
from trbert_jax.model.packed import packed_forward
from trbert_jax.model.tiles import Tiling
from trbert_jax.reduction import selection as tokens
from trbert_jax.reduction.gate import gate_states, gates, log_gate, secants, with_taps
from trbert_jax.reduction.selection import Selection, TokenSet

BERT = dataclasses.replace(tiny_models.BERT, num_layers=2)  # one point, before the last layer
DEEP = tiny_models.BERT  # two points, before layers 1 and 2
SPAN = dataclasses.replace(DEEP, task="span")
WIDTH, LENGTHS = 12, [9, 1, 12, 5]
TILING = Tiling(tokens=16, rest=4, group_tokens=24, width_step=6)  # several tiles and groups
packed = functools.partial(packed_forward, tiling=TILING)
at_once = functools.partial(packed_forward, tiling=dataclasses.replace(TILING, row_by_row=False))


@functools.partial(jax.jit, static_argnums=(0, 1))
def value(
    config: ModelConfig, execute: Any, params: Any, batch: Any, actions: jax.Array, bias: jax.Array
) -> jax.Array:
    """A function of the logits, with biases [points, B, S] in place of gates."""

    def gate(stage: int, selection: Selection) -> jax.Array:
        return jnp.where(selection.keep, bias[stage], 0.0)

    rule = tokens.replay(actions)
    output = execute(TokenReducingModel(config), params, batch, rule=rule, gate=gate)
    weights = jnp.cos(jnp.arange(output.logits.size)).reshape(output.logits.shape)
    if config.reads_all_tokens:
        weights = jnp.where(batch["mask"][:, None], weights, 0)
    return jnp.sum(jnp.tanh(output.logits) * weights)


slope = jax.jit(jax.value_and_grad(value, argnums=5), static_argnums=(0, 1))


def inputs(config: ModelConfig) -> tuple[Any, Any]:
    return params_of(config), random_batch(config, LENGTHS, WIDTH)


@pytest.mark.parametrize(
    ("config", "execute"),
    [(SPAN, forward), (SPAN, packed), (BERT, packed)],
    ids=["span-masked", "span-packed", "packed"],
)
def test_gates_change_no_value(config: ModelConfig, execute: Any) -> None:
    run = functools.partial(execute, TokenReducingModel(config), rule=tokens.keep_probable, num_copies=2)
    with jax.disable_jit():  # a compiler may round two programs differently
        plain = run(*inputs(config))
        gated = run(*inputs(config), gate=gates())
    jax.tree.map(np.testing.assert_array_equal, gated, plain)
    assert all(0 < s.keep.sum() < 2 * sum(LENGTHS) for s in plain.selections)


@pytest.mark.parametrize(
    ("config", "execute"),
    [(SPAN, packed), (BERT, packed), pytest.param(BERT, at_once, marks=pytest.mark.slow)],
    ids=["span", "classification", "gather"],
)
def test_gradient_by_a_bias(config: ModelConfig, execute: Any) -> None:
    """A finite difference of the score bias; packed as masked, also where the bias is not 0."""
    rng = np.random.default_rng(3)
    shape = (config.num_reductions, len(LENGTHS), WIDTH)
    actions = jnp.asarray(rng.random(shape) < 0.7)
    # No gradient passes through a restored state; without a second drop, none of them depends on a gate.
    once = jnp.broadcast_to(actions[0], shape)
    for kept, bias in ((actions, jnp.asarray(rng.normal(size=shape), jnp.float32)), (once, jnp.zeros(shape))):
        expected, gradient = slope(config, forward, *inputs(config), kept, bias)
        found, packed_gradient = slope(config, execute, *inputs(config), kept, bias)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        largest = np.abs(gradient).max()
        np.testing.assert_allclose(packed_gradient, gradient, rtol=1e-4, atol=1e-5 * largest)
    for place in np.argsort(-np.abs(gradient), axis=None)[:6]:
        step = jnp.zeros(gradient.size).at[place].set(2e-3).reshape(shape)
        ahead, behind = (value(config, forward, *inputs(config), once, x) for x in (step, -step))
        np.testing.assert_allclose((ahead - behind) / 4e-3, gradient.flatten()[place], rtol=2e-2)


def test_a_closed_gate_drops_the_token() -> None:
    """With log g of minus infinity at a point a token is missing from there on."""
    every, run = jnp.ones((2, len(LENGTHS), WIDTH), bool), functools.partial(value, DEEP, forward)
    whole = run(*inputs(DEEP), every, jnp.zeros(every.shape))
    for stage in range(2):
        row = (stage, 2, slice(3, 9))
        shut = run(*inputs(DEEP), every, jnp.zeros(every.shape).at[row].set(-1e9))
        gone = run(*inputs(DEEP), every.at[row].set(False), jnp.zeros(every.shape))
        np.testing.assert_allclose(shut, gone, rtol=1e-5)
        assert abs(gone - whole) > 1e-3


def test_gated_states_tend_to_those_restored() -> None:
    """Linear in b; one step down is the state with which the token would have been dropped."""
    last, before = np.random.default_rng(0).normal(size=(2, 1, 3, 4)).astype(np.float32)
    restored = TokenSet(jnp.asarray(last), jnp.ones((1, 3), bool))
    states = gate_states(restored, [(jnp.array([[0.0, -1.0, 0.0]]), jnp.asarray(before))]).states
    np.testing.assert_array_equal(states[:, ::2], last[:, ::2])
    np.testing.assert_allclose(states[:, 1], before[:, 1], rtol=1e-5, atol=1e-6)


def test_derivative_of_a_gate() -> None:
    """1 - p of a token drawn, p (1 - p) of one above a threshold, 0 of [CLS], dropped and unjudged tokens."""
    logits = jnp.array([[1.5, 1.5, -0.5, 1.5, 1.5]] * 2)
    keep, scored = jnp.array([[1, 1, 1, 0, 1]] * 2, bool), jnp.array([[1, 1, 1, 1, 0]] * 2, bool)

    def opened(logits: jax.Array) -> jax.Array:
        return log_gate(Selection(logits, scored, keep), jnp.array([True, False]))

    np.testing.assert_array_equal(opened(logits), 0)
    p = 1 / (1 + np.exp([-1.5, 0.5]))
    expected = np.zeros((2, 5))
    expected[:, 1:3] = [1 - p, p * (1 - p)]
    np.testing.assert_allclose(jax.grad(lambda x: opened(x).sum())(logits), expected, rtol=1e-5)


def test_secant_is_exact_for_a_square() -> None:
    """Of f = h (x - y)^2 / 2, linear in the gates: what the loss would lose without each token alone."""
    worth = jnp.array([[0.5, -1.0, 0.3], [2.0, 0.1, 0.0]])
    scale, target, weight = jnp.array([2.0, 0.7]), jnp.array([0.4, -1.0]), jnp.array([0.25, 0.5])

    def loss(x: jax.Array) -> jax.Array:
        return scale * (x - target) ** 2 / 2

    def total(bias: jax.Array) -> jax.Array:
        taps: list[jax.Array] = []
        gate = secants(lambda stage, selection: bias, taps)
        f = loss((worth * (1 + gate(0, None))).sum(1))  # type: ignore[arg-type]
        return (weight * with_taps(f, taps, f)).sum()

    x = worth.sum(1)
    np.testing.assert_allclose(total(0 * worth), (weight * loss(x)).sum(), rtol=1e-6)
    without = jax.vmap(lambda w: loss(x - w), in_axes=1, out_axes=1)(worth)
    expected = weight[:, None] * (loss(x)[:, None] - without)
    np.testing.assert_allclose(jax.grad(total)(0 * worth), expected, rtol=1e-4, atol=1e-5)


def trained() -> tuple[Any, Any]:
    """A model that tells, with tokens missing, whether 11 outnumbers 12; rows of [CLS] and six tokens."""
    rng = np.random.default_rng(1)
    ids = rng.integers(9, 14, (256, 7)).astype(np.int32)
    ids[:, 0] = 2
    labels = jnp.asarray((ids == 11).sum(1) > (ids == 12).sum(1), jnp.int32)
    batch = {"input_ids": jnp.asarray(ids), "mask": jnp.ones(ids.shape, bool), "labels": labels}
    optimizer = optax.adam(1e-2)

    def step(i: int, state: Any) -> Any:
        params, moments = state
        kept = jax.random.uniform(jax.random.key(i), (1, *ids.shape)) < 0.7
        gradient = jax.grad(lambda params: losses(params, batch, kept)[0].mean())(params)
        updates, moments = optimizer.update(gradient, moments)
        return optax.apply_updates(params, updates), moments

    params = jax.tree.map(jnp.asarray, tiny_models.tiny_params(BERT, seed=31, scale=0.2))
    params, _ = jax.jit(lambda x: jax.lax.fori_loop(0, 80, step, (x, optimizer.init(x))))(params)
    return params, {key: x[:64] for key, x in batch.items()}


def losses(params: Any, batch: Any, actions: jax.Array, gate: Any = None) -> tuple[jax.Array, jax.Array]:
    """Losses [B] and selector logits with actions, bool [S] or [1, B, S]."""
    rule = tokens.replay(jnp.broadcast_to(actions, (1, *batch["mask"].shape)))
    output = forward(TokenReducingModel(BERT), params, batch, rule=rule, gate=gate)
    loss = optax.softmax_cross_entropy_with_integer_labels(output.logits, batch["labels"])
    return loss, output.selections[0].logits


def test_expected_gradient_over_all_actions() -> None:
    """With six tokens: equal to the first-order formula, and close to the gradient of the expected loss."""
    params, batch = trained()
    every = jnp.asarray([(1, *x) for x in itertools.product((0, 1), repeat=6)], bool)  # [64, S]

    def one(actions: jax.Array) -> tuple[jax.Array, ...]:
        """With gates, the gradients by the logits and by b; loss and logits: [B, ...] each."""
        loss, logits = losses(params, batch, actions)

        def total(x: jax.Array, gate: Any) -> jax.Array:
            return losses(params, batch, actions, lambda _, selection: gate(x, selection))[0].sum()

        gated = jax.grad(total)(logits, lambda x, s: log_gate(dataclasses.replace(s, logits=x)))
        by_bias = jax.grad(total)(jnp.zeros_like(logits), lambda x, s: jnp.where(s.keep, x, 0.0))
        return gated, by_bias, loss, logits

    gated, by_bias, loss, logits = map(np.asarray, jax.jit(jax.vmap(one))(every))
    p = 1 / (1 + np.exp(-logits[0, :, 1:]))  # [B, 6]
    acted = np.asarray(every)[:, None, 1:]  # [64, 1, 6]
    chance = np.prod(np.where(acted, p, 1 - p), -1, keepdims=True)  # [64, B, 1]
    expected = (chance * gated[..., 1:]).sum(0)
    formula = (1 - p) * (chance * acted * by_bias[..., 1:]).sum(0)
    np.testing.assert_allclose(expected, formula, rtol=1e-4, atol=1e-6)
    # The derivative of a probability by the logits is the probability times a - p.
    exact = (chance * (acted - p) * loss[..., None]).sum(0)
    cosine = (expected * exact).sum(-1) / np.linalg.norm(expected, axis=-1) / np.linalg.norm(exact, axis=-1)
    assert np.median(cosine) > 0.9  # of an example; few examples have nearly all of the sum
