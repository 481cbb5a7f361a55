"""Metrics of HotpotQA: the answer, the supporting facts, and both together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trbert_jax.tasks import score_answers as answers
from trbert_jax.tasks.score_answers import Overlap

# Answers that are a word of their own kind: right only as a whole, no part of another answer.
_CLOSED = {"yes", "no", "noanswer"}
_NAMES = ("em", "f1", "prec", "recall")


def evaluate(
    gold: Mapping[str, Mapping[str, Any]], predictions: Mapping[str, Mapping[str, Any]]
) -> dict[str, float]:
    """Means over all questions as `hotpot_evaluate_v1.py` computes them.

    A question without a prediction scores 0 in what is missing: without an answer it may still score
    for its supporting facts and the other way round, and without one of them 0 for both together.

    Args:
      gold: question id -> `answer`, text, and `supporting_facts`, pairs of title and sentence number.
      predictions: `answer`, question id -> text, and `sp`, question id -> pairs as above; ids that
        `gold` lacks do not count, nor does how often or in what order a pair is named.

    Returns:
      `em`, `f1`, `prec`, `recall` of the answer, with `sp_` before them those of the supporting facts,
      with `joint_` those of both (precision and recall are the products), all 0 to 1.

    Raises:
      ValueError: no question at all, or predictions without `answer` or `sp`.
    """
    answers.check_questions(gold)
    missing = {"answer", "sp"} - predictions.keys()
    if missing:
        raise ValueError(f"predictions lack {sorted(missing)}")
    totals = {prefix + name: 0.0 for prefix in ("", "sp_", "joint_") for name in _NAMES}
    for question, true in gold.items():
        answer = facts = None
        if question in predictions["answer"]:
            answer = _answer_scores(predictions["answer"][question], true["answer"])
            _add(totals, "", *answer)
        if question in predictions["sp"]:
            facts = _fact_scores(predictions["sp"][question], true["supporting_facts"])
            _add(totals, "sp_", *facts)
        if answer and facts:
            both = _overlap(answer[1].precision * facts[1].precision, answer[1].recall * facts[1].recall)
            _add(totals, "joint_", answer[0] * facts[0], both)
    return {name: total / len(gold) for name, total in totals.items()}


def _answer_scores(prediction: str, answer: str) -> tuple[float, Overlap]:
    predicted, true = answers.normalize(prediction), answers.normalize(answer)
    exact = answers.exact_match(predicted, [true])
    if not exact and _CLOSED & {predicted, true}:
        return exact, Overlap(0.0, 0.0, 0.0)
    return exact, answers.overlap(predicted, true)


def _fact_scores(
    prediction: Iterable[Sequence[Any]], supporting: Iterable[Sequence[Any]]
) -> tuple[float, Overlap]:
    predicted, true = set(map(tuple, prediction)), set(map(tuple, supporting))
    hits = len(predicted & true)
    return float(predicted == true), _overlap(
        hits / len(predicted) if predicted else 0.0, hits / len(true) if true else 0.0
    )


def _overlap(precision: float, recall: float) -> Overlap:
    total = precision + recall
    return Overlap(2 * precision * recall / total if total > 0 else 0.0, precision, recall)


def _add(totals: dict[str, float], prefix: str, exact: float, overlap: Overlap) -> None:
    for name, value in zip(_NAMES, (exact, *overlap), strict=True):
        totals[prefix + name] += value
