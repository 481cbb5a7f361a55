"""The metric of classification, from predicted and true label ids."""

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
    predicted, true = np.asarray(predictions), np.asarray(labels)
    if predicted.shape != true.shape or predicted.ndim != 1:
        raise ValueError(
            f"predictions are {list(predicted.shape)}, labels {list(true.shape)}; both must be [n]"
        )
    if not len(true):
        raise ValueError("no examples to measure")
    return float(np.mean(predicted == true))
