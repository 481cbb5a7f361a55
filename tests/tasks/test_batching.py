from __future__ import annotations

import numpy as np
import pytest

from trbert_jax.tasks.batching import epoch_order, length_batches, pad_batch, width_ladder
from trbert_jax.tasks.examples import Examples

CLS = 101


def make(lengths: list[int], token_types: bool = False) -> Examples:
    rng = np.random.default_rng(0)
    rows = [np.concatenate([[CLS], rng.integers(1, 99, n - 1)]).astype(np.int32) for n in lengths]
    tokens = np.concatenate(rows)
    return Examples(
        tokens=tokens,
        offsets=np.cumsum([0, *lengths], dtype=np.int64),
        token_types=(tokens % 2).astype(np.int8) if token_types else None,
        labels=np.arange(len(lengths), dtype=np.int32) % 3,
        ids=[str(i) for i in range(len(lengths))],
        num_truncated=0,
        digest="",
    )


LENGTHS = np.random.default_rng(1).integers(3, 65, 101).tolist()


@pytest.mark.parametrize("max_length", [3, 18, 32, 33, 96, 100, 256, 512, 1000, 1024, 4096])
def test_ladder(max_length: int) -> None:
    widths = width_ladder(max_length)
    assert widths[-1] == max_length
    assert list(widths) == sorted(set(widths))
    assert len(widths) <= 5
    assert all(width % 16 == 0 for width in widths[:-1])


def test_ladder_at_usual_lengths() -> None:
    assert width_ladder(512) == (64, 128, 256, 384, 512)
    assert width_ladder(96) == (32, 48, 80, 96)


def test_epoch_order() -> None:
    order = epoch_order(1000, seed=42, epoch=0)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(1000))
    assert order.tolist() == epoch_order(1000, 42, 0).tolist()
    others = [epoch_order(1000, 42, 1), epoch_order(1000, 43, 0), epoch_order(1000, 0, 42)]
    assert all(order.tolist() != other.tolist() for other in others)
    assert epoch_order(8, 42, 0).tolist() == [3, 4, 2, 7, 6, 1, 5, 0]  # on every machine


@pytest.mark.parametrize("batch_size", [1, 8, 101, 128])
def test_every_example_comes_once_and_fits(batch_size: int) -> None:
    features, widths = make(LENGTHS), (16, 32, 64)
    batches = list(length_batches(features, batch_size, widths))
    assert sorted(np.concatenate([index for index, _ in batches]).tolist()) == list(range(101))
    assert [len(index) for index, _ in batches[:-1]] == [batch_size] * (len(batches) - 1)
    for index, width in batches:
        longest = features.lengths[index].max()
        assert width == min(w for w in widths if w >= longest)
    assert [width for _, width in batches] == sorted((width for _, width in batches), reverse=True)
    again = list(length_batches(features, batch_size, widths))
    assert [index.tolist() for index, _ in again] == [index.tolist() for index, _ in batches]


def test_little_is_padded() -> None:
    features = make(LENGTHS)
    area = sum(8 * width for _, width in length_batches(features, 8, (16, 32, 48, 64)))
    assert area < 1.35 * features.lengths.sum()
    assert features.lengths.sum() * 1.7 < 64 * 101


def test_an_example_that_no_width_holds() -> None:
    with pytest.raises(ValueError, match="an example has 20 tokens"):
        list(length_batches(make([20, 3]), 2, (8, 16)))


@pytest.mark.parametrize("token_types", [False, True])
def test_padded_rows_hold_the_examples(token_types: bool) -> None:
    features = make(LENGTHS, token_types)
    index = np.array([7, 3, 99])
    batch = pad_batch(features, index, 5, 64)
    assert {name: array.dtype for name, array in batch.items() if name != "token_type_ids"} == {
        "input_ids": np.int32,
        "mask": bool,
        "labels": np.int32,
        "valid": bool,
        "index": np.int32,
    }
    assert ("token_type_ids" in batch) == token_types
    for row, i in enumerate(index):
        tokens = features.tokens[features.offsets[i] : features.offsets[i + 1]]
        assert batch["input_ids"][row, batch["mask"][row]].tolist() == tokens.tolist()
        assert batch["mask"][row].tolist() == [k < len(tokens) for k in range(64)]
        assert not batch["input_ids"][row, len(tokens) :].any()
        if token_types:
            assert batch["token_type_ids"][row, : len(tokens)].tolist() == (tokens % 2).tolist()
    assert batch["labels"][:3].tolist() == features.labels[index].tolist()
    assert batch["valid"].tolist() == [True] * 3 + [False] * 2
    assert batch["index"].tolist() == [7, 3, 99, -1, -1]
    # A filler row is a single [CLS].
    assert batch["input_ids"][3:].tolist() == [[CLS] + [0] * 63] * 2
    assert batch["mask"][3:].tolist() == [[True] + [False] * 63] * 2
    assert batch["labels"][3:].tolist() == [0, 0]


def test_a_batch_of_fillers() -> None:
    batch = pad_batch(make([4, 5]), np.zeros(0, np.int64), 2, 8)
    assert not batch["valid"].any()
    assert batch["mask"].sum() == 2


def test_what_does_not_fit() -> None:
    features = make([4, 9])
    with pytest.raises(ValueError, match="2 examples do not fit into a batch of 1"):
        pad_batch(features, np.array([0, 1]), 1, 16)
    with pytest.raises(ValueError, match="an example of 9 tokens does not fit into a width of 8"):
        pad_batch(features, np.array([0, 1]), 2, 8)
