from __future__ import annotations

from collections.abc import Callable

import pytest

from trbert_jax.metrics.classification import accuracy, macro_f1


@pytest.mark.parametrize(
    ("predictions", "labels", "expected"),
    [([0, 1, 1, 2], [0, 1, 2, 2], 0.75), ([1], [1], 1.0), ([0, 0], [1, 1], 0.0)],
)
def test_accuracy(predictions: list[int], labels: list[int], expected: float) -> None:
    assert accuracy(predictions, labels) == expected


@pytest.mark.parametrize(
    ("predictions", "labels", "expected"),
    [
        # Class 0: 1 hit of 1 and 1. Class 1: 1 hit of 2 predicted, 1 there: 2/3. Class 2: 1 of 1 and 2: 2/3.
        ([0, 1, 1, 2], [0, 1, 2, 2], (1 + 2 / 3 + 2 / 3) / 3),
        # A rare class that is never found halves the score; accuracy would be 0.9.
        ([0] * 10, [0] * 9 + [7], (18 / 19 + 0) / 2),
        ([3, 3], [3, 3], 1.0),
        # A class that is predicted but never there counts as a failure too.
        ([0, 5], [0, 0], (2 / 3 + 0) / 2),
    ],
)
def test_macro_f1(predictions: list[int], labels: list[int], expected: float) -> None:
    assert macro_f1(predictions, labels) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("metric", [accuracy, macro_f1])
@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [([], [], "no examples"), ([0], [0, 1], "must be"), ([[0]], [[0]], "must be")],
)
def test_impossible_input_is_refused(
    metric: Callable[..., float], predictions: list[int], labels: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        metric(predictions, labels)
