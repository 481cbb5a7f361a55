"""Metrics of TriviaQA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trbert_jax.tasks import score_answers as answers


def evaluate(gold: Mapping[str, Sequence[str]], predictions: Mapping[str, str]) -> dict[str, float]:
    """Exact match and F1 as `triviaqa_evaluation.py` computes them.

    Ids are compared as they are. In the Web domain a question is asked of every document by itself
    and has an id `question--document` in both arguments; in the Wikipedia domain it has one answer.

    Args:
      gold: question id -> accepted answers, the best of which counts; aliases as written or already
        normalized, which comes to the same.
      predictions: question id -> answer; a missing one scores 0, ids that `gold` lacks do not count.

    Returns:
      `exact_match` and `f1`, 0 to 100 and over all of `gold`; `common`, the questions with a
      prediction; `denominator` and `gold_len`, all questions; `pred_len`, all predictions.

    Raises:
      ValueError: no question at all, or a predicted one without an accepted answer.
    """
    exact, f1, common = answers.sums(gold, predictions, answers.normalize_triviaqa)
    return {
        "exact_match": 100 * exact / len(gold),
        "f1": 100 * f1 / len(gold),
        "common": common,
        "denominator": len(gold),
        "pred_len": len(predictions),
        "gold_len": len(gold),
    }
