"""Packed execution computes what masked execution does."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_models import assert_same_gradients, params_of, random_batch

from trbert_jax.model import packed as packed_module
from trbert_jax.model.config import ModelConfig
from trbert_jax.model.model import ModelOutput, TokenReducingModel, forward
from trbert_jax.model.packed import pack, packed_forward
from trbert_jax.model.segment import KEPT, Segment, kept_numbers
from trbert_jax.model.tiles import Tiling
from trbert_jax.reduction import selection as tokens
from trbert_jax.reduction.policy_loss import advantage
from trbert_jax.training import objectives

BERT = tiny_models.BERT
WIDTH = 18
# Smaller than the batches: several large tiles, several small ones, several groups and buckets.
TILING = Tiling(tokens=16, rest=4, group_tokens=24, width_step=6)
NUM_ROWS = 5


@functools.partial(jax.jit, static_argnums=(0, 1))
def both(config: ModelConfig, rule_of: Any, params: Any, batch: Any) -> tuple[ModelOutput, ModelOutput]:
    model, rule = TokenReducingModel(config), rule_of(batch)
    masked = forward(model, params, batch, rule=rule)
    return masked, packed_forward(model, params, batch, rule=rule, tiling=TILING)


def assert_same(masked: ModelOutput, packed: ModelOutput) -> None:
    np.testing.assert_allclose(packed.logits, masked.logits, rtol=1e-5, atol=1e-5)
    for ours, reference in zip(packed.selections, masked.selections, strict=True):
        np.testing.assert_array_equal(ours.keep, reference.keep)
        np.testing.assert_array_equal(ours.scored, reference.scored)
        logits = np.where(reference.scored, reference.logits, 0)
        np.testing.assert_allclose(ours.logits, logits, rtol=1e-5, atol=1e-5)


RULES: dict[str, Callable[[dict[str, Any]], tokens.Rule | None]] = {
    "replay": lambda batch: tokens.replay(batch["actions"]),
    "reduced": lambda batch: tokens.keep_probable,
    "dense": lambda batch: None,
}
rows_of_tokens = st.one_of(
    st.lists(st.integers(1, WIDTH), min_size=NUM_ROWS, max_size=NUM_ROWS),
    st.integers(1, WIDTH).map(lambda n: [n] * NUM_ROWS),  # all rows equal
    st.just([1] * (NUM_ROWS - 1) + [WIDTH]),  # one huge row among tiny ones
)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(lengths=rows_of_tokens, keep=st.floats(0, 1), seed=st.integers(0, 2**16))
@example(lengths=[1] * NUM_ROWS, keep=0.0, seed=0)
@example(lengths=[WIDTH] * NUM_ROWS, keep=0.0, seed=0)  # every row keeps [CLS] alone
@example(lengths=[WIDTH] * NUM_ROWS, keep=1.0, seed=0)  # nothing is dropped, nothing is padding
def test_any_batch_and_any_selection(lengths: list[int], keep: float, seed: int) -> None:
    actions = np.random.default_rng(seed).random((2, NUM_ROWS, WIDTH)) < keep
    batch = {**random_batch(BERT, lengths, seed=seed, width=WIDTH), "actions": jnp.asarray(actions)}
    assert_same(*both(BERT, RULES["replay"], params_of(BERT), batch))


@pytest.mark.parametrize("rule", ["reduced", "dense"])
@pytest.mark.parametrize("num_layers", [1, 2, 3, 5])
@tiny_models.CONFIGS
def test_any_depth(config: ModelConfig, num_layers: int, rule: str) -> None:
    config = dataclasses.replace(config, num_layers=num_layers)
    batch = random_batch(config, [9, 1, 18, 5, 12], width=WIDTH)
    assert_same(*both(config, RULES[rule], params_of(config), batch))


@pytest.mark.parametrize("lengths", [[18], [1], [7, 18]])
def test_small_batches(lengths: list[int]) -> None:
    assert_same(*both(BERT, RULES["reduced"], params_of(BERT), random_batch(BERT, lengths, width=WIDTH)))


@functools.cache
def gradient_program(execute: Any, joint: bool) -> Any:
    def loss(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        samples = objectives.sample_policy(
            TokenReducingModel(BERT),
            params,
            batch,
            rule=objectives.sampling_rule(jax.random.key(5), batch, 3, imitating=False),
            num_samples=3,
            alpha=1.0,
            max_length=WIDTH,
            execute=execute,
        )
        make = objectives.joint_objective if joint else objectives.policy_objective
        # The policy's terms nearly cancel: their size, not the sum's, is what rounding is relative to.
        terms = jnp.abs(advantage(samples.reward) * samples.selector_nll).mean(0) + samples.task_loss.mean(0)
        return make(batch, samples).total.sum(), terms.sum()

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


packed = functools.partial(packed_forward, tiling=TILING)
# As on an accelerator.
at_once = functools.partial(packed_forward, tiling=dataclasses.replace(TILING, row_by_row=False))


@pytest.mark.parametrize(
    ("packed", "joint"),
    [(packed, True), (packed, False), pytest.param(at_once, True, marks=pytest.mark.slow)],
    ids=["joint", "policy", "gather"],
)
def test_gradients_of_sampled_runs(packed: Any, joint: bool) -> None:
    batch = random_batch(BERT, [9, 1, 18, 5], width=WIDTH)
    (reference, size), expected = gradient_program(forward, joint)(params_of(BERT), batch)
    (value, _), found = gradient_program(packed, joint)(params_of(BERT), batch)
    np.testing.assert_allclose(value, reference, rtol=0, atol=1e-5 * size)
    assert_same_gradients(found, expected)


def test_pack() -> None:
    states = jnp.arange(12.0)[:, None]
    valid = jnp.array([[True, False, True, True], [True, False, False, False], [True, True, True, True]])
    packed = pack(states, jnp.arange(12).reshape(3, 4), valid, TILING)
    assert int(packed.count) == 8
    np.testing.assert_array_equal(packed.states[:8, 0], [8, 9, 10, 11, 0, 2, 3, 4])  # the longest row first
    np.testing.assert_array_equal(packed.start, [4, 7, 0])
    np.testing.assert_array_equal(packed.length, [3, 1, 4])
    np.testing.assert_array_equal(packed.to_rows(packed.states[:, 0]), jnp.arange(12.0).reshape(3, 4) * valid)


@pytest.mark.parametrize("width", [1, 4, 5, 18, 256, 512, 1024])
def test_buckets_end_at_the_width_and_are_few(width: int) -> None:
    for tiling in (TILING, *(Tiling.for_backend(name, rows) for name in ("cpu", "gpu") for rows in (1, 32))):
        buckets = tiling.buckets(width)
        assert buckets == tuple(sorted(set(buckets)))
        assert len(buckets) <= 8
        assert buckets[-1] >= width
        assert len(buckets) == 1 or buckets[-2] < width
        assert all(wide <= narrow + 2 * buckets[0] for narrow, wide in itertools.pairwise(buckets))
        # A row that starts at the last token, and the last tile, end within the array.
        assert tiling.capacity(3 * width, width) >= 3 * width - 1 + buckets[-1]
        assert tiling.capacity(3 * width, width) >= -(-3 * width // tiling.tokens) * tiling.tokens


@pytest.fixture(scope="module")
def gradient() -> Any:
    """Returns gradients with dropout and what the backward pass kept; computes each once."""
    config = dataclasses.replace(BERT, num_layers=3)
    params, batch = params_of(config), random_batch(config, [18, 1, 7], width=WIDTH)
    used: list[str] = []

    def segment(layer: Any, num_layers: int, tiling: Tiling, kept: str) -> Segment:
        used.append(kept)
        return Segment(layer, num_layers, tiling, kept)

    @functools.cache
    def compute(tiling: Tiling, **memory: Any) -> tuple[Any, str]:
        options: Any = {"rule": tokens.keep_probable, "num_copies": 2, "tiling": tiling}
        run: Any = functools.partial(packed_forward, TokenReducingModel(config, **memory), **options)

        def loss(params: Any) -> jax.Array:
            return jnp.square(run(params, batch, dropout_rng=jax.random.key(1)).logits).sum()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(packed_module, "Segment", segment)
            return jax.jit(jax.grad(loss))(params), used[-1]

    return compute


@pytest.mark.parametrize("kept", [*KEPT, "remat"])
def test_memory_changes_no_gradient(kept: str, gradient: Any) -> None:
    """Whatever is computed again is computed with the same masks of dropout; so with other tiles."""
    slots = TILING.capacity(2 * 3 * WIDTH, WIDTH)
    memory = 4.0 * 3 * slots * kept_numbers(BERT).get(kept, 10**6)
    found, used = gradient(TILING, remat=kept == "remat", activation_memory=memory)
    assert used == ("states" if kept == "remat" else kept)
    expected, used = gradient(dataclasses.replace(TILING, tokens=8, group_tokens=40))
    assert used == "all"
    assert_same_gradients(found, expected)


def test_remat_of_the_masked_backend_changes_no_gradient() -> None:
    config = dataclasses.replace(tiny_models.BERT, num_layers=2)
    params, batch = params_of(config), random_batch(config, [18, 1, 7], width=18)

    def gradient(remat: bool) -> tuple[Any, str]:
        model = TokenReducingModel(config, remat=remat)

        def loss(params: Any) -> jax.Array:
            rng = jax.random.key(1)
            output = forward(model, params, batch, rule=tokens.keep_probable, dropout_rng=rng)
            return jnp.square(output.logits).sum()

        return jax.jit(jax.grad(loss))(params), str(jax.make_jaxpr(loss)(params))

    (kept, plain), (again, marked) = gradient(False), gradient(True)
    assert "remat" in marked or "checkpoint" in marked
    assert "remat" not in plain
    assert_same_gradients(again, kept)
