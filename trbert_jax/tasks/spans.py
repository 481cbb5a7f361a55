"""Answers that are a stretch of a text: SQuAD with unanswerable questions, NewsQA, NaturalQuestions.

A window over the context is an example; the windows of a question are put together when it is answered.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trbert_jax.config import RunConfig
from trbert_jax.datasets import find_dataset
from trbert_jax.datasets.dataset import Announce
from trbert_jax.tasks import score_mrqa as mrqa
from trbert_jax.tasks import score_squad as squad
from trbert_jax.tasks.base import QuestionData, Score, at_tokens, feature_set
from trbert_jax.tasks.examples import Examples
from trbert_jax.tasks.span_answers import SpanAnswers, decode_spans, with_null_threshold
from trbert_jax.tasks.span_features import MRQA, SQUAD, SpanFeatures, build_span_features


class SpanData(QuestionData):
    """SQuAD by its own scorer, the others by that of MRQA."""

    task = "span"
    labels = ()
    request = "span"
    metric = "f1"
    own_settings = frozenset({"data.skip_bad_records", "model.max_question_length", "model.window_step"})

    def __init__(self, config: RunConfig, announce: Announce) -> None:
        super().__init__(config, announce)
        self.is_squad = find_dataset(config.data.name).style == "squad"
        base, model = SQUAD if self.is_squad else MRQA, config.model
        self.settings = dataclasses.replace(
            base,
            max_length=model.max_length,
            max_question_length=model.max_question_length or base.max_question_length,
            step=model.window_step or base.step,
        )

    @functools.cached_property
    def unanswerable(self) -> bool:  # type: ignore[override]
        """As the training questions have it: those of SQuAD 1.1 always have an answer."""
        return self.is_squad and any(record.impossible for record in self.records("train"))

    def texts(self, split: str) -> list[str]:
        found = [record.question for record in self.records(split)]
        return found + list(dict.fromkeys(record.context for record in self.records(split)))

    @functools.cache  # noqa: B019 - lives as long as the run
    def windows(self, split: str, tokenizer: Any) -> SpanFeatures:
        """The windows of a split."""
        training = split == "train"
        return build_span_features(
            self.records(split),
            tokenizer,
            self.settings,
            training=training,
            discard_without_answer=training and not self.is_squad,
            announce=lambda line: self.announce(f"{split}: {line}"),
        )

    def features(self, split: str, tokenizer: Any, cache_dir: Path) -> Examples:
        found = self.windows(split, tokenizer)
        self.note_counts(split, found.counts)
        ids = [found.windows.ids[i] for i in found.windows.question]
        ends = {"starts": found.starts[:, None], "ends": found.ends[:, None]}
        return feature_set(
            found.windows.rows, ids, found.digest, found.counts.num_truncated, row_targets=ends
        )

    def answers(self, windows: SpanFeatures, features: Examples, logits: Any) -> SpanAnswers:
        """Answers to the questions of a split from logits [windows, 2, S]."""
        null_threshold = self.null_threshold if self.unanswerable else None
        return decode_spans(windows.windows, *at_tokens(features, np.asarray(logits)), null_threshold)

    def best_null_threshold(self, metrics: Mapping[str, float]) -> float | None:
        return metrics.get("best_f1_thresh")

    def score(self, split: str, features: Examples, tokenizer: Any, logits: Any) -> Score:
        found = self.answers(self.windows(split, tokenizer), features, logits)
        # Of a question asked of a trained model nobody says what is right.
        gold = {r.id: list(r.answers) for r in self.records(split) if r.answers or r.impossible}
        metrics = {}
        if gold and self.is_squad:
            odds = {question: found.null_odds[question] for question in found.null_odds if question in gold}
            # Which threshold is best shows only where what it would turn into "" is still there.
            texts = with_null_threshold(found, math.inf).answers if odds else found.answers
            metrics = squad.evaluate(gold, texts, odds or None, self.null_threshold if odds else None)
        elif gold:
            metrics = mrqa.evaluate(gold, found.answers)
        files: dict[str, Any] = {"predictions.json": found.answers, "nbest_predictions.json": found.n_best}
        return Score(metrics, {**files, "null_odds.json": found.null_odds} if self.unanswerable else files)
