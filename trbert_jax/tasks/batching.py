"""Batches of a fixed shape out of ragged examples. Pure NumPy; the same arguments, the same batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from trbert_jax.tasks.examples import Examples

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
    features: Examples, batch_size: int, widths: Sequence[int]
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


def pad_batch(features: Examples, indices: np.ndarray, batch_size: int, width: int) -> dict[str, np.ndarray]:
    """Puts examples into arrays of a fixed shape.

    Args:
      features: the set, G rows an example (`Examples.group`).
      indices: int [b], b <= batch_size, positions in the set.
      batch_size: B, examples of the arrays. Those beyond b are fillers: `valid` is False. The only token of
        a row that fills is a [CLS], so that no computation meets a row without tokens.
      width: W, columns of the arrays.

    Returns:
      input_ids int32 [B * G, W] (0 where padded), mask bool [B * G, W] (True = real), valid bool [B],
      index int32 [B] (-1 for fillers), where the set has them labels int32 [B] and token_type_ids int32
      [B * G, W], segment bool [B * G] (False for rows that fill) where examples differ in their number of
      rows, shared bool [B * G, W] where options have a passage in common, and the set's targets.

    Raises:
      ValueError: too many examples, or one that is longer than `width`.
    """
    chosen = np.asarray(indices, np.int64)
    if len(chosen) > batch_size:
        raise ValueError(f"{len(chosen)} examples do not fit into a batch of {batch_size}")
    rows = batch_rows(features, chosen, batch_size)
    there = rows >= 0
    lengths = np.where(there, features.row_lengths[rows], 0)
    if lengths.max(initial=0) > width:
        raise ValueError(f"an example of {lengths.max()} tokens does not fit into a width of {width}")
    columns = np.arange(width)
    mask = columns < lengths[:, None]  # [B * G, W]

    def by_example(values: np.ndarray) -> np.ndarray:
        array = np.full((batch_size, *values.shape[1:]), _FILL.get(values.dtype.kind, 0), values.dtype)
        array[: len(chosen)] = values[chosen]
        return array

    input_ids, token_types = features.padded_rows(rows, width)
    input_ids[~there, 0] = features.first_token
    index = np.full(batch_size, -1, np.int32)
    index[: len(chosen)] = chosen
    batch = {"input_ids": input_ids, "mask": mask, "valid": index >= 0, "index": index}
    if token_types is not None:
        batch["token_type_ids"] = token_types
    if features.has_labels:
        batch["labels"] = np.maximum(by_example(features.labels), 0)
    batch |= {name: by_example(values) for name, values in features.targets.items()}
    for name, values in features.row_targets.items():
        shape = there.reshape(-1, *(1,) * (values.ndim - 1))
        found = np.where(shape, values[rows], _FILL.get(values.dtype.kind, 0)).astype(values.dtype)
        if name == "shared_length":
            batch["shared"] = columns < found[:, None]
        else:
            batch[name] = found
    if features.first_row is not None and "shared" not in batch:
        batch["segment"] = there.copy()
    mask[~there, 0] = True
    return batch


def batch_rows(features: Examples, indices: np.ndarray, batch_size: int) -> np.ndarray:
    """The rows of a set that stand in a batch: int [b] -> int64 [B * G], -1 for those that fill."""
    rows = np.full((batch_size, features.group), -1, np.int64)
    rows[: len(indices)] = features.rows(indices)
    return rows.reshape(-1)


# What stands in arrays of positions where there is none.
_FILL = {"i": -1}
