"""Random batches for the tests of everything that computes on them."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from trbert_jax.model.config import ModelConfig
from trbert_jax.model.model import Batch

STAGES = 2


def random_batch(config: ModelConfig, lengths: Sequence[int], width: int, seed: int = 0) -> Batch:
    """Rows of the given lengths, padded to `width`, with all that any training stage reads.

    A row's contents follow from `seed` and its number alone: the same whatever `width`, and whoever
    its neighbors are.
    """
    rows = [_row(config, length, width, (seed, i)) for i, length in enumerate(lengths)]
    batch = {key: jnp.asarray(np.stack([row[key] for row in rows])) for key in rows[0]}
    return {**batch, "index": jnp.arange(len(rows)), "valid": jnp.ones(len(rows), bool)}


def take(batch: Batch, rows: Sequence[int] | np.ndarray) -> Batch:
    """Some rows of a batch."""
    return {key: value[np.asarray(rows)] for key, value in batch.items()}


def _row(config: ModelConfig, length: int, width: int, seed: tuple[int, int]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    row = {
        "input_ids": rng.integers(1, config.vocab_size, length).astype(np.int32),
        "token_type_ids": rng.integers(0, 2, length).astype(np.int32),
        "mask": np.ones(length, bool),
        "guide": rng.uniform(size=(STAGES, length)).astype(np.float32),
        "rank": rng.uniform(size=(STAGES, length)).astype(np.float32),
    }
    row = {k: np.pad(v, [(0, 0)] * (v.ndim - 1) + [(0, width - length)]) for k, v in row.items()}
    if not config.type_vocab_size:
        row.pop("token_type_ids")
    row["labels"] = np.asarray(rng.integers(0, config.num_labels), np.int32)
    row["teacher_logits"] = rng.normal(size=config.num_labels).astype(np.float32)
    return row
