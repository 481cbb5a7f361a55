"""Questions over long documents in several segments, any of whose answers is right: TriviaQA."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np

from trbert_jax.config import RunConfig
from trbert_jax.datasets.dataset import Announce
from trbert_jax.tasks import score_triviaqa as triviaqa
from trbert_jax.tasks.base import QuestionData, Score, at_tokens, feature_set, padded
from trbert_jax.tasks.examples import Examples
from trbert_jax.tasks.segment_features import TRIVIAQA, SegmentFeatures, build_segment_features
from trbert_jax.tasks.span_answers import best_of_records, decode_segments


class SegmentData(QuestionData):
    """The segments of a question share one softmax; the best answer of all segments wins.

    Of TriviaQA's Wikipedia domain it is the best of all documents of a question, too.
    """

    task = "span"
    labels = ()
    request = "span"
    metric = "f1"
    own_settings = frozenset(
        {"data.skip_bad_records", "model.max_question_length", "model.window_step", "model.max_segments"}
    )

    def __init__(self, config: RunConfig, announce: Announce) -> None:
        super().__init__(config, announce)
        model = config.model
        self.settings = dataclasses.replace(
            TRIVIAQA,
            max_length=model.max_length,
            max_question_length=model.max_question_length or TRIVIAQA.max_question_length,
            step=model.window_step,
            max_windows=model.max_segments,
        )

    def texts(self, split: str) -> list[str]:
        found = [record.question for record in self.records(split)]
        return found + list(dict.fromkeys(record.context for record in self.records(split)))

    @functools.cache  # noqa: B019 - lives as long as the run
    def segments(self, split: str, tokenizer: Any) -> SegmentFeatures:
        """The segments of a split."""
        return build_segment_features(
            self.records(split),
            tokenizer,
            self.settings,
            training=split == "train",
            announce=lambda line: self.announce(f"{split}: {line}"),
        )

    def features(self, split: str, tokenizer: Any, cache_dir: Path) -> Examples:
        found = self.segments(split, tokenizer)
        self.note_counts(split, found.counts)
        inner = found.target_offsets[1:-1]
        ends = {
            "starts": padded(np.split(found.starts, inner)),
            "ends": padded(np.split(found.ends, inner)),
        }
        return feature_set(
            found.windows.rows,
            found.windows.ids,
            found.digest,
            found.counts.num_truncated,
            first_row=found.windows.question_rows,
            group=self.settings.max_windows or 1,
            row_targets=ends,
        )

    def score(self, split: str, features: Examples, tokenizer: Any, logits: Any) -> Score:
        found = self.segments(split, tokenizer)
        records = self.records(split)
        segments = decode_segments(found, *at_tokens(features, np.asarray(logits)))
        answers = best_of_records(segments, {record.id: record.scored_id for record in records})
        gold = {record.scored_id: list(record.answers) for record in records if record.answers}
        metrics = triviaqa.evaluate(gold, answers) if gold else {}
        return Score(metrics, {"predictions.json": answers})
