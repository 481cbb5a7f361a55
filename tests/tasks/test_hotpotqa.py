from __future__ import annotations

from typing import Any

import pytest

from trbert_jax.tasks.score_hotpotqa import evaluate

FACTS = [["Ed Wood", 0], ["Scott Derrickson", 0]]
ALL = {f"{prefix}{name}" for prefix in ("", "sp_", "joint_") for name in ("em", "f1", "prec", "recall")}


def scores(answer: str, predicted: str, facts: Any = FACTS, predicted_facts: Any = FACTS) -> dict[str, float]:
    gold = {"q": {"answer": answer, "supporting_facts": facts}}
    return evaluate(gold, {"answer": {"q": predicted}, "sp": {"q": predicted_facts}})


def test_everything_right() -> None:
    assert scores("The Animorphs", "animorphs.") == dict.fromkeys(ALL, 1.0)


@pytest.mark.parametrize(
    ("answer", "predicted", "em", "f1"),
    [
        ("yes", "Yes.", 1, 1),
        ("yes", "yes it is", 0, 0),  # a third of its words would be right
        ("no", "yes", 0, 0),
        ("no doubt", "no", 0, 0),
        ("noanswer", "noanswer here", 0, 0),
        ("no", "‘no’", 0, 0),  # typographic quotes stay, and the words differ
        ("no doubt", "no way", 0, 1 / 2),  # neither is "no" itself
        ("one two", "", 0, 0),
        ("the", "a", 1, 0),  # both normalize to nothing: equal, without a common word
    ],
)
def test_answers(answer: str, predicted: str, em: float, f1: float) -> None:
    found = scores(answer, predicted)
    assert [found["em"], found["f1"]] == [em, pytest.approx(f1)]
    # All facts are right: joint is what the answer alone is.
    assert [found[f"joint_{name}"] for name in ("em", "f1")] == [em, pytest.approx(f1)]
    assert found["sp_em"] == 1


def test_supporting_facts_and_both() -> None:
    # Answer: 2 of 4 words predicted right, 2 of 2 there. Facts: 1 of 3 predicted, 1 of 2 there.
    predicted = [("Ed Wood", 0), ("Ed Wood", 1), ("Ed Wood", 1), ("Tim Burton", 0)]
    found = scores("new york", "new york city hall", predicted_facts=predicted)
    assert found == pytest.approx(
        {
            "em": 0,
            "prec": 1 / 2,
            "recall": 1,
            "f1": 2 / 3,
            "sp_em": 0,
            "sp_prec": 1 / 3,
            "sp_recall": 1 / 2,
            "sp_f1": 2 / 5,
            "joint_em": 0,
            "joint_prec": 1 / 6,
            "joint_recall": 1 / 2,
            "joint_f1": 2 * (1 / 12) / (2 / 3),
        }
    )


def test_order_and_repetition_of_facts_do_not_count() -> None:
    found = scores("x", "x", predicted_facts=[*reversed(FACTS), FACTS[0]])
    assert found == dict.fromkeys(ALL, 1.0)


@pytest.mark.parametrize(
    ("facts", "predicted", "em"), [([], [], 1), (FACTS, [], 0), ([], FACTS, 0), (FACTS, [["Ed Wood", 1]], 0)]
)
def test_no_common_fact(facts: Any, predicted: Any, em: float) -> None:
    found = scores("x", "x", facts, predicted)
    assert [found[f"sp_{name}"] for name in ("em", "f1", "prec", "recall")] == [em, 0, 0, 0]
    assert [found[f"joint_{name}"] for name in ("em", "f1", "prec", "recall")] == [em, 0, 0, 0]


def test_missing_predictions() -> None:
    """An answer without facts counts as an answer, facts without an answer as facts, neither as both."""
    gold = {question: {"answer": "x", "supporting_facts": FACTS} for question in "abcd"}
    predictions: dict[str, dict[str, Any]] = {
        "answer": dict.fromkeys("abz", "x"),
        "sp": dict.fromkeys("bcz", FACTS),
    }
    found = evaluate(gold, predictions)
    parts = {name: 1 / 4 if name.startswith("joint_") else 1 / 2 for name in ALL}
    assert found == parts


def test_impossible_input_is_refused() -> None:
    with pytest.raises(ValueError, match="no questions"):
        evaluate({}, {"answer": {}, "sp": {}})
    with pytest.raises(ValueError, match="sp"):
        evaluate({"q": {"answer": "x", "supporting_facts": FACTS}}, {"answer": {"q": "x"}})
