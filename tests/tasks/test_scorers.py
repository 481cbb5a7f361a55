"""Edge cases of the official metrics; tests/test_golden_metrics.py has the official scripts themselves."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from trbert_jax.datasets.triviaqa import normalize as normalize_triviaqa
from trbert_jax.tasks import scorers
from trbert_jax.tasks.scorers import score_hotpotqa, score_mrqa, score_squad, score_triviaqa


def test_accuracy() -> None:
    assert scorers.accuracy([0, 1, 1, 2], [0, 1, 2, 2]) == 0.75
    for predictions, labels in (([], []), ([0], [0, 1]), ([[0]], [[0]])):
        with pytest.raises(ValueError, match=r"\[n\]|no examples"):
            scorers.accuracy(predictions, labels)


def test_scores_of_classes() -> None:
    metrics, details = scorers.class_scores([0, 1, 1, 2, 2], [0, 1, 2, 2, 2], ["a", "b", "c", "d"])
    assert details["confusion_matrix"] == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 2, 0], [0, 0, 0, 0]]
    found = {name: [*row.values()] for name, row in details["classes"].items()}
    third = pytest.approx(2 / 3)
    assert found == {"a": [1, 1, 1, 1], "b": [0.5, 1, third, 1], "c": [1, third, 0.8, 3], "d": [0, 0, 0, 0]}
    # As in scikit-learn, a class that is neither a label nor a prediction does not count.
    assert metrics == {"accuracy": 0.8, "macro_f1": pytest.approx((1 + 2 / 3 + 0.8) / 3)}


@pytest.mark.parametrize(
    ("text", "expected", "triviaqa"),
    [
        ("well-known", "wellknown", "well known"),
        ("an  apple\ta\nday", "apple day", "apple day"),
        ("Theatre, an anthem", "theatre anthem", "theatre anthem"),
        ("‘Heroes’ “x”", "‘heroes’ “x”", "heroes “x”"),  # double typographic quotes stay
        ("a the an !!!", "", ""),
    ],
)
def test_normalization(text: str, expected: str, triviaqa: str) -> None:
    assert (scorers.normalize(text), normalize_triviaqa(text)) == (expected, triviaqa)
    assert normalize_triviaqa(triviaqa) == triviaqa  # aliases may be normalized already


@pytest.mark.parametrize(
    ("gold", "prediction", "exact", "f1"),
    [
        (["bones"], "", 0, 0),
        ([], "something", 0, 0),
        ([], "the", 1, 1),  # no answer: only what normalizes to nothing is right
        # An answer of punctuation or articles is none to compare with if there is another.
        (["...", "dots"], "", 0, 0),
        (["...", "dots"], "dots", 1, 1),
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


def test_threshold_of_squad() -> None:
    """Above it, and only above, "" is the prediction: d becomes right, b at the threshold stays."""
    found = score_squad(GOLD, PREDICTIONS, ODDS, null_threshold=0.5)
    assert (found["exact"], found["NoAns_exact"], found["HasAns_exact"]) == (75, 100, 50)
    # Whether a question has an answer does not depend on the answer's normalized form.
    for odds, exact in ((0.5, 100), (1.5, 0)):
        assert score_squad({"a": ["the"]}, {"a": ""}, {"a": odds}, null_threshold=1.0)["exact"] == exact


def test_best_thresholds_have_the_quirks_of_the_official_script() -> None:
    found = score_squad(GOLD, {"a": "x", "b": "x", "c": "x", "d": ""}, ODDS)  # always "" is best
    assert [found[f"best_{name}"] for name in ("exact", "exact_thresh", "f1", "f1_thresh")] == [50, 0, 50, 0]
    assert scorers.best_null_threshold(GOLD, {**PREDICTIONS, "a": "x", "b": "x"}, ODDS) == scorers.NOTHING
    # The official script puts a threshold between a and d, which have the same odds.
    same = {**ODDS, "d": -2.0}
    assert scorers.best_null_threshold({**GOLD, "b": []}, PREDICTIONS, same) == scorers.NOTHING
    assert scorers.best_null_threshold(GOLD, PREDICTIONS, ODDS) == 0.5
    assert score_squad(GOLD, PREDICTIONS, ODDS) == score_squad(GOLD, PREDICTIONS, {"z": -9.0, **ODDS})
    # It takes predictions as written: an article is an answer here, though it normalizes to nothing.
    found = score_squad({"a": [], "b": ["x"]}, {"a": "the", "b": "x"}, {"a": 0.1, "b": 0.2})
    assert (found["exact"], found["best_exact"], found["best_exact_thresh"]) == (100, 50, 0)
    # Equal odds count one by one in their order, although no threshold lies between them.
    gold, predictions = {"a": ["x"], "b": []}, {"a": "x", "b": "y"}
    assert score_squad(gold, predictions, {"a": 0.5, "b": 0.5})["best_exact"] == 100
    assert score_squad(gold, predictions, {"b": 0.5, "a": 0.5})["best_exact"] == 50


@pytest.mark.parametrize("score", [score_mrqa, score_triviaqa])
def test_means_of_mrqa_and_triviaqa(score: Callable[..., dict[str, float]]) -> None:
    gold = {"band": ["!!!"], "half": ["one two"], "empty": ["four"], "missing": ["five"]}
    found = score(gold, {"band": "The", "half": "two six", "empty": "", "other": "five"})
    # The first is equal without a common word, the second has one of two words each way.
    assert [found["exact_match"], found["f1"]] == [25, pytest.approx(100 * 0.5 / 4)]


FACTS = [["Ed Wood", 0], ["Scott Derrickson", 0]]
NAMES = ("em", "f1", "prec", "recall")


@pytest.mark.parametrize(
    ("answer", "predicted", "em", "f1"),
    [
        ("yes", "yes it is", 0, 0),  # a third of its words would be right
        ("no doubt", "no", 0, 0),
        ("noanswer", "noanswer here", 0, 0),
        ("no doubt", "no way", 0, 1 / 2),  # neither is "no" itself
        ("the", "a", 1, 0),  # equal, without a common word
    ],
)
def test_answers_of_hotpotqa(answer: str, predicted: str, em: float, f1: float) -> None:
    """All facts are right, whatever their order: joint is what the answer alone is."""
    gold = {"q": {"answer": answer, "supporting_facts": FACTS}}
    found = score_hotpotqa(gold, {"answer": {"q": predicted}, "sp": {"q": [*reversed(FACTS), FACTS[0]]}})
    names = ("em", "f1", "sp_em", "joint_em", "joint_f1")
    assert [found[name] for name in names] == [em, pytest.approx(f1), 1, em, pytest.approx(f1)]


def test_facts_of_hotpotqa() -> None:
    for facts, predicted, em in (([], [], 1), (FACTS, [], 0), ([], FACTS, 0), (FACTS, [["Ed Wood", 1]], 0)):
        gold = {"q": {"answer": "x", "supporting_facts": facts}}
        found = score_hotpotqa(gold, {"answer": {"q": "x"}, "sp": {"q": predicted}})
        for prefix in ("sp_", "joint_"):
            assert [found[prefix + name] for name in NAMES] == [em, 0, 0, 0]


def test_missing_predictions_of_hotpotqa() -> None:
    """An answer without facts counts as an answer, facts without an answer as facts, neither as both."""
    gold = {question: {"answer": "x", "supporting_facts": FACTS} for question in "abcd"}
    found = score_hotpotqa(gold, {"answer": dict.fromkeys("abz", "x"), "sp": dict.fromkeys("bcz", FACTS)})
    parts = {"": 1 / 2, "sp_": 1 / 2, "joint_": 1 / 4}
    assert found == {prefix + name: value for prefix, value in parts.items() for name in NAMES}


@pytest.mark.parametrize(
    ("score", "arguments", "match"),
    [
        (score_squad, ({}, {"a": "x"}), "no questions"),
        (score_squad, (GOLD, {"a": "x"}), "'b'"),
        (score_squad, (GOLD, PREDICTIONS, dict.fromkeys("abc", 0.0)), "'d'"),
        (score_squad, (GOLD, PREDICTIONS, None, 1.0), "threshold"),
        (score_mrqa, ({}, {"a": "x"}), "no questions"),
        (score_hotpotqa, ({}, {"answer": {}, "sp": {}}), "no questions"),
        (score_hotpotqa, ({"q": {"answer": "x", "supporting_facts": FACTS}}, {"answer": {}}), "sp"),
    ],
)
def test_incomplete_input_is_refused(
    score: Callable[..., Any], arguments: tuple[Any, ...], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        score(*arguments)
