"""A query over several documents with candidate answers: WikiHop."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from trbert_jax.tasks.base import QuestionData, Score, feature_set
from trbert_jax.tasks.candidate_features import CandidateFeatures, build_candidate_features
from trbert_jax.tasks.choice_answers import candidate_answers, choose_candidate
from trbert_jax.tasks.examples import Examples
from trbert_jax.tasks.score_classification import accuracy


class CandidateData(QuestionData):
    """The candidate whose marker has the highest logit, on average over the segments."""

    task = "candidates"
    labels = ()
    request = "candidates"
    metric = "accuracy"
    own_settings = frozenset({"data.skip_bad_records", "model.max_segments"})

    def texts(self, split: str) -> list[str]:
        asked = [" ".join((record.query, *record.candidates)) for record in self.records(split)]
        return asked + [text for record in self.records(split) for text in record.supports]

    @functools.cache  # noqa: B019 - lives as long as the run
    def candidates(self, split: str, tokenizer: Any) -> CandidateFeatures:
        """The segments of a split."""
        model = self.config.model
        return build_candidate_features(
            self.records(split),
            tokenizer,
            model.max_length,
            model.max_segments,
            training=split == "train",
            announce=lambda line: self.announce(f"{split}: {line}"),
        )

    def features(self, split: str, tokenizer: Any, cache_dir: Path) -> Examples:
        found = self.candidates(split, tokenizer)
        self.note_counts(split, found.counts)
        positions = np.repeat(found.candidate_positions, np.diff(found.segment_offsets), axis=0)
        return feature_set(
            found.rows,
            found.ids,
            found.digest,
            found.counts.num_truncated,
            labels=found.labels,
            first_row=found.segment_offsets,
            group=found.max_segments,
            row_targets={"candidates": positions},
        )

    def score(self, split: str, features: Examples, tokenizer: Any, logits: Any) -> Score:
        found = self.candidates(split, tokenizer)
        chosen = choose_candidate(found, np.asarray(logits))
        known = found.labels >= 0
        metrics = {"accuracy": accuracy(chosen[known], found.labels[known])} if known.any() else {}
        return Score(metrics, {"predictions.json": candidate_answers(found, chosen)})
