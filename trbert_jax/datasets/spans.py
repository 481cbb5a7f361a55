"""Where an answer stands in its context: from published offsets to spans, checked."""

from __future__ import annotations

import re
import unicodedata

from trbert_jax.datasets.json_values import JsonValue, shorten
from trbert_jax.datasets.records import Span

_ARTICLES = frozenset(("a", "an", "the"))


def span_of_text(context: str, start: int, text: str) -> Span | None:
    """The span of an answer whose text and first character are published, as in SQuAD.

    White space may differ in kind and length: a context loses or gains some when it is copied. The
    span is that of the context, without white space at its ends.

    Returns:
      None if the text does not stand there.
    """
    if context.startswith(text, start):
        return without_outer_space(context, start, start + len(text))
    words = r"\s+".join(map(re.escape, text.split()))
    found = re.compile(rf"\s*{words}").match(context, start)
    return without_outer_space(context, start, found.end()) if found and words else None


def span_of_ends(value: JsonValue, context: str) -> Span:
    """The span of published `[first, last]` characters, the last one included, as in MRQA.

    Raises:
      BadRecord: not two offsets inside the context in order, or nothing but white space there.
    """
    first, last = value.items(2)
    start = first.integer(0, len(context) - 1)
    end = last.integer(start, len(context) - 1) + 1
    span = without_outer_space(context, start, end)
    if span is None:
        raise value.bad("names nothing but white space of the context; expected the answer")
    return span


def without_outer_space(context: str, start: int, end: int) -> Span | None:
    """The span without white space at its ends; None if nothing remains."""
    text = context[start:end]
    left, right = len(text) - len(text.lstrip()), len(text) - len(text.rstrip())
    return Span(start + left, end - right) if left < len(text) else None


def same_answer(one: str, other: str) -> bool:
    """Whether two texts differ at most in case, accents, punctuation, articles and white space."""
    return _essence(one) == _essence(other)


def excerpt(context: str, start: int) -> str:
    """What stands at a character, for messages."""
    return repr(shorten(context[start : start + 60]))


def _essence(text: str) -> str:
    plain = "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))
    return "".join(word for word in re.findall(r"\w+", plain) if word not in _ARTICLES)
