"""Thresholds that run a model at a known speed, stored with it under `trbert.operating_points`.

Source: docs/method.md, "Frontier and operating points".
"""

import dataclasses
import numbers
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trbert_jax.errors import UserError
from trbert_jax.io import read_json, write_json
from trbert_jax.reduction.rules import DEFAULT_RULE, DEFAULT_THRESHOLD, Threshold, point_thresholds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Promise:
    """A bound that a point keeps, shown on texts that had no part in choosing it: `inference.promise`."""

    kind: str  # disagreement: share of answers that differ from the dense model's; drop: of accuracy lost
    most: float  # what it stays below
    confidence: float
    found: float  # on these texts
    data: str  # SHA-256 of the file they are a half of


@dataclasses.dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """Thresholds, and the model's numbers with them on the development data they were chosen on."""

    name: str  # `3x`, a speed-up, or `within_0.5`, percentage points of the metric lost at most
    thresholds: tuple[float, ...]  # keep probability of each point of reduction
    speedup: float  # dense FLOPs over reduced ones
    kept: tuple[float, ...]  # mean tokens of a row after each point of reduction
    metric: str  # name of the metric
    value: float  # of the reduced model
    dense: float  # of the dense model
    examples: int  # of the development data
    promise: Promise | None = None


def _fields(kind: type) -> dict[str, Any]:
    return {x.name: x.type for x in dataclasses.fields(kind) if x.name not in ("name", "promise")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A model's numbers on labeled examples that it was not trained on, stored under `trbert.evaluation`."""

    data: str  # name of the data set, `text` for texts of one's own
    split: str
    examples: int
    metric: str
    dense: float
    reduced: float
    speedup: float  # dense FLOPs over reduced ones

    @classmethod
    def from_dict(cls, section: Any, where: str) -> "Evaluation":
        """Reads a result of `dataclasses.asdict`. Raises `UserError`, which begins with `where`."""
        if not _fit(section, _fields(cls)):
            expected = f"an object with {', '.join(_fields(cls))}"
            raise UserError(f"{where} is {reprlib.repr(section)}; expected {expected}")
        return cls(**section)


_FIELDS, _PROMISE = _fields(OperatingPoint), _fields(Promise)


def to_dict(points: Iterable[OperatingPoint]) -> dict[str, dict[str, Any]]:
    """Returns name -> the other fields, for JSON."""
    return {
        point.name: {name: getattr(point, name) for name in _FIELDS}
        | ({"promise": dataclasses.asdict(point.promise)} if point.promise else {})
        for point in points
    }


def from_dict(section: Any, where: str) -> tuple[OperatingPoint, ...]:
    """Reads a result of `to_dict`. Raises `UserError`, which begins with `where`."""
    given: dict[str, Any] = section if isinstance(section, dict) else {"": None}
    for name, values in given.items():
        promise = values.get("promise") if isinstance(values, dict) else None
        rest = {k: v for k, v in values.items() if k != "promise"} if isinstance(values, dict) else values
        fits = _fit(rest, _FIELDS) and (promise is None or _fit(promise, _PROMISE))
        if not fits:
            expected = f"an object from names to objects with {', '.join(_FIELDS)}"
            raise UserError(f"{where} is {reprlib.repr(section)}; expected {expected}")
        point_thresholds(values["thresholds"], len(values["kept"]), f"{where}.{name}.thresholds")
    points = list[OperatingPoint]()
    for name, values in given.items():
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        if fields.get("promise"):
            fields["promise"] = Promise(**fields["promise"])
        points.append(OperatingPoint(name=name, **fields))
    return tuple(points)


def _fit(values: Any, fields: dict[str, Any]) -> bool:
    if not isinstance(values, dict) or values.keys() != fields.keys():
        return False
    return all(_fits(values[key], kind) for key, kind in fields.items())


def _fits(value: Any, kind: Any) -> bool:
    if kind == tuple[float, ...]:
        return isinstance(value, list) and all(_fits(x, float) for x in value)
    expected = numbers.Real if kind is float else kind
    return isinstance(value, expected) and not isinstance(value, bool)


def find_thresholds(
    points: Iterable[OperatingPoint],
    name: str | None,
    rule: str = DEFAULT_RULE,
    threshold: Threshold = DEFAULT_THRESHOLD,
) -> Threshold:
    """Returns the thresholds of an operating point, or without a name those that are given.

    Raises `UserError` for an unknown name, or a rule or thresholds beside it.
    """
    if name is None:
        return threshold
    found = {point.name: point for point in points}
    if name not in found:
        has = f"the model has {', '.join(found)}" if found else "`trbert calibrate` stores some with a model"
        raise UserError(f"operating point {name!r} is unknown; {has}")
    if rule != DEFAULT_RULE or threshold != DEFAULT_THRESHOLD:
        given = f"rule {rule}" if rule != DEFAULT_RULE else f"threshold {threshold}"
        raise UserError(f"operating point {name!r} has its own thresholds; leave out {given}")
    return found[name].thresholds


def store(model_dir: Path, points: Iterable[OperatingPoint]) -> None:
    """Replaces the operating points of a model folder. Raises `UserError` for one of another origin."""
    path = model_dir / "config.json"
    values = read_json(path)
    if "trbert" not in values:
        advice = "convert it first: trbert convert --input DIR --output DIR"
        raise UserError(f"{path}: has no section trbert, so this project did not write it; {advice}")
    write_json(path, {**values, "trbert": {**values["trbert"], "operating_points": to_dict(points)}})
