"""The official metrics of question answering, and accuracy.

Answers are compared after a normalization that drops case, punctuation and articles: as strings (exact
match) or as bags of words (F1). Sources: `evaluate-v2.0.py` of SQuAD 2.0, `mrqa_official_eval.py` of the MRQA
2019 shared task, `hotpot_evaluate_v1.py` of HotpotQA and `triviaqa_evaluation.py` of TriviaQA. The results
equal theirs to the last bit.
"""

import collections
import re
import string
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from trbert_jax.datasets import triviaqa

_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
_DELETED = dict.fromkeys(map(ord, string.punctuation))
# Answers of HotpotQA that are right only as a whole, never as part of another answer.
_CLOSED = {"yes", "no", "noanswer"}
_HOTPOTQA_NAMES = ("em", "f1", "prec", "recall")


class Overlap(NamedTuple):
    """How far the words of two answers agree, each number 0 to 1."""

    f1: float
    precision: float  # share of the predicted words that the accepted answer has
    recall: float  # share of the accepted answer's words that were predicted

    @classmethod
    def of(cls, precision: float, recall: float) -> "Overlap":
        """Adds the harmonic mean."""
        total = precision + recall
        return cls(2 * precision * recall / total if total > 0 else 0.0, precision, recall)


def normalize(text: str) -> str:
    """Returns lower case without ASCII punctuation and articles, words one space apart.

    For SQuAD, MRQA and HotpotQA. `U.S.A.` becomes `usa`, and `well-known` one word.
    """
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_DELETED)).split())


def _overlap(prediction: str, answer: str) -> Overlap:
    """Compares two normalized answers; a word counts as often as both have it."""
    predicted, accepted = prediction.split(), answer.split()
    common = (collections.Counter(predicted) & collections.Counter(accepted)).total()
    if not common:
        return Overlap(0.0, 0.0, 0.0)
    return Overlap.of(common / len(predicted), common / len(accepted))


def _best_f1(prediction: str, answers: Iterable[str]) -> float:
    return max((_overlap(prediction, answer).f1 for answer in answers), default=0.0)


def _check(gold: Mapping[str, object], **needed: Mapping[str, object]) -> None:
    """Raises `ValueError` if there is no question, or one without an entry in each mapping."""
    if not gold:
        raise ValueError("no questions to measure")
    for name, mapping in needed.items():
        missing = [question for question in gold if question not in mapping]
        if missing:
            raise ValueError(f"no {name} for {len(missing)} of {len(gold)} questions, first {missing[0]!r}")


# Classification and multiple choice ------------------------------------------------------------------


