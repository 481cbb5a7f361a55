"""Both scorers do the same with what their normalizations leave."""

from __future__ import annotations

from types import ModuleType

import pytest

from trbert_jax.tasks import score_mrqa as mrqa
from trbert_jax.tasks import score_triviaqa as triviaqa

both = pytest.mark.parametrize("metric", [mrqa, triviaqa])


@both
def test_means_in_percent(metric: ModuleType) -> None:
    gold = {
        "exact": ["Dewar", "James Dewar"],
        "half": ["one two"],
        "wrong": ["three"],
        "empty": ["four"],
        "missing": ["five"],
    }
    predictions = {
        "exact": "the james dewar.",
        "half": "two six",
        "wrong": "four",
        "empty": "",
        "other": "five",
    }
    found = metric.evaluate(gold, predictions)
    assert found["exact_match"] == 20
    # 1 and 1/2 (one of two words each way) of 5.
    assert found["f1"] == pytest.approx(100 * 1.5 / 5)


@both
def test_what_normalizes_to_nothing_matches_without_a_common_word(metric: ModuleType) -> None:
    found = metric.evaluate({"band": ["!!!"]}, {"band": "The"})
    assert (found["exact_match"], found["f1"]) == (100, 0)


@both
def test_no_prediction_at_all(metric: ModuleType) -> None:
    found = metric.evaluate({"a": ["x"], "b": []}, {})
    assert (found["exact_match"], found["f1"]) == (0, 0)


@both
def test_impossible_input_is_refused(metric: ModuleType) -> None:
    with pytest.raises(ValueError, match="no questions"):
        metric.evaluate({}, {"a": "x"})
    with pytest.raises(ValueError, match="'b' has no accepted answer"):
        metric.evaluate({"a": ["x"], "b": []}, {"a": "x", "b": "x"})


def test_they_differ_in_punctuation() -> None:
    gold, predictions = {"q": ["Lloyd-Webber"]}, {"q": "‘Lloyd Webber’"}
    assert mrqa.evaluate(gold, predictions) == {"exact_match": 0, "f1": 0}
    assert triviaqa.evaluate(gold, predictions)["exact_match"] == 100


def test_counts_of_triviaqa() -> None:
    gold = {"q1--a.txt": ["x"], "q1--b.txt": ["x"], "q2": ["y"]}
    found = triviaqa.evaluate(gold, {"q1--a.txt": "x", "q1": "x", "q2": "z", "q3": "y"})
    assert found == {
        "exact_match": pytest.approx(100 / 3),
        "f1": pytest.approx(100 / 3),
        "common": 2,
        "denominator": 3,
        "pred_len": 4,
        "gold_len": 3,
    }


def test_keys_of_mrqa() -> None:
    assert mrqa.evaluate({"q": ["x"]}, {"q": "x"}) == {"exact_match": 100, "f1": 100}
