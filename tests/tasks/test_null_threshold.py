"""The threshold of "no answer" that is tuned may lie above the one that answers were given with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from trbert_jax.tasks.span_answers import SpanAnswers, with_null_threshold
from trbert_jax.tasks.spans import SpanData

# The first two have an answer, of which the model is less sure than of having none.
ODDS = {"a": 0.4, "b": 0.7, "c": 2.0, "d": 3.0}
GOLD = {"a": ["one"], "b": ["two"], "c": [], "d": []}


def answers(threshold: float) -> SpanAnswers:
    texts = {"a": "one", "b": "two", "c": "three", "d": "four"}
    n_best: Any = {name: [{"text": ""}, {"text": text}] for name, text in texts.items()}
    return with_null_threshold(SpanAnswers({}, n_best, ODDS), threshold)


def score(monkeypatch: pytest.MonkeyPatch, threshold: float) -> dict[str, float]:
    data: Any = object.__new__(SpanData)
    data.is_squad = data.unanswerable = True
    data.null_threshold = threshold
    records = [
        SimpleNamespace(id=name, answers=accepted, impossible=not accepted) for name, accepted in GOLD.items()
    ]
    monkeypatch.setattr(SpanData, "records", lambda self, split: records)
    monkeypatch.setattr(SpanData, "windows", lambda self, split, tokenizer: None)
    monkeypatch.setattr(SpanData, "answers", lambda self, *inputs: answers(threshold))
    found = data.score("dev", None, None, None)
    assert found.files["predictions.json"] == answers(threshold).answers
    return dict(found.metrics)


def test_a_threshold_above_the_present_one_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = score(monkeypatch, 0.0)
    assert (metrics["f1"], metrics["HasAns_f1"], metrics["NoAns_f1"]) == (50, 0, 100)
    assert (metrics["best_f1"], metrics["best_f1_thresh"]) == (100, 0.7)
    assert object.__new__(SpanData).best_null_threshold(metrics) == 0.7


def test_what_is_best_does_not_depend_on_the_present_one(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = score(monkeypatch, 1.0)
    assert metrics["f1"] == metrics["best_f1"] == 100
    assert metrics["best_f1_thresh"] == 0.7