def accuracy(predictions: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Returns the share of predictions, int [n], that equal the labels, 0 to 1.

    Raises `ValueError` for different shapes and for no example.
    """
    predicted, true = np.asarray(predictions), np.asarray(labels)
    if predicted.shape != true.shape or predicted.ndim != 1:
        raise ValueError(f"predictions are {predicted.shape}, labels {true.shape}; both must be [n]")
    if not len(true):
        raise ValueError("no examples to measure")
    return float(np.mean(predicted == true))


def class_scores(
    predictions: npt.ArrayLike, labels: npt.ArrayLike, names: Sequence[str]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Compares predicted classes, int [n], with the labels, int [n].

    Returns:
      `accuracy` and `macro_f1`, 0 to 1, the mean over the classes that are a label or a prediction, as in
      scikit-learn; and `classes`, name -> precision, recall, f1 (0 if undefined) and number of examples, with
      `confusion_matrix`, a list per label of the counts of each prediction.
    """
    predicted, true, size = np.asarray(predictions), np.asarray(labels), len(names)
    metrics = {"accuracy": accuracy(predicted, true)}
    matrix = np.bincount(true * size + predicted, minlength=size * size).reshape(size, size)
    right, of_label, of_prediction = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    columns = {
        "precision": right / np.maximum(of_prediction, 1),
        "recall": right / np.maximum(of_label, 1),
        "f1": 2 * right / np.maximum(of_label + of_prediction, 1),
    }
    metrics["macro_f1"] = float(columns["f1"][of_label + of_prediction > 0].mean())
    classes = {
        name: {**{key: float(x[i]) for key, x in columns.items()}, "examples": int(of_label[i])}
        for i, name in enumerate(names)
    }
    return metrics, {"classes": classes, "confusion_matrix": matrix.tolist()}


# SQuAD -----------------------------------------------------------------------------------------------


def score_squad(
    gold: Mapping[str, Sequence[str]],
    predictions: Mapping[str, str],
    null_odds: Mapping[str, float] | None = None,
    null_threshold: float | None = None,
) -> dict[str, float]:
    """Computes the metrics of `evaluate-v2.0.py`; all questions of SQuAD 1.1 have an answer.

    Args:
      gold: question id -> accepted answers, the best of which counts; empty if the question has none.
      predictions: question id -> answer, "" for none. Ids that `gold` lacks do not count.
      null_odds: question id -> log-odds or probability of no answer. The order decides among equal ones.
        None leaves the `best_` metrics out.
      null_threshold: predictions with null odds above it count as ""; None takes all as they are.

    Returns:
      `exact` and `f1`, 0 to 100, and `total`, the number of questions; the same with the prefixes
      `HasAns_` and `NoAns_`, over the questions with and without an answer, if any; with `null_odds` also
      `best_exact` and `best_f1`, and the thresholds that give them, `best_exact_thresh` and
      `best_f1_thresh` (0 if always answering "" is best).

    Raises `ValueError` for no question, one without prediction or null odds, a threshold without null odds.
    """
    _check(gold, predictions=predictions)
    if null_odds is not None:
        _check(gold, null_odds=null_odds)
    elif null_threshold is not None:
        raise ValueError("a threshold needs null odds to compare with")

    scores: dict[str, dict[str, float]] = {"exact": {}, "f1": {}}
    for question, accepted in gold.items():
        scores["exact"][question], scores["f1"][question] = _squad_scores(predictions[question], accepted)
    final = scores
    if null_odds is not None and null_threshold is not None:
        above = {q: float(not gold[q]) for q in gold if null_odds[q] > null_threshold}
        final = {name: raw | above for name, raw in scores.items()}
    metrics = _squad_means(final, gold)
    for prefix, has_answer in (("HasAns_", True), ("NoAns_", False)):
        if questions := [question for question, accepted in gold.items() if bool(accepted) == has_answer]:
            metrics |= {prefix + name: value for name, value in _squad_means(final, questions).items()}
    if null_odds is not None:
        for name, raw in scores.items():
            best, threshold = _best_threshold(gold, predictions, null_odds, raw)
            metrics |= {f"best_{name}": best, f"best_{name}_thresh": threshold}
    return metrics


def _squad_scores(prediction: str, accepted: Sequence[str]) -> tuple[float, float]:
    predicted = normalize(prediction)
    # Answers of punctuation or articles do not count, unless there is no other.
    normalized = [text for text in map(normalize, accepted) if text] or [""]
    exact = float(predicted in normalized)
    # Two empty answers have no word in common, yet agree.
    return exact, max(exact, _best_f1(predicted, normalized))


def _squad_means(scores: Mapping[str, Mapping[str, float]], questions: Collection[str]) -> dict[str, float]:
    n = len(questions)
    means = {name: 100 * sum(values[q] for q in questions) / n for name, values in scores.items()}
    return means | {"total": n}


def _best_threshold(
    gold: Mapping[str, Sequence[str]],
    predictions: Mapping[str, str],
    null_odds: Mapping[str, float],
    scores: Mapping[str, float],
) -> tuple[float, float]:
    """Finds the greatest mean, 0 to 100, of "" above a threshold and the prediction up to it.

    The threshold rises over one question after the other: each loses the score of "" and gains that of
    its prediction. As in the official script, questions of equal odds come one by one, although no
    threshold lies between them, and predictions are not normalized here.
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


NOTHING = -1e9  # a null threshold below all odds: no question has an answer


def best_null_threshold(
    gold: Mapping[str, Sequence[str]], predictions: Mapping[str, str], null_odds: Mapping[str, float]
) -> float:
    """Returns the null threshold with the greatest F1, the least among equals; arguments as above.

    Unlike the `best_f1_thresh` of the official script, it lies between questions of different odds, and if
    no answer at all is best, it gives none.
    """
    gain = collections.defaultdict[float, float](float)  # odds -> F1 that answering gains
    for question, accepted in gold.items():
        gain[null_odds[question]] += _squad_scores(predictions[question], accepted)[1] - (not accepted)
    total = best = 0.0
    threshold = NOTHING
    for odds in sorted(gain):
        total += gain[odds]
        if total > best:
            best, threshold = total, odds
    return threshold


# MRQA and TriviaQA -----------------------------------------------------------------------------------


def score_mrqa(gold: Mapping[str, Sequence[str]], predictions: Mapping[str, str]) -> dict[str, float]:
    """Computes the metrics of `mrqa_official_eval.py`.

    `gold` has the accepted answers of each question id, the best of which counts; a missing prediction
    scores 0, and ids that `gold` lacks do not count. A question without an accepted answer, which the
    official data lack, needs the prediction "". Returns `exact_match` and `f1`, 0 to 100. Raises `ValueError`
    for no question.
    """
    return _means(gold, predictions, normalize)[0]


def score_triviaqa(gold: Mapping[str, Sequence[str]], predictions: Mapping[str, str]) -> dict[str, float]:
    """Computes the metrics of `triviaqa_evaluation.py`; arguments and errors as for `score_mrqa`.

    Returns:
      `exact_match` and `f1`, 0 to 100 over all of `gold`; `common`, the questions with a prediction;
      `denominator` and `gold_len`, all questions; `pred_len`, all predictions.
    """
    means, common = _means(gold, predictions, triviaqa.normalize)
    counts = {"common": common, "denominator": len(gold), "pred_len": len(predictions), "gold_len": len(gold)}
    return means | counts


def _means(
    gold: Mapping[str, Sequence[str]], predictions: Mapping[str, str], normalized: Callable[[str], str]
) -> tuple[dict[str, float], int]:
    """Averages exact match and F1 over all questions, 0 to 100, and counts those with a prediction."""
    _check(gold)
    exact_sum = f1_sum = 0.0
    predicted = [question for question in gold if question in predictions]
    for question in predicted:
        answers = [normalized(answer) for answer in gold[question]]
        prediction = normalized(predictions[question])
        if not answers and not predictions[question]:
            exact_sum, f1_sum = exact_sum + 1, f1_sum + 1
            continue
        exact_sum += float(prediction in answers)
        f1_sum += _best_f1(prediction, answers)
    return {"exact_match": 100 * exact_sum / len(gold), "f1": 100 * f1_sum / len(gold)}, len(predicted)


# HotpotQA --------------------------------------------------------------------------------------------


def score_hotpotqa(
    gold: Mapping[str, Mapping[str, Any]], predictions: Mapping[str, Mapping[str, Any]]
) -> dict[str, float]:
    """Computes the metrics of `hotpot_evaluate_v1.py`, means over all questions.

    A question without a predicted answer may still score for its facts, and the other way round.

    Args:
      gold: question id -> `answer`, text, and `supporting_facts`, pairs of title and sentence number.
      predictions: `answer`, question id -> text, and `sp`, question id -> set of pairs as above. Ids
        that `gold` lacks do not count.

    Returns:
      `em`, `f1`, `prec` and `recall` of the answer; with the prefix `sp_` those of the supporting facts,
      with `joint_` those of both (precision and recall are the products); all 0 to 1.

    Raises `ValueError` for no question, or predictions without `answer` or `sp`.
    """
    _check(gold)
    missing = {"answer", "sp"} - predictions.keys()
    if missing:
        raise ValueError(f"predictions lack {sorted(missing)}")
    totals = {prefix + name: 0.0 for prefix in ("", "sp_", "joint_") for name in _HOTPOTQA_NAMES}
    for question, true in gold.items():
        scores = dict[str, tuple[float, Overlap]]()
        if question in predictions["answer"]:
            scores[""] = _answer_scores(predictions["answer"][question], true["answer"])
        if question in predictions["sp"]:
            scores["sp_"] = _fact_scores(predictions["sp"][question], true["supporting_facts"])
        if len(scores) == 2:
            (exact, answer), (all_facts, facts) = scores.values()
            both = Overlap.of(answer.precision * facts.precision, answer.recall * facts.recall)
            scores["joint_"] = exact * all_facts, both
        for prefix, (exact, overlap) in scores.items():
            for name, value in zip(_HOTPOTQA_NAMES, (exact, *overlap), strict=True):
                totals[prefix + name] += value
    return {name: total / len(gold) for name, total in totals.items()}


def _answer_scores(prediction: str, answer: str) -> tuple[float, Overlap]:
    predicted, true = normalize(prediction), normalize(answer)
    exact = float(predicted == true)
    if not exact and _CLOSED & {predicted, true}:
        return exact, Overlap(0.0, 0.0, 0.0)
    return exact, _overlap(predicted, true)


def _fact_scores(
    prediction: Iterable[Sequence[Any]], supporting: Iterable[Sequence[Any]]
) -> tuple[float, Overlap]:
    predicted, true = set(map(tuple, prediction)), set(map(tuple, supporting))
    precision, recall = (len(predicted & true) / len(facts) if facts else 0.0 for facts in (predicted, true))
    return float(predicted == true), Overlap.of(precision, recall)
