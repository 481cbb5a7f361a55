"""The good records of a source, in order."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from trbert_jax.datasets.bad_records import BadRecords
from trbert_jax.datasets.json_values import JsonValue
from trbert_jax.errors import UserError


class _Identified(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def id(self) -> str: ...
    @property
    def where(self) -> str: ...


Record = TypeVar("Record", bound=_Identified)


class RecordList(Generic[Record]):
    """Collects records; no two of them with the same id.

    Args:
      source: file, folder or name, for messages.
      bad: the policy of the reader.
      repeats: whether a record that comes a second time, word for word, is taken once; by default it
        is a bad record like any other with an id that was there before.
    """

    def __init__(self, source: object, bad: BadRecords, repeats: bool = False) -> None:
        self._source, self._bad, self._repeats = source, bad, repeats
        self._records: dict[str, Record] = {}

    def add(self, record: Record, value: JsonValue) -> None:
        """Adds a record that was read from `value`. Raises `BadRecord` if another one has its id."""
        other = self._records.setdefault(record.id, record)
        if other is not record and not (self._repeats and _same(record, other)):
            raise value.bad(
                f"has the id {record.id!r}, which is also that of {other.where}; expected an id of its own"
            )

    def finish(self, expected: str) -> list[Record]:
        """All records.

        Args:
          expected: describes the format.

        Raises:
          UserError: there is none.
        """
        if not self._records:
            reason = self._bad.summary(0) or f"expected {expected}"
            raise UserError(f"{self._source}: has no usable record; {reason}")
        return list(self._records.values())


def _same(record: Record, other: Record) -> bool:
    return dataclasses.replace(record, where=other.where) == other
