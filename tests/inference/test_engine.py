"""A model over a whole feature set: every example by itself, in few compiled shapes."""

from __future__ import annotations

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from trbert_jax.errors import UserError
from trbert_jax.inference import engine
from trbert_jax.inference.engine import CompiledForward, InferenceEngine, Outputs
from trbert_jax.model.model import TokenReducingModel, forward
from trbert_jax.model.packed import BACKENDS
from trbert_jax.reduction import selection as tokens
from trbert_jax.tasks.examples import Examples, width_buckets

MAX_LENGTH = 48
CONFIG = dataclasses.replace(tiny_models.BERT, max_positions=MAX_LENGTH, max_length=MAX_LENGTH)
MODEL = TokenReducingModel(CONFIG)
# With this seed both points drop some tokens of most texts, and both labels are predicted.
PARAMS = jax.tree.map(jnp.asarray, tiny_models.tiny_params(CONFIG, seed=38, scale=0.3))
NUM = 40
WIDTHS = width_buckets(MAX_LENGTH)
BATCH = 32


def make_features(num: int = NUM, seed: int = 0) -> Examples:
    """Random examples of 3 to `MAX_LENGTH` tokens."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, MAX_LENGTH + 1, num)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = rng.integers(5, CONFIG.vocab_size, offsets[-1]).astype(np.int32)
    ids[offsets[:-1]], ids[offsets[1:] - 1] = 2, 3  # [CLS] and [SEP]
    labels = rng.integers(0, 2, num).astype(np.int32)
    return Examples(ids, offsets, None, labels, [str(i) for i in range(num)], 0, "")


FEATURES = make_features()


@pytest.fixture(scope="module")
def runner() -> InferenceEngine:
    return InferenceEngine(MODEL, BATCH)


@pytest.fixture(scope="module")
def masked(runner: InferenceEngine) -> Outputs:
    return runner.run(PARAMS, FEATURES)


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> collections.Counter[int]:
    """Width -> how often a program was traced; compiled code does not come by here."""
    counts: collections.Counter[int] = collections.Counter()

    def counting(model, params, batch, **options):  # type: ignore[no-untyped-def]
        counts[batch["input_ids"].shape[1]] += 1
        return forward(model, params, batch, **options)

    monkeypatch.setitem(BACKENDS, "masked", counting)
    return counts


def whole_batch() -> dict[str, jax.Array]:
    """All examples in one batch, padded to the full length."""
    ids, mask = np.zeros((2, NUM, MAX_LENGTH), np.int32)
    for row in range(NUM):
        length = FEATURES.lengths[row]
        ids[row, :length] = FEATURES.tokens[FEATURES.offsets[row] : FEATURES.offsets[row + 1]]
        mask[row, :length] = 1
    return {"input_ids": jnp.asarray(ids), "mask": jnp.asarray(mask > 0)}


def kept_masks(outputs: Outputs) -> np.ndarray:
    """bool [stages, n, MAX_LENGTH]."""
    masks = np.zeros((len(outputs.kept), len(outputs.labels), MAX_LENGTH), bool)
    for stage, rows in enumerate(outputs.kept):
        for row, positions in enumerate(rows):
            masks[stage, row, positions] = True
    return masks


def assert_same(left: Outputs, right: Outputs) -> None:
    np.testing.assert_allclose(left.logits, right.logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(kept_masks(left), kept_masks(right))


# Every example by itself --------------------------------------------------------------------------


def test_outputs_are_the_models(masked: Outputs) -> None:
    """Rows in the order of the features, against the model on one batch of all of them."""
    output = jax.jit(lambda params: forward(MODEL, params, whole_batch(), rule=tokens.keep_probable))(PARAMS)
    np.testing.assert_allclose(masked.logits, output.logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(kept_masks(masked), [s.keep for s in output.selections])
    np.testing.assert_array_equal(masked.num_kept.T, [s.num_kept for s in output.selections])
    np.testing.assert_array_equal(masked.lengths, FEATURES.lengths)
    np.testing.assert_array_equal(masked.labels, FEATURES.labels)
    assert masked.accuracy == np.mean(output.logits.argmax(-1) == FEATURES.labels)
    assert masked.seconds > 0


def test_the_model_drops_tokens(masked: Outputs) -> None:
    """And predicts both labels: else nothing here is tested."""
    first, second = masked.num_kept.T
    assert (first < masked.lengths).mean() > 0.5
    assert (second < first).mean() > 0.5
    assert (second > 1).mean() > 0.5
    assert set(masked.logits.argmax(-1)) == {0, 1}


def test_alone_and_in_another_order(runner: InferenceEngine, masked: Outputs) -> None:
    order = np.random.default_rng(1).permutation(NUM)
    shuffled = runner.run(PARAMS, FEATURES.take(order))
    assert_same(pick(masked, order), shuffled)
    alone = InferenceEngine(MODEL, 1)
    for row in range(0, NUM, 5):
        assert_same(pick(masked, [row]), alone.run(PARAMS, FEATURES.take([row])))


def pick(outputs: Outputs, rows: list[int] | np.ndarray) -> Outputs:
    kept = tuple([stage[row] for row in rows] for stage in outputs.kept)
    return Outputs(outputs.logits[rows], kept, outputs.lengths[rows], outputs.labels[rows], 1.0)


def test_a_batch_larger_than_the_data(runner: InferenceEngine, masked: Outputs) -> None:
    some = [0, 7, 21]
    assert runner.num_batches(FEATURES.take(some)) == 1
    assert_same(pick(masked, some), runner.run(PARAMS, FEATURES.take(some)))


def test_dropped_tokens_are_gone(masked: Outputs) -> None:
    """Replaying what was kept gives the same, whatever the dropped tokens were after the first layer."""
    actions = jnp.asarray(kept_masks(masked))
    replay = jax.jit(lambda params: forward(MODEL, params, whole_batch(), rule=tokens.replay(actions)))
    np.testing.assert_allclose(masked.logits, replay(PARAMS).logits, rtol=1e-5, atol=1e-5)


def test_dense_keeps_no_account(runner: InferenceEngine) -> None:
    outputs = runner.run(PARAMS, FEATURES, rule="dense")
    assert outputs.kept == ()
    assert outputs.num_kept.shape == (NUM, 0)
    dense = jax.jit(lambda params: forward(MODEL, params, whole_batch(), rule=None).logits)
    np.testing.assert_allclose(outputs.logits, dense(PARAMS), rtol=1e-5, atol=1e-5)


def test_batch_max_fills_rows_up(runner: InferenceEngine, masked: Outputs) -> None:
    filled = runner.run(PARAMS, FEATURES, rule="batch_max")
    # Alone, a row is its own batch.
    assert_same(
        pick(masked, [4]), InferenceEngine(MODEL, 1).run(PARAMS, FEATURES.take([4]), rule="batch_max")
    )
    assert (kept_masks(filled)[0] >= kept_masks(masked)[0]).all()
    longest_first = np.argsort(-FEATURES.lengths, kind="stable")
    for rows in (longest_first[:BATCH], longest_first[BATCH:]):
        most = masked.num_kept[rows, 0].max()
        np.testing.assert_array_equal(filled.num_kept[rows, 0], np.minimum(most, FEATURES.lengths[rows]))


def test_threshold_moves_between_keeping_all_and_nothing(runner: InferenceEngine, masked: Outputs) -> None:
    assert_same(masked, runner.run(PARAMS, FEATURES, threshold=0.5))
    few, many, every = (kept_masks(runner.run(PARAMS, FEATURES, threshold=t)) for t in (0.55, 0.45, 1e-9))
    assert (few[0] <= kept_masks(masked)[0]).all()
    assert (kept_masks(masked)[0] <= many[0]).all()
    assert few[0].sum() < many[0].sum()
    np.testing.assert_array_equal(every[1].sum(-1), FEATURES.lengths)


@pytest.mark.parametrize(
    ("rule", "threshold", "words"),
    [
        ("threshold", 0.0, "above 0 and below 1"),
        ("threshold", 1.5, "above 0 and below 1"),
        ("threshold", float("nan"), "above 0 and below 1"),
        ("dense", 0.4, "rule dense has none"),
        ("batch_max", 0.4, "rule batch_max has none"),
    ],
)
def test_bad_threshold(runner: InferenceEngine, rule: str, threshold: float, words: str) -> None:
    with pytest.raises(UserError, match=words):
        runner.run(PARAMS, FEATURES, rule=rule, threshold=threshold)


# Baselines ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["random", "first_k"])
def test_baselines_keep_exactly_the_given_counts(runner: InferenceEngine, masked: Outputs, kind: str) -> None:
    outputs = runner.run(PARAMS, FEATURES, rule=kind, num_kept=masked.num_kept)
    np.testing.assert_array_equal(outputs.num_kept, masked.num_kept)
    first, second = kept_masks(outputs)
    assert first[:, 0].all()
    assert second[:, 0].all()
    assert (second <= first).all()
    # The example's own tokens, and its own draws, in whatever batch.
    assert max(p[-1] - n for p, n in zip(outputs.kept[0], FEATURES.lengths, strict=True)) < 0
    assert_same(outputs, InferenceEngine(MODEL, 7).run(PARAMS, FEATURES, rule=kind, num_kept=masked.num_kept))


def test_first_k(runner: InferenceEngine, masked: Outputs) -> None:
    outputs = runner.run(PARAMS, FEATURES, rule="first_k", num_kept=masked.num_kept)
    np.testing.assert_array_equal(
        kept_masks(outputs), np.arange(MAX_LENGTH) < masked.num_kept.T[..., np.newaxis]
    )


def test_random_draws_follow_the_seed(runner: InferenceEngine, masked: Outputs) -> None:
    one, again, two = (
        runner.run(PARAMS, FEATURES, rule="random", num_kept=masked.num_kept, seed=seed) for seed in (1, 1, 2)
    )
    assert_same(one, again)
    assert (kept_masks(one) != kept_masks(two)).any()
    # Over many draws every position of a text is as likely as any other but the first.
    counts = np.full((NUM, 2), 2)
    draws = [
        runner.run(PARAMS, FEATURES, rule="random", num_kept=counts, seed=seed).kept[1] for seed in range(12)
    ]
    place = [
        (kept[row][1] - 1) / (FEATURES.lengths[row] - 2)
        for kept in draws
        for row in range(NUM)
        if FEATURES.lengths[row] > 9
    ]
    assert np.mean(place) == pytest.approx(0.5, abs=0.06)


# Compilation --------------------------------------------------------------------------------------


def test_compiles_once_for_each_rule_and_width(traces: collections.Counter[int], masked: Outputs) -> None:
    assert len(WIDTHS) == 2
    fresh = InferenceEngine(MODEL, 8)
    for _ in range(2):
        fresh.run(PARAMS, FEATURES, backend="masked")
        fresh.run(PARAMS, make_features(23, seed=5), backend="masked", threshold=0.3)
    assert traces == dict.fromkeys(WIDTHS, 1)
    for seed in (0, 1):
        fresh.run(PARAMS, FEATURES, rule="random", backend="masked", num_kept=masked.num_kept, seed=seed)
    assert traces == dict.fromkeys(WIDTHS, 2)


def test_progress_counts_batches_and_examples(runner: InferenceEngine) -> None:
    calls: list[tuple[int, int]] = []
    runner.run(PARAMS, FEATURES, progress=lambda step, examples: calls.append((step, examples)))
    assert calls == [(1, BATCH), (2, NUM - BATCH)]
    assert runner.num_batches(FEATURES) == 2


def test_a_storm_of_compilations_is_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for ever other batch sizes is told why it takes so long, and then left alone."""
    monkeypatch.setattr(engine, "MANY_PROGRAMS", 2)
    programs = CompiledForward(MODEL)
    features = FEATURES.take([0])
    InferenceEngine(MODEL, 1, programs).run(PARAMS, features)
    with pytest.warns(RuntimeWarning, match="2 programs have been compiled .* 1 x 48 .* batch size"):
        InferenceEngine(MODEL, 2, programs).run(PARAMS, features)
    InferenceEngine(MODEL, 3, programs).run(PARAMS, features)
