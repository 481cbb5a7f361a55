"""The official metrics of question answering, and accuracy.

Answers are compared after a normalization that drops case, punctuation and articles: as strings (exact
match) or as bags of words (F1). Sources: `evaluate-v2.0.py` of SQuAD 2.0, `mrqa_official_eval.py` of the MRQA
2019 shared task, `hotpot_evaluate_v1.py` of HotpotQA and `triviaqa_evaluation.py` of TriviaQA. The results
equal theirs to the last bit.
"""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
_DELETED = dict.fromkeys(map(ord, string.punctuation))
_SPACED = dict.fromkeys(map(ord, string.punctuation + "‘’´`"), " ")
# Answers of HotpotQA that are right only as a whole, never as part of another answer.
_CLOSED = {"yes", "no", "noanswer"}
_HOTPOTQA_NAMES = ("em", "f1", "prec", "recall")


class Overlap(NamedTuple):
    """How far the words of two answers agree, each number 0 to 1.

    Attributes:
      f1: harmonic mean of the other two.
      precision: share of the predicted words that the accepted answer has too.
      recall: share of the accepted answer's words that were predicted.
    """

    f1: float
    precision: float
    recall: float


def normalize(text: str) -> str:
    """Lower case without ASCII punctuation and articles, words one space apart.

    SQuAD, MRQA, HotpotQA. Punctuation is deleted, so `U.S.A.` becomes `usa` and `well-known` one word;
    that of other scripts, typographic quotes included, stays.
    """
    return _without_articles(text.lower().translate(_DELETED))


def normalize_triviaqa(text: str) -> str:
    """As `normalize`, but punctuation and the quotes ‘ ’ ´ ` become spaces: `U.S.A.` becomes `u s`."""
    return _without_articles(text.lower().translate(_SPACED))


def overlap(prediction: str, answer: str) -> Overlap:
    """How far the words of two normalized answers agree; a word counts as often as both have it.

    Zero where there is no common word, so also where both are empty.
    """
    predicted, accepted = prediction.split(), answer.split()
    common = (collections.Counter(predicted) & collections.Counter(accepted)).total()
    if not common:
        return Overlap(0.0, 0.0, 0.0)
    precision, recall = common / len(predicted), common / len(accepted)
    return Overlap(2 * precision * recall / (precision + recall), precision, recall)


def exact_match(prediction: str, answers: Iterable[str]) -> float:
    """1 where a normalized prediction is one of the normalized answers, else 0."""
    return float(prediction in set(answers))


def f1(prediction: str, answers: Iterable[str]) -> float:
    """The greatest F1, 0 to 1, of a normalized prediction with any of the normalized answers."""
    return max((overlap(prediction, answer).f1 for answer in answers), default=0.0)


def _sums(
    gold: Mapping[str, Sequence[str]],
    predictions: Mapping[str, str],
    normalized: Callable[[str], str],
) -> tuple[float, float, int]:
    """Exact match and F1 summed over the questions with a prediction, and how many these are.

    Args:
      gold: question id -> accepted answers, one at least where there is a prediction.
      predictions: question id -> answer; ids that `gold` lacks do not count.
      normalized: one of the normalizations above.

    Raises:
      ValueError: no question at all, or a predicted one without an accepted answer.
    """
    _check_questions(gold)
    exact_sum = f1_sum = 0.0
    predicted = [question for question in gold if question in predictions]
    for question in predicted:
        answers = [normalized(answer) for answer in gold[question]]
        if not answers:
            raise ValueError(f"question {question!r} has no accepted answer to compare with")
        prediction = normalized(predictions[question])
        exact_sum += exact_match(prediction, answers)
        f1_sum += f1(prediction, answers)
    return exact_sum, f1_sum, len(predicted)


def _check_questions(gold: Mapping[str, object]) -> None:
    """Raises `ValueError` where there is no question to measure."""
    if not gold:
        raise ValueError("no questions to measure")


def _without_articles(text: str) -> str:
    return " ".join(_ARTICLE.sub(" ", text).split())


# Classification and multiple choice ------------------------------------------------------------------


