"""How an example of prepared data lies in a record of TensorFlow Datasets: one form for all splits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trbert_jax.tasks.examples import Examples


@dataclasses.dataclass(frozen=True)
class Field:
    """The targets of one name in all splits.

    Attributes:
      shape: of one entry, wide enough for every split.
      dtype: int32 or float32, what records hold.
    """

    shape: tuple[int, ...]
    dtype: Any

    @classmethod
    def of(cls, arrays: Sequence[np.ndarray]) -> Field:
        """Of arrays [n, ...] of one name; raises ValueError where they differ by more than widths."""
        ranks, dtypes = {x.ndim for x in arrays}, {_stored(x.dtype) for x in arrays}
        if len(ranks) > 1 or len(dtypes) > 1:
            raise ValueError(f"targets of ranks {ranks} and types {dtypes}; expected one of each")
        shape = tuple(np.max([x.shape[1:] for x in arrays], axis=0).tolist())
        return cls(shape, dtypes.pop())

    @property
    def filler(self) -> Any:
        """What stands where an entry ends earlier: no position, or nothing to count."""
        return self.dtype(-1 if self.dtype is np.int32 else 0)

    def fitted(self, values: np.ndarray | None, count: int) -> np.ndarray:
        """Entries [count, ...], padded to the common shape; None for a split that has none."""
        array = np.full((count, *self.shape), self.filler, self.dtype)
        if values is not None:
            array[(slice(None), *map(slice, values.shape[1:]))] = values
        return array


@dataclasses.dataclass(frozen=True)
class Schema:
    """What a record holds, the same in every split: the library has one description for all.

    Attributes:
      features: the description, a `tfds.features.FeaturesDict`.
      serializer: writes a record.
      targets: name -> of an example's targets.
      row_targets: name -> of a row's.
      has_token_types: whether any split has token types.
    """

    features: Any
    serializer: Any
    targets: Mapping[str, Field]
    row_targets: Mapping[str, Field]
    has_token_types: bool

    @classmethod
    def of(cls, splits: Sequence[Examples]) -> Schema:
        """The schema of some sets together."""
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core import example_serializer

        def tensor(shape: Sequence[int | None], dtype: Any) -> Any:
            return tfds.features.Tensor(shape=tuple(shape), dtype=dtype)

        targets = _fields([features.targets for features in splits])
        row_targets = _fields([features.row_targets for features in splits])
        has_token_types = any(features.token_types is not None for features in splits)
        fields = {
            "id": tfds.features.Text(),
            "label": tensor((), np.int32),
            "input_ids": tensor((None,), np.int32),
            "row_lengths": tensor((None,), np.int32),
        }
        if has_token_types:
            fields["token_type_ids"] = tensor((None,), np.int32)
        fields |= {f"target_{name}": tensor(field.shape, field.dtype) for name, field in targets.items()}
        fields |= {
            f"row_{name}": tensor((None, *field.shape), field.dtype) for name, field in row_targets.items()
        }
        made = tfds.features.FeaturesDict(fields)
        serializer = example_serializer.ExampleSerializer(made.get_serialized_info())
        return cls(made, serializer, targets, row_targets, has_token_types)

    def record(self, features: Examples, index: int) -> bytes:
        """One example of a set as a record."""
        from tensorflow_datasets.proto import tf_example_pb2

        rows = features.rows(np.array([index]))[0]
        rows = rows[rows >= 0]
        begin, end = features.offsets[rows[0]], features.offsets[rows[-1] + 1]
        example: dict[str, Any] = {
            "id": features.ids[index],
            "label": np.int32(features.labels[index]),
            "input_ids": features.tokens[begin:end].astype(np.int32),
            "row_lengths": features.row_lengths[rows].astype(np.int32),
        }
        if self.has_token_types:
            types = features.token_types
            example["token_type_ids"] = (
                np.zeros(end - begin, np.int32) if types is None else types[begin:end].astype(np.int32)
            )
        for name, field in self.targets.items():
            values = features.targets.get(name)
            example[f"target_{name}"] = field.fitted(None if values is None else values[[index]], 1)[0]
        for name, field in self.row_targets.items():
            values = features.row_targets.get(name)
            example[f"row_{name}"] = field.fitted(None if values is None else values[rows], len(rows))
        content = self.serializer.serialize_example(self.features.encode_example(example))
        # Once more, with the fields in one order: equal examples are to make equal files.
        ordered: bytes = tf_example_pb2.Example.FromString(content).SerializeToString(deterministic=True)
        return ordered


def _fields(splits: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Field]:
    names = dict.fromkeys(name for targets in splits for name in targets)
    return {name: Field.of([targets[name] for targets in splits if name in targets]) for name in names}


def _stored(dtype: Any) -> Any:
    return np.float32 if np.dtype(dtype).kind == "f" else np.int32
