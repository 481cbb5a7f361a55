from __future__ import annotations

import pytest

from trbert_jax.tasks.score_classification import accuracy


@pytest.mark.parametrize(
    ("predictions", "labels", "expected"),
    [([0, 1, 1, 2], [0, 1, 2, 2], 0.75), ([1], [1], 1.0), ([0, 0], [1, 1], 0.0)],
)
def test_accuracy(predictions: list[int], labels: list[int], expected: float) -> None:
    assert accuracy(predictions, labels) == expected


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [([], [], "no examples"), ([0], [0, 1], "must be"), ([[0]], [[0]], "must be")],
)
def test_impossible_input_is_refused(predictions: list[int], labels: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        accuracy(predictions, labels)