def accuracy(predictions: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Share of examples with the right label, 0 to 1.

    Args:
      predictions: int [n], predicted label ids.
      labels: int [n], true label ids.

    Raises:
      ValueError: where the two differ in shape or hold no example.
    """
    predicted, true = np.asarray(predictions), np.asarray(labels)
    if predicted.shape != true.shape or predicted.ndim != 1:
        raise ValueError(
            f"predictions are {list(predicted.shape)}, labels {list(true.shape)}; both must be [n]"
        )
    if not len(true):
        raise ValueError("no examples to measure")
    return float(np.mean(predicted == true))


# SQuAD -----------------------------------------------------------------------------------------------


def score_squad(
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
    _check_questions(gold)
    _check_covers("predictions", predictions, gold)
    if null_odds is not None:
        _check_covers("null odds", null_odds, gold)
    elif null_threshold is not None:
        raise ValueError("a threshold needs null odds to compare with")

    scores: dict[str, dict[str, float]] = {"exact": {}, "f1": {}}
    for question, accepted in gold.items():
        scores["exact"][question], scores["f1"][question] = _squad_scores(predictions[question], accepted)
    final = scores
    if null_odds is not None and null_threshold is not None:
        final = {
            name: {
                question: float(not gold[question]) if null_odds[question] > null_threshold else score
                for question, score in raw.items()
            }
            for name, raw in scores.items()
        }
    metrics = _squad_means(final, gold)
    answered = [question for question, accepted in gold.items() if accepted]
    unanswerable = [question for question, accepted in gold.items() if not accepted]
    for prefix, questions in (("HasAns_", answered), ("NoAns_", unanswerable)):
        if questions:
            metrics |= {prefix + name: value for name, value in _squad_means(final, questions).items()}
    if null_odds is not None:
        for name, raw in scores.items():
            best, threshold = _best_threshold(gold, predictions, null_odds, raw)
            metrics |= {f"best_{name}": best, f"best_{name}_thresh": threshold}
    return metrics


def _squad_scores(prediction: str, accepted: Sequence[str]) -> tuple[float, float]:
    predicted = normalize(prediction)
    normalized = [text for text in map(normalize, accepted) if text] or [""]
    exact = exact_match(predicted, normalized)
    # Two empty answers have no word in common, yet agree.
    return exact, max(exact, f1(predicted, normalized))


def _squad_means(scores: Mapping[str, Mapping[str, float]], questions: Collection[str]) -> dict[str, float]:
    means = {
        name: 100 * sum(values[question] for question in questions) / len(questions)
        for name, values in scores.items()
    }
    return means | {"total": len(questions)}


def _best_threshold(
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


# MRQA and TriviaQA -----------------------------------------------------------------------------------


def score_mrqa(gold: Mapping[str, Sequence[str]], predictions: Mapping[str, str]) -> dict[str, float]:
    """Exact match and F1 as `mrqa_official_eval.py` computes them.

    Args:
      gold: question id -> accepted answers, the best of which counts.
      predictions: question id -> answer; a missing one scores 0, ids that `gold` lacks do not count.

    Returns:
      `exact_match` and `f1`, 0 to 100.

    Raises:
      ValueError: no question at all, or a predicted one without an accepted answer.
    """
    exact, f1, _ = _sums(gold, predictions, normalize)
    return {"exact_match": 100 * exact / len(gold), "f1": 100 * f1 / len(gold)}


def score_triviaqa(gold: Mapping[str, Sequence[str]], predictions: Mapping[str, str]) -> dict[str, float]:
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
    exact, f1, common = _sums(gold, predictions, normalize_triviaqa)
    return {
        "exact_match": 100 * exact / len(gold),
        "f1": 100 * f1 / len(gold),
        "common": common,
        "denominator": len(gold),
        "pred_len": len(predictions),
        "gold_len": len(gold),
    }


# HotpotQA --------------------------------------------------------------------------------------------


def score_hotpotqa(
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
    _check_questions(gold)
    missing = {"answer", "sp"} - predictions.keys()
    if missing:
        raise ValueError(f"predictions lack {sorted(missing)}")
    totals = {prefix + name: 0.0 for prefix in ("", "sp_", "joint_") for name in _HOTPOTQA_NAMES}
    for question, true in gold.items():
        answer = facts = None
        if question in predictions["answer"]:
            answer = _answer_scores(predictions["answer"][question], true["answer"])
            _add(totals, "", *answer)
        if question in predictions["sp"]:
            facts = _fact_scores(predictions["sp"][question], true["supporting_facts"])
            _add(totals, "sp_", *facts)
        if answer and facts:
            both = _overlap_of(answer[1].precision * facts[1].precision, answer[1].recall * facts[1].recall)
            _add(totals, "joint_", answer[0] * facts[0], both)
    return {name: total / len(gold) for name, total in totals.items()}


def _answer_scores(prediction: str, answer: str) -> tuple[float, Overlap]:
    predicted, true = normalize(prediction), normalize(answer)
    exact = exact_match(predicted, [true])
    if not exact and _CLOSED & {predicted, true}:
        return exact, Overlap(0.0, 0.0, 0.0)
    return exact, overlap(predicted, true)


def _fact_scores(
    prediction: Iterable[Sequence[Any]], supporting: Iterable[Sequence[Any]]
) -> tuple[float, Overlap]:
    predicted, true = set(map(tuple, prediction)), set(map(tuple, supporting))
    hits = len(predicted & true)
    return float(predicted == true), _overlap_of(
        hits / len(predicted) if predicted else 0.0, hits / len(true) if true else 0.0
    )


def _overlap_of(precision: float, recall: float) -> Overlap:
    total = precision + recall
    return Overlap(2 * precision * recall / total if total > 0 else 0.0, precision, recall)


def _add(totals: dict[str, float], prefix: str, exact: float, overlap: Overlap) -> None:
    for name, value in zip(_HOTPOTQA_NAMES, (exact, *overlap), strict=True):
        totals[prefix + name] += value
