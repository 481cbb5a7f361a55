"""Batches of a fixed shape out of ragged examples. Pure NumPy; the same arguments, the same batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from trbert_jax.data.features import FeatureSet

_SHARES = (0.125, 0.25, 0.5, 0.75)
_STEP = 16  # widths are multiples of this
_SMALLEST = 32


def width_ladder(max_length: int, shares: Sequence[float] = _SHARES) -> tuple[int, ...]:
    """Padded lengths to choose from, ascending, the last one `max_length`.

    Few, because each one is compiled; at 512: 64, 128, 256, 384, 512.

    Args:
      max_length: the largest.
      shares: what parts of it the others are, about.
    """
    rounded = {-(-int(share * max_length) // _STEP) * _STEP for share in shares}
    return (*sorted(w for w in rounded if _SMALLEST <= w < max_length), max_length)


def epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch visits the examples, int64 [num_examples].

    Args:
      num_examples: how many there are.
      seed: of the run, not negative.
      epoch: 0-based; each has its own order.
    """
    rng = np.random.Generator(np.random.PCG64([seed, epoch]))
    return rng.permutation(num_examples).astype(np.int64, copy=False)


def length_batches(
    features: FeatureSet, batch_size: int, widths: Sequence[int]
) -> Iterator[tuple[np.ndarray, int]]:
    """Divides all examples into batches of like length, so that little is padded.

    The longest come first: a batch that does not fit into memory fails at once.

    Args:
      features: n examples.
      batch_size: rows of a batch; the last one may have fewer.
      widths: padded lengths to choose from, ascending.

    Yields:
      Positions of a batch's examples, int64 [<= batch_size], and the smallest width that holds
      them. Every example comes once.

    Raises:
      ValueError: an example is longer than the largest width.
    """
    lengths = features.lengths
    order = np.argsort(-lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        longest = int(lengths[index[0]])
        width = next((w for w in widths if w >= longest), None)
        if width is None:
            raise ValueError(f"an example has {longest} tokens; the widths are {tuple(widths)}")
        yield index, width


def pad_batch(
    features: FeatureSet, indices: np.ndarray, batch_size: int, width: int
) -> dict[str, np.ndarray]:
    """Puts examples into arrays of a fixed shape.

    Args:
      features: the set.
      indices: int [b], b <= batch_size, positions in the set.
      batch_size: B, rows of the arrays. Rows beyond b are fillers: `valid` is False, their only
        token is a [CLS], so that no computation meets a row without tokens.
      width: W, columns of the arrays.

    Returns:
      input_ids int32 [B, W] (0 where padded), mask bool [B, W] (True = real), labels int32 [B],
      valid bool [B], index int32 [B] (-1 for fillers), and token_type_ids int32 [B, W] where the set
      has token types.

    Raises:
      ValueError: too many examples, or one that is longer than `width`.
    """
    rows = np.asarray(indices, np.int64)
    lengths = features.lengths[rows]
    if len(rows) > batch_size:
        raise ValueError(f"{len(rows)} examples do not fit into a batch of {batch_size}")
    if len(rows) and lengths.max() > width:
        raise ValueError(f"an example of {lengths.max()} tokens does not fit into a width of {width}")
    b = len(rows)
    columns = np.arange(width)
    real = columns < lengths[:, None]  # [b, W]
    source = np.where(real, features.offsets[rows][:, None] + columns, 0)  # [b, W]

    def padded(values: np.ndarray) -> np.ndarray:
        array = np.zeros((batch_size, width), np.int32)
        array[:b] = np.where(real, values[source], 0)
        return array

    input_ids = padded(features.tokens)
    input_ids[b:, 0] = features.tokens[0]  # every example begins with [CLS]
    mask = np.zeros((batch_size, width), bool)
    mask[:b] = real
    mask[b:, 0] = True
    labels = np.zeros(batch_size, np.int32)
    labels[:b] = features.labels[rows]
    index = np.full(batch_size, -1, np.int32)
    index[:b] = rows
    batch = {"input_ids": input_ids, "mask": mask, "labels": labels, "valid": index >= 0, "index": index}
    if features.token_types is not None:
        batch["token_type_ids"] = padded(features.token_types)
    return batch
