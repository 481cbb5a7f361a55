"""Metrics of classification, from predicted and true label ids."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def accuracy(predictions: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Share of examples with the right label, 0 to 1.

    Args:
      predictions: int [n], predicted label ids.
      labels: int [n], true label ids.

    Raises:
      ValueError: where the two differ in shape or hold no example.
    """
    predicted, true = _checked(predictions, labels)
    return float(np.mean(predicted == true))


def macro_f1(predictions: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Mean of the classes' F1, 0 to 1, each class counting the same however many examples it has.

    The mean is over the classes that occur as a label or as a prediction. Arguments and errors are
    those of `accuracy`.
    """
    predicted, true = _checked(predictions, labels)
    classes, flat = np.unique(np.concatenate([predicted, true]), return_inverse=True)
    predicted, true = flat[: len(predicted)], flat[len(predicted) :]
    hits = np.bincount(true[predicted == true], minlength=len(classes))
    # F1 = 2 tp / (2 tp + fp + fn), and the denominator is predictions plus labels of the class.
    totals = np.bincount(flat, minlength=len(classes))
    return float(np.mean(2 * hits / totals))


def _checked(predictions: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    predicted, true = np.asarray(predictions), np.asarray(labels)
    if predicted.shape != true.shape or predicted.ndim != 1:
        raise ValueError(
            f"predictions are {list(predicted.shape)}, labels {list(true.shape)}; both must be [n]"
        )
    if not len(true):
        raise ValueError("no examples to measure")
    return predicted, true
