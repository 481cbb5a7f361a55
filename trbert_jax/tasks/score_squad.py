"""Metrics of SQuAD 2.0, whose questions may have no answer; SQuAD 1.1 is the case where all have one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from trbert_jax.tasks import score_answers as answers


def evaluate(
    gold: Mapping[str, Sequence[str]],
    predictions: Mapping[str, str],
    null_odds: Mapping[str, float] | None = None,
    null_threshold: float | None = None,
) -> dict[str, float]:
    """Exact match and F1 as `evaluate-v2.0.py` computes them.

    Which questions have an answer is what `gold` says, even where it normalizes to nothing; but only
    answers of which something is left are compared with, the empty one where there is none.

    Args:
      gold: question id -> accepted answers, the best of which counts; empty where there is no answer.
      predictions: question id -> answer, "" for none; ids that `gold` lacks do not count.
      null_odds: question id -> the more, the surer the model is that there is no answer: log-odds, or
        a probability. Its order decides among equal ones, as in the official script. None leaves the
        `best_` metrics out.
      null_threshold: predictions with null odds above count as "". None takes all as they are; the
        official script's default, 1.0, is the same for probabilities.

    Returns:
      `exact` and `f1`, 0 to 100, and `total`, the number of questions; the same over the questions with
      an answer, `HasAns_` before the name, and over those without, `NoAns_`, where there are any; with
      `null_odds` also `best_exact` and `best_f1`, the greatest that any threshold gives, and that
      threshold, `best_exact_thresh` and `best_f1_thresh` (0 where always saying "" is best).

    Raises:
      ValueError: no question at all, a question without a prediction or without null odds, or
        a threshold without null odds.
    """
    answers.check_questions(gold)
    _check_covers("predictions", predictions, gold)
    if null_odds is not None:
        _check_covers("null odds", null_odds, gold)
    elif null_threshold is not None:
        raise ValueError("a threshold needs null odds to compare with")

    scores: dict[str, dict[str, float]] = {"exact": {}, "f1": {}}
    for question, accepted in gold.items():
        scores["exact"][question], scores["f1"][question] = _scores(predictions[question], accepted)
    final = scores
    if null_odds is not None and null_threshold is not None:
        final = {
            name: {
                question: float(not gold[question]) if null_odds[question] > null_threshold else score
                for question, score in raw.items()
            }
            for name, raw in scores.items()
        }
    metrics = _means(final, gold)
    answered = [question for question, accepted in gold.items() if accepted]
    unanswerable = [question for question, accepted in gold.items() if not accepted]
    for prefix, questions in (("HasAns_", answered), ("NoAns_", unanswerable)):
        if questions:
            metrics |= {prefix + name: value for name, value in _means(final, questions).items()}
    if null_odds is not None:
        for name, raw in scores.items():
            best, threshold = _best(gold, predictions, null_odds, raw)
            metrics |= {f"best_{name}": best, f"best_{name}_thresh": threshold}
    return metrics


def _scores(prediction: str, accepted: Sequence[str]) -> tuple[float, float]:
    predicted = answers.normalize(prediction)
    normalized = [text for text in map(answers.normalize, accepted) if text] or [""]
    exact = answers.exact_match(predicted, normalized)
    # Two empty answers have no word in common, yet agree.
    return exact, max(exact, answers.f1(predicted, normalized))


def _means(scores: Mapping[str, Mapping[str, float]], questions: Collection[str]) -> dict[str, float]:
    means = {
        name: 100 * sum(values[question] for question in questions) / len(questions)
        for name, values in scores.items()
    }
    return means | {"total": len(questions)}


def _best(
    gold: Mapping[str, Sequence[str]],
    predictions: Mapping[str, str],
    null_odds: Mapping[str, float],
    scores: Mapping[str, float],
) -> tuple[float, float]:
    """The greatest mean, 0 to 100, of "" above a threshold and the prediction up to it.

    From the threshold below which no question lies upwards: each further question gives up what ""
    scores and gets what its prediction does. Questions of equal odds come one by one, as in the
    official script, although no threshold lies between them. Nor does it normalize predictions here.
    """
    score = best = float(sum(not accepted for accepted in gold.values()))
    threshold = 0.0
    for question in sorted((q for q in null_odds if q in scores), key=lambda q: null_odds[q]):
        if gold[question]:
            score += scores[question]
        elif predictions[question]:
            score -= 1
        if score > best:
            best, threshold = score, null_odds[question]
    return 100 * best / len(scores), threshold


def _check_covers(what: str, mapping: Mapping[str, object], gold: Mapping[str, object]) -> None:
    missing = [question for question in gold if question not in mapping]
    if missing:
        raise ValueError(f"no {what} for {len(missing)} of {len(gold)} questions, first {missing[0]!r}")
