from __future__ import annotations

from collections.abc import Sequence

import pytest

from trbert_jax.tasks.score_squad import evaluate


@pytest.mark.parametrize(
    ("gold", "prediction", "exact", "f1"),
    [
        (["biomolecules"], "The Biomolecules.", 1, 1),
        (["Only a few", "a few"], "few", 1, 1),
        (["James Dewar"], "chemist James Dewar", 0, 0.8),  # 2 of 3 words, 2 of 2
        (["one two three four", "two"], "one two", 0, 2 / 3),  # the second answer is the closer one
        (["bones"], "", 0, 0),
        (["bones"], "‘bones’", 0, 0),
        # No answer: only what normalizes to nothing is right.
        ([], "", 1, 1),
        ([], "something", 0, 0),
        ([], "the", 1, 1),
        ([], "?!", 1, 1),
        # An answer of punctuation or articles is none to compare with ...
        (["...", "dots"], "", 0, 0),
        (["...", "dots"], "dots", 1, 1),
        # ... and if it is the only one, the empty prediction is right.
        (["The"], "", 1, 1),
        (["The"], "dots", 0, 0),
    ],
)
def test_one_question(gold: Sequence[str], prediction: str, exact: float, f1: float) -> None:
    found = evaluate({"q": gold}, {"q": prediction, "other": "x"})
    prefix = "HasAns_" if gold else "NoAns_"
    own = {"exact": 100 * exact, "f1": pytest.approx(100 * f1), "total": 1}
    assert found == own | {prefix + name: value for name, value in own.items()}


GOLD = {"a": ["one"], "b": ["two three"], "c": [], "d": []}
PREDICTIONS = {"a": "one", "b": "two", "c": "", "d": "four"}
ODDS = {"a": -2.0, "b": 0.5, "c": 3.0, "d": 1.5}


def test_splits() -> None:
    f1 = 100 * (1 + 2 / 3) / 2  # of a and b
    assert evaluate(GOLD, PREDICTIONS) == {
        "exact": 50,
        "f1": pytest.approx((f1 + 50) / 2),
        "total": 4,
        "HasAns_exact": 50,
        "HasAns_f1": pytest.approx(f1),
        "HasAns_total": 2,
        "NoAns_exact": 50,
        "NoAns_f1": 50,
        "NoAns_total": 2,
    }


def test_best_thresholds() -> None:
    """Always "" scores 2 of 4. Upwards: a adds 1; b 0 or 2/3; d takes 1 away; c, "" as it is, nothing."""
    found = evaluate(GOLD, PREDICTIONS, ODDS)
    assert (found["best_exact"], found["best_exact_thresh"]) == (75, -2.0)
    assert found["best_f1"] == pytest.approx(100 * (3 + 2 / 3) / 4)
    assert found["best_f1_thresh"] == 0.5
    # The others are those of the predictions as they are.
    assert found.items() >= evaluate(GOLD, PREDICTIONS).items()


def test_always_empty_is_best_at_threshold_zero() -> None:
    found = evaluate(GOLD, {"a": "x", "b": "x", "c": "x", "d": ""}, ODDS)
    assert [found[f"best_{name}"] for name in ("exact", "exact_thresh", "f1", "f1_thresh")] == [50, 0, 50, 0]


def test_the_search_takes_predictions_as_written() -> None:
    """An article as the prediction is right for the score, yet an answer for the search."""
    found = evaluate({"a": [], "b": ["x"]}, {"a": "the", "b": "x"}, {"a": 0.1, "b": 0.2})
    assert (found["exact"], found["best_exact"], found["best_exact_thresh"]) == (100, 50, 0)


def test_equal_odds_count_in_their_order() -> None:
    """One by one, although no threshold lies between: what comes first decides."""
    gold, predictions = {"a": ["x"], "b": []}, {"a": "x", "b": "y"}
    assert evaluate(gold, predictions, {"a": 0.5, "b": 0.5})["best_exact"] == 100
    assert evaluate(gold, predictions, {"b": 0.5, "a": 0.5})["best_exact"] == 50


def test_threshold() -> None:
    """Above it, and only above, "" is the prediction: d becomes right, b at the threshold stays."""
    found = evaluate(GOLD, PREDICTIONS, ODDS, null_threshold=0.5)
    assert (found["exact"], found["NoAns_exact"], found["HasAns_exact"]) == (75, 100, 50)
    found = evaluate(GOLD, PREDICTIONS, ODDS, null_threshold=-3.0)
    assert (found["exact"], found["f1"], found["NoAns_exact"], found["HasAns_f1"]) == (50, 50, 100, 0)
    # The best thresholds are searched among the predictions as they are.
    assert (found["best_exact"], found["best_exact_thresh"]) == (75, -2.0)


def test_an_answer_of_nothing_is_still_an_answer_above_the_threshold() -> None:
    """As in the official script: whether there is an answer is not asked of its normalized form."""
    gold, predictions = {"a": ["the"]}, {"a": ""}
    assert evaluate(gold, predictions, {"a": 0.5}, null_threshold=1.0)["exact"] == 100
    assert evaluate(gold, predictions, {"a": 1.5}, null_threshold=1.0)["exact"] == 0


def test_ids_that_gold_lacks_do_not_count() -> None:
    found = evaluate(GOLD, {**PREDICTIONS, "z": "x"}, {"z": -9.0, **ODDS})
    assert found == evaluate(GOLD, PREDICTIONS, ODDS)


def test_impossible_input_is_refused() -> None:
    with pytest.raises(ValueError, match="no questions"):
        evaluate({}, {"a": "x"})
    with pytest.raises(ValueError, match="no predictions for 3 of 4 questions, first 'b'"):
        evaluate(GOLD, {"a": "x"})
    with pytest.raises(ValueError, match="no null odds for 1 of 4 questions, first 'd'"):
        evaluate(GOLD, PREDICTIONS, dict.fromkeys("abc", 0.0))
    with pytest.raises(ValueError, match="threshold"):
        evaluate(GOLD, PREDICTIONS, null_threshold=1.0)
