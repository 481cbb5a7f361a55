import dataclasses

import numpy as np
import pytest
from tiny_qa import span_question

from trbert_jax.datasets.records import Span
from trbert_jax.tasks.examples import (
    Counts,
    Examples,
    Ragged,
    digest_of,
    epoch_order,
    length_batches,
    pad_batch,
    width_buckets,
)

CLS = 101
LENGTHS = np.random.default_rng(1).integers(3, 65, 101).tolist()


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


def test_ragged_arrays() -> None:
    ragged = Ragged.of([np.array([1, 2]), np.array([], int), np.array([3])])
    assert [array.tolist() for array in ragged] == [[1, 2], [], [3]]
    assert [ragged.values.dtype, ragged.offsets.dtype] == [np.dtype(np.int32), np.dtype(np.int64)]
    assert ragged.padded().tolist() == [[1, 2], [-1, -1], [3, -1]]
    assert ragged.padded(1).tolist() == [[1], [-1], [3]]
    joined = Ragged.join([ragged, Ragged.of([]), ragged])
    assert [array.tolist() for array in joined] == [[1, 2], [], [3]] * 2
    pairs = Ragged.of([np.zeros((0, 2)), np.ones((2, 2))], width=2)
    assert pairs.padded(3).tolist() == [[[-1, -1]] * 3, [[1, 1], [1, 1], [-1, -1]]]


def test_rows_of_two_segments() -> None:
    a, b = np.array([1, 2], np.int32), np.array([3], np.int32)
    rows = [((a, b), (b,)), ((b,), ()), ((b,), (a, a))]
    examples = Examples.of_pairs(rows, ["x", "y", "z"], counts=Counts(), digest="")
    assert [examples.row(i).tolist() for i in range(3)] == [[1, 2, 3, 3], [3], [3, 1, 2, 1, 2]]
    assert examples.token_types is not None
    assert examples.token_types.tolist() == [0, 0, 0, 1, 0, 0, 1, 1, 1, 1]
    assert examples.labels.tolist() == [-1, -1, -1]
    assert [examples.tokens.dtype, examples.token_types.dtype] == [np.dtype(np.int32), np.dtype(np.int8)]
    assert len(Examples.of_pairs([], [], counts=Counts(), digest="")) == 0


@pytest.mark.parametrize(
    ("max_length", "widths"),
    [(3, (3,)), (33, (32, 33)), (96, (32, 48, 80, 96)), (512, (64, 128, 256, 384, 512))],
)
def test_width_buckets(max_length: int, widths: tuple[int, ...]) -> None:
    assert width_buckets(max_length) == widths


def test_epoch_order() -> None:
    order = epoch_order(1000, seed=42, epoch=0)
    assert sorted(order.tolist()) == list(range(1000))
    for seed, epoch in ((42, 1), (43, 0), (0, 42)):
        assert order.tolist() != epoch_order(1000, seed, epoch).tolist()
    assert epoch_order(8, 42, 0).tolist() == [3, 4, 2, 7, 6, 1, 5, 0]  # on every machine


@pytest.mark.parametrize("batch_size", [1, 8, 101, 128])
def test_length_batches_cover_all_examples(batch_size: int) -> None:
    examples, widths = make(LENGTHS), (16, 32, 64)
    batches = list(length_batches(examples, batch_size, widths))
    assert sorted(np.concatenate([index for index, _ in batches]).tolist()) == list(range(101))
    assert [len(index) for index, _ in batches[:-1]] == [batch_size] * (len(batches) - 1)
    for index, width in batches:
        longest = examples.lengths[index].max()
        assert width == min(w for w in widths if w >= longest)
    assert [width for _, width in batches] == sorted((width for _, width in batches), reverse=True)


def test_pad_batch() -> None:
    examples = make(LENGTHS, token_types=True)
    index = np.array([7, 3, 99])
    batch = pad_batch(examples, index, 5, 64)
    numbers = ("input_ids", "labels", "index", "token_type_ids")
    assert {name: array.dtype for name, array in batch.items()} == {
        **dict.fromkeys(numbers, np.int32),
        **dict.fromkeys(("mask", "valid"), bool),
    }
    assert batch.keys() - pad_batch(make(LENGTHS), index, 5, 64).keys() == {"token_type_ids"}
    for row, i in enumerate(index):
        tokens = examples.row(i)
        assert batch["input_ids"][row].tolist() == [*tokens, *[0] * (64 - len(tokens))]
        assert batch["mask"][row].tolist() == [k < len(tokens) for k in range(64)]
        assert batch["token_type_ids"][row, : len(tokens)].tolist() == (tokens % 2).tolist()
    assert batch["labels"].tolist() == [*examples.labels[index], 0, 0]
    assert batch["valid"].tolist() == [True] * 3 + [False] * 2
    assert batch["index"].tolist() == [7, 3, 99, -1, -1]
    # A padding row is a single [CLS].
    assert batch["input_ids"][3:].tolist() == [[CLS] + [0] * 63] * 2
    assert batch["mask"][3:].tolist() == [[True] + [False] * 63] * 2
    empty = pad_batch(examples, np.zeros(0, np.int64), 2, 8)
    assert not empty["valid"].any()
    assert empty["mask"].sum() == 2


def test_what_does_not_fit_is_refused() -> None:
    examples = make([4, 20])
    for batch_size, width, match in ((1, 32, "2 examples"), (2, 8, "20 tokens")):
        with pytest.raises(ValueError, match=match):
            pad_batch(examples, np.array([0, 1]), batch_size, width)
    with pytest.raises(ValueError, match="20 tokens"):
        list(length_batches(examples, 2, (8, 16)))


def test_take() -> None:
    examples = make([4, 9, 6], token_types=True)
    some = examples.take([2, 0, 2])
    assert [some.row(i).tolist() for i in range(3)] == [examples.row(i).tolist() for i in (2, 0, 2)]
    assert (some.labels.tolist(), some.ids) == ([2, 0, 2], ["2", "0", "2"])
    assert some.digest not in (examples.digest, examples.take([2, 0]).digest)
    assert some.token_types is not None
    assert some.token_types.tolist() == (some.tokens % 2).tolist()
    assert len(examples.take(np.zeros(0, np.int64))) == 0


def test_counts_in_words() -> None:
    found = [(counts.describe(), counts.is_lossy) for counts in (Counts(3, 5), Counts(3, 5, num_dropped=1))]
    assert found[0] == ("3 questions, 5 inputs", False)
    assert found[1][0].startswith("3 questions, 5 inputs; 1 questions left out")
    assert found[1][1]


def test_digest() -> None:
    question = span_question("a b", "a")
    values = [("ab", "c"), ("a", "bc"), (("ab", "c"),), 1, "1", 1.0, True, None]
    values += [np.array([1], np.int32), np.array([1], np.int64), np.array([[1]], np.int64), question]
    values += [dataclasses.replace(question, spans=(Span(2, 3),)), dataclasses.replace(question, id="r")]
    assert len({digest_of(value) for value in values}) == len(values)
    assert digest_of("ab", "c") != digest_of("a", "bc")
    assert digest_of(question) == digest_of(dataclasses.replace(question, where="elsewhere"))
    assert digest_of([1, "x"]) == digest_of((1, "x"))
    with pytest.raises(TypeError, match="set has no digest"):
        digest_of({1})
    # As in earlier versions; else old checkpoints would not resume.
    assert digest_of("span", span_question("a b", "a"), np.arange(3)).startswith("825cf6718e3af554c56e")
