"""Where aliases stand: exactly there where the official TriviaQA normalization makes them equal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trbert_jax.datasets.aliases import find_aliases, normalize
from trbert_jax.datasets.spans import same_answer
from trbert_jax.datasets.triviaqa import first_words


def found(context: str, *aliases: str) -> list[str]:
    return [context[span.start : span.end] for span in find_aliases(context, aliases)]


@pytest.mark.parametrize(
    ("context", "aliases", "expected"),
    [
        ("In Paris. PARIS, paris!", ("paris",), ["Paris", "PARIS", "paris"]),
        ("Parisian comparisons", ("paris",), []),
        ("the_Beatles; Beatles", ("The Beatles",), ["Beatles", "Beatles"]),
        ("War and the Peace", ("war and peace",), ["War and the Peace"]),
        ("U.S. forces", ("u s",), ["U.S"]),
        ("new\n york city", ("New York", "New York City"), ["new\n york", "new\n york city"]),
        ("東京 and Zürich.", ("zürich", "東京"), ["東京", "Zürich"]),
        ("a the !!! an", ("The", "!!!", ""), []),
        ("“Sunset Blvd.”", ("sunset blvd",), ["Sunset Blvd"]),
        ("AC DC, AC–DC", ("ac–dc",), ["AC–DC"]),
        ("5 or £5", ("£5",), ["£5"]),
        ("cafe\u0301", ("cafe",), []),
        ("na na na", ("na na",), ["na na", "na na"]),
        ("", ("x",), []),
    ],
)
def test_places(context: str, aliases: tuple[str, ...], expected: list[str]) -> None:
    assert found(context, *aliases) == expected


WORDS = st.lists(
    st.sampled_from(["Sun", "set", "The", "a", "SUN", "x.", "-", "_", "sun-set", "’"]), max_size=8
)
TEXTS = st.builds(
    lambda words, space: space.join(words), WORDS, st.sampled_from([" ", "\n", "\u00a0 ", "  "])
)


@pytest.mark.parametrize(
    ("text", "normal"),
    [("The_Cat's  ‘hat’\n", "cat s hat"), ("A.B.", "b"), ("Another an", "another"), ("“The”", "“ ”")],
)
def test_normalization(text: str, normal: str) -> None:
    assert normalize(text) == normal


@given(TEXTS, st.lists(TEXTS, max_size=3))
def test_agrees_with_the_official_normalization(context: str, aliases: list[str]) -> None:
    accepted = set(map(normalize, aliases)) - {""}
    places = found(context, *aliases)
    assert set(map(normalize, places)) <= accepted
    there = {alias for alias in accepted if f" {alias} " in f" {normalize(context)} "}
    assert set(map(normalize, places)) == there


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, ""), (1, " a"), (2, " a\n\u2003b"), (3, " a\n\u2003b c"), (9, " a\n\u2003b c")],
)
def test_first_words(count: int, expected: str) -> None:
    assert first_words(" a\n\u2003b c ", count) == expected


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("The Élysée,", "elysee", True),
        ("1,000 m", "1000m", True),
        ("Cats", "cat", False),
        ("東京", "東", False),
    ],
)
def test_same_answer(one: str, other: str, same: bool) -> None:
    assert same_answer(one, other) is same
