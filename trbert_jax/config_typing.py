"""Turns a tree of settings into dataclasses: every key known, every value of its type and range.

A dataclass's annotations are the whole schema: `int`, `float`, `bool`, `str`, `X | None`,
`Literal[...]`, `tuple[X, ...]`, another dataclass, or `Annotated[X, Range(...)]`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

from trbert_jax.config_tree import Node, describe
from trbert_jax.errors import UserError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `minimum` to `maximum`, both included, greater than `above` and less than `below`."""

    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, number: float) -> bool:
        return (
            (self.minimum is None or number >= self.minimum)
            and (self.maximum is None or number <= self.maximum)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        parts = []
        if self.above is not None:
            parts.append(f"above {self.above}")
        if self.below is not None:
            parts.append(f"below {self.below}")
        if self.minimum is not None and self.maximum is not None:
            parts.append(f"from {self.minimum} to {self.maximum}")
        elif self.minimum is not None:
            parts.append(f"of at least {self.minimum}")
        elif self.maximum is not None:
            parts.append(f"of at most {self.maximum}")
        return " and ".join(parts)


def build(cls: type[T], tree: Node) -> T:
    """Builds a `cls` from a tree of settings.

    Raises:
      UserError: a key is unknown or missing, or a value has the wrong type or is out of range; the
        message names the origin, the dotted key, and what was expected.
    """
    built: T = _section(cls, tree, "", cls)
    return built


def dotted_keys(cls: Any, prefix: str = "") -> list[str]:
    """Every key of a configuration class and of the sections below it: `policy.alpha`, ..."""
    keys: list[str] = []
    for name, kind in _hints(cls).items():
        below = dotted_keys(kind, f"{prefix}{name}.") if dataclasses.is_dataclass(kind) else [prefix + name]
        keys.extend(below)
    return keys


def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _section(cls: Any, node: Node, prefix: str, root: Any) -> Any:
    kinds, settings = _hints(cls), {} if node.value is None else node.value
    if not isinstance(settings, dict):
        raise UserError(
            f"{node.origin}: {prefix.rstrip('.')}: expected a section with keys such as "
            f"{', '.join(list(kinds)[:3])}, got {describe(settings)}"
        )
    for name, value in settings.items():
        if name not in kinds:
            raise UserError(
                f"{value.origin}: {prefix}{name}: unknown key{_suggest(list(kinds), name, prefix, root)}"
            )
    values = {}
    for field in dataclasses.fields(cls):
        kind, key, given = kinds[field.name], prefix + field.name, settings.get(field.name)
        if dataclasses.is_dataclass(kind):
            values[field.name] = _section(kind, given or Node(None, node.origin), key + ".", root)
        elif given is not None:
            values[field.name] = _value(kind, given.value, f"{given.origin}: {key}", kind)
        elif field.default is dataclasses.MISSING:
            raise UserError(f"{node.origin}: {key}: missing, expected {_expected(kind)}")
    return cls(**values)


def _suggest(known: Sequence[str], name: str, prefix: str, root: Any) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"; did you mean {prefix}{close[0]}?"
    wanted = name.lower()
    elsewhere = [key for key in dotted_keys(root) if key.rpartition(".")[2] == wanted]
    if elsewhere:
        return f"; did you mean {' or '.join(elsewhere)}?"
    return f"; known here: {', '.join(known)}"


def _value(kind: Any, value: Any, where: str, asked: Any) -> Any:
    """Checks one value; `asked` is the field's whole type, for messages."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        number = _value(arguments[0], value, where, asked)
        if number not in arguments[1]:
            raise UserError(f"{where}: {number} is out of range, expected {_expected(asked)}")
        return number
    if origin in (typing.Union, types.UnionType):
        inner = next(a for a in arguments if a is not type(None))
        return None if value is None else _value(inner, value, where, asked)
    if origin is typing.Literal:
        if value in arguments and isinstance(value, str):
            return value
        close = difflib.get_close_matches(str(value), arguments, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"{where}: expected {_expected(kind)}, got {describe(value)}{hint}")
    if origin is tuple and isinstance(value, list):
        return tuple(_value(arguments[0], item, where, arguments[0]) for item in value)
    if kind is float and type(value) is int:
        value = _as_float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)) or value == "":
        raise UserError(f"{where}: expected {_expected(asked)}, got {describe(value)}{_quote(kind, value)}")
    return value


def _as_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _quote(kind: Any, value: Any) -> str:
    scalar = isinstance(value, (bool, int, float))
    return f'; quote it to have it as text: "{value}"' if kind is str and scalar else ""


def _expected(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return f"{_expected(arguments[0])} {arguments[1]}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if a is type(None) else _expected(a) for a in arguments)
    if origin is typing.Literal:
        return f"one of {', '.join(arguments)}"
    if origin is tuple:
        return f"a list in brackets, each item {_expected(arguments[0])}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
