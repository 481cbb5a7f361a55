"""Metrics of the MRQA 2019 shared task: NewsQA, NaturalQuestions and others in its format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trbert_jax.tasks import score_answers as answers


def evaluate(gold: Mapping[str, Sequence[str]], predictions: Mapping[str, str]) -> dict[str, float]:
    """Exact match and F1 as `mrqa_official_eval.py` computes them.

    Args:
      gold: question id -> accepted answers, the best of which counts.
      predictions: question id -> answer; a missing one scores 0, ids that `gold` lacks do not count.

    Returns:
      `exact_match` and `f1`, 0 to 100.

    Raises:
      ValueError: no question at all, or a predicted one without an accepted answer.
    """
    exact, f1, _ = answers.sums(gold, predictions, answers.normalize)
    return {"exact_match": 100 * exact / len(gold), "f1": 100 * f1 / len(gold)}
