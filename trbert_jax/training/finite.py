"""Stages that only compute stop at the first value that is not finite, as updates do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from trbert_jax.errors import UserError
from trbert_jax.tasks.batching import batch_rows
from trbert_jax.tasks.examples import Examples


def check_finite(
    stage: str, features: Examples, index: np.ndarray, size: int, found: Mapping[str, Any]
) -> None:
    """Raises a UserError that names the first example of a batch with a value that is not finite.

    Args:
      stage: the stage.
      features: the training examples.
      index: int [b], those of the batch.
      size: b and the fillers.
      found: name -> array, or tree of arrays, [size, ...] or [rows of the batch, ...].
    """
    rows = batch_rows(features, index, size)
    for name, tree in found.items():
        for array in map(np.asarray, jax.tree.leaves(tree)):
            strange = ~np.isfinite(array).reshape(len(array), -1).all(1)
            strange &= rows >= 0 if len(array) == len(rows) else np.arange(size) < len(index)
            if strange.any():
                example = int(index[int(strange.argmax()) * size // len(array)])
                raise UserError(
                    f"{stage}: {name} of example {features.ids[example]} is not finite; the fine-tuned model "
                    "does not compute it: look at finetune/metrics.jsonl, try a smaller "
                    "finetune.learning_rate or model.dtype float32"
                )
