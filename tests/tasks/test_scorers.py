"""Properties of the official metrics; tests/test_golden_metrics.py has the official scripts themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from trbert_jax.datasets.triviaqa import normalize as normalize_triviaqa
from trbert_jax.tasks import scorers
from trbert_jax.tasks.scorers import accuracy, score_hotpotqa, score_mrqa, score_squad, score_triviaqa


def test_accuracy() -> None:
    assert accuracy([0, 1, 1, 2], [0, 1, 2, 2]) == 0.75
    for predictions, labels in (([], []), ([0], [0, 1]), ([[0]], [[0]])):
        with pytest.raises(ValueError, match=r"\[n\]|no examples"):
            accuracy(predictions, labels)


@pytest.mark.parametrize(
    ("text", "expected", "triviaqa"),
    [
        ("The Beatles!", "beatles", "beatles"),
        ("U.S.A.", "usa", "u s"),
        ("well-known", "wellknown", "well known"),
        ("an  apple\ta\nday", "apple day", "apple day"),
        ("Theatre, an anthem", "theatre anthem", "theatre anthem"),
        ("‘Heroes’ “x”", "‘heroes’ “x”", "heroes “x”"),  # double typographic quotes stay
        ("a the an", "", ""),
        ("!!!", "", ""),
    ],
)
def test_normalization(text: str, expected: str, triviaqa: str) -> None:
    assert (scorers.normalize(text), normalize_triviaqa(text)) == (expected, triviaqa)
    assert normalize_triviaqa(triviaqa) == triviaqa  # aliases may be normalized already


# SQuAD -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gold", "prediction", "exact", "f1"),
    [
        (["biomolecules"], "The Biomolecules.", 1, 1),
        (["James Dewar"], "chemist James Dewar", 0, 0.8),  # 2 of 3 words, 2 of 2
        (["one two three four", "two"], "one two", 0, 2 / 3),  # the second answer is the closer one
        (["new new"], "new new new", 0, 0.8),  # a word counts as often as both have it
        (["bones"], "", 0, 0),
        (["bones"], "‘bones’", 0, 0),
        # No answer: only what normalizes to nothing is right.
        ([], "", 1, 1),
        ([], "something", 0, 0),
        ([], "the", 1, 1),
        # An answer of punctuation or articles is none to compare with, unless it is the only one.
        (["...", "dots"], "", 0, 0),
        (["...", "dots"], "dots", 1, 1),
        (["The"], "", 1, 1),
    ],
)
def test_one_question_of_squad(gold: Sequence[str], prediction: str, exact: float, f1: float) -> None:
    found = score_squad({"q": gold}, {"q": prediction, "other": "x"})
    prefix = "HasAns_" if gold else "NoAns_"
    own = {"exact": 100 * exact, "f1": pytest.approx(100 * f1), "total": 1}
    assert found == own | {prefix + name: value for name, value in own.items()}


GOLD = {"a": ["one"], "b": ["two three"], "c": [], "d": []}
PREDICTIONS = {"a": "one", "b": "two", "c": "", "d": "four"}
ODDS = {"a": -2.0, "b": 0.5, "c": 3.0, "d": 1.5}


def test_best_thresholds() -> None:
    """Always "" scores 2 of 4. Upwards: a adds 1; b 0 or 2/3; d takes 1 away; c, "" as it is, nothing."""
    found = score_squad(GOLD, PREDICTIONS, ODDS)
    assert (found["best_exact"], found["best_exact_thresh"]) == (75, -2.0)
    assert found["best_f1"] == pytest.approx(100 * (3 + 2 / 3) / 4)
    assert found["best_f1_thresh"] == 0.5
    assert found.items() >= score_squad(GOLD, PREDICTIONS).items()
    assert found == score_squad(GOLD, {**PREDICTIONS, "z": "x"}, {"z": -9.0, **ODDS})
    found = score_squad(GOLD, {"a": "x", "b": "x", "c": "x", "d": ""}, ODDS)
    assert [found[f"best_{name}"] for name in ("exact", "exact_thresh", "f1", "f1_thresh")] == [50, 0, 50, 0]


def test_the_search_has_the_quirks_of_the_official_script() -> None:
    # It takes predictions as written: an article is an answer here, though it normalizes to nothing.
    found = score_squad({"a": [], "b": ["x"]}, {"a": "the", "b": "x"}, {"a": 0.1, "b": 0.2})
    assert (found["exact"], found["best_exact"], found["best_exact_thresh"]) == (100, 50, 0)
    # Equal odds count one by one in their order, although no threshold lies between them.
    gold, predictions = {"a": ["x"], "b": []}, {"a": "x", "b": "y"}
    assert score_squad(gold, predictions, {"a": 0.5, "b": 0.5})["best_exact"] == 100
    assert score_squad(gold, predictions, {"b": 0.5, "a": 0.5})["best_exact"] == 50


def test_threshold() -> None:
    """Above it, and only above, "" is the prediction: d becomes right, b at the threshold stays."""
    found = score_squad(GOLD, PREDICTIONS, ODDS, null_threshold=0.5)
    assert (found["exact"], found["NoAns_exact"], found["HasAns_exact"]) == (75, 100, 50)
    found = score_squad(GOLD, PREDICTIONS, ODDS, null_threshold=-3.0)
    assert (found["exact"], found["f1"], found["NoAns_exact"], found["HasAns_f1"]) == (50, 50, 100, 0)
    # Whether a question has an answer does not depend on the answer's normalized form.
    for odds, exact in ((0.5, 100), (1.5, 0)):
        assert score_squad({"a": ["the"]}, {"a": ""}, {"a": odds}, null_threshold=1.0)["exact"] == exact


def test_incomplete_input_is_refused() -> None:
    with pytest.raises(ValueError, match="no questions"):
        score_squad({}, {"a": "x"})
    with pytest.raises(ValueError, match="'b'"):
        score_squad(GOLD, {"a": "x"})
    with pytest.raises(ValueError, match="'d'"):
        score_squad(GOLD, PREDICTIONS, dict.fromkeys("abc", 0.0))
    with pytest.raises(ValueError, match="threshold"):
        score_squad(GOLD, PREDICTIONS, null_threshold=1.0)
    with pytest.raises(ValueError, match="no questions"):
        score_hotpotqa({}, {"answer": {}, "sp": {}})
    with pytest.raises(ValueError, match="sp"):
        score_hotpotqa({"q": {"answer": "x", "supporting_facts": FACTS}}, {"answer": {"q": "x"}})


# MRQA and TriviaQA -----------------------------------------------------------------------------------


@pytest.mark.parametrize("score", [score_mrqa, score_triviaqa])
def test_means_in_percent(score: Callable[..., dict[str, float]]) -> None:
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
    found = score(gold, predictions)
    assert found["exact_match"] == 20
    assert found["f1"] == pytest.approx(100 * 1.5 / 5)  # 1, and 1/2 for one of two words each way
    found = score({"band": ["!!!"]}, {"band": "The"})
    assert (found["exact_match"], found["f1"]) == (100, 0)  # equal, without a common word
    with pytest.raises(ValueError, match="no questions"):
        score({}, {"a": "x"})
    with pytest.raises(ValueError, match="'b'"):
        score({"a": ["x"], "b": []}, {"a": "x", "b": "x"})


def test_counts_and_punctuation_of_triviaqa() -> None:
    gold, predictions = {"q": ["Lloyd-Webber"]}, {"q": "‘Lloyd Webber’"}
    assert score_mrqa(gold, predictions) == {"exact_match": 0, "f1": 0}
    assert score_triviaqa(gold, predictions)["exact_match"] == 100
    gold = {"q1--a.txt": ["x"], "q1--b.txt": ["x"], "q2": ["y"]}
    assert score_triviaqa(gold, {"q1--a.txt": "x", "q1": "x", "q2": "z", "q3": "y"}) == {
        "exact_match": pytest.approx(100 / 3),
        "f1": pytest.approx(100 / 3),
        "common": 2,
        "denominator": 3,
        "pred_len": 4,
        "gold_len": 3,
    }


# HotpotQA --------------------------------------------------------------------------------------------

FACTS = [["Ed Wood", 0], ["Scott Derrickson", 0]]
NAMES = {f"{prefix}{name}" for prefix in ("", "sp_", "joint_") for name in ("em", "f1", "prec", "recall")}


def hotpot(answer: str, predicted: str, facts: Any = FACTS, predicted_facts: Any = FACTS) -> dict[str, float]:
    gold = {"q": {"answer": answer, "supporting_facts": facts}}
    return score_hotpotqa(gold, {"answer": {"q": predicted}, "sp": {"q": predicted_facts}})


@pytest.mark.parametrize(
    ("answer", "predicted", "em", "f1"),
    [
        ("The Animorphs", "animorphs.", 1, 1),
        ("yes", "Yes.", 1, 1),
        ("yes", "yes it is", 0, 0),  # a third of its words would be right
        ("no", "yes", 0, 0),
        ("no doubt", "no", 0, 0),
        ("noanswer", "noanswer here", 0, 0),
        ("no", "‘no’", 0, 0),  # typographic quotes stay
        ("no doubt", "no way", 0, 1 / 2),  # neither is "no" itself
        ("the", "a", 1, 0),  # equal, without a common word
    ],
)
def test_answers_of_hotpotqa(answer: str, predicted: str, em: float, f1: float) -> None:
    found = hotpot(answer, predicted, predicted_facts=[*reversed(FACTS), FACTS[0]])
    assert [found["em"], found["f1"]] == [em, pytest.approx(f1)]
    # All facts are right, whatever their order: joint is what the answer alone is.
    assert [found["sp_em"], found["joint_em"], found["joint_f1"]] == [1, em, pytest.approx(f1)]


def test_supporting_facts_and_both() -> None:
    # Answer: 2 of 4 words predicted right, 2 of 2 there. Facts: 1 of 3 predicted, 1 of 2 there.
    predicted = [("Ed Wood", 0), ("Ed Wood", 1), ("Ed Wood", 1), ("Tim Burton", 0)]
    found = hotpot("new york", "new york city hall", predicted_facts=predicted)
    expected = {"em": 0, "prec": 1 / 2, "recall": 1, "f1": 2 / 3}
    expected |= {"sp_em": 0, "sp_prec": 1 / 3, "sp_recall": 1 / 2, "sp_f1": 2 / 5}
    expected |= {"joint_em": 0, "joint_prec": 1 / 6, "joint_recall": 1 / 2, "joint_f1": (1 / 6) / (2 / 3)}
    assert found == pytest.approx(expected)
    for facts, others, em in (([], [], 1), (FACTS, [], 0), ([], FACTS, 0), (FACTS, [["Ed Wood", 1]], 0)):
        found = hotpot("x", "x", facts, others)
        for prefix in ("sp_", "joint_"):
            assert [found[prefix + name] for name in ("em", "f1", "prec", "recall")] == [em, 0, 0, 0]


def test_missing_predictions_of_hotpotqa() -> None:
    """An answer without facts counts as an answer, facts without an answer as facts, neither as both."""
    gold = {question: {"answer": "x", "supporting_facts": FACTS} for question in "abcd"}
    predictions: dict[str, dict[str, Any]] = {
        "answer": dict.fromkeys("abz", "x"),
        "sp": dict.fromkeys("bcz", FACTS),
    }
    parts = {name: 1 / 4 if name.startswith("joint_") else 1 / 2 for name in NAMES}
    assert score_hotpotqa(gold, predictions) == parts
