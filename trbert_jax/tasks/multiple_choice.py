"""A question about an article with four options: RACE, in three forms.

pairs         each option with its question is an example of two classes, right or wrong (as published)
independent   each option selects tokens by itself, one softmax over the four
shared        the options select the tokens of article and question together, one softmax over the four
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from trbert_jax.config import RunConfig
from trbert_jax.datasets.dataset import Announce
from trbert_jax.tasks.base import QuestionData, Score, feature_set
from trbert_jax.tasks.choice_answers import choose_by_pairs, choose_option
from trbert_jax.tasks.choice_features import MAX_QUESTION_LENGTH, ChoiceFeatures, build_choice_features
from trbert_jax.tasks.examples import Examples
from trbert_jax.tasks.score_classification import accuracy

LETTERS = ("A", "B", "C", "D")


class ChoiceData(QuestionData):
    """Accuracy over questions, whatever the form."""

    request = "choice"
    metric = "accuracy"
    own_settings = frozenset({"data.skip_bad_records", "data.choices", "model.max_question_length"})

    def __init__(self, config: RunConfig, announce: Announce) -> None:
        super().__init__(config, announce)
        self.form = config.data.choices
        self.task = "classification" if self.form == "pairs" else "multiple_choice"
        self.labels = ("wrong", "right") if self.form == "pairs" else LETTERS

    def texts(self, split: str) -> list[str]:
        records = self.records(split)
        asked = [" ".join((record.question, *record.options)) for record in records]
        return asked + list(dict.fromkeys(record.article for record in records))

    @functools.cache  # noqa: B019 - lives as long as the run
    def choices(self, split: str, tokenizer: Any) -> ChoiceFeatures:
        """The rows of a split."""
        model = self.config.model
        return build_choice_features(
            self.records(split),
            tokenizer,
            model.max_length,
            model.max_question_length or MAX_QUESTION_LENGTH,
            training=split == "train",
            announce=lambda line: self.announce(f"{split}: {line}"),
        )

    def features(self, split: str, tokenizer: Any, cache_dir: Path) -> Examples:
        found = self.choices(split, tokenizer)
        self.note_counts(split, found.counts)
        if self.form == "pairs":
            return found.pairs()
        shared = {"shared_length": np.repeat(found.question_ends, 4)} if self.form == "shared" else {}
        return feature_set(
            found.rows,
            found.ids,
            found.digest,
            found.counts.num_truncated,
            labels=found.labels,
            first_row=np.arange(0, len(found.rows) + 1, 4, dtype=np.int64),
            group=4,
            row_targets=shared,
        )

    def score(self, split: str, features: Examples, tokenizer: Any, logits: Any) -> Score:
        found = self.choices(split, tokenizer)
        choose = choose_by_pairs if self.form == "pairs" else choose_option
        chosen = choose(np.asarray(logits))
        answers = dict(zip(found.ids, (LETTERS[k] for k in chosen), strict=True))
        known = found.labels >= 0
        metrics = {"accuracy": accuracy(chosen[known], found.labels[known])} if known.any() else {}
        return Score(metrics, {"predictions.json": answers})
