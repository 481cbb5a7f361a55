"""Finds the aliases of an answer in a document, with TriviaQA's idea of what is the same answer."""

from __future__ import annotations

import re
import string
from collections import defaultdict
from collections.abc import Sequence

from trbert_jax.datasets.records import Span

_ARTICLES = frozenset(("a", "an", "the"))
# What the official normalization reads as a space: ASCII punctuation and these four quotes.
_PUNCTUATION = string.punctuation + "‘’´`"
_TO_SPACE = str.maketrans(dict.fromkeys(_PUNCTUATION, " "))
# A run of letters, digits and accents, or any other sign but those and white space.
_WORD = re.compile(rf"(?:[^\W_]|[\u0300-\u036f])+|[^\s{re.escape(_PUNCTUATION)}]")


def normalize(text: str) -> str:
    """The official normalization: lower case, without punctuation and articles, single spaces."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_TO_SPACE)).split())


def find_aliases(context: str, aliases: Sequence[str]) -> tuple[Span, ...]:
    """All places where an alias stands as whole words, in the order of the context.

    Case, punctuation, articles and white space make no difference, as for the official scorer: the
    text at each span is one that it accepts. Places may overlap, `Sunset Boulevard` is part of `West
    Sunset Boulevard`.

    Args:
      context: the document.
      aliases: accepted answers, normalized or not. One that is nothing but punctuation and articles
        is not looked for, it would be found everywhere.
    """
    by_first_word: defaultdict[str, set[tuple[str, ...]]] = defaultdict(set)
    for alias in aliases:
        words = tuple(word for word, _, _ in _words(alias))
        if words:
            by_first_word[words[0]].add(words)
    words_there = _words(context)
    texts = [word for word, _, _ in words_there]
    found = set()
    for i, first in enumerate(texts):
        for words in by_first_word.get(first, ()):
            last = i + len(words) - 1
            if tuple(texts[i : last + 1]) == words:
                found.add((words_there[i][1], words_there[last][2]))
    # The words are a little more than the normalization keeps apart: AC–DC is not AC DC to it.
    accepted = set(map(normalize, aliases))
    return tuple(
        Span(start, end) for start, end in sorted(found) if normalize(context[start:end]) in accepted
    )


def _words(text: str) -> list[tuple[str, int, int]]:
    """Lower-case words without articles, each with its first character and the one after its last."""
    matches = ((match[0].lower(), match.start(), match.end()) for match in _WORD.finditer(text))
    return [word for word in matches if word[0] not in _ARTICLES]
