"""Turns the labels of files into class names and classes, the same way in every command.

A label is a text, a whole number (also 1.0, as pandas writes integers with gaps), a fraction or a boolean.
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from trbert_jax.datasets.reading import describe, shorten
from trbert_jax.io import check_unicode

_WHOLE = re.compile(r"([-+]?\d+)(\.0+)?", re.ASCII)
_NUMBER = re.compile(r"[-+]?\d+(\.\d+)?", re.ASCII)


def class_name(value: Any) -> str:
    """Returns the name of the class that a label stands for.

    White space around a text does not count; 1, 1.0, "1" and "1.0" are `1`, and true is `True`. Raises
    `ValueError` for an empty label, null, NaN or another kind of value.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)) or value == "":
        raise ValueError("missing; expected a label")
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, bool | int | float):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"is {describe(value)}; expected a text or a number")
    check_unicode(value)
    name = value.strip()
    if not name:
        raise ValueError("is empty; expected a label")
    whole = _WHOLE.fullmatch(name)
    return whole[1] if whole and whole[2] else name


def class_index(value: Any, labels: Sequence[str], first: int = 0) -> int:
    """Returns the class of a label, 0-based: by its name, or by its number if no name is a number.

    `first` is the number of the first class. Raises `ValueError` for a label that is none of the classes.
    """
    if isinstance(value, str) and value in labels:
        return labels.index(value)
    name = class_name(value)
    if name in labels:
        return labels.index(name)
    if name in ("True", "False", "true", "false", "TRUE", "FALSE"):
        same = [i for i, label in enumerate(labels) if label.lower() == name.lower()]
        if len(same) == 1:
            return same[0]
    expected = f"one of {shorten(', '.join(labels))}"
    if not any(map(_WHOLE.fullmatch, labels)):
        last = first + len(labels) - 1
        if _WHOLE.fullmatch(name) and len(name) < 10 and first <= int(name) <= last:
            return int(name) - first
        expected += f", or a whole number from {first} to {last}"
    raise ValueError(f"is {describe(value)}; expected {expected}")


def class_names(values: Iterable[Any]) -> tuple[str, ...]:
    """Returns the names of the classes among labels: by value if all are numbers, else by alphabet."""
    names = sorted({class_name(value) for value in values})
    return tuple(sorted(names, key=float) if all(map(_NUMBER.fullmatch, names)) else names)
