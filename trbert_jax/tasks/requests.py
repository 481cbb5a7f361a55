"""Questions that a trained model is asked: JSON objects as records of its data set, without answers.

    span             {"question": "...", "context": "..."}
    multiple choice  {"passage": "...", "question": "...", "options": ["...", "...", "...", "..."]}
    candidates       {"query": "...", "candidates": ["...", ...], "supports": ["...", ...]}
    several hops     {"question": "...", "paragraphs": [{"title": "...", "sentences": ["...", ...]}, ...]}

An `id` is optional, and so is the question of a multiple choice. Supports and sentences may be empty, as
they are in published data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from trbert_jax.datasets.records import (
    CandidateQuestion,
    ChoiceQuestion,
    MultiHopQuestion,
    Paragraph,
    SpanQuestion,
)
from trbert_jax.errors import UserError


def parse_requests(kind: str, requests: Iterable[tuple[str, Any]], ids: set[str]) -> list[Any]:
    """Records of JSON objects.

    Args:
      kind: `span`, `choice`, `candidates` or `multi_hop`.
      requests: what messages call the place of each object, and the object.
      ids: of all questions before these; those of these are added. Without an id of its own a question gets
        its number.

    Raises:
      UserError: a missing field, a wrong type, an empty text, an id that is there twice; names the object.
    """
    records = []
    for where, request in requests:
        if not isinstance(request, Mapping):
            raise UserError(f"{where}: a JSON {type(request).__name__}; expected an object")
        given = request.get("id")  # null is none
        name = str(len(ids) + 1 if given is None else given)
        if name in ids:
            raise UserError(f"{where}: the id {name!r} is there twice; give each question its own, or none")
        ids.add(name)
        records.append(_PARSERS[kind](_Fields(request, where), name, where))
    return records


class _Fields:
    """The fields of a request, checked when they are asked for."""

    def __init__(self, request: Mapping[str, Any], where: str) -> None:
        self._request, self._where = request, where

    def get(self, *names: str) -> Any:
        for name in names:
            if name in self._request:
                return self._request[name]
        there = ", ".join(map(repr, self._request)) or "none"
        raise UserError(f"{self._where}: no field {names[0]!r} (it has: {there})")

    def text(self, *names: str) -> str:
        return _text(self.get(*names), f"{self._where}: {names[0]}")

    def text_or_nothing(self, name: str) -> str:
        return _text(self._request.get(name, ""), f"{self._where}: {name}", may_be_empty=True)

    def texts(self, name: str, exactly: int | None = None, may_be_empty: bool = False) -> tuple[str, ...]:
        values = self.get(name)
        expected = "a list of strings" if exactly is None else f"a list of {exactly} strings"
        if not isinstance(values, list) or not values or exactly not in (None, len(values)):
            raise UserError(f"{self._where}: {name} is not {expected}")
        return tuple(_text(value, f"{self._where}: {name}", may_be_empty) for value in values)


def _text(value: Any, where: str, may_be_empty: bool = False) -> str:
    if not isinstance(value, str) or not (may_be_empty or value.strip()):
        raise UserError(f"{where} is {value!r}; expected a string with something in it")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # half of an escaped pair: JSON allows it, Unicode does not
        raise UserError(f"{where} is not valid Unicode (character {error.start}: {error.reason})") from error
    return value


def _span(fields: _Fields, name: str, where: str) -> SpanQuestion:
    return SpanQuestion(name, fields.text("question"), fields.text("context"), (), (), False, where)


def _choice(fields: _Fields, name: str, where: str) -> ChoiceQuestion:
    article, question = fields.text("passage", "article"), fields.text_or_nothing("question")
    return ChoiceQuestion(name, article, question, fields.texts("options", 4), None, where)


def _candidates(fields: _Fields, name: str, where: str) -> CandidateQuestion:
    candidates, supports = fields.texts("candidates"), fields.texts("supports", may_be_empty=True)
    return CandidateQuestion(name, fields.text("query"), candidates, supports, None, where)


def _multi_hop(fields: _Fields, name: str, where: str) -> MultiHopQuestion:
    paragraphs = fields.get("paragraphs")
    if not isinstance(paragraphs, list) or not paragraphs:
        raise UserError(f"{where}: paragraphs is not a list of objects with title and sentences")
    found = []
    for number, paragraph in enumerate(paragraphs, 1):
        place = f"{where}: paragraph {number}"
        if not isinstance(paragraph, Mapping):
            raise UserError(f"{place} is a JSON {type(paragraph).__name__}; expected an object")
        inner = _Fields(paragraph, place)
        found.append(Paragraph(inner.text("title"), inner.texts("sentences", may_be_empty=True)))
    return MultiHopQuestion(name, fields.text("question"), None, tuple(found), (), where)


_PARSERS: dict[str, Callable[[_Fields, str, str], Any]] = {
    "span": _span,
    "choice": _choice,
    "candidates": _candidates,
    "multi_hop": _multi_hop,
}

# A question of each kind that is as short as one can be.
SHORTEST: dict[str, dict[str, Any]] = {
    "span": {"question": "a", "context": "a"},
    "choice": {"passage": "a", "question": "a", "options": ["a"] * 4},
    "candidates": {"query": "a", "candidates": ["a"], "supports": ["a"]},
    "multi_hop": {"question": "a", "paragraphs": [{"title": "a", "sentences": ["a"]}]},
}
