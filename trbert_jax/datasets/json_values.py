"""JSON values that know where they stand, so that every mistake can be named with its field."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from trbert_jax.datasets.bad_records import BadRecord, Place

_KINDS = {
    type(None): "null",
    bool: "true or false",
    str: "a text",
    int: "a number",
    float: "a fraction",
    list: "a list",
    dict: "an object",
}
_SHOWN = 60


@dataclasses.dataclass(frozen=True, slots=True)
class JsonValue:
    """A value of a JSON document and its place.

    Attributes:
      data: what `json.loads` made of it.
      place: file and record.
      parent: path of what it is part of, empty for the whole document or line.
      key: its own place in there: field name or index.
    """

    data: object
    place: Place
    parent: JsonValue | None = None
    key: str | int = ""

    @property
    def path(self) -> str:
        """Path of the field, `data[0].paragraphs[2].context`."""
        if self.parent is None:
            return ""
        if isinstance(self.key, int):
            return f"{self.parent.path}[{self.key}]"
        return ".".join(filter(None, (self.parent.path, self.key)))

    @property
    def where(self) -> str:
        """File, line and field."""
        file = dataclasses.replace(self.place, record="")
        return ": ".join(filter(None, (str(file), self.path)))

    def bad(self, reason: str) -> BadRecord:
        """The error to raise about this value."""
        return BadRecord(self.place, self.path, reason)

    def named(self, record: str) -> JsonValue:
        """The same value, called `record` in messages from here on."""
        name = ", ".join(filter(None, (self.place.record, record)))
        return dataclasses.replace(self, place=dataclasses.replace(self.place, record=name))

    def has(self, field: str) -> bool:
        """Whether it is an object with this field."""
        return isinstance(self.data, dict) and field in self.data

    def __getitem__(self, field: str) -> JsonValue:
        """A field of an object. Raises `BadRecord` if it is missing, or this is no object."""
        if not isinstance(self.data, dict):
            raise self.bad(f"is {describe(self.data)}; expected an object with the field {field!r}")
        child = JsonValue(self.data.get(field), self.place, self, field)
        if field not in self.data:
            raise child.bad(f"missing (the fields are: {shorten(', '.join(map(repr, self.data))) or 'none'})")
        return child

    def items(self, count: int | None = None) -> list[JsonValue]:
        """The items of a list. Raises `BadRecord` if it is none, or has not `count` of them."""
        values = self._list()
        if count is not None and len(values) != count:
            raise self.bad(f"has {len(values)} items; expected {count}")
        return [JsonValue(value, self.place, self, i) for i, value in enumerate(values)]

    def text(self, *, may_be_empty: bool = False) -> str:
        """A string, with more than white space unless allowed, and valid Unicode; else `BadRecord`."""
        if not isinstance(self.data, str):
            raise self.bad(f"is {describe(self.data)}; expected a text")
        if not may_be_empty and (not self.data or self.data.isspace()):
            raise self.bad("is empty; expected a text")
        if not self.data.isascii():
            try:
                self.data.encode("utf-8")
            except UnicodeEncodeError as error:
                raise self.bad(
                    f"is not valid Unicode, it has half of a surrogate pair at character {error.start}"
                ) from error
        return self.data

    def texts(self, *, may_be_empty: bool = False) -> tuple[str, ...]:
        """A list of strings, each as `text` wants it."""
        # Long lists of short strings are common (wordpieces); the path is made only for a bad one.
        values = self._list()
        for i, value in enumerate(values):
            if not (isinstance(value, str) and value.isascii() and value.strip()):
                JsonValue(value, self.place, self, i).text(may_be_empty=may_be_empty)
        return tuple(str(value) for value in values)

    def integer(self, low: int = 0, high: int | None = None) -> int:
        """A whole number from `low` to `high`, both included; else `BadRecord`."""
        limits = f"a whole number from {low}" + ("" if high is None else f" to {high}")
        if isinstance(self.data, bool) or not isinstance(self.data, int):
            raise self.bad(f"is {describe(self.data)}; expected {limits}")
        if self.data < low or (high is not None and self.data > high):
            raise self.bad(f"is {self.data}; expected {limits}")
        return self.data

    def flag(self) -> bool:
        """True or false, or the numbers 1 and 0 in their place; else `BadRecord`."""
        if not isinstance(self.data, int) or self.data not in (0, 1):
            raise self.bad(f"is {describe(self.data)}; expected true or false")
        return bool(self.data)

    def _list(self) -> list[object]:
        if not isinstance(self.data, list):
            raise self.bad(f"is {describe(self.data)}; expected a list")
        return self.data


def any_has(values: Iterable[JsonValue], field: str) -> bool:
    """Whether some record has a field. Where none has, the source withholds it, as test sets do."""
    return any(value.has(field) for value in values)


def describe(value: object) -> str:
    """What a value is, for messages: `a number (7)`."""
    kind = _KINDS.get(type(value), f"a {type(value).__name__}")
    return kind if value is None else f"{kind} ({shorten(repr(value))})"


def shorten(text: str) -> str:
    """The beginning of a long text, for messages."""
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 4]} ..."
