"""A model over a whole data set: each example by itself, in few compiled shapes."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from common import random_examples

from trbert_jax.inference import engine
from trbert_jax.inference.engine import CompiledForward, InferenceEngine, bucket_widths
from trbert_jax.inference.outputs import Outputs
from trbert_jax.model.model import ModelOutput, TokenReducingModel, forward
from trbert_jax.model.packed import BACKENDS
from trbert_jax.reduction.selection import Rule, keep_probable

MAX_LENGTH = 48
CONFIG = dataclasses.replace(tiny_models.BERT, max_positions=MAX_LENGTH, max_length=MAX_LENGTH)
MODEL = TokenReducingModel(CONFIG)
# With this seed both points drop some tokens of most texts, and both labels are predicted.
PARAMS = jax.tree.map(jnp.asarray, tiny_models.tiny_params(CONFIG, seed=38, scale=0.3))
NUM, BATCH = 40, 32
RUNNER = InferenceEngine(MODEL, BATCH)
RNG = np.random.default_rng(0)
EXAMPLES = random_examples(CONFIG, RNG.integers(3, MAX_LENGTH + 1, NUM), RNG)


@pytest.fixture(scope="module")
def packed() -> Outputs:
    return RUNNER.run(PARAMS, EXAMPLES)


def masks(outputs: Outputs) -> np.ndarray:
    """bool [stages, n, MAX_LENGTH]."""
    return outputs.kept_masks(MAX_LENGTH).swapaxes(0, 1)


def one_batch(rule: Rule) -> ModelOutput:
    """All examples, padded to the full length."""
    mask = np.arange(MAX_LENGTH) < EXAMPLES.lengths[:, None]
    ids = np.zeros(mask.shape, np.int32)
    ids[mask] = EXAMPLES.tokens
    batch = {"input_ids": jnp.asarray(ids), "mask": jnp.asarray(mask)}
    return jax.jit(lambda params: forward(MODEL, params, batch, rule=rule))(PARAMS)


def assert_same(left: Outputs, right: Outputs) -> None:
    np.testing.assert_allclose(left.logits, right.logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(masks(left), masks(right))


def pick(outputs: Outputs, rows: list[int]) -> Outputs:
    kept = tuple([stage[row] for row in rows] for stage in outputs.kept)
    return Outputs(outputs.logits[rows], kept, outputs.lengths[rows], outputs.labels[rows], 1.0)


def test_outputs_are_the_models(packed: Outputs) -> None:
    """In the order of the examples, here one batch that is padded to the full length."""
    output = one_batch(keep_probable)
    np.testing.assert_allclose(packed.logits, output.logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(masks(packed), [s.keep for s in output.selections])
    np.testing.assert_array_equal(packed.num_kept.T, [s.num_kept for s in output.selections])
    np.testing.assert_array_equal(packed.lengths, EXAMPLES.lengths)
    assert packed.accuracy == np.mean(output.logits.argmax(-1) == EXAMPLES.labels)
    unknown = np.append(output.logits[:-1].argmax(-1), -1)  # of a text without a label
    assert dataclasses.replace(packed, labels=unknown).accuracy == 1
    assert packed.seconds > 0
    # Otherwise nothing here is tested.
    first, second = packed.num_kept.T
    assert min((first < packed.lengths).mean(), (second < first).mean(), (second > 1).mean()) > 0.5
    assert set(packed.logits.argmax(-1)) == {0, 1}


def test_a_threshold_for_each_point() -> None:
    """Keeps what the probabilities of the model's own logits say, point by point."""
    outputs = RUNNER.run(PARAMS, EXAMPLES, threshold=(0.3, 0.6))

    def rule(stage: int, logits: jax.Array, valid: jax.Array) -> jax.Array:
        return (jax.nn.sigmoid(logits) >= (0.3, 0.6)[stage]) & valid

    output = one_batch(rule)
    np.testing.assert_array_equal(masks(outputs), [s.keep for s in output.selections])
    assert (outputs.num_kept[:, 0] > outputs.num_kept[:, 1]).mean() > 0.5


def test_batch_max_fills_rows_up(packed: Outputs) -> None:
    filled = RUNNER.run(PARAMS, EXAMPLES, rule="batch_max")
    # Alone, a row is its own batch.
    alone = InferenceEngine(MODEL, 1).run(PARAMS, EXAMPLES.take([4]), rule="batch_max")
    assert_same(pick(packed, [4]), alone)
    assert (masks(filled)[0] >= masks(packed)[0]).all()
    longest_first = np.argsort(-EXAMPLES.lengths, kind="stable")
    for rows in (longest_first[:BATCH], longest_first[BATCH:]):
        most = packed.num_kept[rows, 0].max()
        np.testing.assert_array_equal(filled.num_kept[rows, 0], np.minimum(most, EXAMPLES.lengths[rows]))


