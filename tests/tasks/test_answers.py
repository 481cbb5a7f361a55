from __future__ import annotations

import pytest

from trbert_jax.tasks import score_answers as answers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Beatles!", "beatles"),
        ("U.S.A.", "usa"),
        ("well-known", "wellknown"),
        ("an  apple\ta\nday", "apple day"),
        # Articles are whole words only, and found after punctuation is gone.
        ("Theatre, an anthem", "theatre anthem"),
        ("'The' A.", ""),
        ("a the an", ""),
        ("!?...", ""),
        ("", ""),
        ("the-the", "thethe"),
        # Only ASCII punctuation goes.
        ("‘1984’", "‘1984’"),
        ("«Été», “l’ÎLE”", "«été» “l’île”"),
        # A typographic quote is no letter, so the article before or behind it still is a word.
        ("‘the end’", "‘ end’"),
        ("snow_white", "snowwhite"),
        ("no\N{NO-BREAK SPACE}break", "no break"),
    ],
)
def test_normalize(text: str, expected: str) -> None:
    assert answers.normalize(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("U.S.A.", "u s"),
        ("New_York City", "new york city"),
        ("Andrew Lloyd-Webber", "andrew lloyd webber"),
        ("‘1984’", "1984"),
        ("O´Brien`s ‘the’", "o brien s"),
        ("the-the", ""),
        ("!!!", ""),
        # Double typographic quotes stay, as in the official script.
        ("“Heroes”", "“heroes”"),
    ],
)
def test_normalize_triviaqa(text: str, expected: str) -> None:
    assert answers.normalize_triviaqa(text) == expected
    assert answers.normalize_triviaqa(expected) == expected  # aliases may come normalized


@pytest.mark.parametrize(
    ("prediction", "answer", "precision", "recall"),
    [
        ("queen elizabeth", "queen elizabeth ii", 1.0, 2 / 3),
        # A word counts as often as both have it: 2 of 3 predicted, 2 of 2 there.
        ("new new new", "new new", 2 / 3, 1.0),
        ("one two", "three", 0.0, 0.0),
        ("", "one", 0.0, 0.0),
        ("one", "", 0.0, 0.0),
        ("", "", 0.0, 0.0),
    ],
)
def test_overlap(prediction: str, answer: str, precision: float, recall: float) -> None:
    found = answers.overlap(prediction, answer)
    assert (found.precision, found.recall) == (precision, recall)
    f1 = 2 / (1 / precision + 1 / recall) if precision else 0.0
    assert found.f1 == pytest.approx(f1, rel=1e-12)


def test_the_best_accepted_answer_counts() -> None:
    assert answers.exact_match("two", ["one", "two"]) == 1
    assert answers.exact_match("two", ["one two", "three"]) == 0
    assert answers.f1("one two", ["one two three four", "two"]) == pytest.approx(2 / 3)
    assert answers.f1("one", []) == 0
