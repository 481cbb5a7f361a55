"""Records that cannot be used: what is wrong with one, and whether reading goes on without it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Protocol

from trbert_jax.errors import UserError

_ADVICE = "correct the record, or leave such records out with --skip-bad-records"
_LISTED = 10


class Identified(Protocol):
    """A record with an id and a place."""

    @property
    def id(self) -> str: ...
    @property
    def where(self) -> str: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where a record stands.

    Attributes:
      file: path, or name of the source.
      line: 1-based, for formats of one record a line.
      record: `question 'id'`; empty until the id is known.
    """

    file: str
    line: int | None = None
    record: str = ""

    def __str__(self) -> str:
        file = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{file}: {self.record}" if self.record else file


class BadRecord(UserError):
    """A record of a readable file that cannot be used.

    Attributes:
      place: file and record.
      field: path of the field, `qas[0].answers`; empty for the record as a whole.
      reason: what is wrong, and what was expected.
    """

    def __init__(self, place: Place, field: str, reason: str) -> None:
        self.place, self.field, self.reason = place, field, reason
        super().__init__(": ".join(filter(None, (str(place), field, reason))))


class UnusableRecords(UserError):
    """Records that were read, and are as they should be, but cannot become inputs of a model.

    Whoever has the policy leaves them out and makes the inputs of the others.

    Attributes:
      found: id -> what is wrong.
    """

    def __init__(self, found: Mapping[str, BadRecord]) -> None:
        self.found = dict(found)
        super().__init__(str(next(iter(self.found.values()))))


def unusable(record: Identified, field: str, reason: str) -> BadRecord:
    """The error about a field of a record that was read."""
    return BadRecord(Place(record.where, record=f"question {record.id!r}"), field, reason)


class BadRecords:
    """What a reader does about bad records: it stops at the first, or leaves them out and lists them.

    Only records are left out. A file that cannot be read (missing, cut short, not UTF-8, not JSON)
    always stops the reader.

    Attributes:
      skip: whether bad records are left out; what `--skip-bad-records` sets.
      skipped: those left out so far. A paragraph or article that is bad is one entry, whatever
        number of questions it has.
    """

    def __init__(self, skip: bool = False) -> None:
        self.skip = skip
        self.skipped: list[BadRecord] = []

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        """The block that reads one record.

        Raises:
          UserError: the record is bad and `skip` is off.
        """
        try:
            yield
        except BadRecord as error:
            if not self.skip:
                raise UserError(f"{error}; {_ADVICE}") from error
            self.skipped.append(error.with_traceback(None))  # which would keep the whole file in memory

    def summary(self, kept: int, start: int = 0) -> str | None:
        """What was left out, in a line; None where nothing was.

        Args:
          kept: number of records that were read.
          start: position in `skipped` of the first entry that counts, where several files are read
            with one policy.
        """
        skipped = self.skipped[start:]
        if not skipped:
            return None
        listed = "; ".join(map(str, skipped[:_LISTED]))
        more = f"; and {len(skipped) - _LISTED} more" if len(skipped) > _LISTED else ""
        return f"{len(skipped)} of {kept + len(skipped)} records skipped: {listed}{more}"