@pytest.mark.parametrize("rule", ["random", "first_k"])
def test_baselines_keep_exactly_the_given_counts(packed: Outputs, rule: str) -> None:
    outputs = RUNNER.run(PARAMS, EXAMPLES, rule=rule, num_kept=packed.num_kept)
    np.testing.assert_array_equal(outputs.num_kept, packed.num_kept)
    first, second = masks(outputs)
    assert first[:, 0].all()
    assert second[:, 0].all()
    assert (second <= first).all()
    # The example's own tokens, and its own draws, in whatever batch.
    assert max(p[-1] - n for p, n in zip(outputs.kept[0], EXAMPLES.lengths, strict=True)) < 0
    assert_same(outputs, InferenceEngine(MODEL, 7).run(PARAMS, EXAMPLES, rule=rule, num_kept=packed.num_kept))
    if rule == "first_k":
        np.testing.assert_array_equal(masks(outputs), np.arange(MAX_LENGTH) < packed.num_kept.T[..., None])


def test_random_draws_follow_the_seed(packed: Outputs) -> None:
    def draw(seed: int, counts: np.ndarray) -> Outputs:
        return RUNNER.run(PARAMS, EXAMPLES, rule="random", num_kept=counts, seed=seed)

    one, again, two = (draw(seed, packed.num_kept) for seed in (1, 1, 2))
    assert_same(one, again)
    assert (masks(one) != masks(two)).any()
    # Over many draws each position of a text but the first is equally likely.
    kept = np.array([draw(seed, np.full((NUM, 2), 2)).kept[1] for seed in range(12)])  # [12, NUM, 2]
    places = (kept[..., 1] - 1) / (EXAMPLES.lengths - 2)
    assert places[:, EXAMPLES.lengths > 9].mean() == pytest.approx(0.5, abs=0.06)


def test_progress_counts_batches_and_examples(packed: Outputs) -> None:
    calls: list[tuple[int, int]] = []
    RUNNER.run(PARAMS, EXAMPLES, progress=lambda step, examples: calls.append((step, examples)))
    assert calls == [(1, BATCH), (2, NUM - BATCH)]
    assert RUNNER.num_batches(EXAMPLES) == 2
    some = [0, 7, 21]  # fewer than a batch
    assert RUNNER.num_batches(EXAMPLES.take(some)) == 1
    assert_same(pick(packed, some), RUNNER.run(PARAMS, EXAMPLES.take(some)))


def test_compiles_once_for_each_rule_and_width(monkeypatch: pytest.MonkeyPatch, packed: Outputs) -> None:
    traces = collections.Counter[int]()  # by width; compiled code is not traced again

    def counting(model, params, batch, **options):  # type: ignore[no-untyped-def]
        traces[batch["input_ids"].shape[1]] += 1
        return forward(model, params, batch, **options)

    monkeypatch.setitem(BACKENDS, "masked", counting)
    widths = bucket_widths("masked", MAX_LENGTH)
    assert len(widths) == 2
    fresh = InferenceEngine(MODEL, 8)
    for _ in range(2):
        fresh.run(PARAMS, EXAMPLES, backend="masked")
        fresh.run(PARAMS, EXAMPLES.take(range(23)), backend="masked", threshold=0.3)
        fresh.run(PARAMS, EXAMPLES, backend="masked", threshold=(0.3, 0.6))
    assert traces == dict.fromkeys(widths, 1)
    for seed in (0, 1):
        fresh.run(PARAMS, EXAMPLES, rule="random", backend="masked", num_kept=packed.num_kept, seed=seed)
    assert traces == dict.fromkeys(widths, 2)


def test_programs_know_all_their_inputs() -> None:
    """Splits share programs; one may lack labels, or have more of an input than another."""
    runner = InferenceEngine(MODEL, 4)
    labeled = EXAMPLES.take(range(4))
    withheld = dataclasses.replace(labeled, labels=np.full(4, -1, np.int32))
    wide = [np.zeros((4, count), np.int32) for count in (2, 5)]
    others = [dataclasses.replace(withheld, row_targets={"starts": starts}) for starts in wide]
    first, *rest = (runner.run(PARAMS, examples) for examples in (labeled, withheld, *others, labeled))
    for other in rest:
        np.testing.assert_array_equal(first.logits, other.logits)
    assert len(runner.programs.compile_seconds) == 4


def test_many_compilations_warn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "MANY_PROGRAMS", 2)
    programs = CompiledForward(MODEL)
    examples = EXAMPLES.take([0])
    InferenceEngine(MODEL, 1, programs).run(PARAMS, examples)
    with pytest.warns(RuntimeWarning, match="2 programs .* 1 x 48 .* batch size"):
        InferenceEngine(MODEL, 2, programs).run(PARAMS, examples)
    InferenceEngine(MODEL, 3, programs).run(PARAMS, examples)
