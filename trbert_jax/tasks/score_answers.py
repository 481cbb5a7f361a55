"""What the official scorers of question answering have in common: how they compare two answers.

Answers are compared after a normalization that drops capitals, punctuation and articles, as the same
string (exact match) or as bags of words (F1). Sources: `evaluate-v2.0.py` of SQuAD 2.0,
`mrqa_official_eval.py` of the MRQA 2019 shared task, `hotpot_evaluate_v1.py` of HotpotQA and
`triviaqa_evaluation.py` of TriviaQA.
"""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
_DELETED = dict.fromkeys(map(ord, string.punctuation))
_SPACED = dict.fromkeys(map(ord, string.punctuation + "‘’´`"), " ")


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


def sums(
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
    check_questions(gold)
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


def check_questions(gold: Mapping[str, object]) -> None:
    """Raises `ValueError` where there is no question to measure."""
    if not gold:
        raise ValueError("no questions to measure")


def _without_articles(text: str) -> str:
    return " ".join(_ARTICLE.sub(" ", text).split())
